"""Writes and reads messages: metadata, plans, pure requests, errors; the same code at both ends.

The server first sends its metadata.  Then every message of the client is a request, and gets one
answer.  A request ``{"plan": {...}}`` is pure: it carries the observation windows, the last plan and
the generators' states, and its answer the plan and the states that the generators have now, so the
server keeps nothing of it, and any server with the same policy answers it alike.  (Requests of the
other kind, which openpi's clients send, are in ``session``.)

A plan travels as its tensors: ``actions``, ``sample``, ``x0_hats``, ``x_T``, ``iterations``, ``nfe``
and, only for a solver that adds noise, ``z`` and ``u``: an ODE solver's are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import InputError, nearest
from ..observation import InvalidObservationError
from ..policy import InvalidPlanError, Policy
from ..types import Committed, Noise, Plan, PolicySpec, Solution
from .messages import MessageError

PROTOCOL = 1
"""Version of the messages; raised when older ends can't read them."""

STATE_BYTES = torch.Generator().get_state().numel()
"""Size of a CPU generator's state."""


class BusyError(InputError):
    """The server's queue is full; the same request may succeed later."""


class ServerError(InputError):
    """The server can't be reached, doesn't fit this client, or failed by its own fault."""


KINDS: dict[str, type[InputError]] = {
    "invalid_observation": InvalidObservationError,
    "invalid_plan": InvalidPlanError,
    "busy": BusyError,
    "message": MessageError,
    "server": ServerError,
    "input": InputError,
}
"""Errors by their names in answers, subclasses first."""


def kind_of(error: Exception) -> str:
    """The error's name in answers; ``server`` for errors that the input didn't cause."""
    return next((kind for kind, cls in KINDS.items() if isinstance(error, cls)), "server")


def error_map(error: Exception) -> dict[str, Any]:
    """The answer to a pure request that failed."""
    return {"error": kind_of(error), "message": line_of(error)}


def line_of(error: Exception) -> str:
    """The error as one line of text."""
    if isinstance(error, InputError):
        return str(error)
    return f"the server failed ({type(error).__name__}): its log says more"


def raise_error(answer: Mapping[str, Any]) -> None:
    """Raises the server's error, if ``answer`` is an ``error_map``."""
    if "error" in answer:
        raise KINDS.get(str(answer["error"]), ServerError)(str(answer.get("message")))


# -------------------------------------------------------------------------------------------- fields


def checked_map(
    value: Any, where: str, required: Collection[str], optional: Collection[str]
) -> dict[str, Any]:
    """Checks that a value is a map with all of ``required``, and further keys only from ``optional``.

    Raises:
        MessageError: it isn't.
    """
    if not isinstance(value, dict):
        raise MessageError(f"{where} must be a map, not {type(value).__name__}")
    for key in value:
        if key not in required and key not in optional:
            raise MessageError(f"{where} has no place for {key!r:.40}{_hint(key, [*required, *optional])}")
    for key in required:
        if key not in value:
            raise MessageError(f"{where} lacks {key!r}")
    return value


def _hint(key: object, known: Collection[str]) -> str:
    return nearest(key[:40] if isinstance(key, str) else "", known)


