"""The reference driver: one node after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Walk
from .tableau import Tableau
from .walk import BoundDenoise, Linear


@dataclass(frozen=True)
class Sequential:
    """``for i: D_i = D(x_i)``: N rounds of one node each; ignores ``start``."""

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, x_T: Tensor, z: Tensor, start: Tensor | None = None
    ) -> Walk:
        linear, n, batch = Linear(tableau, x_T, z), tableau.n_nodes, len(x_T)
        element = torch.arange(batch, device=x_T.device)
        x0_hats = x_T.new_zeros(n, *x_T.shape)
        for i in range(n):
            t = linear.timesteps[i].expand(batch)
            x0_hats[i] = denoise(linear.node(i, x0_hats), t, element)
        calls = torch.full((batch,), n, device=x_T.device)
        return Walk(linear.node(n, x0_hats), x0_hats, x_T, z, rounds=calls, evaluations=calls)
