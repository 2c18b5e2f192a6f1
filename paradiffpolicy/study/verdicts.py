"""Verdicts on paired differences while they come in, of all questions of a study together.

A question's mean difference is tested for four claims, by the one-sided tests of ``betting.py``:

    equivalent     it lies within ± margin: both sides are refuted
    better         it is above 0
    non-inferior   it is above -margin
    worse          it is below -margin

The p-values are valid at any time: a study may look after every block, and stop for whatever reason.

*Many questions* are tested by Holm's step-down procedure, each kind of claim for itself, as in
``evaluation/statistics.py``: ``error`` is the largest chance that a study ever makes a false claim of a kind.
Holm asks nothing of how questions depend on each other, and they do: they share seeds and references.  (The
average of the questions' e-values shows only that *some* question has an effect.)  p-values only fall with
time, hence Holm's levels only rise: no claim is taken back.

*The interval* is the one of the two tests for equivalence.  Each refutes what lies beyond its end at Holm's
level a for that claim, so the interval's confidence is 1 - 2a, at all times: 90 % for a single question at
5 %.  A question is equivalent just when its interval lies within ± margin.

Snyder et al. (2025), arXiv 2503.10966, and (2026), arXiv 2603.13616, compare robot policies sequentially.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.statistics import CLAIMS as FIXED_CLAIMS
from ..evaluation.statistics import MOST_SEEDS, POWER
from .betting import BoundedMean, Side

CLAIMS = {
    "equivalent": FIXED_CLAIMS["equivalent"],
    "better": "better",
    "non_inferior": FIXED_CLAIMS["non_inferior"],
    "worse": FIXED_CLAIMS["worse"],
}
"""What may be claimed of a difference: each decides on the margin, the first that is shown is the verdict."""

TESTS: dict[str, tuple[tuple[int, Side], ...]] = {
    "equivalent": ((-1, "above"), (1, "below")),
    "better": ((0, "above"),),
    "non_inferior": ((-1, "above"),),
    "worse": ((-1, "below"),),
}
"""Per claim, the one-sided tests that must all reject: the bound in margins, and the side that is claimed."""


@dataclass(frozen=True)
class Answer:
    """A question's answer, as far as its differences show one.

    Attributes:
        n: differences, one per seed.
        mean: of the differences; NaN without any.
        interval: of the mean, the means that no look has refuted.
        confidence: of the interval, at all times.
        margin: that is tested.
        claim: the first of ``CLAIMS`` that is shown.
        p_values: per claim, valid at any time.
        levels: per claim, that it is tested at, by Holm's procedure.
        seeds_needed: more seeds until a verdict, see ``judge``; None: decided, or it can't be told.
        fixed_n: seeds that a test of a fixed number of seeds would have needed; see ``fixed_size``.
    """

    n: int
    mean: float
    interval: tuple[float, float]
    confidence: float
    margin: float
    claim: str | None
    p_values: Mapping[str, float]
    levels: Mapping[str, float]
    seeds_needed: int | None
    fixed_n: int | None

    @property
    def decided(self) -> bool:
        """A claim on the margin is shown."""
        return self.claim is not None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.claim:
            return CLAIMS[self.claim].format(self.margin)
        more = self.seeds_needed
        return "inconclusive" if more is None else f"inconclusive: about {more} more seeds would decide"


def judge(sequences: Sequence[BoundedMean], margins: Sequence[float], error: float = 0.05) -> list[Answer]:
    """All questions of a study together, in order.

    ``seeds_needed`` is the number of further seeds that decide on -margin in about every second study, if
    differences stay as they are.

    Args:
        sequences: of each question, its differences.
        margins: of each question, within the bounds of its differences.
        error: chance of a false claim of a kind in the whole study.

    Raises:
        ValueError: the lengths differ; a margin or the error is out of range.
    """
    if len(sequences) != len(margins):
        raise ValueError(f"{len(sequences)} questions, but {len(margins)} margins")
    if not 0 < error < 0.5:
        raise ValueError(f"error must be in (0, 0.5): {error:g}")
    tests = [_p_values(sequence, margin) for sequence, margin in zip(sequences, margins, strict=True)]
    levels = {claim: holm_levels([p[claim] for p in tests], error) for claim in CLAIMS}
    return [
        _answer(sequence, margin, p, {claim: levels[claim][k] for claim in CLAIMS})
        for k, (sequence, margin, p) in enumerate(zip(sequences, margins, tests, strict=True))
    ]


def holm_levels(p_values: Sequence[float], error: float) -> list[float]:
    """The level of each test by Holm's step-down procedure (1979).

    A hypothesis is rejected where its p-value is at most its level.
    """
    levels = [0.0] * len(p_values)
    level = error / max(1, len(p_values))
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        levels[k] = level
        if p_values[k] <= level and rank + 1 < len(p_values):
            level = error / (len(p_values) - rank - 1)
    return levels


def fixed_size(distance: float, deviation: float, level: float) -> int | None:
    """Seeds with which a one-sided paired test that looks once decides with a chance of ``POWER``.

    Values are taken for normal, as planning for such a test does.

    Args:
        distance: from the mean to what is refuted.
        deviation: of the differences.
        level: of the test.

    Returns:
        None: it can't be told, or more than ``MOST_SEEDS``.
    """
    from scipy.special import ndtri

    if not (distance > 0 and deviation > 0):
        return None
    needed = ((ndtri(1 - level) + ndtri(POWER)) * deviation / distance) ** 2
    return max(2, math.ceil(needed)) if needed <= MOST_SEEDS else None


def _p_values(sequence: BoundedMean, margin: float) -> dict[str, float]:
    if not margin > 0:
        raise ValueError(f"a margin must be positive: {margin:g}")
    return {
        claim: max(math.exp(sequence.log_p(bound * margin, side)) for bound, side in tests)
        for claim, tests in TESTS.items()
    }


def _answer(
    sequence: BoundedMean, margin: float, p_values: Mapping[str, float], levels: Mapping[str, float]
) -> Answer:
    claim = next((claim for claim in CLAIMS if p_values[claim] <= levels[claim]), None)
    mean, level = sequence.mean, levels["equivalent"]
    distance = margin - abs(mean) if claim == "equivalent" else abs(mean + margin)
    return Answer(
        n=sequence.n,
        mean=mean,
        interval=sequence.interval(2 * level),
        confidence=1 - 2 * level,
        margin=margin,
        claim=claim,
        p_values=p_values,
        levels=levels,
        seeds_needed=None if claim else _seeds_needed(sequence, margin, levels),
        fixed_n=fixed_size(distance, sequence.deviation, levels[claim or "non_inferior"]),
    )


def _seeds_needed(sequence: BoundedMean, margin: float, levels: Mapping[str, float]) -> int | None:
    """Of the claim on -margin that is the nearest."""
    found = []
    for claim in ("non_inferior", "worse"):
        ((bound, side),) = TESTS[claim]
        found.append(sequence.more_needed(bound * margin, side, math.log(levels[claim]), MOST_SEEDS))
    return min((more for more in found if more is not None), default=None)
