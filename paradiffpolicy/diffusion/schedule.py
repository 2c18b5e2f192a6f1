r"""Noise schedules: ``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``.

Discrete training timesteps ``t = 0 … n_train_steps - 1``; ``CLEAN = -1`` stands for the data itself
(alpha 1, sigma 0).  Everything is float64, from closed forms; whoever needs float32 rounds at the
end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, nearest

CLEAN = -1
"""The timestep of the noise-free sample."""


def linear_betas(n: int, beta_start: float, beta_end: float) -> Tensor:
    """Ho et al. 2020 (DDPM), section 4."""
    return torch.linspace(beta_start, beta_end, n, dtype=torch.float64)


def scaled_linear_betas(n: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear in the square root, as latent diffusion has it (Rombach et al. 2022)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2


def squared_cosine_betas(n: int, max_beta: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021, equation 17; each beta clipped at ``max_beta``."""
    u = torch.arange(n + 1, dtype=torch.float64) / n
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "squared_cosine": lambda n, beta_start, beta_end: squared_cosine_betas(n),
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
}


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule.

    Attributes:
        alphas_cumprod: ``[n_train_steps]`` float64, the squared alphas, strictly decreasing in
            (0, 1).

    Raises:
        InputError: ``alphas_cumprod`` is not such a sequence.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if a.ndim != 1 or a.dtype != torch.float64 or len(a) == 0:
            raise InputError(f"alphas_cumprod must be a float64 vector, got {a.dtype} {tuple(a.shape)}")
        if not bool((a > 0).all() and (a < 1).all() and (a.diff() < 0).all()):
            raise InputError("alphas_cumprod must fall strictly within (0, 1): check the schedule's betas")

    @staticmethod
    def named(
        name: str, n_train_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """One of ``SCHEDULES``; the betas' ends are used by the linear ones only."""
        if name not in SCHEDULES:
            raise InputError(f"unknown noise schedule {name!r}{nearest(name, SCHEDULES)}")
        betas = SCHEDULES[name](n_train_steps, beta_start, beta_end)
        return NoiseSchedule(torch.cumprod(1 - betas, dim=0))

    @property
    def n_train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal's share at timesteps ``t`` (any shape, ``CLEAN`` allowed), float64."""
        return self._squared_alpha(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise's share at timesteps ``t`` (any shape, ``CLEAN`` allowed), float64."""
        return (1 - self._squared_alpha(t)).sqrt()

    def _squared_alpha(self, t: Tensor) -> Tensor:
        a = self.alphas_cumprod.to(t.device)
        return torch.where(t == CLEAN, 1.0, a[t.clamp(min=0)])