def whole(value: Any, where: str, low: int, high: int) -> int:
    """Checks that a value is a whole number, also a numpy one, within bounds.

    Raises:
        MessageError: it isn't.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise MessageError(f"{where}={value!r:.40} must be a whole number")
    if not low <= value <= high:
        raise MessageError(f"{where}={value} must be {low} to {high}")
    return int(value)


def numbers(value: Any, where: str) -> np.ndarray[Any, Any]:
    """Reads an array or nested list of numbers as float32.

    Raises:
        InvalidObservationError: it is something else.
    """
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidObservationError(f"{where} is a list whose rows differ in length")
    if not isinstance(value, np.ndarray | list) or array.dtype.kind not in "biuf":
        raise InvalidObservationError(f"{where} must be an array or a list of numbers")
    with np.errstate(over="ignore"):  # to infinity, which Policy.checked refuses, with its place
        return array.astype(np.float32)


# --------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class PlanFormat:
    """The shapes of a policy's plans, and how they are sent.

    Attributes:
        spec: the policy's.
        n_nodes: of the sampler's table.
        stochastic: whether its solver adds noise.
    """

    spec: PolicySpec
    n_nodes: int
    stochastic: bool

    @staticmethod
    def of(policy: Policy) -> PlanFormat:
        tableau = policy.sampler.tableau
        return PlanFormat(policy.spec, tableau.n_nodes, tableau.stochastic)

    def plan_map(self, plan: Plan) -> dict[str, Any]:
        """Writes a plan."""
        solution = plan.solution
        sent = {
            "actions": plan.actions,
            "sample": solution.sample,
            "x0_hats": solution.x0_hats,
            "x_T": solution.noise.x_T,
            "iterations": solution.iterations,
            "nfe": solution.nfe,
        }
        return sent | ({"z": solution.noise.z, "u": solution.noise.u} if self.stochastic else {})

    def plan_of(self, value: Any, where: str, batch: int) -> Plan:
        """Reads a plan, on the CPU.

        Raises:
            MessageError: a tensor is missing, has another shape or dtype than ``batch`` elements need,
                or isn't finite.
        """
        n, each = self.n_nodes, (self.spec.horizon, self.spec.action_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "actions": (batch, *each),
            "sample": (batch, *each),
            "x0_hats": (n, batch, *each),
            "x_T": (batch, *each),
            "iterations": (batch,),
            "nfe": (batch,),
        }
        if self.stochastic:
            shapes |= {"z": (n, batch, *each), "u": (n, batch)}
        value = checked_map(value, where, shapes, ())
        got = {name: _tensor(value[name], f"{where}.{name}", shape) for name, shape in shapes.items()}
        zero = got["x_T"].new_zeros(())
        z, u = got.get("z", zero.expand(n, batch, *each)), got.get("u", zero.expand(n, batch))
        noise = Noise(got["x_T"], z, u)
        solution = Solution(got["sample"], got["x0_hats"], noise, got["iterations"], got["nfe"])
        return Plan(got["actions"], self.spec.executed, solution)

    @staticmethod
    def committed_map(committed: Committed) -> dict[str, Any]:
        """Writes committed actions."""
        return {"actions": committed.actions.float(), "weight": committed.weight.float()}

    def committed_of(self, value: Any, where: str, batch: int) -> Committed:
        """Reads committed actions.

        Raises:
            MessageError: a tensor is missing, has another shape or dtype, or isn't finite.
        """
        value = checked_map(value, where, ("actions", "weight"), ())
        shape = (batch, self.spec.horizon, self.spec.action_dim)
        return Committed(
            _tensor(value["actions"], f"{where}.actions", shape),
            _tensor(value["weight"], f"{where}.weight", shape[:2]),
        )


def _tensor(value: Any, where: str, shape: tuple[int, ...]) -> Tensor:
    dtype = np.int64 if where.endswith(("iterations", "nfe")) else np.float32
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise MessageError(f"{where} must be {np.dtype(dtype)} {shape}, not {got}")
    if not np.isfinite(value).all():
        raise MessageError(f"{where} has NaN or infinity: plan without a previous plan")
    return torch.from_numpy(value)


def state_of(generator: torch.Generator) -> bytes:
    """Writes a CPU generator's state."""
    return generator.get_state().numpy().tobytes()


def generator_at(state: bytes) -> torch.Generator:
    """Makes a CPU generator in a state.

    Raises:
        MessageError: it isn't a generator's state.
    """
    generator = torch.Generator()
    try:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    except (RuntimeError, ValueError, TypeError):
        raise MessageError(f"a generator's state must be the {STATE_BYTES} bytes of torch's get_state()")
    return generator


# ------------------------------------------------------------------------------------------ requests

Options = tuple[tuple[str, Any], ...]
"""Further keywords of ``Policy.plan``, and their values."""


@dataclass(frozen=True)
class PlanJob:
    """A checked request for a plan.

    Attributes:
        window: ``[batch, To, O]`` as ``Policy.checked`` gives it.
        previous: the last plan, on the policy's device, or None.
        generators: states of the noise, one per batch element.
        options: for ``Policy.plan``; only requests with the same ones are planned together.
        committed: actions to keep, or None.
    """

    window: Tensor
    previous: Plan | None
    generators: tuple[bytes, ...]
    options: Options = ()
    committed: Committed | None = None


