"""Exactly K rounds per plan, continued from the last plan.

The idea is the real-time iteration of nonlinear model predictive control (Diehl et al. 2005): a
solver that is asked again and again for nearly the same problem needs few iterations if it starts
from its last answer, moved along by what has been executed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count
from ..types import Noise, Walk
from .sequential import Sequential
from .tableau import Tableau
from .walk import BoundDenoise, Evaluate, Linear, evaluate_all


@dataclass(frozen=True)
class Realtime:
    """K rounds of ``D <- D(drift + B D)`` over all nodes: constant latency, no stopping rule.

    Without a ``start`` (a first plan) there is nothing to continue: that plan is sampled
    sequentially, in N rounds.
    """

    rounds: int = 2
    evaluate: Evaluate = evaluate_all

    def __post_init__(self) -> None:
        require_count(rounds=self.rounds)

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        if start is None:
            return Sequential()(denoise, tableau, noise)
        linear, n, batch = Linear(tableau, noise), tableau.n_nodes, len(noise.x_T)
        t = linear.timesteps[:, None].expand(n, batch)
        active = torch.ones_like(t, dtype=torch.bool)
        x0_hats = start
        for _ in range(self.rounds):
            x = linear.drift[:n] + torch.tensordot(linear.B[:n], x0_hats, dims=1)
            x0_hats = self.evaluate(denoise, x, t, active)
        rounds = torch.full((batch,), self.rounds, device=noise.x_T.device)
        return Walk(linear.node(n, x0_hats), x0_hats, noise, rounds, evaluations=rounds * n)
