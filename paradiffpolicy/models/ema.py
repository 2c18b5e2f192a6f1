"""Exponential moving average of a network's weights, with diffusion_policy's warm-up."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, inv_gamma: float = 1.0, power: float = 0.75, max_value: float = 0.9999) -> float:
    """Decay after optimiser step ``step`` (1-based): ``1 - (1 + k / inv_gamma) ** -power`` with
    ``k = step - 1``; 0 on the first step, so that the average starts from trained weights."""
    k = max(0, step - 1)
    return 0.0 if k == 0 else min(max_value, 1.0 - (1.0 + k / inv_gamma) ** -power)


class EMA:
    """Holds ``network``, a copy whose weights are the running average.

    The decay is a function of the step that is passed in: nothing but the weights needs saving.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = ema_decay(step)
        averages: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(averages, list(network.parameters()), 1.0 - decay)
