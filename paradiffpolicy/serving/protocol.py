"""Writes and reads messages: metadata, plans, pure requests, errors; the same code at both ends.

The server first sends its metadata.  Then every message of the client is a request, and gets one
answer.  A request ``{"plan": {...}}`` is pure: it carries the observation windows, the last plan and
the generators' states, and its answer the plan and the states that the generators have now, so the
server keeps nothing of it, and any server with the same policy answers it alike.  (Requests of the
other kind, which openpi's clients send, are in ``session``.)

A plan travels as its tensors: ``actions``, ``sample``, ``x0_hats``, ``x_T``, ``iterations``, ``nfe``
and, only for a solver that adds noise, ``z`` and ``u``: an ODE solver's are zero; only of relative actions,
``reference``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import InputError, nearest
from ..observation import InvalidObservationError, Window, numbers_window
from ..policy import InvalidPlanError, Policy
from ..sampling.capture.network import PIXELS
from ..task import NUMBERS
from ..types import Committed, Noise, Plan, PolicySpec, Solution
from .messages import MessageError

PROTOCOL = 1
"""Version of the messages; raised when older ends can't read them."""

STATE = np.dtype(
    [
        *(("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("words", "<u8", 624)),
        *(("x", "V8"), ("double", "<f8"), ("rho", "V8"), ("has_double", "<i4"), ("padding", "V4")),
        *(("float", "<f4"), ("has_float", "u1"), ("padding_too", "V3")),
    ]
)
"""A CPU generator's state as torch's ``get_state`` writes it: the Mersenne twister's 624 words, of which
``next`` comes next and ``left`` are left, and a normal number drawn in advance."""


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


def error_map(error: Exception) -> dict[str, str]:
    """The answer to a request that failed: the error's name, and one line."""
    fault = f"the server failed ({type(error).__name__}): its log says more"
    return {"error": kind_of(error), "message": str(error) if isinstance(error, InputError) else fault}


def raise_error(answer: Mapping[str, Any]) -> None:
    """Raises the server's error, if ``answer`` is an ``error_map``."""
    if "error" in answer:
        raise KINDS.get(str(answer["error"]), ServerError)(str(answer.get("message")))


# -------------------------------------------------------------------------------------------- fields


def checked_map(
    value: Any, where: str, required: Collection[str], optional: Collection[str]
) -> dict[str, Any]:
    """Returns a map that has all of ``required``, and further keys only from ``optional``; raises a
    ``MessageError`` for anything else."""
    if not isinstance(value, dict):
        raise MessageError(f"{where} must be a map, not {type(value).__name__}")
    known = [*required, *optional]
    for key in value:
        if key not in known:
            hint = nearest(key[:40] if isinstance(key, str) else "", known)
            raise MessageError(f"{where} has no place for {short(key)}{hint}")
    for key in required:
        if key not in value:
            raise MessageError(f"{where} lacks {key!r}")
    return value


def whole(value: Any, where: str, low: int, high: int) -> int:
    """Returns a whole number, also numpy's, within bounds; raises a ``MessageError`` for anything else."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise MessageError(f"{where}={short(value)} must be a whole number")
    if not low <= value <= high:
        raise MessageError(f"{where}={value} must be {low} to {high}")
    return int(value)


def numbers(value: Any, where: str) -> np.ndarray[Any, Any]:
    """Reads an array or nested list of numbers as float64; raises an ``InvalidObservationError`` for
    anything else."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidObservationError(f"{where} is a list whose rows differ in length")
    if not isinstance(value, np.ndarray | list) or array.dtype.kind not in "biuf":
        raise InvalidObservationError(f"{where} must be an array or a list of numbers")
    return array.astype(np.float64)


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
        solution, noise = plan.solution, plan.solution.noise
        sent = {name: getattr(solution, name) for name in ("sample", "x0_hats", "iterations", "nfe")}
        sent |= {"actions": plan.actions, "x_T": noise.x_T}
        sent |= {} if plan.reference is None else {"reference": plan.reference}
        return sent | {"z": noise.z, "u": noise.u} if self.stochastic else sent

    def plan_of(self, value: Any, where: str, batch: int) -> Plan:
        """Reads a plan, on the CPU; raises a ``MessageError`` for a tensor that is missing, isn't finite, or
        has another shape or dtype than ``batch`` elements need."""
        each = (batch, self.spec.horizon, self.spec.action_dim)
        every = (self.n_nodes, *each)
        shapes = {"actions": each, "sample": each, "x0_hats": every, "x_T": each}
        shapes |= {"iterations": each[:1], "nfe": each[:1]}
        if self.spec.relative:
            shapes["reference"] = (batch, self.spec.action_dim)
        if self.stochastic:
            shapes |= {"z": every, "u": every[:2]}
        got, zero = _tensors(value, where, shapes), torch.zeros(())
        noise = Noise(got["x_T"], got.get("z", zero.expand(every)), got.get("u", zero.expand(every[:2])))
        solution = Solution(got["sample"], got["x0_hats"], noise, got["iterations"], got["nfe"])
        return Plan(got["actions"], self.spec.executed, solution, reference=got.get("reference"))

    @staticmethod
    def committed_map(committed: Committed) -> dict[str, Any]:
        """Writes committed actions."""
        return {"actions": committed.actions, "weight": committed.weight.float()}

    def committed_of(self, value: Any, where: str, batch: int) -> Committed:
        """Reads committed actions as ``plan_of`` reads a plan."""
        shape = (batch, self.spec.horizon, self.spec.action_dim)
        return Committed(**_tensors(value, where, {"actions": shape, "weight": shape[:2]}))


def _tensors(value: Any, where: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    value = checked_map(value, where, shapes, ())
    return {name: _tensor(value[name], f"{where}.{name}", shape) for name, shape in shapes.items()}


def _tensor(value: Any, where: str, shape: tuple[int, ...]) -> Tensor:
    dtype: type = np.int64 if where.endswith(("iterations", "nfe")) else np.float32
    dtype = np.float64 if where.endswith("reference") else dtype
    dtypes = (dtype, np.float64) if where.endswith("actions") else (dtype,)  # see Normalizer.raw_dtype
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes or value.shape != shape:
        got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise MessageError(f"{where} must be {np.dtype(dtype)} {shape}, not {got}")
    if not np.isfinite(value).all():
        raise MessageError(f"{where} has NaN or infinity: plan without a previous plan")
    return torch.from_numpy(value)


def state_of(generator: torch.Generator) -> bytes:
    """Writes a CPU generator's state."""
    return generator.get_state().numpy().tobytes()


def generator_at(state: bytes) -> torch.Generator:
    """Makes a CPU generator in a state; raises a ``MessageError`` for one that no generator can have.

    torch checks too little: with ``left`` = ``next`` = 624 it reads what lies behind its words, which
    would come back to the client as noise.
    """
    fields = np.frombuffer(state, STATE)[0] if len(state) == STATE.itemsize else np.zeros((), STATE)
    left, place = int(fields["left"]), int(fields["next"])
    possible = (
        fields["seeded"] == 1
        and ((left, place) == (1, 0) or (1 <= left <= 624 and left + place == 625))
        and (fields["words"] < 2**32).all()
        and all(fields[f"has_{name}"] in (0, 1) and np.isfinite(fields[name]) for name in ("double", "float"))
    )
    if not possible:
        raise MessageError(f"a generator's state must be the {STATE.itemsize} bytes of torch's get_state()")
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


# ------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True)
class PlanJob:
    """A checked request for a plan.

    Attributes:
        window: as ``Policy.checked`` gives it.
        previous: the last plan, on the policy's device, or None.
        generators: states of the noise, one per batch element.
        executed_steps: of the last plan; only requests with the same number are planned together.
        committed: actions to keep, or None.
    """

    window: Window
    previous: Plan | None
    generators: tuple[bytes, ...]
    executed_steps: int | None = None
    committed: Committed | None = None


def executed_steps_of(request: Mapping[str, Any], spec: PolicySpec) -> int | None:
    """Reads how many steps of the last plan have been executed; None: the request doesn't say."""
    steps = request.get("executed_steps")
    return None if steps is None else whole(steps, "executed_steps", 0, spec.horizon)


def request_map(
    window: Any, previous: dict[str, Any] | None, states: list[bytes], **optional: Any
) -> dict[str, Any]:
    """Writes a pure request; entries that are None are left out."""
    entries = {"window": window, "previous": previous, "generator": states, **optional}
    return {"plan": {name: value for name, value in entries.items() if value is not None}}


def window_map(window: Window) -> Any:
    """Writes windows: an array, or with cameras a map of two."""
    if window.pixels is None:
        return window.numbers
    return {NUMBERS: window.numbers, PIXELS: window.pixels}


def window_of(value: Any, policy: Policy) -> Window:
    """Reads windows; raises an ``InvalidObservationError`` for wrong ones, a ``MessageError`` for anything
    else that is wrong."""
    spec = policy.spec
    if not spec.contract.cameras:
        return policy.checked(numbers(value, "plan.window"))
    parts = checked_map(value, "plan.window", [NUMBERS, PIXELS], ())
    vectors = torch.from_numpy(numbers(parts[NUMBERS], f"plan.window.{NUMBERS}"))
    pixels, size = parts[PIXELS], spec.observation_dtype.itemsize - 8 * spec.obs_dim
    wanted = (len(vectors), spec.n_obs_steps, size)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != wanted:
        raise InvalidObservationError(f"plan.window.{PIXELS} must be uint8 {wanted}, the cameras' pictures")
    return Window(numbers_window(spec, vectors), torch.from_numpy(pixels)).to(policy.device)


def job_of(request: Any, policy: Policy, max_batch: int) -> PlanJob:
    """Reads a pure request; raises an ``InvalidObservationError`` for a wrong window, a ``MessageError`` for
    anything else that is wrong."""
    form, request = PlanFormat.of(policy), checked_map(request, "the request", ["plan"], ())["plan"]
    request = checked_map(
        request, "plan", ["window", "generator"], ["previous", "committed", "executed_steps"]
    )
    window = window_of(request["window"], policy)
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
    return PlanJob(window, plan, tuple(states), executed_steps_of(request, policy.spec), committed)


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
        """Reads the message; raises a ``ServerError`` if the server is none, or of another protocol."""
        if not isinstance(value, dict) or value.get("protocol") != PROTOCOL:
            found = value.get("protocol") if isinstance(value, dict) else None
            raise ServerError(
                f"the server isn't a paradiffpolicy server of protocol {PROTOCOL} (it says {short(found)}): "
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
