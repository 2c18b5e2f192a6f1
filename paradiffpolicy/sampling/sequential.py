"""The reference driver: one node after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count
from ..types import Noise, Solution
from .driver import IterativeDriver, Linear, NodeDenoise, Solve, State
from .tableau import Tableau


@dataclass(frozen=True)
class Sequential(IterativeDriver):
    """Computes ``D_i = D(x_i)`` for every i in turn: N iterations of one node each.

    Attributes:
        warm_iterations: with a ``guess``, only so many of the last nodes are computed, those before stay as
            guessed; None: all N, and no guess is used.
    """

    warm_iterations: int | None = None

    def __post_init__(self) -> None:
        if self.warm_iterations is not None:
            require_count(warm_iterations=self.warm_iterations)

    @property
    def usual_start(self) -> str:  # type: ignore[override]
        """``renoised`` where the last plan is used at all."""
        return "cold" if self.warm_iterations is None else "renoised"

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        n, few = tableau.n_nodes, self.warm_iterations
        count = min(few, n) if warm and few is not None else n
        return SequentialSolve(tableau, like, count)


class SequentialSolve(Solve):
    """Every iteration computes the next node; the first is the ``count``-th from the end."""

    def __init__(self, tableau: Tableau, like: Tensor, count: int) -> None:
        self.linear = Linear(tableau, like)
        self.count = self.limit = count

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        drift, first = self.linear.drift(noise), self.linear.n - self.count
        if guess is None or not first:
            guess = torch.zeros_like(drift[:-1])
        node = torch.full((1,), first, dtype=torch.int64, device=drift.device)
        return {"drift": drift, "x0_hats": guess, "node": node}

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        node, drift, x0_hats = state["node"], state["drift"], state["x0_hats"]
        row = self.linear.B.index_select(0, node)
        x = drift.index_select(0, node)[0] + (row @ x0_hats.flatten(1)).view_as(drift[0])
        element = torch.arange(x.shape[0], device=x.device)
        output = denoise(x, node.expand(x.shape[0]), element)
        return {**state, "x0_hats": x0_hats.index_copy(0, node, output[None]), "node": node + 1}

    def done(self, state: State) -> Tensor:
        return state["node"][0] >= self.linear.n

    def finish(self, noise: Noise, state: State) -> Solution:
        sample = self.linear.sample(state["drift"], state["x0_hats"])
        calls = torch.full((sample.shape[0],), self.limit, device=sample.device)
        return Solution(sample, state["x0_hats"], noise, iterations=calls, nfe=calls)
