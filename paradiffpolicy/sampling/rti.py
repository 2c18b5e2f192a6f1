"""Real-time iteration: exactly K iterations per plan, warm-started from the last plan.

The idea is the real-time iteration of nonlinear model predictive control (Diehl et al. 2005): a
solver that meets nearly the same problem again and again needs few iterations if it starts from its
last solution, moved along by the executed steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import require_count
from ..types import Noise, Solution
from .driver import Evaluate, IterativeDriver, Linear, NodeDenoise, Solve, State, evaluate_all
from .sequential import Sequential
from .tableau import Tableau


@dataclass(frozen=True)
class RTI(IterativeDriver):
    """Iterates ``D <- D(drift + B D)`` K times over all nodes: no stopping rule, so constant latency, but for
    plans without a ``guess``.

    A plan without one (the first, or the first after a reset or a long gap) is sampled sequentially, in N
    iterations: time for that must be budgeted.
    """

    usual_start: ClassVar[str] = "warm_same_noise"

    iterations: int = 2
    evaluate: Evaluate = field(default=evaluate_all, repr=False)

    def __post_init__(self) -> None:
        require_count(iterations=self.iterations)

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        return RTISolve(self, tableau, like) if warm else Sequential().on(tableau, like, warm)


class RTISolve(Solve):
    """Every iteration calls the network on all nodes."""

    def __init__(self, driver: RTI, tableau: Tableau, like: Tensor) -> None:
        self.linear, self.evaluate = Linear(tableau, like), driver.evaluate
        self.count = self.limit = driver.iterations
        self.nodes = torch.arange(tableau.n_nodes, device=like.device)[:, None]

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        assert guess is not None
        drift = self.linear.drift(noise)
        return {"drift": drift, "x0_hats": guess, "iteration": drift.new_zeros((), dtype=torch.int64)}

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        x = self.linear.all_nodes(state["drift"], state["x0_hats"])
        node = self.nodes.expand(x.shape[:2])
        active = torch.ones_like(node, dtype=torch.bool)
        outputs = self.evaluate(denoise, x, node, active)
        return {**state, "x0_hats": outputs, "iteration": state["iteration"] + 1}

    def done(self, state: State) -> Tensor:
        return state["iteration"] >= self.limit

    def finish(self, noise: Noise, state: State) -> Solution:
        sample = self.linear.sample(state["drift"], state["x0_hats"])
        iterations = torch.full((sample.shape[0],), self.limit, device=sample.device)
        return Solution(sample, state["x0_hats"], noise, iterations, nfe=iterations * len(self.nodes))
