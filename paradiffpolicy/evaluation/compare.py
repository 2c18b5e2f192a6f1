"""Compares samplers on the same seeds: simulated time waits for every plan, or goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.timing import plan_latencies
from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record, total_faults
from ..planning.blending import Blending, Latest
from ..policy import Policy
from ..robots.env import EnvRobot
from ..tables import bar
from .blocks import Blocks
from .episodes import Episode, Outcome, judged
from .realtime import MakeEnvAt, boundary_jumps, realtime_rollout, wall_rollout
from .rollout import in_groups, rollout
from .workers import MakeEnv

Progress = Callable[[str, float, str], AbstractContextManager[Any]]
"""A label, a total and its unit to a progress bar; see ``tables.bar``."""

no_progress: Progress = partial(bar, shown=False)

MARGINS = {"score": 0.05, "success": 0.1}
"""Differences that still count as equivalent."""


@dataclass(frozen=True, kw_only=True)
class SamplerResult(Outcome):
    """A sampler whose every plan the simulation waits for.

    Attributes:
        record: of a run at the environment's own rate on a real clock, or None.
    """

    record: Record | None = None

    @property
    def missed(self) -> int:
        """Deadlines missed in that run."""
        return 0 if self.record is None else self.record.missed

    def per_plan(self, name: str) -> list[int]:
        """``iterations`` or ``nfe`` of every plan of every episode."""
        return [value for episode in self.episodes for value in getattr(episode, name)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            **self.compared(),
            "iterations_per_plan": _spread(self.per_plan("iterations")),
            "nfe_per_plan": _spread(self.per_plan("nfe")),
            "plan_latency_ms": self.latency_ms,
            "deadlines": {
                "ticks": 0 if self.record is None else self.record.n_ticks,
                "missed": self.missed,
                "faults": {} if self.record is None else self.record.faults(),
            },
        }


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "max": float(np.max(values))}


def compare(
    policies: Mapping[str, Policy],
    make_env: MakeEnv,
    seeds: Sequence[int],
    max_steps: int,
    *,
    reference: str,
    clock: Clock,
    margins: Mapping[str, float] = MARGINS,
    stop_early: bool = False,
    side_by_side: int | None = None,
    n_pictured: int = 0,
    latency_plans: int = 0,
    paced_ticks: int = 0,
    blocks: Blocks | None = None,
    on_result: Callable[[Sequence[SamplerResult], str], object] = lambda results, name: None,
    progress: Progress = no_progress,
    **options: Any,
) -> list[SamplerResult]:
    """Runs every sampler's policy on the same seeds, block by block, then times their plans and loops.

    Args:
        policies: by the sampler's name.
        reference: the sampler that the others are compared with; it runs first.
        clock: the machine's.
        margins: for the verdicts on ``score`` and ``success``.
        stop_early: a sampler ends after the block that decides on its score and its success; verdicts are
            then those of ``paired_difference`` with a look after every block.
        side_by_side: episodes in a block; None: all.
        n_pictured: episodes of every sampler of which there are pictures.
        latency_plans: plans of one robot that are timed, per sampler, taking turns; 0: none.
        paced_ticks: ticks of a run at the environment's own rate, per sampler; 0: none.
        blocks: keeps the episodes of finished blocks; None: nothing does.
        on_result: called after every block with the results so far, and whose block it was.
        options: of ``rollout``.
    """
    blocks = Blocks() if blocks is None else blocks
    episodes: dict[str, list[Episode]] = {name: [] for name in dict.fromkeys([reference, *policies])}
    groups = in_groups(seeds, side_by_side)
    ends = list(accumulate(map(len, groups)))
    looks: dict[str, Any] = {"looks": ends, "n_looks": len(groups)} if stop_early else {}

    def results(**more: Mapping[str, Any]) -> list[SamplerResult]:
        rows = [
            SamplerResult(
                name=name,
                episodes=own,
                reference=None if name == reference else episodes[reference],
                **{field: values[name] for field, values in more.items() if values},
            )
            for name, own in episodes.items()
            if own
        ]
        return judged(rows, margins, **looks)

    running = list(episodes)
    with progress("episodes", len(episodes) * len(seeds) * max_steps, "step") as shown:
        for k, group in enumerate(groups):
            for name in running:

                def on_stage(stage: str, name: str = name) -> None:
                    shown.set_postfix_str(f"{name} {stage}".strip())

                run = partial(
                    rollout,
                    *(policies[name], make_env, group, max_steps),
                    n_pictured=max(0, n_pictured - ends[k] + len(group)),
                    on_steps=shown.update,
                    on_stage=on_stage,
                    **options,
                )
                if blocks.has(name, k):
                    shown.update(len(group) * max_steps)
                episodes[name] += blocks.episodes(name, k, run)
                on_result(results(), name)
            if stop_early:
                undecided = [r.name for r in results() if r.reference is not None and not r.decided]
                running = [reference, *undecided] if undecided else []
    latencies: dict[str, list[float]] = {}
    records: dict[str, Record] = {}
    if latency_plans:
        windows = [window for episode in episodes[reference] for window in episode.windows][:latency_plans]
        with progress("latency", len(windows), "turn") as shown:
            latencies = plan_latencies(policies, windows, clock, shown.update)
    if paced_ticks:
        with progress("at the real rate", len(episodes), "sampler") as shown:
            for name in episodes:
                records[name] = paced_run(policies[name], make_env, int(seeds[0]), paced_ticks, clock)
                shown.update(1)
    return results(latencies=latencies, record=records)


def paced_run(policy: Policy, make_env: MakeEnv, seed: int, n_ticks: int, clock: Clock) -> Record:
    """Runs the control loop at the environment's own rate on a real clock, planning within its ticks."""
    env = make_env()
    try:
        spec = policy.spec
        with Controller(policy, spec.control_hz, generator=seed, planner="inline", clock=clock) as controller:
            robot = EnvRobot(env, seed, clock, control_hz=spec.control_hz, contract=spec.contract)
            return ControlLoop(controller, robot).run(n_ticks, until=lambda: robot.finished)
    finally:
        env.close()


