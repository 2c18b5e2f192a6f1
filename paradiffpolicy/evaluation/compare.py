"""Compares samplers on the same seeds: simulated time waits for every plan, or goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.timing import plan_latencies
from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record, total_faults
from ..planning.blending import Blending
from ..policy import Policy
from ..robots.env import EnvRobot
from ..tables import bar
from .episodes import Episode, Outcome
from .realtime import MakeEnvAt, boundary_jumps, realtime_rollout, wall_rollout
from .rollout import rollout
from .workers import MakeEnv

Progress = Callable[[str, float, str], AbstractContextManager[Any]]
"""A label, a total and its unit to a progress bar; see ``tables.bar``."""

no_progress: Progress = partial(bar, shown=False)


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
    margin: float = 0.05,
    latency_plans: int = 0,
    paced_ticks: int = 0,
    on_result: Callable[[Sequence[SamplerResult]], object] = lambda results: None,
    progress: Progress = no_progress,
    **options: Any,
) -> list[SamplerResult]:
    """Runs every sampler's policy on the same seeds, then times their plans and loops.

    Args:
        policies: by the sampler's name.
        reference: the sampler that the others are compared with; it runs first.
        clock: the machine's.
        margin: of score, for the verdict.
        latency_plans: plans of one robot that are timed, per sampler, taking turns; 0: none.
        paced_ticks: ticks of a run at the environment's own rate, per sampler; 0: none.
        on_result: called with the results so far, whenever a sampler's episodes are there.
        options: of ``rollout``.
    """
    results: list[SamplerResult] = []
    for name in dict.fromkeys([reference, *policies]):
        with progress(name, len(seeds) * max_steps, "step") as shown:
            options |= {"on_steps": shown.update, "on_stage": shown.set_postfix_str}
            episodes = rollout(policies[name], make_env, seeds, max_steps, **options)
        scores = results[0].scores if results else None
        results.append(SamplerResult(name=name, episodes=episodes, reference=scores, margin=margin))
        on_result(results)
    if latency_plans:
        windows = [window for episode in results[0].episodes for window in episode.windows][:latency_plans]
        with progress("latency", len(windows), "turn") as shown:
            latencies = plan_latencies(policies, windows, clock, shown.update)
        results = [replace(result, latencies=latencies[result.name]) for result in results]
    if paced_ticks:
        with progress("at the real rate", len(results), "sampler") as shown:
            for k, result in enumerate(results):
                record = paced_run(policies[result.name], make_env, int(seeds[0]), paced_ticks, clock)
                results[k] = replace(result, record=record)
                shown.update(1)
    return results


def paced_run(policy: Policy, make_env: MakeEnv, seed: int, n_ticks: int, clock: Clock) -> Record:
    """Runs the control loop at the environment's own rate on a real clock, planning within its ticks."""
    env = make_env()
    try:
        with Controller(
            policy, policy.spec.control_hz, generator=seed, planner="inline", clock=clock
        ) as controller:
            robot = EnvRobot(env, seed, clock, control_hz=policy.spec.control_hz)
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


@dataclass
class RealtimeComparison:
    """Runs samplers of one task on the same seeds while simulated time goes on.

    Attributes:
        make_env: see ``realtime_rollout``.
        seeds, seconds: of episodes.
        rates_hz: of control; what isn't said to run at all of them runs at the first.
        blending_name, blending: of chunks.
        margin: of score, for verdicts.
        options: of ``realtime_rollout`` and ``wall_rollout``.
        on_result: called after every result.
        results: of ``unlimited`` and ``case``.
        sweep: of ``inject``.
    """

    make_env: MakeEnvAt
    seeds: Sequence[int]
    seconds: float
    rates_hz: Sequence[float]
    blending_name: str
    blending: Blending
    margin: float = 0.05
    options: Mapping[str, Any] = field(default_factory=dict)
    on_result: Callable[[], object] = lambda: None
    progress: Progress = no_progress
    results: list[RealtimeResult] = field(default_factory=list, init=False)
    sweep: list[RealtimeResult] = field(default_factory=list, init=False)
    references: dict[str, list[float]] = field(default_factory=dict, init=False)

    def unlimited(self, sampler: str, policy: Policy) -> None:
        """Runs a sampler whose plans take no time: the reference of its cases."""
        label, rate = f"{sampler}, unlimited", self.rates_hz[0]
        episodes = self._run(label, realtime_rollout, policy, rate)
        self.references[sampler] = [episode.score for episode in episodes]
        self._add(self.results, label, episodes, [0.0], rate, self.blending_name)

    def case(
        self, name: str, sampler: str, policy: Policy, latencies: Sequence[float] | None, **wall: Any
    ) -> None:
        """Runs a sampler at every rate.

        Args:
            policy: that plans.
            latencies: in seconds, to draw from; None: as plans take on the machine's clock.
            wall: options of ``wall_rollout``, where there are no latencies.
        """
        for rate in self.rates_hz:
            label, options = f"{name}, {rate:g} Hz", {"blending": self.blending}
            if latencies is None:
                episodes = self._run(label, wall_rollout, policy, rate, **options, **wall)
                taken = [float(s) for e in episodes if e.record for s in e.record.plans["latency"]]
            else:
                episodes = self._run(label, realtime_rollout, policy, rate, latencies=latencies, **options)
                taken = list(latencies)
            reference = self.references.get(sampler)
            self._add(self.results, name, episodes, taken, rate, self.blending_name, reference)

    def inject(self, sampler: str, policy: Policy, blending_name: str, blending: Blending, ms: float) -> None:
        """Runs a sampler at the first rate under an injected latency."""
        options = {"latencies": [ms / 1e3], "blending": blending}
        label, rate = f"{blending_name}, {ms:g} ms", self.rates_hz[0]
        episodes = self._run(label, realtime_rollout, policy, rate, **options)
        reference = self.references.get(sampler)
        self._add(self.sweep, sampler, episodes, [ms / 1e3], rate, blending_name, reference)

    def _run(
        self, label: str, how: Callable[..., list[Episode]], policy: Policy, rate: float, **options: Any
    ) -> list[Episode]:
        total = len(self.seeds) * round(self.seconds * rate)
        with self.progress(label, total, "tick") as shown:
            options = {**self.options, **options, "rate_hz": rate, "on_ticks": shown.update}
            return how(policy, self.make_env, self.seeds, self.seconds, **options)

    def _add(
        self,
        results: list[RealtimeResult],
        name: str,
        episodes: Sequence[Episode],
        latencies: Sequence[float],
        rate_hz: float,
        blending: str,
        reference: Sequence[float] | None = None,
    ) -> None:
        results.append(
            RealtimeResult(
                name=name,
                episodes=episodes,
                latencies=latencies,
                reference=reference,
                margin=self.margin,
                rate_hz=rate_hz,
                blending=blending,
            )
        )
        self.on_result()
