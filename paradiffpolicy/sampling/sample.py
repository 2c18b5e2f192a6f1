"""Samples from any diffusion network, without a policy.

>>> import torch
>>> from paradiffpolicy.sampling.sample import sample
>>> solution = sample(lambda x, t: x, (3, 16, 2), n_steps=10)   # a network that predicts epsilon
>>> solution.sample.shape
torch.Size([3, 16, 2])

With a condition, a parallel driver, and the whole plan captured as one call, to be sampled again and again:

>>> network = lambda x, t, condition: x - condition["goal"][:, None]
>>> fast = NetworkSampler(network, solver="ddim", n_steps=10, driver="picard", window=10, capture="auto")
>>> goals = torch.zeros(3, 2)
>>> fast((3, 16, 2), condition={"goal": goals}, generator=0).sample.shape
torch.Size([3, 16, 2])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import BoundDenoise, Clip, Denoiser, Prediction, Threshold, unbounded
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, is_whole
from ..models.networks import usable_device
from ..types import Noise, Solution
from .capture.backends import CaptureSettings
from .capture.executor import Executor
from .capture.network import DenoiserNetwork
from .driver import State
from .noise import Seed, generators_for
from .sampler import make_sampler

Condition = Tensor | Mapping[str, Tensor] | None
"""``[batch, …]``, or several of them by name, or none."""

CONDITION = "condition"
"""Name of a single condition among a program's inputs; begins the names of several."""


class NetworkSampler:
    """Samples from a network; keeps what it has captured for the next call.

    Args:
        network: a torch module or function ``(x [rows, …], t [rows], condition) -> [rows, …]``, or
            ``(x, t)`` where there is no condition.  ``t`` are timesteps in x's dtype, and may be
            fractional; conditions come as they were given, a row for each row of x.
        schedule: a name in ``SCHEDULES``, or a schedule, that the network was trained on.
        n_train_steps: of a named schedule.
        prediction: what the network predicts, a name in ``PREDICTIONS``.
        clip: bounds x0 to ``±clip``; None: not at all; or a function.
        n_steps: of the solver; None: as many as the schedule has.
        capture, precision: see ``CaptureSettings``; a network of one's own has ``f32`` only.
        device: where to sample; None: where the network's parameters are.
        dtype: to compute in.
        sampler: more of what ``make_sampler`` takes: ``solver``, ``driver``, its options, ….

    Raises:
        InputError: a setting is unknown or unusable, or the driver can't be captured.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        *,
        schedule: str | NoiseSchedule = "squared_cosine",
        n_train_steps: int = 100,
        prediction: str | Prediction = "epsilon",
        clip: float | Threshold | None = None,
        n_steps: int | None = None,
        capture: Any = "eager",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **sampler: Any,
    ) -> None:
        if not callable(network):
            raise InputError(f"the network must be a module or a function (x, t, condition), not {network!r}")
        if isinstance(schedule, str):
            schedule = NoiseSchedule.named(schedule, n_train_steps)
        if not isinstance(schedule, NoiseSchedule):
            raise InputError(f"schedule={schedule!r:.40} must be a name, or a NoiseSchedule")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype={dtype!r:.40} must be a torch.dtype of real numbers, as torch.float32")
        steps = schedule.n_train_steps if n_steps is None else n_steps
        threshold = clip if callable(clip) else unbounded if clip is None else Clip(clip)
        if device is None:
            weights = network.parameters() if isinstance(network, torch.nn.Module) else iter(())
            device = next((weight.device for weight in weights), torch.device("cpu"))
        self.device, self.dtype = usable_device(device), dtype
        self.sampler = make_sampler(schedule, n_steps=steps, **sampler)

        def called(x: Tensor, t: Tensor, condition: Any) -> Tensor:
            output = network(x, t) if condition is None else network(x, t, condition)
            if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
                found = (output.dtype, tuple(output.shape)) if isinstance(output, Tensor) else type(output)
                raise InputError(f"the network gives {found}, expected real numbers {tuple(x.shape)}, as x")
            return output

        denoiser = Denoiser(called, schedule, prediction, threshold)
        like = torch.zeros((), dtype=dtype, device=self.device)
        bound = ConditionedNetwork(denoiser, self.sampler.tableau, like)
        self.executor = Executor(
            self.sampler.driver,
            self.sampler.tableau,
            lambda backend: bound,
            CaptureSettings(capture).backends(self.device),
        )

    def __call__(
        self,
        shape: tuple[int, ...],
        *,
        condition: Condition = None,
        generator: Seed | Sequence[Seed] = 0,
    ) -> Solution:
        """Samples a batch; see ``sample``."""
        sizes = list(shape) if isinstance(shape, tuple | list) else []
        if len(sizes) < 2 or not all(is_whole(size) and int(size) >= 1 for size in sizes):
            raise InputError(f"shape={shape!r:.40} must be [batch, …], the batch and the sample's own axes")
        batch, *each = shape
        generators = generators_for(generator, batch)
        noise, guess = self.sampler.start(self.sampler.tableau, tuple(each), None, 0, generators)
        noise = Noise(*(value.to(self.device, self.dtype) for value in vars(noise).values()))
        return self.executor.run(self._inputs(condition, batch), noise, guess)

    def _inputs(self, condition: Condition, batch: int) -> State:
        if condition is None:
            return {}
        named = (
            {f"{CONDITION}.{name}": value for name, value in condition.items()}
            if isinstance(condition, Mapping)
            else {CONDITION: condition}
        )
        for name, value in named.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{name} must be a tensor [batch={batch}, …], not {found}")
        return {name: value.detach().to(self.device) for name, value in named.items()}


def sample(
    network: Callable[..., Tensor],
    shape: tuple[int, ...],
    *,
    condition: Condition = None,
    generator: Seed | Sequence[Seed] = 0,
    **settings: Any,
) -> Solution:
    """Samples a batch from a network, with gradients off.

    Args:
        network: ``eps(x, t)`` or ``eps(x, t, condition)``, a module or a function.
        shape: ``[batch, …]``, the sample's.
        condition: ``[batch, …]``, or a dict of such tensors.
        generator: seeds or generators of the noise, one per batch element; or one seed for all.
        settings: see ``NetworkSampler``: ``schedule``, ``n_train_steps``, ``prediction``, ``clip``,
            ``solver``, ``n_steps``, ``driver``, its options, ``capture``, ``device``, ``dtype``.

    Returns:
        The solution; ``solution.sample`` has the shape.

    Raises:
        InputError: a setting, the condition or the generators are unusable.
    """
    return NetworkSampler(network, **settings)(shape, condition=condition, generator=generator)


class ConditionedNetwork(DenoiserNetwork):
    """A ``PlanNetwork`` of any conditions: inputs ``condition``, or ``condition.name``, ``[batch, …]``."""

    def observed(self, denoiser: Denoiser, inputs: State) -> State:
        return {name: value for name, value in inputs.items() if name.startswith(CONDITION)}

    def bound(self, denoiser: Denoiser, observed: State) -> BoundDenoise:
        def denoise(x: Tensor, at: Tensor, element: Tensor) -> Tensor:
            rows: Any = {
                name.removeprefix(f"{CONDITION}."): value.index_select(0, element)
                for name, value in observed.items()
            }
            condition: Any = rows.get(CONDITION, rows) if rows else None
            return denoiser(x, at, condition)

        return denoise
