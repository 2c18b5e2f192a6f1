"""Samplers side by side: reward on the same seeds, latency and deadlines one robot at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record
from ..policy import Policy
from ..robots.robot import EnvRobot
from .rollout import Episode
from .statistics import PairedDifference, paired_difference, standard_error
from .workers import MakeEnv


def paced_run(policy: Policy, make_env: MakeEnv, seed: int, n_ticks: int, clock: Clock) -> Record:
    """The control loop at the environment's own rate on a real clock, planning within its ticks."""
    env = make_env()
    generator = torch.Generator().manual_seed(seed)
    try:
        with Controller(policy, policy.spec.control_hz, generator=generator, clock=clock) as controller:
            robot = EnvRobot(env, seed, clock)
            return ControlLoop(controller, robot).run(n_ticks, until=lambda: robot.finished)
    finally:
        env.close()


@dataclass(frozen=True)
class SamplerResult:
    """One sampler's figures.

    Attributes:
        name: of the sampler.
        episodes: one per seed.
        latencies: seconds per plan of one robot.
        record: of the paced run, or None.
        difference: to the reference's scores; None for the reference itself.
    """

    name: str
    episodes: list[Episode]
    latencies: list[float]
    record: Record | None
    difference: PairedDifference | None

    @property
    def scores(self) -> list[float]:
        return [episode.score for episode in self.episodes]

    @property
    def missed(self) -> int:
        """Deadlines missed in the paced run."""
        return 0 if self.record is None else self.record.missed

    def latency_ms(self, percentile: float) -> float:
        return float(np.percentile(self.latencies, percentile)) * 1e3 if self.latencies else math.nan

    def per_plan(self, field: str) -> list[int]:
        """``rounds`` or ``evaluations`` of every plan of every episode."""
        return [value for episode in self.episodes for value in getattr(episode, field)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        iterations, nfe = self.per_plan("iterations"), self.per_plan("nfe")
        return {
            "score": {
                "mean": float(np.mean(self.scores)),
                "standard_error": _number(standard_error(self.scores)),
                "per_seed": {str(e.seed): round(e.score, 6) for e in self.episodes},
            },
            "success_rate": float(np.mean([e.success for e in self.episodes])),
            "iterations_per_plan": _spread(iterations),
            "nfe_per_plan": _spread(nfe),
            "plan_latency_ms": {
                "p50": _number(self.latency_ms(50)),
                "p99": _number(self.latency_ms(99)),
                "n_plans": len(self.latencies),
            },
            "deadlines": {
                "ticks": 0 if self.record is None else self.record.n_ticks,
                "missed": self.missed,
                "faults": {} if self.record is None else self.record.faults(),
            },
            "difference_to_reference": None
            if self.difference is None
            else {
                "mean": self.difference.mean,
                "interval_95": [_number(self.difference.low), _number(self.difference.high)],
                "margin": self.difference.margin,
                "p_value": _number(self.difference.p_value),
                "verdict": self.difference.verdict,
            },
        }


def results(
    episodes: Mapping[str, list[Episode]],
    latencies: Mapping[str, list[float]],
    records: Mapping[str, Record],
    reference: str,
    margin: float,
) -> list[SamplerResult]:
    """Joins what was measured; all samplers must have run the same seeds."""
    scores = {name: [e.score for e in runs] for name, runs in episodes.items()}
    return [
        SamplerResult(
            name,
            runs,
            list(latencies.get(name, [])),
            records.get(name),
            None if name == reference else paired_difference(scores[name], scores[reference], margin),
        )
        for name, runs in episodes.items()
    ]


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "max": float(np.max(values))}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
