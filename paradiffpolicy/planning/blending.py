"""Chunk blending: which action runs now, where plans overlap.

A plan made from tick k's observation holds an action for k and for every step after it.  It arrives with a
delay of L ticks; the time of its first L actions has passed then, and they are skipped::

    tick        k        k+L            k+8        k+8+L
    old plan  ..a a a a a a a a          |
    new plan    - - - - -a a a a a a a a a a a a
    next plan                            - - - - -a a a ...

A blending of one's own is a class that takes a ``Grid``, most easily a subclass of ``Latest``.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, require_count
from ..registry import Registry
from ..types import PolicySpec
from .interpolation import Interpolator, held
from .request import PlanReply

ROUNDING = 1e-9
"""Steps; as near to a step a tick lies on it, whatever rates in floats make of it."""


@dataclass(frozen=True)
class Grid:
    """Maps the loop's ticks to a plan's steps, and to the commands between these.

    Attributes:
        spec: of the policy.
        stride: ticks per step; need not be a whole number.
        interpolator: gives the commands between steps; None: they are held.
    """

    spec: PolicySpec
    stride: float
    interpolator: Interpolator | None = None

    def steps(self, ticks: int) -> tuple[int, float]:
        """How many whole steps so many ticks are, and the fraction of a step that is left."""
        whole, left = divmod(ticks, self.stride)
        fraction = left / self.stride
        if fraction > 1 - ROUNDING:
            return int(whole) + 1, 0.0
        return int(whole), fraction if fraction > ROUNDING else 0.0

    def command(self, plan: PlanReply, tick: int) -> tuple[int, NDArray[np.float64] | None]:
        """The step of a plan that is due at ``tick``, and the command ``[A]`` then; ``-1, None`` if it has
        none."""
        whole, fraction = self.steps(tick - plan.tick)
        step = whole + self.spec.executed.start
        if not 0 <= step < self.spec.horizon:
            return -1, None
        return step, self.between(plan.actions, step, fraction)

    def runs(self, plan: PlanReply, start: int, stop: int) -> slice:
        """The steps of a plan that commands depend on in the ticks from ``start`` to before ``stop``."""
        first, last = (
            self.steps(tick - plan.tick)[0] + self.spec.executed.start for tick in (start, stop - 1)
        )
        return slice(first, last + 1 + bool(self.between.reach))

    @functools.cached_property
    def between(self) -> Interpolator:
        """The interpolator."""
        return self.interpolator or held(self.spec)


class Blender(Protocol):
    """Takes plans as they arrive, and gives the action that is due.

    Attributes:
        commits: whether plans are asked for with actions to keep.
        plan: the newest that acts, or None.
    """

    commits: bool
    plan: PlanReply | None

    def add(self, plan: PlanReply) -> None:
        """Takes a plan that has arrived."""
        ...

    def act(self, tick: int, out: NDArray[np.float64]) -> int:
        """Writes the action for ``tick`` to ``out`` ``[A]``; returns the plan's step, or -1: there is
        none.  Where the state is rolled forward (``forward``), it is asked about ticks to come, too."""
        ...

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The actions ``[T, A]`` that a plan for ``tick``, which arrives ``delay`` ticks later, should keep,
        and their weight ``[T]``."""
        ...

    def clear(self) -> None:
        """Forgets all plans."""
        ...


Blending = Callable[[Grid], Blender]
"""A way of blending plans: a blender's class, or a ``functools.partial`` of it."""


class Latest:
    """The newest plan acts from the moment it arrives."""

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
        step, command = self._grid.command(self.plan, tick)
        if command is not None:
            out[:] = command
        return step

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        raise NotImplementedError("a blender with commits=True must say what to keep")

    def clear(self) -> None:
        self.plan = None


