r"""Which action runs now, where plans overlap.

A plan made from tick k's observation holds an action for k and for every step after it.  It arrives L
ticks late; its first L actions are past then, and dropped::

    tick        k        k+L            k+8        k+8+L
    old plan  ..a a a a a a a a          |
    new plan    - - - - -a a a a a a a a a a a a
    next plan                            - - - - -a a a ...

``Switch`` goes over to a plan when it arrives.  ``Ensemble`` averages all that have something to say
(temporal ensembling, Zhao et al. 2023, ACT).  ``Commit`` switches too, but has each plan made so that it
fits the one before: it keeps what that will execute until it arrives, and less and less of what comes
after (real-time chunking, Black et al. 2025, by inpainting instead of a gradient).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..types import PolicySpec
from .planner import PlanReply


@dataclass(frozen=True)
class Grid:
    """Where a plan's steps lie in the loop's ticks.

    Attributes:
        spec: of the policy.
        stride: ticks per step.
    """

    spec: PolicySpec
    stride: int

    def step(self, plan_tick: int, tick: int) -> int:
        """The step of a plan for ``plan_tick`` that is due at ``tick``; -1 if it has none."""
        step = (tick - plan_tick) // self.stride + self.spec.n_obs_steps - 1
        return step if 0 <= step < self.spec.horizon else -1


class Blender(Protocol):
    """Takes plans as they arrive, and says which action is due.

    Attributes:
        commits: whether plans are asked for with something committed.
        plan: the newest that acts, or None.
    """

    commits: bool
    plan: PlanReply | None

    def add(self, plan: PlanReply) -> None:
        """Takes a plan that has arrived."""
        ...

    def act(self, tick: int, out: NDArray[np.float64]) -> int:
        """Writes the action for ``tick`` to ``out`` ``[A]``; the plan's step, or -1: there is none."""
        ...

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """For a plan that will be made for ``tick`` and arrive ``lateness`` ticks later: the actions
        ``[T, A]`` that it should keep, and their weight ``[T]``."""
        ...

    def clear(self) -> None:
        """Forgets all plans."""
        ...


Blending = Callable[[Grid], Blender]
"""A way of joining plans: a joiner's class, or a ``functools.partial`` of it."""


class Latest:
    """The newest plan acts from when it arrives."""

    commits = False

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.plan: PlanReply | None = None

    def add(self, plan: PlanReply) -> None:
        if self.plan is None or plan.tick >= self.plan.tick:
            self.plan = plan

    def act(self, tick: int, out: NDArray[np.float64]) -> int:
        if self.plan is None:
            return -1
        step = self._grid.step(self.plan.tick, tick)
        if step >= 0:
            out[:] = self.plan.actions[step]
        return step

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        raise NotImplementedError("only a joiner that commits is asked")

    def clear(self) -> None:
        self.plan = None


class TemporalEnsemble(Latest):
    """The mean of all plans' actions for the tick, the i-th oldest weighted ``exp(-decay i)``.

    Args:
        decay: m there; 0 weights all alike, more leans to the old ones.
    """

    def __init__(self, grid: Grid, decay: float = 0.01) -> None:
        super().__init__(grid)
        self._decay = decay
        self._plans: deque[PlanReply] = deque(maxlen=grid.spec.horizon)

    def add(self, plan: PlanReply) -> None:
        super().add(plan)
        self._plans.append(plan)

    def act(self, tick: int, out: NDArray[np.float64]) -> int:
        newest, weights, i = -1, 0.0, 0
        for plan in self._plans:
            step = self._grid.step(plan.tick, tick)
            if step < 0:
                continue
            if not i:
                out[:] = 0.0
            weight = math.exp(-self._decay * i)
            out += weight * plan.actions[step]
            newest, weights, i = step, weights + weight, i + 1
        if i:
            out /= weights
        return newest

    def clear(self) -> None:
        super().clear()
        self._plans.clear()


class RealTimeChunking(Latest):
    """``Switch``, with plans that fit the ones before.

    Weights are 1 for what will be executed before the plan arrives (and for what has been, as far as
    the plan reaches back), and decay over the ``overlap`` steps after it (Black et al. 2025, equation
    5, with ``overlap`` steps in place of the rest of the old plan).

    Args:
        overlap: steps over which the weights decay; 0: none.
    """

    commits = True

    def __init__(self, grid: Grid, overlap: int = 2) -> None:
        super().__init__(grid)
        spec = grid.spec
        self._zeros = np.zeros(spec.horizon)
        # Ticks from a plan's own to its steps.
        self._ahead = (np.arange(spec.horizon) - spec.n_obs_steps + 1) * grid.stride
        self._decay = np.array([decayed(beyond, overlap) for beyond in range(spec.horizon + 2)])

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        spec, stride = self._grid.spec, self._grid.stride
        if self.plan is None:
            return np.zeros((spec.horizon, spec.action_dim)), self._zeros
        steps = (tick + self._ahead - self.plan.tick) // stride + spec.n_obs_steps - 1
        has = (steps >= 0) & (steps < spec.horizon)
        beyond = -((delay - 1 - self._ahead) // stride)  # steps past the last that is certain, rounded up
        weight = self._decay[np.clip(beyond, 0, spec.horizon)] * has
        return self.plan.actions[np.clip(steps, 0, spec.horizon - 1)], weight


def decayed(beyond: int, overlap: int) -> float:
    """1 up to the last certain step, 0 from ``overlap`` steps after it, and exponentially less
    between."""
    if beyond <= 0:
        return 1.0
    c = (overlap + 1 - beyond) / (overlap + 1)
    return max(c * (math.exp(c) - 1) / (math.e - 1), 0.0) if c > 0 else 0.0


BLENDINGS: dict[str, Callable[..., Blender]] = {
    "latest": Latest,
    "temporal_ensemble": TemporalEnsemble,
    "rtc": RealTimeChunking,
}
"""Every way by name."""
