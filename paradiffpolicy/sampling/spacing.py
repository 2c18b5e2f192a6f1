"""Spacings of the timesteps that a solver visits.

A spacing is a function ``(schedule, n, last)`` to n falling times, float64, of which ``last`` is
the noisiest that it may use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.schedule import CLEAN, NoiseSchedule
from ..errors import LARGEST, InputError, is_number, require_count
from ..registry import Registry

Spacing = Callable[[NoiseSchedule, int, int], Tensor]


def _between(first: float, last: float, n: int) -> Tensor:
    """n equidistant values that begin with ``first``."""
    return torch.linspace(first, last, n, dtype=torch.float64)


def _lambda_at(schedule: NoiseSchedule, last: int) -> float:
    lam = schedule.at(last).lam
    if math.isinf(lam):
        raise InputError(
            f"timestep {last} is nothing but noise, where a spacing of lambdas can't begin: trailing, or "
            "leave that timestep out, as with lambda_min=-6"
        )
    return lam


def leading(schedule: NoiseSchedule, n: int, last: int) -> Tensor:
    """``…, 2k, k, 0`` with ``k = (last + 1) // n``: never sees the noisiest timesteps."""
    return torch.arange(n - 1, -1, -1, dtype=torch.float64) * ((last + 1) // n)


def trailing(schedule: NoiseSchedule, n: int, last: int) -> Tensor:
    """From the last timestep in equal strides: never sees the cleanest ones (Lin et al. 2024)."""
    stride = (last + 1) / n
    return (last + 1 - stride * torch.arange(n, dtype=torch.float64)).round() - 1


def linspace(schedule: NoiseSchedule, n: int, last: int) -> Tensor:
    """Both ends, and equal strides between them, rounded."""
    return _between(last, 0, n).round()


def quadratic(schedule: NoiseSchedule, n: int, last: int) -> Tensor:
    """Equal strides in the root of the timestep: dense where it is clean (Song et al. 2021, DDIM,
    appendix D.2)."""
    return _between(last**0.5, 0, n) ** 2


def uniform_lambda(schedule: NoiseSchedule, n: int, last: int) -> Tensor:
    """Equal strides in the log signal-to-noise ratio (Lu et al. 2022, DPM-Solver, section 3.3)."""
    lambdas = _between(_lambda_at(schedule, last), schedule.at(0).lam, n)
    return torch.tensor([schedule.timestep(lam) for lam in lambdas.tolist()], dtype=torch.float64)


def karras(schedule: NoiseSchedule, n: int, last: int, rho: float = 7.0) -> Tensor:
    """Equal strides in ``(sigma / alpha)^(1/rho)`` (Karras et al. 2022, equation 5)."""
    ends = [math.exp(-_lambda_at(schedule, t) / rho) for t in (last, 0)]
    noise = _between(ends[0], ends[1], n) ** rho
    return torch.tensor([schedule.timestep(-math.log(s)) for s in noise.tolist()], dtype=torch.float64)


SPACINGS: Registry[Spacing] = Registry(
    "timestep spacing",
    {
        "leading": leading,
        "trailing": trailing,
        "linspace": linspace,
        "quadratic": quadratic,
        "uniform_lambda": uniform_lambda,
        "karras": karras,
    },
)
"""Every spacing by name."""


@dataclass(frozen=True)
class Listed:
    """Timesteps of one's own, as a spacing.

    Raises:
        InputError: they aren't falling numbers.
    """

    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        times = self.timesteps
        if not all(map(is_number, times)) or list(times) != sorted(set(times), reverse=True):
            raise InputError(f"spacing={list(times)!r:.60} must be falling timesteps, as [90, 50, 10]")

    def __call__(self, schedule: NoiseSchedule, n: int, last: int) -> Tensor:
        times = self.timesteps
        if n != len(times):
            raise InputError(f"spacing lists {len(times)} timesteps: n_steps must be as many")
        if not 0 <= times[-1] <= times[0] <= last:
            raise InputError(f"spacing={list(times)!r:.60} must be timesteps from {last} to 0")
        return torch.tensor(times, dtype=torch.float64)


def time_grid(
    schedule: NoiseSchedule,
    n_steps: int,
    spacing: str | Spacing | Sequence[float] = "leading",
    denoise_to_zero: bool = True,
    lambda_min: float | None = None,
) -> Tensor:
    """The ``n_steps + 1`` times between which a solver steps.

    Args:
        spacing: a name in ``SPACINGS``, a function like those, or a list of falling timesteps.
        denoise_to_zero: the last step goes from the spacing's last timestep to the clean sample;
            without it the sample is left there, with that timestep's noise on it.
        lambda_min: leave out the timesteps whose log signal-to-noise ratio is lower (Lu et al. 2022
            use -5.1 for the squared-cosine schedule, whose last timesteps are nothing but noise).

    Raises:
        InputError: the spacing is unknown, the schedule has too few timesteps for so many steps, or the
            spacing is of lambdas and the noisiest timestep has none.
    """
    if isinstance(spacing, list | tuple):
        spacing = Listed(tuple(spacing))
    space = spacing if callable(spacing) else SPACINGS.named(spacing)
    if not isinstance(denoise_to_zero, bool):
        raise InputError(f"{denoise_to_zero=} must be true or false")
    if lambda_min is not None and not (is_number(lambda_min) and abs(lambda_min) <= LARGEST):
        raise InputError(f"{lambda_min=} must be a number, or null")
    require_count(n_steps=n_steps)
    n_times = n_steps + (not denoise_to_zero)
    last = schedule.n_train_steps - 1
    if lambda_min is not None:
        last = min(last, math.floor(schedule.timestep(lambda_min) + 1e-6))
    usable = max(last + 1, 0) - (not denoise_to_zero)
    if n_steps > usable:
        clipped = "" if lambda_min is None else f" with lambda_min={lambda_min:g}"
        raise InputError(f"n_steps={n_steps} must be 1 to {usable}, the schedule's training steps{clipped}")
    times = space(schedule, n_times, last).clamp(0, last)  # against rounding at the ends
    return torch.cat((times, times.new_tensor([CLEAN]))) if denoise_to_zero else times
