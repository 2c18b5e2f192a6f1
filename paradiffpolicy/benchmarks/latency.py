"""How long a plan takes for one robot, next to its floor and to the loops on diffusers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from ..clock import Clock
from ..policy import Policy
from ..tables import quantiles, spread, table, tail
from .baselines import BASELINES, Loop, baseline_plan
from .floors import Floors
from .timing import WARM_UPS, ContinuedPlans, Timing, interleaved, resident, timings


class _BaselinePlans:
    """Plans by one of diffusers' loops; keeps the iterations of each."""

    def __init__(self, loop: Loop, policy: Policy) -> None:
        self._loop, self._policy = loop, policy
        self._generator = torch.Generator().manual_seed(0)
        self.iterations: list[int] = []

    def __call__(self, window: NDArray[Any]) -> None:
        actions, iterations = baseline_plan(self._loop, self._policy, window, self._generator)
        actions.cpu()  # waits for the device
        self.iterations.append(iterations)


@dataclass(frozen=True, kw_only=True)
class LatencyRow(Timing):
    """One row of the benchmark, compared with the first baseline.

    Attributes:
        speedup_ddim: over the second baseline, median.
        iterations: mean per plan.
        memory: megabytes by which the process grew when this row's first plans were made.
    """

    name: str
    speedup_ddim: float
    iterations: float
    memory: float


def latency_rows(
    policies: Mapping[str, Policy],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
    floors: Floors | None = None,
) -> list[LatencyRow]:
    """Times the baselines and every policy, for one robot, on the same windows.

    Args:
        floors: of the network; None: its rates are measured here.

    Raises:
        InputError: diffusers, for the baselines, isn't installed.
    """
    first = next(iter(policies.values()))
    floors = Floors(first.network, first.spec.horizon, first.device, clock) if floors is None else floors
    loops = {name: _BaselinePlans(loop, first) for name, loop in BASELINES.items()}
    ours = {name: ContinuedPlans(policy) for name, policy in policies.items()}
    memory, before = {}, resident()

    def on_warm(name: str) -> None:
        nonlocal before
        gc.collect()
        memory[name] = resident() - before
        before = resident()

    seconds = interleaved({**loops, **ours}, windows, clock, on_turn, on_warm)
    ddpm, ddim, _ = (seconds[name] for name in BASELINES)
    rows = []
    for name, values in seconds.items():
        task = loops.get(name) or ours[name]
        iterations = float(np.mean(task.iterations[WARM_UPS:]))
        precision = policies[name].capture.precision if name in policies else "f32"
        nfe = float(np.mean(task.nfe[WARM_UPS:])) if isinstance(task, ContinuedPlans) else iterations
        rows.append(
            LatencyRow(
                name=name,
                **timings(values, ddpm),
                speedup_ddim=float(np.median(np.divide(ddim, values))),
                iterations=iterations,
                floor=floors.seconds(precision, iterations, nfe / iterations) * 1e3,
                memory=memory[name],
            )
        )
    return rows


def latency_table(rows: Sequence[LatencyRow], title: str) -> Table:
    """One row per baseline and policy."""
    return table(
        title,
        (
            {
                "plan": row.name,
                "iterations": f"{row.iterations:.1f}",
                "ms p50": tail(row.ms),
                "floor ms": f"{row.floor:.1f}",
                "times faster than\nDDPM-100 [quartiles]": spread(row.speedup),
                "than\nDDIM-10": f"{row.speedup_ddim:.1f}",
                "memory\nMB": f"{row.memory:.0f}",
            }
            for row in rows
        ),
    )


@dataclass(frozen=True)
class Steady:
    """Many plans of one robot, one after the other.

    Attributes:
        first: milliseconds of the very first, which captures.
        ms: ``quantiles`` of the others' milliseconds.
        growth: megabytes by which the process grew from the first tenth of the plans to the last.
    """

    first: float
    ms: Mapping[str, float | None]
    growth: float

    def __str__(self) -> str:
        grown = f"memory grew by {self.growth:.1f} MB"
        return f"plans in a row, ms: first {self.first:.0f}, then p50 {tail(self.ms)}; {grown}"


def steady_state(
    policy: Policy, windows: Sequence[NDArray[Any]], plans: int, clock: Clock, on_plan: Callable[[], object]
) -> Steady:
    """Times plans one after the other, from ``windows`` in turn, each warm-started from the one before."""
    task, seconds = ContinuedPlans(policy), []
    begun = clock.now()
    task(windows[0])
    first = clock.now() - begun
    policy.warm_up()
    before = resident()
    for k in range(plans):
        begun = clock.now()
        task(windows[k % len(windows)])
        seconds.append(clock.now() - begun)
        if k == plans // 10:
            before = resident()
        on_plan()
    return Steady(first * 1e3, quantiles(1e3 * np.asarray(seconds)), resident() - before)
