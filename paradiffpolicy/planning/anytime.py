"""Plans within a time budget: by the best sampler that is fast enough on this machine, or by as many
iterations as there is time for.

Samplers are timed at the start, and the first in the list that fits the budget plans.  Where none does, the
last one's tableau is solved iteration by iteration: every Picard iteration over all nodes leaves a whole
plan, so the plan at hand when the time is over is the answer, and the change by its last iteration tells how
far it is from convergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..errors import InputError, require_count, require_positive
from ..policy import Policy
from ..sampling.rti import RTI
from ..sampling.sampler import Sampler
from ..sampling.warm_start import warm_start_same_noise
from ..types import Committed, Plan, PolicySpec


class Anytime:
    """Plans like a ``Policy``, each plan within a budget.

    A first plan may take longer where no sampler fits: it is the last policy's own.

    Args:
        policies: the same weights under several samplers, the best first.
        budget: seconds per plan.
        clock: times them.
        repeats: plans per sampler that are timed at the start; the slowest of them counts.
        settled: a change of the executed actions, in their units, below which iterations end early.

    Attributes:
        latencies: seconds of each policy and, last, of one iteration; empty before ``warm_up``.

    Raises:
        InputError: there is no policy, or a number is out of range.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        budget: float,
        clock: Clock,
        *,
        repeats: int = 5,
        settled: float = 0.0,
    ) -> None:
        if not policies:
            raise InputError("policies=[] names none: a plan needs at least one")
        require_positive(budget=budget)
        require_count(repeats=repeats)
        self.policies, self.budget, self.clock = list(policies), budget, clock
        self.repeats, self.settled = repeats, settled
        one = Sampler(policies[-1].sampler.tableau, RTI(iterations=1), warm_start_same_noise)
        self.one_iteration = policies[-1].with_sampler(one)
        self.latencies: list[float] = []

    @property
    def spec(self) -> PolicySpec:
        return self.policies[0].spec

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> Anytime:
        """Warms up and times every sampler; returns itself."""
        self.latencies = [
            self._timed(policy, batch, committed=committed) for policy in [*self.policies, self.one_iteration]
        ]
        return self

    def _timed(self, policy: Policy, batch: int, *, committed: bool) -> float:
        """Seconds of a plan that continues another."""
        policy.warm_up(batch, committed=committed)
        window = policy.middle_window(batch)
        generators = [torch.Generator().manual_seed(0) for _ in range(batch)]
        plan, slowest = policy.plan(window, generator=generators), 0.0
        for _ in range(self.repeats):
            begun = self.clock.now()
            plan = policy.plan(window, plan, generator=generators)
            slowest = max(slowest, self.clock.now() - begun)
        return slowest

    def chosen(self) -> Policy | None:
        """The first policy that is fast enough; None: none is."""
        if not self.latencies:
            self.warm_up()
        timed = zip(self.policies, self.latencies[:-1], strict=True)
        return next((policy for policy, latency in timed if latency <= self.budget), None)

    def plan(
        self,
        observation_window: Any,
        previous: Plan | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan:
        """As ``Policy.plan``, within the budget; with ``Plan.residual`` if it was solved by iterations."""
        deadline = self.clock.now() + self.budget
        policy = self.chosen()
        nodes = (policy or self.one_iteration).sampler.tableau.n_nodes
        if previous is not None and len(previous.solution.x0_hats) != nodes:
            previous = None  # another tableau's solution
        given: dict[str, Any] = {"generator": generator, "committed": committed}
        if policy is not None:
            return policy.plan(observation_window, previous, executed_steps=executed_steps, **given)
        if previous is None:
            return self.policies[-1].plan(observation_window, None, **given)
        plan = self.one_iteration.plan(observation_window, previous, executed_steps=executed_steps, **given)
        moved = self.spec.n_action_steps if executed_steps is None else executed_steps
        residual, iterations = _change(plan, previous, moved), 1
        while self.clock.now() + self.latencies[-1] <= deadline and bool((residual > self.settled).any()):
            # The same noise, and nothing executed in between: one more iteration.
            further = self.one_iteration.plan(observation_window, plan, executed_steps=0, **given)
            plan, residual, iterations = further, _change(further, plan, 0), iterations + 1
        solution = plan.solution
        solution = replace(
            solution, iterations=solution.iterations * iterations, nfe=solution.nfe * iterations
        )
        return replace(plan, solution=solution, residual=residual)


def _change(plan: Plan, before: Plan, moved: int) -> Tensor:
    """``[batch]``: the largest difference between executed actions of two plans, ``moved`` steps apart,
    where they overlap."""
    executed = plan.executed
    stop = min(executed.stop, plan.actions.shape[1] - moved)
    if stop <= executed.start:
        return torch.full((len(plan.actions),), torch.inf)
    old = before.actions[:, executed.start + moved : stop + moved]
    return (plan.actions[:, executed.start : stop] - old).abs().flatten(1).amax(dim=1).cpu()
