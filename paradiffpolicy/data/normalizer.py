"""Per-dimension affine maps between data units and [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """``normalized = raw * scale + offset``, per dimension of the last axis.

    Attributes:
        scale, offset: ``[dim]`` float32.
    """

    scale: Tensor
    offset: Tensor

    @staticmethod
    def fit(data: Tensor, min_range: float = 1e-4) -> Normalizer:
        """Maps each dimension's minimum to -1 and its maximum to 1.

        Args:
            data: ``[..., dim]``.
            min_range: dimensions of a smaller range are only centred, so that noise isn't amplified.
        """
        flat = data.reshape(-1, data.shape[-1]).double()
        low, high = flat.min(dim=0).values, flat.max(dim=0).values
        constant = high - low < min_range
        scale = torch.where(constant, 1.0, 2.0 / torch.where(constant, 1.0, high - low))
        return Normalizer(scale.float(), (-scale * (low + high) / 2).float())

    def normalize(self, raw: Tensor) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``."""
        return raw * self.scale + self.offset

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``."""
        return (normalized - self.offset) / self.scale

    def to(self, device: torch.device | str) -> Normalizer:
        """The same on another device."""
        return Normalizer(self.scale.to(device), self.offset.to(device))

    def to_dict(self) -> dict[str, list[float]]:
        """JSON values."""
        return {"scale": self.scale.tolist(), "offset": self.offset.tolist()}

    @staticmethod
    def from_dict(values: dict[str, list[float]]) -> Normalizer:
        """From ``to_dict``'s values."""
        return Normalizer(torch.tensor(values["scale"]), torch.tensor(values["offset"]))
