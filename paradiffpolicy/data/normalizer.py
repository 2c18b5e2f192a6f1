"""Per-dimension affine maps between data units and [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..types import ByValue, require_real

RESOLVED = 2**17
"""So many parts of a half range must single precision tell apart, or raw values are in double precision."""


@dataclass(frozen=True, eq=False)
class Normalizer(ByValue):
    """``normalized = (raw - middle) * scale``, per dimension of the last axis, in float64, the middle first:
    raw values may be far from zero, next to how much they vary, as encoder counts, UTM coordinates and
    timestamps are.  What is stored is ``offset = -middle * scale``.

    Raises:
        InputError: they aren't as many finite numbers each, or a scale is 0.

    Attributes:
        scale, offset: ``[dim]`` float64.
        reach: ``[dim]`` float64, how far from its middle a raw value may come back; infinite, except for
            dimensions that didn't vary in the data.
    """

    scale: Tensor
    offset: Tensor
    reach: Tensor = field(default_factory=lambda: torch.tensor([math.inf]))

    def __post_init__(self) -> None:
        require_real(scale=self.scale, offset=self.offset, reach=self.reach)
        dim = self.scale.shape
        if len(dim) != 1 or self.offset.shape != dim or self.reach.shape not in (dim, (1,)):
            raise InputError(
                f"a normalizer's scale {tuple(dim)}, offset {tuple(self.offset.shape)} and reach "
                f"{tuple(self.reach.shape)} must be as many numbers each"
            )
        for name in ("scale", "offset", "reach"):
            value = getattr(self, name).double().expand_as(self.scale)
            object.__setattr__(self, name, value)
        usable = self.scale.isfinite() & (self.scale != 0) & self.offset.isfinite() & (self.reach >= 0)
        if not usable.all():
            column = int(usable.logical_not().nonzero()[0])
            raise InputError(f"dimension {column} of a normalizer: its scale is 0, or not all is finite")

    @cached_property
    def middle(self) -> Tensor:
        """``[dim]`` float64, the raw values that are 0 when normalised."""
        return -self.offset / self.scale

    @cached_property
    def raw_dtype(self) -> torch.dtype:
        """The precision in which raw values come back: float32, or float64 where that would round a constant,
        or what varies far from zero (see ``RESOLVED``)."""
        rounded = (self.reach == 0) & (self.middle.float().double() != self.middle)
        coarse = self.reach.isinf() & (self.offset.abs() > 2**24 / RESOLVED)
        return torch.float64 if (rounded | coarse).any() else torch.float32

    @staticmethod
    def fit(data: Tensor, min_range: float = 1e-4) -> Normalizer:
        """Maps each dimension's minimum to -1 and its maximum to 1.

        Args:
            data: ``[..., dim]``.
            min_range: dimensions of a smaller range are only centred, so that noise isn't amplified, and
                come back within their range.

        Raises:
            InputError: there are no data, or their range isn't finite.
        """
        require_real(data=data)
        if data.ndim == 0 or data.numel() == 0:
            raise InputError(f"data {tuple(data.shape)} have no values to fit a normalizer to")
        flat = data.reshape(-1, data.shape[-1]).double()
        low, high = flat.min(dim=0).values, flat.max(dim=0).values
        constant = high - low < min_range
        scale = torch.where(constant, 1.0, 2.0 / torch.where(constant, 1.0, high - low))
        reach = torch.where(constant, (high - low) / 2, math.inf)
        return Normalizer(scale, -scale * (low + high) / 2, reach)

    def normalize(self, raw: Tensor) -> Tensor:
        """``[..., dim]`` to float32 ``[..., dim]``."""
        return ((raw.double() - self.middle) * self.scale).float()

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """``[..., dim]`` to ``raw_dtype`` ``[..., dim]``."""
        from_middle = (normalized.double() / self.scale).clamp(-self.reach, self.reach)
        return (self.middle + from_middle).to(self.raw_dtype)

    def to(self, device: torch.device | str) -> Normalizer:
        """The same on another device."""
        return Normalizer(self.scale.to(device), self.offset.to(device), self.reach.to(device))

    def to_dict(self) -> dict[str, list[float | None]]:
        """JSON values."""
        reach = [value if math.isfinite(value) else None for value in self.reach.tolist()]
        return {"scale": self.scale.tolist(), "offset": self.offset.tolist(), "reach": reach}

    @staticmethod
    def from_dict(values: Mapping[str, Any], dim: int) -> Normalizer:
        """From ``to_dict``'s values; older ones lack ``reach``.

        Raises:
            InputError: they aren't ``dim`` finite numbers each.
        """
        parts = {"reach": [None] * dim, **values}
        usable = {"scale": lambda value: value != 0, "offset": lambda value: True, "reach": lambda v: v >= 0}
        for name in parts:
            if name not in usable:
                raise InputError(f"a normalizer has no {name!r:.40}{nearest(name, usable)}")
        for name, allowed in usable.items():
            part = parts.get(name)
            if not isinstance(part, list) or len(part) != dim:
                raise InputError(f"{name} must be a list of {dim} numbers")
            for value in part:
                if value is None and name == "reach":
                    continue
                if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
                    raise InputError(f"{name} has {value!r:.40}, which is no number that it may have")
                if not math.isfinite(value):
                    raise InputError(f"{name} has {value}: its numbers must be finite")
            numbers = [math.inf if value is None else float(value) for value in part]
            parts[name] = torch.tensor(numbers, dtype=torch.float64)
        return Normalizer(parts["scale"], parts["offset"], parts["reach"])
