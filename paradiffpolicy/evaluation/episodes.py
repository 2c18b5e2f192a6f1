"""One episode, and episodes on the same seeds compared: score, success, difference to a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..tables import quantiles
from .statistics import PairedDifference, paired_difference, standard_error

if TYPE_CHECKING:  # it imports torch, which a process of demonstrations doesn't need
    from ..control.record import Record


@dataclass
class Episode:
    """One episode in closed loop.

    Attributes:
        seed: of the environment and of the plans' noise.
        score: the largest reward of any step, which may be negative; -inf before the first.
        success: the task was done.
        n_steps: its length in control steps.
        rewards: per step.
        iterations, nfe: per plan.
        windows: per plan, the observation window ``[To, O]`` it was made from.
        actions: per step, ``[A]``.
        infos: per step, the environment's ``info`` before the action, if asked for.
        frames: per step, a picture before the action, if asked for.
        texts: about it, by name.
        record: every tick and plan, if a controller ran it.
    """

    seed: int
    score: float = -math.inf
    success: bool = False
    n_steps: int = 0
    rewards: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    windows: list[NDArray[Any]] = field(default_factory=list)
    actions: list[NDArray[Any]] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    record: Record | None = None

    def add_rewards(self, rewards: Sequence[float]) -> None:
        """Notes the rewards of further steps."""
        self.rewards += rewards
        self.n_steps += len(rewards)
        self.score = max(self.score, *rewards)

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """``[n_steps, ...]`` by name: ``action``, ``rewards``, and fields of the infos."""
        own: dict[str, list[Any]] = {"action": self.actions, "rewards": self.rewards}
        return {name: np.stack(own.get(name) or [info[name] for info in self.infos]) for name in names}

    def moment(self, k: int) -> dict[str, Any]:
        """How the episode goes at frame ``k``, for ``episode_lines``, in steps: ``at``, ``score`` (the last
        reward, NaN before the first), ``best`` (until then), ``best_at``, and ``ended``: the last frame tells
        of the end."""
        ended = k >= len(self.frames) - 1
        at = self.n_steps if ended else k
        past = self.rewards[:at]
        best = max(past, default=math.nan)
        return {
            "at": at,
            "score": past[-1] if past else math.nan,
            "best": best,
            "best_at": past.index(best) + 1 if past else 0,
            "ended": ended,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Episodes of one sampler, compared with another's on the same seeds.

    Attributes:
        name: of the sampler, or of the case.
        episodes: one per seed.
        latencies: seconds per plan of one robot.
        reference: the scores that these are compared with, seed by seed; None: these are the reference.
        margin: of score, for the verdict.
    """

    against: ClassVar = "reference"

    name: str
    episodes: Sequence[Episode]
    latencies: Sequence[float] = ()
    reference: Sequence[float] | None = None
    margin: float = 0.05

    @property
    def scores(self) -> list[float]:
        return [episode.score for episode in self.episodes]

    @property
    def success_rate(self) -> float:
        return float(np.mean([episode.success for episode in self.episodes]))

    @cached_property
    def difference(self) -> PairedDifference | None:
        """The paired difference to the reference's scores."""
        if self.reference is None:
            return None
        return paired_difference(self.scores, self.reference, self.margin)

    @cached_property
    def latency_ms(self) -> dict[str, float | None]:
        """``quantiles`` of the milliseconds per plan."""
        return quantiles(1e3 * np.asarray(self.latencies))

    def compared(self) -> dict[str, Any]:
        """Score, success and difference as plain values, for report.json."""
        difference = self.difference
        return {
            "score": {
                "mean": float(np.mean(self.scores)),
                "standard_error": standard_error(self.scores),
                "per_seed": {str(e.seed): round(e.score, 6) for e in self.episodes},
            },
            "success_rate": self.success_rate,
            f"difference_to_{self.against}": difference
            and {
                "mean": difference.mean,
                "interval_95": [difference.low, difference.high],
                "margin": difference.margin,
                "p_value": difference.p_value,
                "verdict": difference.verdict,
            },
        }
