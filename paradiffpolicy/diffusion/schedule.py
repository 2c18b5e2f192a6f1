r"""Noise schedules: ``x_t = alpha_t x_0 + sigma_t eps``.

A diffusion's are variance-preserving, ``alpha_t^2 + sigma_t^2 = 1``; flow matching's is the straight path
from noise to data, ``alpha_t + sigma_t = 1``.

All schedules share one axis of timesteps: ``0`` is the least noisy that training sees,
``n_train_steps - 1`` the noisiest, and ``CLEAN = -1`` the data itself (alpha 1, sigma 0).  Times in
between are allowed everywhere: a discrete schedule interpolates log alpha linearly (Lu et al. 2022,
DPM-Solver, appendix D), a continuous one is a formula in ``u = (t + 1) / n_train_steps``.  The
log signal-to-noise ratio ``lambda = log(alpha / sigma)`` falls strictly with t.

Everything is float64; callers that need float32 round at the end.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, is_number, nearest, require_positive, require_within
from ..registry import Registry
from ..types import LARGEST, ByValue

CLEAN = -1
"""The timestep of the noise-free sample."""


class Point(NamedTuple):
    """A schedule's values at one time, in which solvers' formulas are written."""

    time: float
    alpha: float
    sigma: float
    lam: float
    """lambda; infinite at ``CLEAN``, minus infinity where there is nothing but noise."""


class NoiseSchedule(ABC):
    """How much signal and noise ``x_t`` has.

    Attributes:
        n_train_steps: length of the axis of timesteps.
    """

    n_train_steps: int

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal's share at timesteps ``t`` (any shape, fractions and ``CLEAN`` allowed), float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise's share at timesteps ``t``, in the same form."""

    @abstractmethod
    def timestep(self, lam: float) -> float:
        """The (fractional) timestep at which lambda has this value."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Training timesteps ``[count]``."""

    def network_time(self, t: Tensor) -> Tensor:
        """The number that a network is called with at timesteps ``t``: here the timestep."""
        return t

    @staticmethod
    def named(
        name: str, n_train_steps: int, /, beta_start: float = 1e-4, beta_end: float = 0.02, **options: Any
    ) -> NoiseSchedule:
        """One of ``SCHEDULES``; the betas' ends are used by the linear ones only.

        Args:
            options: of the schedule; ``flow`` has some.

        Raises:
            InputError: there is none of that name, it has no such option, or its values are unusable.
        """
        require_within(1, LARGEST["n_train_steps"], n_train_steps=n_train_steps)
        for end, value in {"beta_start": beta_start, "beta_end": beta_end}.items():
            if not is_number(value) or value < 0:
                raise InputError(f"{end}={value!r:.40} must be a number, not below 0")
        make = SCHEDULES.named(name)
        known = list(inspect.signature(make).parameters)[3:]
        for option in options:
            if option not in known:
                hint = nearest(option, known) if known else ": it has none"
                raise InputError(f"noise schedule {name!r} has no option {option!r:.40}{hint}")
        return make(n_train_steps, beta_start, beta_end, **options)

    def at(self, t: float) -> Point:
        """All values at one time."""
        if t == CLEAN:
            return Point(t, 1.0, 0.0, math.inf)
        where = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(self.alpha(where)), float(self.sigma(where))
        return Point(float(t), alpha, sigma, math.log(alpha / sigma) if alpha > 0 else -math.inf)


class VariancePreserving(NoiseSchedule):
    """A diffusion's schedule, given by its alphas."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """At timesteps ``t`` (any shape, fractions and ``CLEAN`` allowed), float64."""

    @abstractmethod
    def timestep_of_log_alpha(self, log_alpha: float) -> float:
        """The inverse of ``log_alpha``."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def timestep(self, lam: float) -> float:
        return self.timestep_of_log_alpha(-0.5 * float(np.logaddexp(0.0, -2.0 * lam)))