def executed_steps_of(value: Any, spec: PolicySpec) -> int:
    """Reads how many steps of the last plan have been executed.

    Raises:
        MessageError: it isn't a number from 0 to the horizon.
    """
    return whole(value, "executed_steps", 0, spec.horizon)


OPTIONS: dict[str, Callable[[Any, PolicySpec], Any]] = {"executed_steps": executed_steps_of}
"""Keywords of ``Policy.plan`` that a request may give, and their checks."""


def options_of(request: Mapping[str, Any], spec: PolicySpec) -> Options:
    """Reads the options among a request's entries; None means absent.

    Raises:
        MessageError: one is out of range.
    """
    given = {name: request.get(name) for name in OPTIONS}
    return tuple((name, OPTIONS[name](v, spec)) for name, v in given.items() if v is not None)


def request_map(
    window: Any, previous: dict[str, Any] | None, states: list[bytes], **options: Any
) -> dict[str, Any]:
    """Writes a pure request; entries that are None are left out."""
    entries = {"window": window, "previous": previous, "generator": states, **options}
    return {"plan": {name: value for name, value in entries.items() if value is not None}}


def job_of(request: Any, policy: Policy, max_batch: int) -> PlanJob:
    """Reads a pure request.

    Raises:
        InvalidObservationError: the window has the wrong shape, or NaN or infinity in it.
        MessageError: anything else is wrong.
    """
    form = PlanFormat.of(policy)
    request = checked_map(request, "plan", ["window", "generator"], ["previous", "committed", *OPTIONS])
    window = policy.checked(numbers(request["window"], "plan.window"))
    batch, states, previous = len(window), request["generator"], request.get("previous")
    if not 1 <= batch <= max_batch:
        raise MessageError(
            f"plan.window holds {batch} windows, and this server plans for 1 to max_batch={max_batch} at a "
            "time: split the batch, or start the server with a larger max_batch"
        )
    if not isinstance(states, list) or len(states) != batch or any(type(s) is not bytes for s in states):
        raise MessageError(f"plan.generator must be a list of {batch} states, as many as windows, in bytes")
    for state in states:
        generator_at(state)
    plan = None if previous is None else form.plan_of(previous, "plan.previous", batch).to(policy.device)
    kept = request.get("committed")
    committed = None if kept is None else form.committed_of(kept, "plan.committed", batch)
    return PlanJob(window, plan, tuple(states), options_of(request, policy.spec), committed)


# ------------------------------------------------------------------------------------------ metadata


@dataclass(frozen=True)
class Metadata:
    """A server's first message.

    Attributes:
        form: of its plans.
        sampler: its name.
        max_batch: batch elements per request.
        max_message: bytes per request.
        version: of the server's package.
    """

    form: PlanFormat
    sampler: str
    max_batch: int
    max_message: int
    version: str = __version__

    def to_map(self) -> dict[str, Any]:
        """Writes the message; the sizes also by themselves, for clients that need nothing else."""
        spec = self.form.spec
        sizes = ("task", "obs_dim", "action_dim", "n_obs_steps", "horizon", "n_action_steps")
        return {
            **{name: getattr(spec, name) for name in sizes},
            "protocol": PROTOCOL,
            "version": self.version,
            "sampler": self.sampler,
            "spec": asdict(spec),
            "n_nodes": self.form.n_nodes,
            "stochastic": self.form.stochastic,
            "max_batch": self.max_batch,
            "max_message": self.max_message,
        }

    @staticmethod
    def of_map(value: Any) -> Metadata:
        """Reads the message.

        Raises:
            ServerError: the server is none, or of another protocol.
        """
        if not isinstance(value, dict) or value.get("protocol") != PROTOCOL:
            found = value.get("protocol") if isinstance(value, dict) else None
            raise ServerError(
                f"the server isn't a paradiffpolicy server of protocol {PROTOCOL} (it says {found!r:.40}): "
                "install the same version at both ends"
            )
        names = {field.name for field in fields(PolicySpec)}
        try:
            spec = PolicySpec.from_dict(checked_map(value["spec"], "spec", names, ()))
            form = PlanFormat(spec, int(value["n_nodes"]), bool(value["stochastic"]))
            limits = int(value["max_batch"]), int(value["max_message"])
            return Metadata(form, str(value["sampler"]), *limits, str(value["version"]))
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise ServerError(f"the server's metadata is incomplete ({error}): install its version here")
