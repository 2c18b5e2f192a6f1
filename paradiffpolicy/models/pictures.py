"""Operations on pictures, as tensors: resizing, and colour jitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, is_number

WHITE = 255.0
"""The largest value of a channel."""
GREY = (0.2989, 0.587, 0.114)
"""Of red, green and blue in a grey (ITU-R BT.601), as torchvision has them."""


def resizing(old: int, new: int, antialias: bool = True) -> Tensor:
    """The matrix ``[new, old]`` that resizes one axis, bilinear, as torchvision's ``Resize`` does: it is
    linear, and one axis after the other."""
    # Two columns: of one alone, PyTorch 2.13 repeats the first row.
    units = torch.eye(old, device="cpu")[None, :, :, None].repeat(1, 1, 1, 2)
    resized = nn.functional.interpolate(units, (new, 2), mode="bilinear", antialias=antialias)
    return resized[0, :, :, 0].T.contiguous()


def require_strengths(jitter: Any) -> None:
    """Raises ``InputError`` unless it is three strengths, as ``jitter_factors`` takes them."""
    strengths = jitter if isinstance(jitter, tuple) else ()
    if len(strengths) != 3 or not all(is_number(each) and 0 <= each <= 10 for each in strengths):
        what = "[brightness, contrast, saturation], each from 0 to 10"
        raise InputError(f"encoder option jitter={jitter!r:.40} must be {what}")


def jitter_factors(strengths: Sequence[float], drawn: Tensor) -> Tensor:
    """Factors from ``1 - strength``, but not below 0, to ``1 + strength``, of numbers drawn from 0 to 1; each
    ``[..., 3]``, of brightness, contrast and saturation."""
    strength = drawn.new_tensor(strengths)
    low = (1 - strength).clamp(min=0)
    return low + (1 + strength - low) * drawn


def jittered(pictures: Tensor, factors: Tensor) -> Tensor:
    """Pictures with other colours, as torchvision's ``ColorJitter`` makes them, in this order::

        brightness    x = f x
        contrast      x = f x + (1 - f) m       m: the mean of the picture's grey
        saturation    x = f x + (1 - f) g       g: the pixel's grey

    each bounded to what a picture can be.

    Args:
        pictures: ``[rows, To, 3, H, W]``, from 0 to 255.
        factors: ``[rows, 3]``, the same for all pictures of a row.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None, None].unbind(dim=1)
    x = (pictures * brightness).clamp(0, WHITE)
    mean = _grey(x).mean(dim=(-2, -1), keepdim=True)
    x = (contrast * x + (1 - contrast) * mean).clamp(0, WHITE)
    return (saturation * x + (1 - saturation) * _grey(x)).clamp(0, WHITE)


def _grey(pictures: Tensor) -> Tensor:
    """``[..., 3, H, W]`` to ``[..., 1, H, W]``."""
    weights = pictures.new_tensor(GREY)[:, None, None]
    return (pictures * weights).sum(dim=-3, keepdim=True)
