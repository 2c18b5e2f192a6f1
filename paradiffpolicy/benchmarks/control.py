"""Times a control loop beside each kind of planner: deadline errors, missed ticks, the cost of a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record
from ..control.scheduling import Scheduling, scheduled
from ..planning.blending import Blending
from ..planning.interpolation import Interpolation, automatic
from ..planning.request import MakePlanner, Plans
from ..robots.replay import ReplayRobot
from ..tables import table, tail
from ..telemetry.summary import summary

BARE = "the clock alone"
"""Name of the loop that only waits for its deadlines: the best that this machine can do."""


def bare_run(n_ticks: int, rate_hz: float, clock: Clock, scheduling: Scheduling) -> Record:
    """Waits for ``n_ticks`` deadlines; misses those that are over when it wakes, as ``ControlLoop`` does."""
    record = Record(0, n_ticks)
    with scheduled(scheduling):
        start, last, index = clock.now(), -1, 0
        while index < n_ticks:
            deadline = start + index / rate_hz
            clock.sleep_until(deadline)
            now = clock.now()
            record.add_tick(index, deadline, now, now, index - last - 1, -1, -1, math.nan, 0, False, ())
            last, index = index, max(index + 1, math.ceil((clock.now() - start) * rate_hz - 1e-6))
    return record


def timed_runs(
    policy: Plans,
    planners: Mapping[str, MakePlanner],
    observations: NDArray[Any],
    clock: Clock,
    *,
    rate_hz: float,
    seconds: float,
    turns: int,
    blending: Blending,
    interpolation: Interpolation = automatic,
    replan_every: int,
    scheduling: Scheduling,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[Record]]:
    """Runs the loop beside every planner, and the clock alone, taking turns: ``turns`` runs each,
    ``seconds`` in all."""
    records: dict[str, list[Record]] = {name: [] for name in (BARE, *planners)}
    n_ticks = round(seconds * rate_hz / turns)
    for turn in range(turns):
        records[BARE].append(bare_run(n_ticks, rate_hz, clock, scheduling))
        for name, planner in planners.items():
            controller = Controller(
                policy,
                rate_hz,
                generator=torch.Generator().manual_seed(turn),
                planner=planner,
                blending=blending,
                interpolation=interpolation,
                clock=clock,
                replan_every=replan_every,
                capacity=n_ticks,
            )
            loop = ControlLoop(controller, ReplayRobot(observations), scheduling=scheduling)
            records[name].append(loop.run(n_ticks))
            on_turn()
    return records


def control_rows(records: Mapping[str, Sequence[Record]], rate_hz: float) -> list[dict[str, Any]]:
    """Sums the runs up, a row per kind of planner: their ``summary``, how many deadline errors were
    ``over_a_period``, and ``plans_per_second``."""
    rows = []
    for name, runs in records.items():
        errors = np.concatenate([run.deadline_errors for run in runs])
        seconds = sum(float(run.ticks["ended"][-1] - run.ticks["started"][0]) for run in runs)
        row = {"planner": name, **summary(*runs), "over_a_period": int((errors > 1 / rate_hz).sum())}
        rows.append(row | {"plans_per_second": row["plans"] / seconds})
    return rows


def control_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row per kind of planner."""
    return table(
        title,
        (
            {
                "planner": row["planner"],
                "ticks": row["ticks"],
                "over a\nperiod": row["over_a_period"],
                "missed": row["missed"],
                "deadline error, ms": tail(row["deadline_error_ms"], 2),
                "a tick, µs": tail(row["tick_us"], 0),
                "plans / s": f"{row['plans_per_second']:.0f}",
                "plan latency, ms": tail(row["plan_latency_ms"], 1),
                "delay\nticks": "-" if row["delay_mean"] is None else f"{row['delay_mean']:.1f}",
                "faults": ", ".join(f"{name} {count}" for name, count in row["faults"].items()) or "-",
            }
            for row in rows
        ),
    )
