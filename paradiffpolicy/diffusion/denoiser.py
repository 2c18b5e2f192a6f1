r"""One convention for every network: ``x0_hat = D(x_t, t)``.

A network predicts epsilon, the sample, or v; which one, and the clipping of the result, is known
here and nowhere else.

===========  ============================================  =======================
prediction   target for ``x_t = alpha x_0 + sigma eps``     x0_hat from the output o
===========  ============================================  =======================
epsilon      ``eps``                                       ``(x_t - sigma o) / alpha``
sample       ``x_0``                                       ``o``
v            ``alpha eps - sigma x_0`` (Salimans & Ho 22)  ``alpha x_t - sigma o``
===========  ============================================  =======================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, nearest
from .schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t [batch, T, A], t [batch], condition [batch, G]) -> [batch, T, A]``."""


@dataclass(frozen=True)
class Prediction:
    """How a training target is made, and how x0 comes back from the network's output."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """``(x_0, eps, alpha, sigma) -> target``."""
    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """``(x_t, output, alpha, sigma) -> x_0``."""


PREDICTIONS = {
    "epsilon": Prediction(
        target=lambda x0, eps, alpha, sigma: eps,
        to_x0=lambda x, output, alpha, sigma: (x - sigma * output) / alpha,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha, sigma: x0,
        to_x0=lambda x, output, alpha, sigma: output,
    ),
    "v": Prediction(
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        to_x0=lambda x, output, alpha, sigma: alpha * x - sigma * output,
    ),
}


def prediction_named(name: str) -> Prediction:
    if name not in PREDICTIONS:
        raise InputError(f"unknown prediction type {name!r}{nearest(name, PREDICTIONS)}")
    return PREDICTIONS[name]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """``[batch]`` to ``[batch, 1, …, 1]`` in ``like``'s dtype, to multiply ``[batch, T, A]``."""
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True)
class Denoiser:
    """A network as ``x0_hat = D(x_t, t, condition)``.

    Attributes:
        network: the conditional network.
        schedule: the schedule that it was trained on.
        prediction: a name in ``PREDICTIONS``.
        clip: bound of ``|x0_hat|`` in normalised units (diffusion_policy: 1), or None.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: str = "epsilon"
    clip: float | None = 1.0

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``x`` ``[batch, T, A]``, ``t`` ``[batch]`` int64, ``condition`` ``[batch, G]``."""
        alpha, sigma = per_row(self.schedule.alpha(t), x), per_row(self.schedule.sigma(t), x)
        output = self.network(x, t, condition)
        x0 = prediction_named(self.prediction).to_x0(x, output, alpha, sigma)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def bind(self, condition: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Fixes ``condition`` ``[batch, G]`` for one plan; the result is a ``sampling.walk.BoundDenoise``."""

        def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
            return self(x, t, condition.index_select(0, element))

        return denoise


def denoising_loss(
    network: Network,
    schedule: NoiseSchedule,
    prediction: str,
    x0: Tensor,
    condition: Tensor,
    t: Tensor,
    eps: Tensor,
) -> Tensor:
    """Mean squared error to the prediction target (Ho et al. 2020, equation 14).

    Args:
        x0, eps: clean actions and the noise, ``[batch, T, A]``.
        condition: ``[batch, G]``.
        t: ``[batch]`` int64.
    """
    alpha, sigma = per_row(schedule.alpha(t), x0), per_row(schedule.sigma(t), x0)
    target = prediction_named(prediction).target(x0, eps, alpha, sigma)
    output = network(alpha * x0 + sigma * eps, t, condition)
    return torch.nn.functional.mse_loss(output.float(), target)
