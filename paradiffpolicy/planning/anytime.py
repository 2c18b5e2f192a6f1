"""Plans within a time budget: the best sampler that is fast enough here, or as many rounds as there is
time for.

How long a sampler takes on this machine is measured at the start, and the first in the list that fits
the budget plans.  Where none does, the last one's table is walked round by round: every round of Picard's
iteration over all nodes leaves a whole plan, so whenever the time is over the plan at hand is the answer,
and by how much its last round still changed it says how far it is from done.
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

    A first plan, which has nothing to continue, may take longer where it is walked round by round: it is
    the last policy's own.

    Args:
        policies: the same weights under several samplers, the best first.
        budget: seconds per plan.
        clock: times them.
        repeats: plans per sampler that are timed at the start; the slowest of them counts.
        settled: a change of the executed actions, in the environment's units, under which more rounds
            are not worth their time.

    Attributes:
        latencies: seconds of each policy and, last, of one round; empty before ``warm_up``.

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
        last = self.policies[-1]
        tableau = last.sampler.tableau
        self.one_round = last.with_sampler(Sampler(tableau, RTI(iterations=1), warm_start_same_noise))
        self.latencies: list[float] = []

    @property
    def spec(self) -> PolicySpec:
        return self.policies[0].spec

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> Anytime:
        """Makes what the first plans need, and times every sampler; this."""
        self.latencies = [
            self._timed(policy, batch, committed=committed) for policy in [*self.policies, self.one_round]
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
        for policy, latency in zip(self.policies, self.latencies[:-1], strict=True):
            if latency <= self.budget:
                return policy
        return None

    def plan(
        self,
        observation_window: Any,
        previous: Plan | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan:
        """As ``Policy.plan``, within the budget; ``Plan.residual`` is there if it was walked round by
        round."""
        deadline = self.clock.now() + self.budget
        policy = self.chosen()
        if previous is not None and previous.solution.x0_hats.shape[0] != self._nodes(policy):
            previous = None  # another table's walk
        given: dict[str, Any] = {"generator": generator, "committed": committed}
        if policy is not None:
            return policy.plan(observation_window, previous, executed_steps=executed_steps, **given)
        if previous is None:
            return self.policies[-1].plan(observation_window, None, **given)
        plan = self.one_round.plan(observation_window, previous, executed_steps=executed_steps, **given)
        moved = self.spec.n_action_steps if executed_steps is None else executed_steps
        residual, iterations = _change(plan, previous, moved), 1
        while self.clock.now() + self.latencies[-1] <= deadline and bool((residual > self.settled).any()):
            # The same noise, and nothing executed in between: one round more.
            further = self.one_round.plan(observation_window, plan, executed_steps=0, **given)
            plan, residual, iterations = further, _change(further, plan, 0), iterations + 1
        solution = plan.solution
        solution = replace(
            solution, iterations=solution.iterations * iterations, nfe=solution.nfe * iterations
        )
        return replace(plan, solution=solution, residual=residual)

    def _nodes(self, policy: Policy | None) -> int:
        return (policy or self.one_round).sampler.tableau.n_nodes


def _change(plan: Plan, before: Plan, moved: int) -> Tensor:
    """``[batch]``: the largest difference between executed actions of two plans, ``moved`` steps apart,
    where they overlap."""
    executed = plan.executed
    stop = min(executed.stop, plan.actions.shape[1] - moved)
    if stop <= executed.start:
        return torch.full((len(plan.actions),), torch.inf)
    old = before.actions[:, executed.start + moved : stop + moved]
    return (plan.actions[:, executed.start : stop] - old).abs().flatten(1).amax(dim=1).cpu()
