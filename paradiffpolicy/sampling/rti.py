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
from .driver import Evaluate, Linear, NodeDenoise, RoundDriver, Rounds, State, evaluate_all


@dataclass(frozen=True)
class Realtime(RoundDriver):
    """K rounds of ``D <- D(drift + B D)`` over all nodes: constant latency, no stopping rule.

    Without a ``start`` (a first plan) there is nothing to continue: that plan is sampled
    sequentially, in N rounds.
    """

    rounds: int = 2
    evaluate: Evaluate = evaluate_all

    def __post_init__(self) -> None:
        require_count(rounds=self.rounds)

    def on(self, tableau: Tableau, like: Tensor, started: bool) -> Rounds:
        return RealtimeRounds(self, tableau, like) if started else Sequential().on(tableau, like, started)


class RealtimeRounds(Rounds):
    """Every round is all nodes."""

    def __init__(self, driver: Realtime, tableau: Tableau, like: Tensor) -> None:
        self.linear, self.evaluate = Linear(tableau, like), driver.evaluate
        self.count = self.limit = driver.rounds
        self.nodes = torch.arange(tableau.n_nodes, device=like.device)[:, None]

    def begin(self, noise: Noise, start: Tensor | None) -> State:
        assert start is not None
        drift = self.linear.drift(noise)
        return {"drift": drift, "x0_hats": start, "round": drift.new_zeros((), dtype=torch.int64)}

    def round(self, denoise: NodeDenoise, state: State) -> State:
        x = self.linear.all_nodes(state["drift"], state["x0_hats"])
        node = self.nodes.expand(x.shape[:2])
        active = torch.ones_like(node, dtype=torch.bool)
        outputs = self.evaluate(denoise, x, node, active)
        return {**state, "x0_hats": outputs, "round": state["round"] + 1}

    def done(self, state: State) -> Tensor:
        return state["round"] >= self.limit

    def finish(self, noise: Noise, state: State) -> Walk:
        sample = self.linear.sample(state["drift"], state["x0_hats"])
        rounds = torch.full((sample.shape[0],), self.limit, device=sample.device)
        return Walk(sample, state["x0_hats"], noise, rounds, evaluations=rounds * len(self.nodes))
