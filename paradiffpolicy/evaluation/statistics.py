"""Paired comparisons on the same seeds: equivalence, non-inferiority and inferiority, of many at once.

Each comparison is tested for three claims by one-sided tests against ± margin, at 5 %:

    equivalent     the mean difference lies within ± margin (two one-sided tests, Schuirmann 1987)
    non-inferior   it isn't below -margin
    worse          it is below -margin

and, where none of these is shown, for a fourth: that it is below zero.

*Many comparisons* in a table are tested by Holm's step-down procedure, so that 5 % is the chance of any false
claim of a kind in the whole table.  Two one-sided tests at level a reject when the interval of confidence
1 - 2a is within ± margin: that interval is shown.

*Looking early.*  Of K looks the j-th spends the share (2j - 1) / K² of the level, and the shares sum to one:
by the union bound the chance of a false claim at any look is at most the level, whatever the dependence
between looks.  So an evaluation may stop at the first look that decides.

scipy is imported where it is used: it takes a process of environments as long as all the rest of its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL, POWER = 0.05, 0.8
"""Chance of a false claim; and of a verdict, for the number of seeds that would decide."""

MOST_SEEDS = 100_000
"""The largest number of seeds that is worth naming."""

CLAIMS = {
    "equivalent": "equivalent within {:g}",
    "non_inferior": "non-inferior within {:g}",
    "worse": "worse by more than {:g}",
    "lower": "lower, inconclusive within {:g}",
}
"""What may be claimed of a difference and its margin; the first that is shown is the verdict."""

DECISIONS = ("equivalent", "non_inferior", "worse")
"""Claims that decide on the margin."""


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion: it doesn't shrink to nothing when all of n succeed."""
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_proportion(*samples: Sequence[float]) -> bool:
    """Whether all values are 0 or 1."""
    return all({*values} <= {0, 1} for values in samples)


def look_share(look: int, n_looks: int) -> float:
    """The share of the level that the ``look``-th of ``n_looks`` spends."""
    return (2 * look - 1) / n_looks**2


@dataclass(frozen=True)
class PairedDifference:
    """A sampler's mean minus the reference's on the same seeds.

    Attributes:
        n: seeds.
        mean: of the differences.
        centre, se: the estimate that is tested, and its standard error; NaN for fewer than two seeds.
        freedom: degrees of freedom of Student's t; infinite: the normal distribution.
        limit: the largest difference that there can be.
        margin: that is tested.
        p_values: per claim, over all looks; see ``paired_difference``.
        share: of the level, at the last look.
        levels: per claim, that it is tested at; see ``holm``.
    """

    n: int
    mean: float
    centre: float
    se: float
    freedom: float
    limit: float
    margin: float
    p_values: Mapping[str, float]
    share: float = 1.0
    levels: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(CLAIMS, LEVEL))

    @property
    def claim(self) -> str | None:
        """The first claim that is shown."""
        return next((claim for claim in CLAIMS if self.p_values[claim] < self.levels[claim]), None)

    @property
    def decided(self) -> bool:
        """The claim decides on the margin."""
        return self.claim in DECISIONS

    @property
    def equivalent(self) -> bool:
        """The mean lies within ± margin."""
        return self.claim == "equivalent"

    @property
    def non_inferior(self) -> bool:
        """The sampler is not worse by the margin; it may be better by more."""
        return self.claim in ("equivalent", "non_inferior")

    @property
    def confidence(self) -> float:
        """Of the interval of the two one-sided tests for equivalence: 90 % at 5 %."""
        return 1 - 2 * self.levels["equivalent"] * self.share

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, at ``confidence``; NaN for fewer than two seeds."""
        return self.interval_at(self.confidence)

    def interval_at(self, confidence: float) -> tuple[float, float]:
        """Of the mean."""
        from scipy.special import ndtri, stdtrit

        upper = (1 + confidence) / 2
        half = self.se * float(ndtri(upper) if math.isinf(self.freedom) else stdtrit(self.freedom, upper))
        return max(self.centre - half, -self.limit), min(self.centre + half, self.limit)

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    @property
    def seeds_needed(self) -> int | None:
        """Seeds after which a test decides with a chance of ``POWER``, if the difference and its spread are
        as they seem now; None: it can't be told, or more than ``MOST_SEEDS``."""
        from scipy.special import ndtri

        beyond = abs(self.centre) - self.margin
        distance = self.centre + self.margin if beyond > 0 and self.centre > 0 else abs(beyond)
        if not self.se > 0 or distance == 0:
            return None
        z = float(ndtri(1 - self.levels["equivalent"] * self.share) + ndtri(POWER))
        needed = math.ceil(self.n * (z * self.se / distance) ** 2)
        return max(needed, self.n + 1) if needed <= MOST_SEEDS else None

    @property
    def verdict(self) -> str:
        words = CLAIMS[self.claim].format(self.margin) if self.claim else "inconclusive"
        needed = None if self.decided else self.seeds_needed
        return words if needed is None else f"{words}: some {_rounded(needed)} seeds would decide"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "n": self.n,
            "mean": self.mean,
            "interval": list(self.interval),
            "confidence": self.confidence,
            "margin": self.margin,
            "p_values": dict(self.p_values),
            "levels": dict(self.levels),
            "verdict": self.verdict,
            "seeds_needed": None if self.decided else self.seeds_needed,
        }


