"""A long run among faults: does the loop keep its rate, does its memory stay flat, is every fault recorded?

A control loop runs beside a planner in another process that is never idle.  Observations are dropped, and
have NaN in them, at random; the planner is killed and stopped at random.  At the same time a third process
waits for the same deadlines and does nothing else: what that misses, this machine can't do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ..clock import MonotonicClock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Fault, Record, Tick
from ..control.scheduling import Scheduling
from ..planning.process import ProcessPlanner
from ..planning.request import Plans
from ..process import RemoteObject, end_all
from ..robots.replay import ReplayRobot
from ..tables import pairs, table, tail
from ..telemetry.summary import summary
from .control import BARE, bare_run
from .timing import resident

BROKEN = Fault.PLANNER_DEAD | Fault.PLANNER_HUNG
GROWTH = 8.0
"""Megabytes by which a flat memory may grow after the first tenth of a run."""


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What happens to a run, as drawn by ``generator``.

    Attributes:
        kills, stops: how often the planner gets SIGKILL and SIGSTOP.
        dropped, not_finite: shares of observations.
    """

    kills: int
    stops: int
    dropped: float
    not_finite: float
    generator: np.random.Generator


class FaultyRobot(ReplayRobot):
    """``ReplayRobot`` whose observations are dropped, or have NaN in them, at random.

    Attributes:
        faults: of every observation in turn, as the record should have them.
    """

    def __init__(self, observations: NDArray[Any], attacks: Attacks, n_ticks: int) -> None:
        super().__init__(observations)
        kinds = Fault.NONE, Fault.OBSERVATION_MISSING, Fault.OBSERVATION_NOT_FINITE
        shares = (1 - attacks.dropped - attacks.not_finite, attacks.dropped, attacks.not_finite)
        self.faults = attacks.generator.choice(np.array(kinds, dtype=np.uint16), n_ticks, p=shares)
        self._count = 0

    def observe(self) -> NDArray[Any] | None:  # type: ignore[override]
        fault, observation = self.faults[self._count], super().observe()
        self._count += 1
        if fault == Fault.OBSERVATION_NOT_FINITE:
            observation = np.array(observation)
            observation[self._count % len(observation)] = np.nan
        return None if fault == Fault.OBSERVATION_MISSING else observation


class PlannerAttacks:
    """An observer of ticks that sends signals to the planner's process, each when it plans again.

    Attributes:
        sent: the tick and the signal of each.
    """

    def __init__(self, attacks: Attacks, pid: Callable[[], int | None], n_ticks: int) -> None:
        signals = [signal.SIGKILL] * attacks.kills + [signal.SIGSTOP] * attacks.stops
        ticks = attacks.generator.uniform(0.02 * n_ticks, 0.95 * n_ticks, len(signals))
        self._pid, self._left = (
            pid,
            list(zip(sorted(ticks), attacks.generator.permutation(signals), strict=True)),
        )
        self._left.reverse()
        self.sent: list[tuple[int, int]] = []

    def __call__(self, tick: Tick) -> None:
        if not self._left or tick.index < self._left[-1][0] or tick.plan is None:
            return
        last, pid = self.sent[-1][0] if self.sent else 0, self._pid()
        if pid is not None and tick.plan.tick - tick.plan.waited > last:  # asked for after that
            self.sent.append((tick.index, int(self._left.pop()[1])))
            os.kill(pid, self.sent[-1][1])


class ClockAlone:
    """Waits for deadlines in a process of its own."""

    def run(self, n_ticks: int, rate_hz: float, scheduling: Scheduling) -> Record:
        return bare_run(n_ticks, rate_hz, MonotonicClock(), scheduling)

    def close(self) -> None:
        pass


