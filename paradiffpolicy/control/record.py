"""The record of a run: every tick and every plan, in storage that is allocated before it begins."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import write_atomically
from ..planning.request import PlanReply


class Fault(enum.IntFlag):
    """Faults of a tick."""

    NONE = 0
    OBSERVATION_MISSING = enum.auto()
    OBSERVATION_SHAPE = enum.auto()
    OBSERVATION_NOT_FINITE = enum.auto()
    OBSERVATION_STALE = enum.auto()
    PLAN_REFUSED = enum.auto()
    PLAN_LATE = enum.auto()
    PLANNER_DEAD = enum.auto()
    PLANNER_HUNG = enum.auto()
    ACTION_REFUSED = enum.auto()
    PLAN_MISSING = enum.auto()
    FALLBACK_REFUSED = enum.auto()
    FALLBACK_TIMEOUT = enum.auto()
    TWO_THREADS = enum.auto()
    OBSERVATION_FROZEN = enum.auto()
    OBSERVATION_TIME = enum.auto()
    OBSERVATION_REFUSED = OBSERVATION_SHAPE | OBSERVATION_NOT_FINITE


FAULTS: dict[Fault, str] = {
    Fault.OBSERVATION_MISSING: "no new observation",
    Fault.OBSERVATION_SHAPE: "an observation of the wrong shape",
    Fault.OBSERVATION_NOT_FINITE: "an observation with NaN or infinity",
    Fault.OBSERVATION_STALE: "the last good observation is too old",
    Fault.PLAN_REFUSED: "a plan with NaN, infinity or beyond the limits, or none",
    Fault.PLAN_LATE: "no plan that is recent enough",
    Fault.PLANNER_DEAD: "the planner had died, and is restarted",
    Fault.PLANNER_HUNG: "the planner didn't answer, and is restarted",
    Fault.ACTION_REFUSED: "an action with NaN, infinity or beyond the limits",
    Fault.PLAN_MISSING: "no plan yet",
    Fault.FALLBACK_REFUSED: "the fallback's action is none, or beyond the limits",
    Fault.FALLBACK_TIMEOUT: "the fallback has acted for too long",
    Fault.TWO_THREADS: "ticked twice in one period",
    Fault.OBSERVATION_FROZEN: "an observation that repeats an old one",
    Fault.OBSERVATION_TIME: "an observation of a moment that can't be",
}
"""Each fault in words."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One period of a control loop.

    Attributes:
        index: 0, 1, 2, …, by the clock: ticks that weren't called are left out.
        deadline, started, ended: when it should have started, when it did, and when its action was decided;
            in the clock's seconds.
        missed: ticks left out just before.
        observation: ``[O]``, or None if there was none.
        action: ``[A]``; None: nothing was safe.
        plan: the newest that acted, or None.
        plan_index: which step of it; -1 while the fallback is active.
        plan_age: seconds since it was asked for.
        faults: of this tick.
        fallback_active: the action is the fallback's, not a plan's.
    """

    index: int
    deadline: float
    started: float
    ended: float
    missed: int
    observation: NDArray[Any] | None
    action: NDArray[Any] | None
    plan: PlanReply | None
    plan_index: int
    plan_age: float
    faults: Fault
    fallback_active: bool


class Record:
    """The last ticks and plans of a run, the oldest of them first.

    Args:
        action_dim: A.
        capacity: ticks (and plans) that are kept.

    Attributes:
        n_ticks, n_plans: of the whole run.
        n_requests: plans that were asked for.
    """

    def __init__(self, action_dim: int, capacity: int) -> None:
        ticks = "index deadline started ended missed plan plan_index plan_age faults fallback_active action"
        plans = "tick asked arrived latency iterations residual delay refused"
        self._ticks = _rows(capacity, ticks, f"i8 f8 f8 f8 i8 i8 i2 f4 u2 ? ({action_dim},)f8")
        self._plans = _rows(capacity, plans, "i8 f8 f8 f8 i8 f8 i8 ?")
        self.n_ticks = self.n_plans = self.n_requests = 0

    @classmethod
    def of(cls, ticks: NDArray[Any], plans: NDArray[Any], n_requests: int) -> Record:
        """A record of rows that another's ``ticks`` and ``plans`` gave."""
        record = cls(0, 0)
        record._ticks, record._plans = ticks, plans
        record.n_ticks, record.n_plans, record.n_requests = len(ticks), len(plans), n_requests
        return record

    def add_tick(self, *values: Any) -> None:
        """Adds a row: the fields of ``ticks``, in their order."""
        self._ticks[self.n_ticks % len(self._ticks)] = values
        self.n_ticks += 1

    def add_plan(self, *values: Any) -> None:
        """Adds a row: the fields of ``plans``, in their order."""
        self._plans[self.n_plans % len(self._plans)] = values
        self.n_plans += 1

    def __repr__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in self.faults().items()) or "no faults"
        return f"<Record: {self.n_ticks} ticks, {self.missed} missed, {self.n_plans} plans, {faults}>"

    @property
    def ticks(self) -> NDArray[Any]:
        """``[n]``: as in ``Tick``; ``plan`` is the tick that the plan was made for, -1 for none."""
        return _in_order(self._ticks, self.n_ticks)

    @property
    def plans(self) -> NDArray[Any]:
        """``[n]``, as they arrived: made for ``tick``, when they were ``asked`` for and ``arrived``,
        ``latency`` of the computation in seconds, ``delay`` in ticks, and whether they were ``refused``."""
        return _in_order(self._plans, self.n_plans)

    @property
    def missed(self) -> int:
        """Ticks that weren't called."""
        return int(self.ticks["missed"].sum())

    @property
    def unfinished(self) -> int:
        """Requests that were never answered: a newer one replaced them before the planner began, the run
        ended first, or the planner died."""
        return self.n_requests - self.n_plans

    @property
    def deadline_errors(self) -> NDArray[np.float64]:
        """``[n]`` seconds, from deadline to start."""
        return np.asarray(self.ticks["started"] - self.ticks["deadline"])

    def faults(self) -> dict[str, int]:
        """How many ticks had each fault, by its name; only those that occurred."""
        flags = self.ticks["faults"]
        counts = {str(fault.name).lower(): int((flags & fault.value != 0).sum()) for fault in FAULTS}
        return {name: count for name, count in counts.items() if count}

    def joins(self) -> NDArray[np.bool_]:
        """``[n]``: ticks whose action is another plan's than the action before."""
        plans, acting = self.ticks["plan"], ~self.ticks["fallback_active"]
        return np.r_[False, acting[1:] & acting[:-1] & (plans[1:] != plans[:-1])][: len(plans)]

    def save(self, path: Path) -> None:
        """Writes ``ticks`` and ``plans`` as an .npz file."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # of a path, numpy would change the suffix
                np.savez_compressed(file, ticks=self.ticks, plans=self.plans, requests=self.n_requests)

        write_atomically(path, write)


def total_faults(records: Iterable[Record]) -> dict[str, int]:
    """How many ticks of all records had each fault, by its name."""
    return dict(sum((Counter(record.faults()) for record in records), Counter()))


def _rows(capacity: int, names: str, formats: str) -> NDArray[Any]:
    try:
        return np.zeros(capacity, [*zip(names.split(), formats.split(), strict=True)])
    except (MemoryError, ValueError):
        raise InputError(f"{capacity=}: the memory for so many ticks isn't there")


def _in_order(ring: NDArray[Any], count: int) -> NDArray[Any]:
    return ring[:count] if count <= len(ring) else np.roll(ring, -(count % len(ring)))
