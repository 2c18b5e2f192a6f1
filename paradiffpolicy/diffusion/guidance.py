r"""Guidance: a denoiser that leans towards its condition, or towards a classifier's verdict.

Each function returns a ``BoundDenoise``, so guidance works under every driver.  It combines x0_hats
before the threshold.  All predictions are affine in the network's output with the same coefficients, so
combining x0_hats is the same as combining epsilons, as the papers have it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import LARGEST, InputError, is_number
from ..types import require_real
from .denoiser import BoundDenoise, Denoiser, per_row


def check_scale(scale: float | Tensor | None) -> None:
    """Raises ``InputError`` unless it is finite, a number or ``[batch]``, or None."""
    if isinstance(scale, Tensor):
        require_real(guidance_scale=scale)
        if scale.ndim > 1 or not scale.float().isfinite().all():
            raise InputError(f"guidance_scale {tuple(scale.shape)} must be [batch] finite numbers")
    elif scale is not None and not (is_number(scale) and abs(scale) <= LARGEST):
        raise InputError(f"guidance_scale={scale!r:.40} must be a number, a tensor [batch], or null")


def classifier_free(denoiser: Denoiser, condition: Tensor, blank: Tensor, scale: Tensor) -> BoundDenoise:
    """``D_blank + scale (D_condition - D_blank)``, both from one batched network call (Ho and
    Salimans 2022).

    Args:
        condition: ``[batch, G]``, or what a ``NodeDenoiser`` observed of it.
        blank: the same of what stands for no condition.
        scale: ``[batch]``: 0 leaves the condition out, 1 is the network as it is, more exaggerates.
    """

    def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        both = torch.cat((condition.index_select(0, element), blank.index_select(0, element)))
        given, without = denoiser.raw(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
        here = per_row(scale.index_select(0, element), x)
        return denoiser.threshold(without + here * (given - without))

    return denoise


def committed(denoise: BoundDenoise, actions: Tensor, weight: Tensor) -> BoundDenoise:
    """``(1 - w) D + w a``: a sample that keeps given actions, and fits the others to them.

    The inpainting of diffusion models (Sohl-Dickstein et al. 2015, section 2.5; Janner et al. 2022,
    section 3.3) in x0-space: replacing what the network says, not what it sees, leaves every solver's
    steps as they are, so this works under every driver.  Where w is 1, every solver that ends at the
    clean sample gives back the action itself.

    Args:
        actions: ``[batch, T, A]``, normalised.
        weight: ``[batch, T]``, w.
    """

    def denoise_around(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        w = weight.index_select(0, element).unsqueeze(-1)
        return (1 - w) * denoise(x, t, element) + w * actions.index_select(0, element)

    return denoise_around


LogProbability = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t [rows, T, A], t [rows], element [rows]) -> log p(y | x_t) [rows]``, differentiable."""


def classifier(
    denoiser: Denoiser, condition: Tensor, log_probability: LogProbability, scale: Tensor
) -> BoundDenoise:
    """``D + scale sigma^2 / alpha grad log p(y | x_t)`` (Dhariwal and Nichol 2021, algorithm 2, for
    ``eps - scale sigma grad``).

    Args:
        condition: ``[batch, G]``, of the network itself.
        log_probability: a classifier, or any differentiable reward, of noisy samples.
        scale: ``[batch]``.
    """

    def denoise(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        alpha, sigma = denoiser.levels(t)
        with torch.inference_mode(mode=False), torch.enable_grad():
            # Inference tensors take no gradient: their clones do.
            inputs = x.clone().requires_grad_()
            total = log_probability(inputs, t.clone(), element.clone()).sum()
            (gradient,) = torch.autograd.grad(total, inputs)
        x0 = denoiser.raw(x, t, condition.index_select(0, element))
        return denoiser.threshold(x0 + per_row(scale[element] * sigma**2 / alpha, x) * gradient)

    return denoise