@dataclass(frozen=True, kw_only=True)
class RealtimeResult(Outcome):
    """Episodes under one latency at one rate.

    Attributes:
        rate_hz: of control.
        blending: of chunks, by name.
    """

    against: ClassVar = "unlimited"

    rate_hz: float
    blending: str

    @property
    def row_name(self) -> str:
        return f"{self.name}, {self.rate_hz:g} Hz, {self.blending}, {self.latency_ms['p50'] or 0:.3g} ms"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        records = [episode.record for episode in self.episodes if episode.record is not None]
        ticks = np.concatenate([record.ticks for record in records])
        delay = np.concatenate([record.plans["delay"] for record in records])
        at, within = boundary_jumps(records)
        jerk = np.concatenate(
            [np.linalg.norm(np.diff(record.ticks["action"], 3, axis=0), axis=1) for record in records]
        )
        return {
            "case": self.name,
            "rate_hz": self.rate_hz,
            "blending": self.blending,
            "latency_ms": self.latency_ms,
            "delay_ticks": float(np.mean(delay)) if len(delay) else None,
            **self.compared(),
            "fallback_share": float(ticks["fallback_active"].mean()),
            "missed_ticks": sum(record.missed for record in records),
            "jump_at_boundaries": _median_p95(at),
            "change_within_plans": _median_p95(within),
            "jerk": _median_p95(jerk),
            "faults": total_faults(records),
        }


def _median_p95(values: NDArray[Any]) -> dict[str, float | None]:
    """Of finite values; the p95 of 200 or more, as in ``tables.quantiles``."""
    values = values[np.isfinite(values)]
    n = len(values)
    return {
        "n": n,
        "median": float(np.median(values)) if n else None,
        "p95": float(np.percentile(values, 95)) if n >= 200 else None,
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampler to run while simulated time goes on.

    Attributes:
        name: of the case.
        policy: that plans.
        rate_hz: of control.
        latencies: in seconds, to draw from; None: as plans take on the machine's clock.
        blending_name, blending: of chunks.
        reference: the label of the case that it is compared with, if any.
        table: that the result belongs to.
    """

    name: str
    policy: Policy
    rate_hz: float
    latencies: Sequence[float] | None = (0.0,)
    blending_name: str = "latest"
    blending: Blending = Latest
    reference: str | None = None
    table: str = "cases"

    @property
    def label(self) -> str:
        """Which case it is, among all of an evaluation."""
        latency = "" if not self.latencies else f", {1e3 * float(np.median(self.latencies)):g} ms"
        return f"{self.table}: {self.name}, {self.rate_hz:g} Hz, {self.blending_name}{latency}"


def compare_realtime(
    cases: Sequence[Case],
    make_env: MakeEnvAt,
    seeds: Sequence[int],
    seconds: float,
    *,
    side_by_side: int | None = None,
    wall: Mapping[str, Any] | None = None,
    blocks: Blocks | None = None,
    on_result: Callable[[Sequence[RealtimeResult]], object] = lambda results: None,
    progress: Progress = no_progress,
    **options: Any,
) -> list[RealtimeResult]:
    """Runs cases on the same seeds, one after the other, each block by block.

    Args:
        make_env: see ``realtime_rollout``.
        seeds, seconds: of episodes.
        side_by_side: episodes in a block; None: all.
        wall: options of ``wall_rollout``, for cases whose latencies aren't given.
        blocks: keeps the episodes of finished blocks; None: nothing does.
        on_result: called with the results so far after every block.
        options: of ``realtime_rollout`` and ``wall_rollout``.

    Returns:
        The results, which ``judged`` has yet to compare.
    """
    blocks = Blocks() if blocks is None else blocks
    done: dict[str, RealtimeResult] = {}
    for case in cases:
        if case.latencies is None:
            roll = partial(wall_rollout, **(wall or {}))
        else:
            roll = partial(realtime_rollout, latencies=case.latencies)
        episodes: list[Episode] = []
        with progress(case.label, len(seeds) * round(seconds * case.rate_hz), "tick") as shown:
            for k, group in enumerate(in_groups(seeds, side_by_side)):
                run = partial(
                    roll,
                    *(case.policy, make_env, group, seconds),
                    rate_hz=case.rate_hz,
                    blending=case.blending,
                    on_ticks=shown.update,
                    **options,
                )
                if blocks.has(case.label, k):
                    shown.update(len(group) * round(seconds * case.rate_hz))
                episodes += blocks.episodes(case.label, k, run)
                taken = [float(s) for e in episodes if e.record for s in e.record.plans["latency"]]
                done[case.label] = RealtimeResult(
                    name=case.name,
                    episodes=list(episodes),
                    latencies=taken if case.latencies is None else case.latencies,
                    reference=None if case.reference is None else done[case.reference].episodes,
                    rate_hz=case.rate_hz,
                    blending=case.blending_name,
                )
                on_result(list(done.values()))
    return list(done.values())
