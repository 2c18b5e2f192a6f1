"""Values that travel between policy, control loop and reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, is_number, nearest, require_within
from .task import Contract, Relative, check_relative, contract_size

LARGEST = {
    "obs_dim": 10**6,
    "action_dim": 10**5,
    "n_obs_steps": 10**4,
    "horizon": 10**4,
    "n_action_steps": 10**4,
    "diffusion_step_embed_dim": 10**5,
    "kernel_size": 999,
    "n_groups": 10**5,
    "n_train_steps": 10**5,
}
"""The largest values of a spec's whole numbers."""


@dataclass(frozen=True)
class PolicySpec:
    """Describes a policy but for its weights: enough to rebuild it from a checkpoint.

    ``T = horizon``, ``To = n_obs_steps``, ``Ta = n_action_steps``.  A plan's step 0 lies at the
    oldest observation of the window; executed are steps ``To - 1 … To - 2 + Ta``, or from ``first_executed``
    on, the step for the newest observation, if that is given.  ``control_hz`` are the demonstrations' steps
    per second, and so a plan's.  ``sampler`` are the settings, as ``make_sampler`` takes them, that plans are
    meant to be sampled with; empty: DDPM's.
    ``condition_dropout`` is the share of training windows whose observation was blanked: a policy
    with some can be guided (``diffusion.guidance``).  ``prefix_steps`` is the longest delay in steps that was
    simulated in training (``diffusion.prefix``).  ``student_timesteps``, falling, are all that a
    distilled network was trained at (``training.distillation``); empty: it wasn't distilled.  ``network`` is
    a name in ``NETWORKS``, whose builder may read ``network_options``; ``schedule`` is one in ``SCHEDULES``,
    with its ``schedule_options``.  ``encoder``, a name in ``ENCODERS`` with ``encoder_options``, makes
    ``image_features`` numbers of each step's pictures, where the contract has cameras.  ``contract`` says
    what the observation's and the action's numbers are.  ``relative`` are pairs of a number of an action and
    the column of the observation that it is relative to (``data.relative``).  ``dataclasses.asdict`` and
    ``from_dict`` take a spec to JSON and back.

    Raises:
        InputError: a value has the wrong type or is out of range; the message names it.
    """

    task: str
    obs_dim: int
    action_dim: int
    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    first_executed: int | None = None
    down_dims: tuple[int, ...] = (256, 512, 1024)
    diffusion_step_embed_dim: int = 256
    kernel_size: int = 5
    n_groups: int = 8
    cond_predict_scale: bool = True
    schedule: str = "squared_cosine"
    n_train_steps: int = 100
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"
    clip: float | None = 1.0
    condition_dropout: float = 0.0
    prefix_steps: int = 0
    student_timesteps: tuple[float, ...] = ()
    control_hz: float = 10.0
    network: str = "unet1d"
    network_options: dict[str, Any] = field(default_factory=dict, hash=False)
    encoder: str = "resnet18"
    encoder_options: dict[str, Any] = field(default_factory=dict, hash=False)
    image_features: int = 0
    contract: Contract = field(default_factory=Contract)
    sampler: dict[str, Any] = field(default_factory=dict, hash=False)
    schedule_options: dict[str, Any] = field(default_factory=dict, hash=False)
    relative: Relative = ()

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(f"{name}={value!r:.40} must be a whole number from 1 to {most}")
        for name in ("task", "schedule", "prediction", "network", "encoder"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={getattr(self, name)!r:.40} must be text")
        for name in ("beta_start", "beta_end", "condition_dropout", "control_hz", "clip"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not ((number and value >= 0) or (name == "clip" and value is None)):
                raise InputError(f"{name}={value!r:.40} must be a number, not below 0")
        if not isinstance(self.cond_predict_scale, bool):
            raise InputError(f"cond_predict_scale={self.cond_predict_scale!r:.40} must be true or false")
        widths = self.down_dims
        if not isinstance(widths, tuple) or not all(type(w) is int and 1 <= w <= 10**5 for w in widths):
            raise InputError(f"down_dims={widths!r:.40} must be whole numbers from 1 to 100000")
        if not 1 <= len(widths) <= 16:
            raise InputError(f"down_dims={widths!r:.40} must be 1 to 16 numbers")
        if self.condition_dropout >= 1:
            raise InputError(f"condition_dropout={self.condition_dropout} must be at least 0 and under 1")
        if self.control_hz == 0:
            raise InputError("control_hz=0 must be above 0")
        mappings = ("network_options", "encoder_options", "schedule_options", "sampler")
        for name, kind in {**dict.fromkeys(mappings, dict), "contract": Contract}.items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name}={getattr(self, name)!r:.40} must be a {kind.__name__}")
        features, cameras = self.image_features, self.contract.cameras
        if type(features) is not int or not 0 <= features <= 10**6 or bool(features) != bool(cameras):
            there = f"with {len(cameras)} cameras it must be a number over 0, without any 0"
            raise InputError(f"image_features={features!r:.40}: {there}")
        if not all(isinstance(name, str) for name in self.schedule_options):
            raise InputError(f"schedule_options={self.schedule_options!r:.40} must be names and values")
        first = self.first_executed
        if first is not None and (type(first) is not int or first < 0):
            raise InputError(f"first_executed={first!r:.40} must be a whole number, not below 0")
        fields_size = contract_size(self.contract.observation)
        if self.contract.observation and fields_size not in (None, self.obs_dim):
            raise InputError(f"the contract's observation has {fields_size} numbers, obs_dim={self.obs_dim}")
        if self.contract.action_names and len(self.contract.action_names) != self.action_dim:
            raise InputError(
                f"the contract names {len(self.contract.action_names)} numbers of an action, "
                f"action_dim={self.action_dim}"
            )
        check_relative(self.relative, self.contract, self.obs_dim, self.action_dim)
        times = self.student_timesteps
        if not isinstance(times, tuple) or not all(
            is_number(t) and 0 <= t < self.n_train_steps for t in times
        ):
            raise InputError(
                f"student_timesteps={times!r:.60} must be timesteps, from 0 to n_train_steps - 1"
            )
        if self.executed.stop > self.horizon:
            begin = f"n_obs_steps={self.n_obs_steps} - 1" if first is None else f"first_executed={first}"
            raise InputError(
                f"{begin} + n_action_steps={self.n_action_steps} must not be over horizon={self.horizon}"
            )
        delay, most = self.prefix_steps, self.horizon - self.executed.start - 1
        if type(delay) is not int or not 0 <= delay <= most:
            raise InputError(f"prefix_steps={delay!r:.40} must be a whole number from 0 to {most}")

    @property
    def condition_dim(self) -> int:
        """Numbers that condition the network, G: of each step's observation, pictures, and delay."""
        return self.n_obs_steps * (self.obs_dim + self.image_features + self.prefix_steps)

    @property
    def observation_dtype(self) -> np.dtype[Any]:
        """Of one observation: ``[O]`` float64, or a record with the cameras' pictures."""
        vector = np.dtype((np.float64, (self.obs_dim,)))
        return self.contract.record_dtype(self.obs_dim) if self.contract.cameras else vector

    @property
    def executed(self) -> slice:
        """The plan's steps that a control loop executes."""
        first = self.n_obs_steps - 1 if self.first_executed is None else self.first_executed
        return slice(first, first + self.n_action_steps)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PolicySpec:
        """The spec that ``dataclasses.asdict`` made these values of, also by way of JSON.  Settings that
        older files lack take their defaults.

        Raises:
            InputError: a setting is unknown, missing or malformed.
        """
        known = [each.name for each in fields(PolicySpec)]
        for name in values:
            if name not in known:
                raise InputError(f"the policy's spec has an unknown setting {name!r}{nearest(name, known)}")
        given = dict(values)
        try:
            for name in ("down_dims", "student_timesteps"):
                if isinstance(given.get(name), list):
                    given[name] = tuple(given[name])
            given["relative"] = tuple(map(tuple, given.get("relative", ())))
            if not isinstance(given.get("contract", Contract()), Contract):
                given["contract"] = Contract.from_dict(given["contract"])
            return PolicySpec(**given)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the policy's spec is malformed ({error})")


class ByValue:
    """A dataclass with tensors in it that is equal to another of the same values."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [each.name for each in fields(cast(Any, self))]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


class Batched(ByValue):
    """A dataclass of tensors with a batch axis, in which other ``Batched`` ones may be nested.

    Attributes:
        after_nodes: fields whose batch is their second axis; the others' is the first.
    """

    after_nodes: ClassVar[tuple[str, ...]] = ()

    def _changed(self, change: Callable[[Tensor, int], Tensor]) -> Self:
        """The same with ``change(tensor, batch axis)`` in place of every tensor."""

        def changed(name: str) -> Any:
            value = getattr(self, name)
            if isinstance(value, Batched):
                return value._changed(change)
            return change(value, int(name in self.after_nodes)) if isinstance(value, Tensor) else value

        return type(self)(**{each.name: changed(each.name) for each in fields(cast(Any, self))})

    def select(self, elements: Sequence[int] | Tensor) -> Self:
        """The same for some of the batch elements."""
        index = torch.as_tensor(elements, dtype=torch.int64)
        return self._changed(lambda value, axis: value.index_select(axis, index.to(value.device)))

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        # Copies from a GPU are waited for: who reads too early reads the past.
        return self._changed(lambda value, axis: value.to(device, non_blocking=device.type != "cpu"))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Batches one after the other; what isn't a tensor is the first one's, None what one part lacks."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], Batched):
                return values[0].cat(values)
            if any(value is None for value in values):
                return None
            return (
                torch.cat(values, dim=int(name in cls.after_nodes))
                if isinstance(values[0], Tensor)
                else values[0]
            )

        return cls(**{each.name: joined(each.name) for each in fields(cast(Any, cls))})


@dataclass(frozen=True, eq=False)
class Noise(Batched):
    """Everything random about a solution.

    Attributes:
        x_T: ``[batch, T, A]`` standard normal, the initial noise.
        z: ``[N, batch, T, A]`` standard normal, the step noises; zero for an ODE solver.
        u: ``[N, batch]`` uniform in [0, 1), for drivers that accept or reject.
    """

    after_nodes: ClassVar = ("z", "u")

    x_T: Tensor
    z: Tensor
    u: Tensor

    @staticmethod
    def of_flow(x_T: Tensor, n_nodes: int) -> Noise:
        """All the noise of an ODE solver with ``n_nodes`` nodes."""
        zero = x_T.new_zeros(())
        return Noise(x_T, zero.expand(n_nodes, *x_T.shape), zero.expand(n_nodes, len(x_T)))


@dataclass(frozen=True, eq=False)
class Committed(Batched):
    """Actions that a plan is to keep, since they will be executed before it arrives, or nearly so.

    Attributes:
        actions: ``[batch, T, A]`` in the environment's units; anything finite where the weight is 0.
        weight: ``[batch, T]``: 1 keeps an action as it is, 0 leaves it free.
    """

    actions: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Solution(Batched):
    """One sample per batch element, and how a driver came to it from the noise.

    Attributes:
        sample: ``[batch, T, A]``, node N of the tableau: the sample.
        x0_hats: ``[N, batch, T, A]``, the denoiser's output at every node; a warm start needs it.
        noise: x_T and the step noises that give this sample.
        iterations: ``[batch]`` int64, network calls that had to wait for one another.
        nfe: ``[batch]`` int64, network function evaluations: nodes that went through the network.
    """

    after_nodes: ClassVar = ("x0_hats",)

    sample: Tensor
    x0_hats: Tensor
    noise: Noise
    iterations: Tensor
    nfe: Tensor

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{float(values.double().mean()):g} {name}"
            for name, values in (("iterations", self.iterations), ("NFE", self.nfe))
        )
        return f"Solution(sample {tuple(self.sample.shape)}, {len(self.x0_hats)} nodes, {counts} on average)"


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Batched):
    """A batch of action sequences.

    Attributes:
        actions: ``[batch, T, A]`` in the environment's units; float32, or float64 where they are far from
            zero (``Normalizer.raw_dtype``).
        executed: which of the T steps a control loop executes.
        solution: how they were sampled, in normalised units.
        residual: ``[batch]``, by how much a last iteration changed the executed action that it changed
            most, in the environment's units; None: not measured.
        reference: ``[batch, A]`` float64, what the solution is relative to, unlike ``actions``; or None.
    """

    actions: Tensor
    executed: slice
    solution: Solution
    residual: Tensor | None = None
    reference: Tensor | None = None

    def __repr__(self) -> str:
        executed = f"executed {self.executed.start} to {self.executed.stop - 1}"
        return f"Plan(actions {tuple(self.actions.shape)}, {executed}, {self.solution!r})"

    @property
    def executed_actions(self) -> Tensor:
        """``[batch, Ta, A]``."""
        return self.actions[:, self.executed]


def require_real(**values: Any) -> None:
    """Raises ``InputError`` that names the first value that isn't a dense tensor of real numbers."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a tensor, not {type(value).__name__}")
        dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        if not dense or value.is_complex():
            what = f"{value.dtype}, {value.layout}, on {value.device}"
            raise InputError(f"{name} must be a dense tensor of real numbers, not {what}")


def check_arguments(
    spec: PolicySpec,
    batch: int,
    previous: Plan | None,
    executed_steps: int | None,
    committed: Committed | None,
) -> int:
    """Checks what a plan for a batch of observation windows is to be made with; how many steps of the last
    plan were executed, Ta unless given.

    Raises:
        InputError: something has another type, or doesn't fit the batch or the policy.
    """
    executed = spec.n_action_steps if executed_steps is None else executed_steps
    require_within(0, spec.horizon, executed_steps=executed)
    if previous is not None:
        if not isinstance(previous, Plan) or not isinstance(previous.solution, Solution):
            raise InputError(f"previous must be a plan that a policy made, not {type(previous).__name__}")
        require_real(**{"previous.actions": previous.actions})
        if len(previous.actions) != batch:
            raise InputError(f"{batch} observation windows, but {len(previous.actions)} previous plans")
    if committed is not None:
        if not isinstance(committed, Committed):
            raise InputError(f"committed must be Committed(actions, weight), not {type(committed).__name__}")
        actions, weight = committed.actions, committed.weight
        require_real(**{"committed.actions": actions, "committed.weight": weight})
        wanted = (batch, spec.horizon, spec.action_dim)
        if tuple(actions.shape) != wanted or tuple(weight.shape) != wanted[:2]:
            raise InputError(
                f"committed actions {tuple(actions.shape)} and their weight {tuple(weight.shape)} must be "
                f"[batch, horizon, action_dim] = {wanted} and [batch, horizon] = {wanted[:2]}"
            )
        if not actions.float().isfinite().all() or not ((weight >= 0) & (weight <= 1)).all():
            raise InputError("committed actions must be finite, and their weight from 0 to 1")
    return int(executed)
