"""One episode, and episodes on the same seeds compared: score, success, difference to a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..environment import recorded, scored
from ..errors import InputError
from ..tables import quantiles
from .statistics import PairedDifference, holm, is_proportion, paired_difference, standard_error, wilson

if TYPE_CHECKING:  # it imports torch, which a process of demonstrations doesn't need
    from ..control.record import Record


@dataclass
class Episode:
    """One episode in closed loop.

    Attributes:
        seed: of the environment and of the plans' noise.
        score: of its rewards, by ``scoring``; may be negative; -inf before the first.
        success: the task was done; None: the environment doesn't say.
        n_steps: its length in control steps.
        rewards: per step.
        iterations, nfe: per plan.
        windows: per plan, the observation window ``[To, O]`` it was made from.
        actions: per step, ``[A]``.
        infos: per step, the environment's ``info`` before the action, if asked for.
        frames: if asked for, a picture before every action, and one of the end.
        texts: about it, by name.
        record: every tick and plan, if a controller ran it.
        motion: how smooth it was, by measure, where the record isn't kept; see ``study.running.moved``.
        scoring: a name in ``environment.SCORINGS``; max: the score is the largest reward of any step.
    """

    seed: int
    score: float = -math.inf
    success: bool | None = None
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
    motion: dict[str, list[float]] = field(default_factory=dict)
    scoring: str = "max"

    def add(self, rewards: Sequence[float], success: bool | None) -> None:
        """Notes further steps: their rewards, and whether the task was done after one of them."""
        for reward in rewards:
            self.n_steps += 1
            self.score = scored(self.scoring, self.score, reward, self.n_steps)
        self.rewards += rewards
        if success is not None:
            self.success = success or bool(self.success)

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """``[n_steps, ...]`` by name: ``action``, ``rewards``, and fields of the infos."""
        own: dict[str, list[Any]] = {"action": self.actions, "rewards": self.rewards}
        infos = [recorded(info, [name for name in names if name not in own]) for info in self.infos]
        values = {name: own.get(name) or [info[name] for info in infos] for name in names}
        for name, rows in values.items():
            if len({np.shape(row) for row in rows}) > 1:
                raise InputError(f"{name!r} has another shape at another step: it can't be recorded")
        return {name: np.stack(rows) for name, rows in values.items()}

    def moment(self, k: int) -> dict[str, Any]:
        """How the episode goes at frame ``k``, for ``episode_lines``, in steps: ``at``, ``score`` (the last
        reward, NaN before the first), ``best`` (until then), ``best_at``, and ``ended``."""
        past = self.rewards[:k]
        best = max(past, default=math.nan)
        return {
            "at": k,
            "score": past[-1] if past else math.nan,
            "best": best,
            "best_at": past.index(best) + 1 if past else 0,
            "ended": k == self.n_steps,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Episodes of one sampler, compared with another's on the same seeds.

    Attributes:
        name: of the sampler, or of the case.
        episodes: one per seed.
        latencies: seconds per plan of one robot.
        reference: the episodes that these are compared with, of the same seeds and perhaps more; None: these
            are the reference.
        differences: of ``score`` and ``success``, as ``judged`` found them.
    """

    against: ClassVar = "reference"

    name: str
    episodes: Sequence[Episode]
    latencies: Sequence[float] = ()
    reference: Sequence[Episode] | None = None
    differences: Mapping[str, PairedDifference] = field(default_factory=dict)

    @property
    def row_name(self) -> str:
        """Tells it from the other rows of its table."""
        return self.name

    @property
    def scores(self) -> list[float]:
        return [episode.score for episode in self.episodes]

    @property
    def scoring(self) -> str:
        """How scores are made of rewards: see ``Episode``."""
        return self.episodes[0].scoring

    @property
    def successes(self) -> list[float] | None:
        """1 and 0 per episode; None: the environment doesn't say."""
        return _successes(self.episodes)

    @property
    def decided(self) -> bool:
        """All differences have a verdict."""
        return all(difference.decided for difference in self.differences.values())

    @property
    def success_rate(self) -> float | None:
        return None if self.successes is None else float(np.mean(self.successes))

    @cached_property
    def latency_ms(self) -> dict[str, float | None]:
        """``quantiles`` of the milliseconds per plan."""
        return quantiles(1e3 * np.asarray(self.latencies))

    def compared(self) -> dict[str, Any]:
        """Score, success and differences as plain values, for report.json."""
        found = {name: difference.to_dict() for name, difference in self.differences.items()}
        return {
            "score": {
                **described(self.scores),
                "scoring": self.scoring,
                "per_seed": self._per_seed(self.scores),
            },
            "success": self.successes
            and {**described(self.successes), "per_seed": self._per_seed(self.successes)},
            "success_rate": self.success_rate,
            f"difference_to_{self.against}": found.get("score"),
            f"success_difference_to_{self.against}": found.get("success"),
        }

    def _per_seed(self, values: Sequence[float]) -> dict[str, float]:
        return {str(e.seed): round(v, 6) for e, v in zip(self.episodes, values, strict=True)}


OutcomeT = TypeVar("OutcomeT", bound=Outcome)


def _successes(episodes: Sequence[Episode]) -> list[float] | None:
    known = [float(episode.success) for episode in episodes if episode.success is not None]
    return known if episodes and len(known) == len(episodes) else None


def described(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and, of proportions, Wilson's interval: their standard error is 0 by chance.  One
    value has neither, and whether it is a proportion can't be told."""
    n = len(values)
    return {
        "n": n,
        "mean": float(np.mean(values)),
        "standard_error": standard_error(values),
        "interval_95": list(wilson(sum(values), n)) if n > 1 and is_proportion(values) else None,
    }


def judged(
    outcomes: Sequence[OutcomeT], margins: Mapping[str, float], looks: Sequence[int] = (), n_looks: int = 1
) -> list[OutcomeT]:
    """The rows of one table, each compared with its reference in score and in success; all comparisons of the
    table are tested together (see ``holm``).  Where score and success are the same numbers, that is one.

    Args:
        margins: of ``score`` and ``success``.
        looks, n_looks: see ``paired_difference``; looks after more seeds than a row has are left out.
    """
    found: dict[tuple[int, str], PairedDifference] = {}
    same = set()
    for row, outcome in enumerate(outcomes):
        if outcome.reference is None:
            continue
        n, pairs = len(outcome.episodes), {}
        reference = outcome.reference[:n]
        pairs["score"] = outcome.scores, [episode.score for episode in reference]
        own, others = outcome.successes, _successes(reference)
        if own is not None and others is not None:
            pairs["success"] = own, others
        if pairs["score"] == pairs.get("success"):
            same.add(row)
            del pairs["score"]
        for name, (values, against) in pairs.items():
            ends = [look for look in looks if look <= n]
            found[row, name] = paired_difference(
                values, against, margins[name], looks=ends if n in ends else (), n_looks=n_looks
            )
    tested = dict(zip(found, holm(list(found.values())), strict=True))
    differences: list[dict[str, PairedDifference]] = [{} for _ in outcomes]
    for (row, name), difference in tested.items():
        differences[row][name] = difference
    for row in same:
        differences[row]["score"] = differences[row]["success"]
    return [replace(outcome, differences=own) for outcome, own in zip(outcomes, differences, strict=True)]
