"""Problems with known answers: denoisers in closed form, to test and to measure solvers on."""

from __future__ import annotations

from torch import Tensor

from .denoiser import BoundDenoise, per_row
from .schedule import NoiseSchedule


def mixture_denoiser(schedule: NoiseSchedule, std: float = 0.2) -> BoundDenoise:
    """``E[x_0 | x_t]`` for an equal mixture of ``N(m, std^2)`` at m = -0.6, 0.1 and 0.7, for every
    number of the sample on its own; each batch element's means are shifted by 0.05 times its index,
    so that mixing up elements shows."""

    def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        alpha = per_row(schedule.alpha(t), x)[..., None]
        sigma = per_row(schedule.sigma(t), x)[..., None]
        means = x.new_tensor([-0.6, 0.1, 0.7]) + 0.05 * per_row(element, x)[..., None]
        variance = alpha**2 * std**2 + sigma**2
        centred = x[..., None] - alpha * means
        weights = (-(centred**2) / (2 * variance)).softmax(dim=-1)
        return (weights * (means + alpha * std**2 / variance * centred)).sum(dim=-1)

    return denoise