@dataclass(frozen=True, eq=False)
class DiscreteSchedule(ByValue, VariancePreserving):
    """Given by numbers at whole timesteps.

    Attributes:
        alphas_cumprod: ``[n_train_steps]`` float64, the squared alphas, strictly decreasing in
            (0, 1).

    Raises:
        InputError: ``alphas_cumprod`` is not such a sequence.
    """

    alphas_cumprod: Tensor
    _knots: Tensor = field(init=False, repr=False)  # log alpha at CLEAN, 0, 1, …

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if a.ndim != 1 or a.dtype != torch.float64 or len(a) == 0:
            raise InputError(f"alphas_cumprod must be a float64 vector, got {a.dtype} {tuple(a.shape)}")
        if not bool((a > 0).all() and (a < 1).all() and (a.diff() < 0).all()):
            raise InputError("alphas_cumprod must fall strictly within (0, 1): check the schedule's betas")
        knots = torch.cat((torch.zeros(1, dtype=torch.float64), 0.5 * a.log()))
        object.__setattr__(self, "_knots", knots)

    @staticmethod
    def from_betas(betas: Tensor) -> DiscreteSchedule:
        """``betas`` ``[n_train_steps]`` float64: what the forward process adds at each step."""
        return DiscreteSchedule(torch.cumprod(1 - betas, dim=0))

    @property
    def n_train_steps(self) -> int:  # type: ignore[override]
        return len(self.alphas_cumprod)

    def log_alpha(self, t: Tensor) -> Tensor:
        knots = self._knots.to(t.device)
        position = t.double() + 1
        below = position.floor().clamp(0, len(knots) - 2).long()
        return torch.lerp(knots[below], knots[below + 1], position - below)

    def timestep_of_log_alpha(self, log_alpha: float) -> float:
        rising = self._knots.flip(0).numpy()
        return float(np.interp(log_alpha, rising, np.arange(len(rising) - 2, -2, -1, dtype=float)))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.n_train_steps, (count,), generator=generator)


