"""Times tasks that take turns within one run, and the memory that they take.

A machine's speed drifts, and other processes come and go: everything that is compared takes turns within
one run, and is given as a ratio to another's time in the same turn.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..policy import Policy
from ..provenance import resident_bytes
from ..tables import quantiles
from ..types import Plan

WARM_UPS = 2
"""First turns of every task that are not counted: they warm up, and a warm-started sampler's first plan
is another."""

Task = Callable[[NDArray[Any]], object]
"""A task to time on an observation window ``[To, O]``."""


class ContinuedPlans:
    """Plans from window to window, each from the plan before; keeps iterations and NFE of each."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._generator = torch.Generator().manual_seed(0)
        self._plan: Plan | None = None
        self.iterations: list[int] = []
        self.nfe: list[int] = []

    def __call__(self, window: NDArray[Any]) -> None:
        self._plan = self._policy.plan(window, self._plan, generator=self._generator)
        self.iterations.append(int(self._plan.solution.iterations[0]))  # waits for the device
        self.nfe.append(int(self._plan.solution.nfe[0]))


def interleaved(
    tasks: Mapping[str, Task],
    windows: Sequence[NDArray[Any]],
    clock: Clock,
    on_turn: Callable[[], object] = lambda: None,
    on_warm: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds that each task took on each window, the tasks taking turns on every window.

    Args:
        on_turn: called after every turn.
        on_warm: called with a task's name after its ``WARM_UPS`` uncounted turns.
    """
    for name, task in tasks.items():
        for _ in range(WARM_UPS):
            task(windows[0])
        on_warm(name)
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
        {name: ContinuedPlans(policy) for name, policy in policies.items()}, windows, clock, on_turn
    )


def percentiles(values: Sequence[float] | NDArray[Any], *which: float) -> list[float]:
    """Percentiles of values, in the order asked for."""
    return [float(value) for value in np.percentile(np.asarray(values), which)]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A task's time.

    Attributes:
        ms: ``quantiles`` of milliseconds.
        speedup: a baseline's time over this one's in the same turn, quartiles.
        floor: milliseconds that it takes at least; see ``floors``.
    """

    ms: Mapping[str, float | None]
    speedup: Sequence[float]
    floor: float


def timings(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """``ms`` and ``speedup`` of a ``Timing``."""
    ratios = percentiles(np.divide(baseline, seconds), 25, 50, 75)
    return {"ms": quantiles(1e3 * np.asarray(seconds)), "speedup": ratios}


def resident() -> float:
    """Megabytes of this process's memory that are in use; its peak where the system tells no more."""
    return resident_bytes() / 2**20


def peak() -> float:
    """The largest amount of memory this process ever had in use, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
