"""Times a control loop beside each kind of planner: deadline errors, missed ticks, the cost of a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record, total_faults
from ..control.scheduling import Scheduling, scheduled
from ..planning.blending import Blending
from ..planning.request import MakePlanner, Plans
from ..robots.replay import ReplayRobot
from ..tables import table

BARE = "the clock alone"
"""Name of the loop that only waits for its deadlines: the best that this machine can do."""


def bare_run(n_ticks: int, rate_hz: float, clock: Clock, scheduling: Scheduling) -> Record:
    """Waits for ``n_ticks`` deadlines."""
    record = Record(0, n_ticks)
    with scheduled(scheduling):
        start = clock.now()
        for k in range(n_ticks):
            deadline = start + k / rate_hz
            clock.sleep_until(deadline)
            now = clock.now()
            record.add_tick(k, deadline, now, now, 0, -1, -1, math.nan, 0, False, ())
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
                clock=clock,
                replan_every=replan_every,
                capacity=n_ticks,
            )
            loop = ControlLoop(controller, ReplayRobot(observations), scheduling=scheduling)
            records[name].append(loop.run(n_ticks))
            on_turn()
    return records


@dataclass(frozen=True)
class ControlRow:
    """A loop beside one kind of planner; deadline errors in milliseconds, from the deadline to the start
    of its tick, and how many were over a period; a tick's cost in microseconds, from observation to
    action."""

    planner: str
    ticks: int
    missed: int
    over_a_period: int
    error_p50: float
    error_p99: float
    error_p999: float
    error_max: float
    cost_p50: float
    cost_p99: float
    plans_per_second: float
    latency_p50: float
    latency_p99: float
    delay_ticks: float
    faults: Mapping[str, int]


def control_rows(records: Mapping[str, Sequence[Record]], rate_hz: float) -> list[ControlRow]:
    """Sums the runs up, a row per kind of planner."""
    rows = []
    for name, runs in records.items():
        ticks = np.concatenate([run.ticks for run in runs])
        plans = np.concatenate([run.plans for run in runs])
        errors = np.concatenate([run.deadline_errors for run in runs]) * 1e3
        costs = (ticks["ended"] - ticks["started"]) * 1e6
        seconds = sum(float(run.ticks["ended"][-1] - run.ticks["started"][0]) for run in runs)
        latency = plans["latency"] * 1e3
        rows.append(
            ControlRow(
                planner=name,
                ticks=len(ticks),
                missed=sum(run.missed for run in runs),
                over_a_period=int((errors > 1e3 / rate_hz).sum()),
                error_p50=float(np.percentile(errors, 50)),
                error_p99=float(np.percentile(errors, 99)),
                error_p999=float(np.percentile(errors, 99.9)),
                error_max=float(errors.max()),
                cost_p50=float(np.percentile(costs, 50)),
                cost_p99=float(np.percentile(costs, 99)),
                plans_per_second=len(plans) / seconds,
                latency_p50=float(np.percentile(latency, 50)) if len(plans) else 0.0,
                latency_p99=float(np.percentile(latency, 99)) if len(plans) else 0.0,
                delay_ticks=float(plans["delay"].mean()) if len(plans) else 0.0,
                faults=total_faults(runs),
            )
        )
    return rows


def control_table(rows: Sequence[ControlRow], title: str) -> Table:
    """One row per kind of planner."""
    headings = (
        "planner",
        "ticks",
        "over a\nperiod",
        "missed",
        "deadline error, ms\np50 / p99 / p99.9 / most",
    )
    return table(
        title,
        (
            *headings,
            *("a tick, µs\np50 / p99", "plans / s", "plan latency, ms\np50 / p99", "delay\nticks", "faults"),
        ),
        (
            (
                *(row.planner, row.ticks, row.over_a_period, row.missed),
                f"{row.error_p50:.2f} / {row.error_p99:.2f} / {row.error_p999:.2f} / {row.error_max:.2f}",
                f"{row.cost_p50:.0f} / {row.cost_p99:.0f}",
                f"{row.plans_per_second:.0f}",
                f"{row.latency_p50:.1f} / {row.latency_p99:.1f}",
                f"{row.delay_ticks:.1f}",
                ", ".join(f"{name} {count}" for name, count in row.faults.items()) or "-",
            )
            for row in rows
        ),
    )