class TemporalEnsemble(Latest):
    """Averages all plans' actions for the tick, the i-th oldest with weight ``exp(-decay i)`` (ACT, Zhao et
    al. 2023); ``decay`` is m in the paper: 0 weights all equally, a larger one favours the oldest.
    """

    def __init__(self, grid: Grid, decay: float = 0.01) -> None:
        super().__init__(grid)
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
            raise InputError(f"blending: {decay=} must be a number, not below 0")
        self._decay = decay
        self._plans: deque[PlanReply] = deque(maxlen=grid.spec.horizon)

    def add(self, plan: PlanReply) -> None:
        super().add(plan)
        self._plans.append(plan)

    def act(self, tick: int, out: NDArray[np.float64]) -> int:
        due = [self._grid.command(plan, tick) for plan in self._plans]
        acting = [(step, command) for step, command in due if command is not None]
        if not acting:
            return -1
        weights = np.exp(-self._decay * np.arange(len(acting)))
        out[:] = np.average([command for _, command in acting], axis=0, weights=weights)
        return acting[-1][0]

    def clear(self) -> None:
        super().clear()
        self._plans.clear()


class RealTimeChunking(Latest):
    """``Latest``, with plans that are made to fit the ones before: real-time chunking (Black et al. 2025), by
    inpainting instead of a gradient.

    Weights are 1 for the actions that will be executed before the plan arrives (and those that have been, as
    far as the plan reaches back), and decay over the ``overlap`` steps after them (equation 5 there, with
    ``overlap`` steps in place of the rest of the old plan).  Where commands are interpolated, the actions
    that they are on the way to count as executed, too.
    """

    commits = True

    def __init__(self, grid: Grid, overlap: int = 2) -> None:
        super().__init__(grid)
        if overlap != 0:
            require_count(overlap=overlap)
        spec = grid.spec
        self._zeros, self._steps = np.zeros(spec.horizon), np.arange(spec.horizon)
        self._decay = np.array([decayed(beyond, overlap) for beyond in range(spec.horizon + 2)])

    def commit(self, tick: int, delay: int) -> tuple[NDArray[Any], NDArray[Any]]:
        spec, grid = self._grid.spec, self._grid
        if self.plan is None:
            return np.zeros((spec.horizon, spec.action_dim)), self._zeros
        later, fraction = grid.steps(tick - self.plan.tick)
        steps = self._steps + later
        has = (steps >= 0) & (steps < spec.horizon)
        certain = grid.steps(delay - 1)[0] + spec.executed.start + (grid.between.reach if delay else 0)
        weight = self._decay[np.clip(self._steps - certain, 0, spec.horizon)] * has
        kept = self.plan.actions[np.clip(steps, 0, spec.horizon - 1)]
        if fraction and grid.between.reach:
            for k in np.flatnonzero(weight):
                kept[k] = grid.between(self.plan.actions, int(steps[k]), fraction)
        return kept, weight


class Prefix(RealTimeChunking):
    """Real-time chunking without an overlap, for policies that were trained to continue committed actions
    (``diffusion.prefix``): only the steps that will be executed before the plan arrives are committed.

    Raises:
        InputError: the policy wasn't trained so.
    """

    def __init__(self, grid: Grid) -> None:
        if not grid.spec.prefix_steps:
            raise InputError(
                "blending 'prefix' needs a policy that was trained with delays, and this one wasn't: train "
                "one with policy.prefix_steps=8, or choose blending 'rtc'"
            )
        super().__init__(grid, overlap=0)


def decayed(beyond: int, overlap: int) -> float:
    """The weight of a step ``beyond`` the last one that is executed for certain: 1 up to it, decaying to 0
    after ``overlap`` steps (Black et al. 2025, equation 5)."""
    if beyond <= 0:
        return 1.0
    c = (overlap + 1 - beyond) / (overlap + 1)
    return max(c * (math.exp(c) - 1) / (math.e - 1), 0.0) if c > 0 else 0.0


BLENDINGS: Registry[Callable[..., Blender]] = Registry(
    "blending",
    {"latest": Latest, "temporal_ensemble": TemporalEnsemble, "rtc": RealTimeChunking, "prefix": Prefix},
)
"""Ways of blending by name: ``BLENDINGS.register("mine", Mine)``."""
