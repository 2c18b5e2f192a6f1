"""The reference driver: one node after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Noise, Solution
from .driver import IterativeDriver, Linear, NodeDenoise, Solve, State
from .tableau import Tableau


@dataclass(frozen=True)
class Sequential(IterativeDriver):
    """Computes ``D_i = D(x_i)`` for every i in turn: N iterations of one node each; ignores ``guess``."""

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        return SequentialSolve(tableau, like)


class SequentialSolve(Solve):
    """Iteration i is node i."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        self.linear = Linear(tableau, like)
        self.count = self.limit = tableau.n_nodes

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        drift = self.linear.drift(noise)
        return {
            "drift": drift,
            "x0_hats": torch.zeros_like(drift[:-1]),
            "node": torch.zeros(1, dtype=torch.int64, device=drift.device),
        }

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        node, drift, x0_hats = state["node"], state["drift"], state["x0_hats"]
        row = self.linear.B.index_select(0, node)
        x = drift.index_select(0, node)[0] + (row @ x0_hats.flatten(1)).view_as(drift[0])
        element = torch.arange(x.shape[0], device=x.device)
        output = denoise(x, node.expand(x.shape[0]), element)
        return {**state, "x0_hats": x0_hats.index_copy(0, node, output[None]), "node": node + 1}

    def done(self, state: State) -> Tensor:
        return state["node"][0] >= self.limit

    def finish(self, noise: Noise, state: State) -> Solution:
        sample = self.linear.sample(state["drift"], state["x0_hats"])
        calls = torch.full((sample.shape[0],), self.limit, device=sample.device)
        return Solution(sample, state["x0_hats"], noise, iterations=calls, nfe=calls)
