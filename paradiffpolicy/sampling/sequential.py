"""The reference driver: one node after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Noise, Walk
from .tableau import Tableau
from .walk import BoundDenoise, Linear


@dataclass(frozen=True)
class Sequential:
    """``for i: D_i = D(x_i)``: N rounds of one node each; ignores ``start``."""

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        linear, n, x_T = Linear(tableau, noise), tableau.n_nodes, noise.x_T
        element = torch.arange(len(x_T), device=x_T.device)
        x0_hats = x_T.new_zeros(n, *x_T.shape)
        for i in range(n):
            t = linear.timesteps[i].expand(len(x_T))
            x0_hats[i] = denoise(linear.node(i, x0_hats), t, element)
        calls = torch.full((len(x_T),), n, device=x_T.device)
        return Walk(linear.node(n, x0_hats), x0_hats, noise, rounds=calls, evaluations=calls)
