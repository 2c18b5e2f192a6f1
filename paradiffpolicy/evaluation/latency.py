"""How long a plan takes for one robot, next to the loop that people run today.

A machine's speed drifts, and other processes come and go: everything that is compared takes turns
within one run, and is given as a ratio to the baseline's time in the same turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from ..control.clock import Clock
from ..policy import Policy
from ..types import Plan
from .baseline import baseline_plan

BASELINE = "diffusers DDPM-100"

WARM_UPS = 2

Task = Callable[[NDArray[Any]], object]
"""Something to time on an observation window ``[To, O]``."""


class _Continuing:
    """Plans from window to window, each plan continuing the last; keeps their rounds."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._generator = torch.Generator().manual_seed(0)
        self._plan: Plan | None = None
        self.rounds: list[int] = []

    def __call__(self, window: NDArray[Any]) -> None:
        self._plan = self._policy.plan(window, self._plan, generator=self._generator)
        self.rounds.append(int(self._plan.walk.rounds[0]))
        if self._policy.device.type == "cuda":
            torch.cuda.synchronize(self._policy.device)


def interleaved(
    tasks: Mapping[str, Task],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each task took on each window, the tasks taking turns on every window.

    Two first turns are not counted: they warm up, and a continuing sampler's first plan is another.
    """
    for task in list(tasks.values()) * WARM_UPS:
        task(windows[0])
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for window in windows:
        for name, task in tasks.items():
            begun = clock.now()
            task(window)
            seconds[name].append(clock.now() - begun)
        on_turn()
    return seconds


def plan_latencies(
    policies: Mapping[str, Policy],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per plan of one robot, ``[len(windows)]`` per policy; see ``interleaved``.

    Args:
        windows: consecutive observation windows ``[To, O]`` of an episode.
    """
    return interleaved(
        {name: _Continuing(policy) for name, policy in policies.items()}, windows, clock, on_turn
    )


@dataclass(frozen=True)
class LatencyRow:
    """One row of the benchmark; times in milliseconds.

    Attributes:
        speedup, speedup_low, speedup_high: baseline's time over this one's in the same turn: median
            and quartiles.
        rounds: network calls in a row, mean per plan.
    """

    name: str
    p50: float
    p99: float
    speedup: float
    speedup_low: float
    speedup_high: float
    rounds: float


def latency_rows(
    policies: Mapping[str, Policy],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
) -> list[LatencyRow]:
    """The baseline and every policy, one robot, same windows.

    Raises:
        InputError: diffusers, for the baseline, isn't installed.
    """
    first = next(iter(policies.values()))
    generator = torch.Generator().manual_seed(0)

    def baseline(window: NDArray[Any]) -> None:
        baseline_plan(first, torch.from_numpy(window[None]).float(), generator)

    ours = {name: _Continuing(policy) for name, policy in policies.items()}
    seconds = interleaved({BASELINE: baseline, **ours}, windows, clock, on_turn)
    rounds = {name: float(np.mean(task.rounds[WARM_UPS:])) for name, task in ours.items()}
    rounds[BASELINE] = float(first.spec.n_train_steps)
    rows = []
    for name, values in seconds.items():
        low, middle, high = np.percentile(np.divide(seconds[BASELINE], values), (25, 50, 75))
        p50, p99 = np.percentile(values, (50, 99)) * 1e3
        rows.append(
            LatencyRow(name, float(p50), float(p99), float(middle), float(low), float(high), rounds[name])
        )
    return rows


def latency_table(rows: Sequence[LatencyRow], title: str) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column("plan")
    for heading in ("rounds", "ms p50", "ms p99", "times faster [quartiles]"):
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(
            row.name,
            f"{row.rounds:.1f}",
            f"{row.p50:.1f}",
            f"{row.p99:.1f}",
            f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]",
        )
    return view
