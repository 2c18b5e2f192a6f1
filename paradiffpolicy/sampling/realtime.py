"""Exactly K rounds per plan, continued from the last plan.

The idea is the real-time iteration of nonlinear model predictive control (Diehl et al. 2005): a
solver that is asked again and again for nearly the same problem needs few iterations if it starts
from its last answer, moved along by what has been executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count
from ..types import Walk
from .sequential import Sequential
from .tableau import Tableau
from .walk import BoundDenoise, Linear, evaluate_all


@dataclass(frozen=True)
class Realtime:
    """K rounds of ``D <- D(drift + B D)`` over all nodes: constant latency, no stopping rule.

    Without a ``start`` (a first plan) there is nothing to continue: that plan is sampled
    sequentially, in N rounds.
    """

    rounds: int = 2

    def __post_init__(self) -> None:
        require_count(rounds=self.rounds)

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, x_T: Tensor, z: Tensor, start: Tensor | None = None
    ) -> Walk:
        if start is None:
            return Sequential()(denoise, tableau, x_T, z)
        linear, n, batch = Linear(tableau, x_T, z), tableau.n_nodes, len(x_T)
        t = linear.timesteps[:, None].expand(n, batch)
        active = torch.ones_like(t, dtype=torch.bool)
        x0_hats = start
        for _ in range(self.rounds):
            x = linear.drift[:n] + torch.tensordot(linear.B[:n], x0_hats, dims=1)
            x0_hats = evaluate_all(denoise, x, t, active)
        rounds = torch.full((batch,), self.rounds, device=x_T.device)
        return Walk(linear.node(n, x0_hats), x0_hats, x_T, z, rounds, evaluations=rounds * n)


def shifted(values: Tensor, steps: int, tail: Tensor) -> Tensor:
    """``values`` ``[..., T, A]`` moved ``steps`` towards the past; ``tail`` ``[..., steps, A]``
    fills the end."""
    return torch.cat((values[..., steps:, :], tail), dim=-2)


def warm_start(
    previous: Walk, executed_steps: int, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x_T, z, start)`` that continue ``previous`` after ``executed_steps`` of its plan.

    The x0_hats and the noise move along the horizon together, so that what is left of the last
    plan is nearly a fixed point already; x0_hats are extended by their last step, the noise by
    fresh noise from each batch element's generator.
    """
    n, batch, _, action_dim = previous.z.shape
    fresh = torch.stack(
        [torch.randn(n + 1, executed_steps, action_dim, generator=g, device=g.device) for g in generators],
        dim=1,
    ).to(previous.x_T)
    last = previous.x0_hats[..., -1:, :].expand(n, batch, executed_steps, action_dim)
    return (
        shifted(previous.x_T, executed_steps, fresh[0]),
        shifted(previous.z, executed_steps, fresh[1:]),
        shifted(previous.x0_hats, executed_steps, last),
    )
