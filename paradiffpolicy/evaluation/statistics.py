"""Paired comparisons of rewards on the same seeds: intervals, equivalence, non-inferiority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class PairedDifference:
    """A sampler's score minus the reference's on the same seeds.

    Attributes:
        mean: of the differences.
        low, high: 95 % confidence interval of the mean; NaN for fewer than two seeds.
        p_below: of the one-sided test against a mean of ``-margin`` or less; NaN for fewer than two seeds.
        p_above: of the one-sided test against a mean of ``margin`` or more.
        margin: that was tested.
    """

    mean: float
    low: float
    high: float
    p_below: float
    p_above: float
    margin: float

    @property
    def p_value(self) -> float:
        """Of the two one-sided tests together (Schuirmann 1987)."""
        return max(self.p_below, self.p_above)

    @property
    def equivalent(self) -> bool:
        """Both one-sided tests reject at 5 %: the mean lies within ± margin."""
        return self.p_value < 0.05

    @property
    def non_inferior(self) -> bool:
        """The sampler is not worse by the margin, at 5 %; it may be better by more."""
        return self.p_below < 0.05

    @property
    def verdict(self) -> str:
        if self.equivalent:
            return f"equivalent within {self.margin:g}"
        return f"non-inferior within {self.margin:g}" if self.non_inferior else "not shown"


def paired_difference(
    scores: Sequence[float], reference: Sequence[float], margin: float = 0.05
) -> PairedDifference:
    """Compares two samplers on the same seeds, in the same order.

    Scores that are all 0 or 1 are compared as paired proportions (Agresti and Min 2005, half a pair
    added to each of the four possible outcomes): fifty pairs that agree don't prove that all would, as
    their variance of zero has it.  Others by Student's t.

    Raises:
        ValueError: the lengths differ.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores against {len(reference)}: the seeds must be the same")
    differences = np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float)
    n, mean = len(differences), float(differences.mean())
    if n > 1 and {*scores, *reference} <= {0, 1}:
        won, lost, total = (differences > 0).sum() + 0.5, (differences < 0).sum() + 0.5, n + 2
        centre = float(won - lost) / total
        spread = math.sqrt((won + lost) / total - centre**2) / math.sqrt(total)
        compared = _compared(mean, centre, spread, stats.norm, margin)
        return replace(compared, low=max(compared.low, -1.0), high=min(compared.high, 1.0))
    se = standard_error(differences.tolist())
    if n < 2:
        return PairedDifference(mean, math.nan, math.nan, math.nan, math.nan, margin)
    if se == 0:
        return PairedDifference(mean, mean, mean, float(mean <= -margin), float(mean >= margin), margin)
    return _compared(mean, mean, se, stats.t(n - 1), margin)


def _compared(mean: float, centre: float, se: float, distribution: Any, margin: float) -> PairedDifference:
    """Compares an estimate, whose quotient with its standard error has a known distribution."""
    half = float(distribution.ppf(0.975)) * se
    below = float(distribution.sf((centre + margin) / se))
    above = float(distribution.cdf((centre - margin) / se))
    return PairedDifference(mean, centre - half, centre + half, below, above, margin)