class ContinuousSchedule(VariancePreserving):
    """Given by a formula in ``u = (t + 1) / n_train_steps``, from 0 (clean) to 1."""

    @abstractmethod
    def log_alpha_of_u(self, u: Tensor) -> Tensor:
        """The formula, for float64 tensors."""

    @abstractmethod
    def u_of_log_alpha(self, log_alpha: float) -> float:
        """Its inverse."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha_of_u((t.double() + 1) / self.n_train_steps)

    def timestep_of_log_alpha(self, log_alpha: float) -> float:
        return self.u_of_log_alpha(log_alpha) * self.n_train_steps - 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator) * (self.n_train_steps - 1)


@dataclass(frozen=True)
class VPLinear(ContinuousSchedule):
    """The variance-preserving SDE with ``beta(u)`` from ``1000 beta_start`` to ``1000 beta_end``:
    ``log alpha = -u^2 (beta_1 - beta_0) / 4 - u beta_0 / 2`` (Song et al. 2021, equation 33)."""

    n_train_steps: int
    beta_start: float
    beta_end: float

    def log_alpha_of_u(self, u: Tensor) -> Tensor:
        b0, b1 = 1000 * self.beta_start, 1000 * self.beta_end
        return -(u**2) * (b1 - b0) / 4 - u * b0 / 2

    def u_of_log_alpha(self, log_alpha: float) -> float:
        b0, b1 = 1000 * self.beta_start, 1000 * self.beta_end
        return -2 * log_alpha / (b0 / 2 + math.sqrt(b0**2 / 4 - (b1 - b0) * log_alpha))


@dataclass(frozen=True)
class VPCosine(ContinuousSchedule):
    """``alpha = cos(pi/2 (v + s)/(1 + s)) / cos(pi/2 s/(1 + s))``, s = 0.008, with v up to 0.9946,
    where the noise would become infinite (Lu et al. 2022, DPM-Solver, appendix D)."""

    n_train_steps: int
    s: ClassVar = 0.008
    v_max: ClassVar = 0.9946
    log_alpha_0: ClassVar = math.log(math.cos(math.pi / 2 * s / (1 + s)))

    def log_alpha_of_u(self, u: Tensor) -> Tensor:
        log_alpha = torch.cos(math.pi / 2 * (self.v_max * u + self.s) / (1 + self.s)).log() - self.log_alpha_0
        return log_alpha.clamp(max=0)  # against rounding at u = 0

    def u_of_log_alpha(self, log_alpha: float) -> float:
        angle = math.acos(min(1.0, math.exp(log_alpha + self.log_alpha_0)))
        return (angle * 2 / math.pi * (1 + self.s) - self.s) / self.v_max


TRAINING_TIMESTEPS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "distribution of training timesteps",
    {
        "uniform": lambda u: u,
        "beta": lambda u: u ** (1 / 1.5),
    },
)
"""Distributions of flow matching's training timesteps: what becomes of uniform numbers, from 0 (the cleanest
timestep) to 1 (the noisiest).  ``beta`` is Beta(1.5, 1), which draws noisy ones more often (Black et al.
2024, pi_0, appendix B)."""


@dataclass(frozen=True)
class StraightPath(NoiseSchedule):
    """Flow matching's path, ``x_s = (1 - s) x_0 + s eps`` with ``s = (t + 1) / n_train_steps``: the noisiest
    timestep is nothing but noise (Lipman et al. 2023; Liu et al. 2023, rectified flow).

    s is diffusion's and openpi's direction of time; where noise is at 0 and data at 1, time is ``1 - s``.
    Since s is continuous, ``n_train_steps`` only sets the timesteps' unit, and the least noisy
    one that training sees, ``s = 1 / n_train_steps``.

    Attributes:
        training_timesteps: a name in ``TRAINING_TIMESTEPS``.
        time_scale: the network is called with ``time_scale * s``: 1 for openpi's networks; None: with t.

    Raises:
        InputError: an attribute is unusable.
    """

    n_train_steps: int
    training_timesteps: str = "uniform"
    time_scale: float | None = None

    def __post_init__(self) -> None:
        TRAINING_TIMESTEPS.named(self.training_timesteps)
        if self.time_scale is not None:
            require_positive(time_scale=self.time_scale)

    def alpha(self, t: Tensor) -> Tensor:
        return (self.n_train_steps - 1 - t.double()) / self.n_train_steps

    def sigma(self, t: Tensor) -> Tensor:
        return (t.double() + 1) / self.n_train_steps

    def timestep(self, lam: float) -> float:
        return self.n_train_steps * math.exp(-float(np.logaddexp(0.0, lam))) - 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        share = TRAINING_TIMESTEPS[self.training_timesteps](torch.rand(count, generator=generator))
        return share * (self.n_train_steps - 1)

    def network_time(self, t: Tensor) -> Tensor:
        return t if self.time_scale is None else self.time_scale * (t + 1) / self.n_train_steps


def flow(
    n: int,
    beta_start: float,
    beta_end: float,
    training_timesteps: str = "uniform",
    time_scale: float | None = None,
) -> NoiseSchedule:
    """Flow matching: see ``StraightPath``; takes no betas' ends."""
    return StraightPath(n, training_timesteps, time_scale)


def linear(n: int, beta_start: float, beta_end: float) -> NoiseSchedule:
    """Ho et al. 2020 (DDPM), section 4."""
    return DiscreteSchedule.from_betas(torch.linspace(beta_start, beta_end, n, dtype=torch.float64))


def scaled_linear(n: int, beta_start: float, beta_end: float) -> NoiseSchedule:
    """Linear in the square root, as latent diffusion has it (Rombach et al. 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64)
    return DiscreteSchedule.from_betas(roots**2)


def squared_cosine(n: int, beta_start: float, beta_end: float) -> NoiseSchedule:
    """Nichol & Dhariwal 2021, equation 17; each beta clipped at 0.999; takes no betas' ends."""
    u = torch.arange(n + 1, dtype=torch.float64) / n
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return DiscreteSchedule.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


SCHEDULES: Registry[Callable[..., NoiseSchedule]] = Registry(
    "noise schedule",
    {
        "squared_cosine": squared_cosine,
        "squaredcos_cap_v2": squared_cosine,
        "linear": linear,
        "scaled_linear": scaled_linear,
        "vp_linear": VPLinear,
        "vp_cosine": lambda n, beta_start, beta_end: VPCosine(n),
        "flow": flow,
    },
)
"""Every schedule by name: ``(n_train_steps, beta_start, beta_end, **options)`` to a schedule;
``squaredcos_cap_v2`` is diffusers' name of ``squared_cosine``."""