def _rounded(number: int) -> int:
    """Two digits, upwards."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def paired_difference(
    scores: Sequence[float],
    reference: Sequence[float],
    margin: float = 0.05,
    *,
    looks: Sequence[int] = (),
    n_looks: int = 1,
) -> PairedDifference:
    """Compares two samplers on the same seeds, in the same order.

    Scores that are all 0 or 1 are compared as paired proportions (Agresti and Min 2005, half a pair
    added to each of the four possible outcomes): fifty pairs that agree don't prove that all would, as
    their variance of zero has it.  Others by Student's t.

    Args:
        looks: numbers of seeds after which it was decided whether to go on, the last of them all; (): once.
        n_looks: that are planned.

    Raises:
        ValueError: the lengths differ.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores against {len(reference)}: the seeds must be the same")
    a, b = np.asarray(scores, dtype=float), np.asarray(reference, dtype=float)
    ends = list(looks) or [len(a)]
    shares = [look_share(k + 1, max(n_looks, len(ends))) for k in range(len(ends))]
    found = [_at_once(a[:end], b[:end], margin) for end in ends]
    below, above, worse, lower = (
        min(min(1.0, p[side] / share) for (_, p), share in zip(found, shares, strict=True))
        for side in range(4)
    )
    p_values = {"equivalent": max(below, above), "non_inferior": below, "worse": worse, "lower": lower}
    return replace(found[-1][0], p_values=p_values, share=shares[-1])


def _at_once(
    scores: NDArray[Any], reference: NDArray[Any], margin: float
) -> tuple[PairedDifference, list[float]]:
    """The estimate, and the p-values of not below -margin, not above margin, below -margin, and below 0."""
    from scipy.special import ndtr, stdtr

    differences = scores - reference
    n, mean = len(differences), float(differences.mean())
    centre, se, freedom, limit = mean, standard_error(differences.tolist()), n - 1.0, math.inf
    if n > 1 and is_proportion(scores.tolist(), reference.tolist()):
        won, lost, total = (differences > 0).sum() + 0.5, (differences < 0).sum() + 0.5, n + 2
        centre, freedom, limit = float(won - lost) / total, math.inf, 1.0
        se = math.sqrt((won + lost) / total - centre**2) / math.sqrt(total)
    estimate = PairedDifference(n, mean, centre, se, freedom, limit, margin, {})
    if not se > 0:  # one seed shows nothing; where all differences are equal, they are known
        refuted = (mean <= -margin, mean >= margin, mean >= -margin, mean >= 0)
        return estimate, [float(n < 2 or wrong) for wrong in refuted]

    def cdf(x: float) -> float:
        return float(ndtr(x) if math.isinf(freedom) else stdtr(freedom, x))

    low, high = (centre + margin) / se, (centre - margin) / se
    return estimate, [cdf(-low), cdf(high), cdf(low), cdf(centre / se)]


def holm(differences: Sequence[PairedDifference]) -> list[PairedDifference]:
    """The comparisons of one table, each claim tested at its level by Holm's step-down procedure (1979)."""
    levels: list[dict[str, float]] = [{} for _ in differences]
    for claim in CLAIMS:
        order = sorted(range(len(differences)), key=lambda k: differences[k].p_values[claim])
        level = LEVEL / max(1, len(order))
        for rank, k in enumerate(order):
            levels[k][claim] = level
            if differences[k].p_values[claim] < level and rank + 1 < len(order):
                level = LEVEL / (len(order) - rank - 1)
    return [replace(found, levels=own) for found, own in zip(differences, levels, strict=True)]
