"""Exact problems: denoisers that are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.sampling.walk import BoundDenoise

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)


def gaussian_denoiser(schedule: NoiseSchedule, mean: Tensor, std: float) -> BoundDenoise:
    """``E[x_0 | x_t]`` for ``x_0 ~ N(mean, std^2)``; linear in x_t. ``mean`` ``[T, A]``."""

    def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        alpha = schedule.alpha(t).to(x).view(-1, 1, 1)
        sigma = schedule.sigma(t).to(x).view(-1, 1, 1)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


def mixture_denoiser(schedule: NoiseSchedule, std: float = 0.2) -> BoundDenoise:
    """``E[x_0 | x_t]`` for an equal mixture of ``N(m, std^2)`` at m = -0.6, 0.1 and 0.7, for every
    number of the sample on its own; each batch element's means are shifted by 0.05 times its index,
    so that mixing up elements shows."""

    def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        alpha = schedule.alpha(t).to(x).view(-1, 1, 1, 1)
        sigma = schedule.sigma(t).to(x).view(-1, 1, 1, 1)
        means = torch.tensor([-0.6, 0.1, 0.7], dtype=x.dtype) + 0.05 * element.view(-1, 1, 1, 1)
        variance = alpha**2 * std**2 + sigma**2
        centred = x[..., None] - alpha * means
        weights = (-(centred**2) / (2 * variance)).softmax(dim=-1)
        return (weights * (means + alpha * std**2 / variance * centred)).sum(dim=-1)

    return denoise


def noise_for(
    n: int, batch: int, seed: int = 0, shape: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``(x_T [batch, T, A], z [n, batch, T, A])``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n + 1, batch, *shape, generator=generator, dtype=dtype)
    return noise[0], noise[1:]