def soak(
    policy: Plans,
    observations: NDArray[Any],
    attacks: Attacks,
    *,
    rate_hz: float,
    seconds: float,
    planner_timeout: float,
    scheduling: Scheduling,
    seed: int,
    on_tick: Callable[[Tick], object] = lambda tick: None,
) -> dict[str, Any]:
    """Runs the loop for ``seconds`` and says what happened: the ``summary`` of the run and of ``the clock
    alone``, ``faults`` by name as ``[happened, recorded]``, ``memory_mb`` over time, and what was ``broken``.

    Args:
        observations: ``[n, O]``, replayed.
        planner_timeout: seconds after which a stopped planner counts as hung.
        seed: of the plans' noise.
        on_tick: called after every tick.
    """
    n_ticks, planners, memory = round(seconds * rate_hz), list[ProcessPlanner](), list[float]()

    def planner(*arguments: Any) -> ProcessPlanner:
        planners.append(ProcessPlanner(*arguments))
        return planners[-1]

    def measured(tick: Tick) -> None:
        if tick.index >= len(memory) * rate_hz:
            memory.append(resident())

    clock = MonotonicClock()
    controller = Controller(
        policy,
        rate_hz,
        generator=seed,
        planner=planner,
        clock=clock,
        replan_every=0,
        planner_timeout=planner_timeout,
        capacity=n_ticks,
    )
    robot = FaultyRobot(observations, attacks, n_ticks)
    assaults = PlannerAttacks(attacks, lambda: planners[0].pid, n_ticks)
    alone = RemoteObject(ClockAlone, name="clock", remedy="run it again")
    try:
        with controller:
            alone.ask("run", n_ticks, rate_hz, scheduling)
            loop = ControlLoop(
                controller, robot, observers=[assaults, measured, on_tick], scheduling=scheduling
            )
            record = loop.run(n_ticks)
        bare = alone.answer()
    finally:
        end_all([alone])
    return outcome(record, bare, robot, assaults, memory)


def outcome(
    record: Record, bare: Record, robot: FaultyRobot, assaults: PlannerAttacks, memory: Sequence[float]
) -> dict[str, Any]:
    """What ``soak`` returns."""
    noted = record.ticks["faults"]
    happened = robot.faults[: len(noted)]
    observed = noted & (Fault.OBSERVATION_MISSING | Fault.OBSERVATION_NOT_FINITE)
    signals = [number for _, number in assaults.sent]
    broken = noted & BROKEN != 0
    faults = {
        str(fault.name).lower(): [int((happened == fault).sum()), int((observed & fault != 0).sum())]
        for fault in (Fault.OBSERVATION_MISSING, Fault.OBSERVATION_NOT_FINITE)
    }
    faults["planner killed or stopped"] = [len(signals), int((broken[1:] > broken[:-1]).sum())]
    faults["planner stopped"] = [signals.count(signal.SIGSTOP), int((noted & Fault.PLANNER_HUNG != 0).sum())]
    settled = memory[len(memory) // 10 :]
    growth = max(settled) - settled[0]
    failures = {
        f"{record.missed} ticks missed, {bare.missed} by the clock alone": record.missed > bare.missed,
        "observations' faults aren't recorded at their ticks": bool((observed != happened).any()),
        "the planner's faults aren't recorded once each": any(a != b for a, b in faults.values()),
        f"memory grew by {growth:.0f} MB": growth > GROWTH,
    }
    return {
        "run": summary(record),
        BARE: summary(bare),
        "faults": faults,
        "memory_mb": {"first": memory[0], "settled": settled[0], "last": memory[-1], "most": max(memory)},
        "broken": [name for name, failed in failures.items() if failed],
    }


def soak_tables(values: Mapping[str, Any], title: str) -> list[Table]:
    """The loop beside the clock alone; then what happened to it."""
    loops = {"the loop": values["run"], BARE: values[BARE]}
    timing = table(
        title,
        (
            {
                "": name,
                "ticks": row["ticks"],
                "missed": row["missed"],
                "deadline error, ms": tail(row["deadline_error_ms"], 2),
                "a tick, µs": tail(row["tick_us"], 0),
            }
            for name, row in loops.items()
        ),
    )
    rows = {
        f"{name.replace('_', ' ')}: happened, recorded": f"{happened}, {recorded}"
        for name, (happened, recorded) in values["faults"].items()
    }
    rows["plans"] = f"{values['run']['plans']}"
    rows["plan latency, ms"] = tail(values["run"]["plan_latency_ms"])
    rows["fallback active"] = f"{values['run']['fallback_share']:.1%}"
    rows["memory, MB"] = ", ".join(f"{name} {size:.0f}" for name, size in values["memory_mb"].items())
    rows["broken"] = "; ".join(values["broken"]) or "nothing"
    return [timing, pairs("", rows)]
