"""Confidence sequences for the mean of bounded values, by betting.

Against the hypothesis that a mean is at most m, a gambler stakes the share f of a capital of 1 on every
value x, at odds that are fair where the mean is m.  With the values moved to [0, 1], each multiplies the
capital by

    1 - f + f x / m,    0 < f <= 1

Where the hypothesis is true the capital isn't expected to grow, so by Ville's inequality the chance that it
*ever* reaches 1/a is at most a, however often one looks and for whatever reason one stops.  Which share is
best depends on a spread that isn't known: so the capital is spread over ``SHARES`` beforehand.  Its sum, a
mixture, is an e-process as each of its parts is.  The means that it doesn't refute are a confidence sequence.

The shares don't depend on the values seen before, so the capital doesn't depend on their order; and it falls
as m rises, so that what it doesn't refute is an interval.

*Least n.*  Even where all values are equal, a distance d to the hypothesis (of a range of 1) takes some
-log(a) m / d values.  No test that is valid for all values in bounds does with less: rare values at the bound
may not have been seen yet.  Tests that take the values for normal are quicker there, and wrong for such.

Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting"; Cover (1991),
"Universal portfolios".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Side = Literal["above", "below"]

SHARES = 2.0 ** -np.arange(7)
"""Shares that are staked: all is best where values hardly vary, little where they are at both bounds.  The
best one is about the distance to the hypothesis over the variance; one that is off by sqrt(2) loses a sixth
of the growth."""

WEIGHTS = 0.7 ** np.arange(len(SHARES)) / (0.7 ** np.arange(len(SHARES))).sum()
"""The part of the capital that begins with each share.  Where large shares are best, tests are short, and the
capital that other shares hold costs the most."""

_STEPS = 50
"""Halvings of the range in search of an interval's end."""


def log_capitals(ratios: NDArray[Any], starts: Sequence[int]) -> Floats:
    """Logarithms of what a capital of 1 has become after each look, by each share.

    Args:
        ratios: x / m of each value, ``[..., n]``, not negative.
        starts: index of the first value of each look, ascending from 0.

    Returns:
        ``[..., looks, shares]``.
    """
    with np.errstate(divide="ignore"):  # all is lost where all was staked and the value is 0
        looks = [np.add.reduceat(np.log(1 + f * (ratios - 1)), starts, axis=-1) for f in SHARES]
    return np.stack(looks, axis=-1).cumsum(axis=-2)


def log_mixture(capitals: Floats) -> Floats:
    """Logarithm of the sum of the capitals: ``[..., shares]`` to ``[...]``."""
    return np.logaddexp.reduce(capitals + np.log(WEIGHTS), axis=-1)


class BoundedMean:
    """Anytime-valid inference for the mean of values within known bounds.

    Each call of ``add`` is a look; the order of its values doesn't matter.

    Args:
        low, high: bounds of each value; -1 and 1 for differences of scores in [0, 1].

    Raises:
        ValueError: the bounds aren't finite numbers, the lower one first.
    """

    def __init__(self, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds of values must be finite, the lower one first: {low=:g}, {high=:g}")
        self.low, self.high = float(low), float(high)
        self._values: Floats = np.empty(0)
        self._starts: list[int] = []

    def add(self, values: Sequence[float]) -> None:
        """Adds values, and looks once; without values, it does nothing.

        Raises:
            ValueError: a value is out of bounds or no number; then none is added.
        """
        new = np.asarray(values, dtype=float).reshape(-1)
        wrong = new[~((new >= self.low) & (new <= self.high))]
        if len(wrong):
            raise ValueError(f"value {wrong[0]:g} is out of its bounds, [{self.low:g}, {self.high:g}]")
        if len(new):
            self._starts.append(self.n)
            self._values = np.concatenate([self._values, new])

    @property
    def n(self) -> int:
        """Values so far."""
        return len(self._values)

    @property
    def mean(self) -> float:
        """Of the values; NaN without any."""
        return float(self._values.mean()) if self.n else math.nan

    @property
    def deviation(self) -> float:
        """The values' standard deviation; NaN for fewer than two."""
        return float(self._values.std(ddof=1)) if self.n > 1 else math.nan

    def log_e(self, bound: float, side: Side) -> float:
        """Log of the e-process at the last look, against a mean of at most ("above") or at least ("below")
        ``bound``; 0 without values.

        Raises:
            ValueError: ``bound`` is not between the bounds of the values.
        """
        return float(log_mixture(self._capitals(bound, side))[-1])

    def log_p(self, bound: float, side: Side) -> float:
        """Log of the anytime-valid p-value of the same hypothesis: of 1 over the e-process's maximum over all
        looks, and at most 0.

        Raises:
            ValueError: as ``log_e``.
        """
        return -float(log_mixture(self._capitals(bound, side)).max())

    def more_needed(self, bound: float, side: Side, log_level: float, most: int) -> int | None:
        """Further values until the same hypothesis is refuted at a level, if values stay as they are.

        Each share's log capital grows per value as it did so far.

        Args:
            log_level: log of the level.
            most: the largest number that is worth naming.

        Returns:
            None: more than ``most``, or never.

        Raises:
            ValueError: as ``log_e``.
        """
        capitals = self._capitals(bound, side)[-1]
        low, high = 0, most
        while low < high:  # the mixture is convex in time: from below the level, it crosses it once
            middle = (low + high) // 2
            if log_mixture(capitals * (1 + middle / max(1, self.n))) >= -log_level:
                high = middle
            else:
                low = middle + 1
        return low if log_mixture(capitals * (1 + low / max(1, self.n))) >= -log_level else None

    def interval(self, error: float) -> tuple[float, float]:
        """The means that no look has refuted, at ``error / 2`` on each side.

        At all looks together it misses the mean with a chance of at most ``error``.  Where looks contradict
        each other and refute all, which is no more likely, it lies between the two ends, swapped.

        Raises:
            ValueError: ``error`` is not in (0, 1).
        """
        if not 0 < error < 1:
            raise ValueError(f"an interval's error must be in (0, 1): {error:g}")
        ends = self._end("above", math.log(error / 2)), self._end("below", math.log(error / 2))
        return min(ends), max(ends)

    def _end(self, side: Side, log_level: float) -> float:
        """The refuted mean that is the nearest to those that aren't; a bound where none is."""
        refuted, allowed = (self.low, self.high) if side == "above" else (self.high, self.low)
        for _ in range(_STEPS):
            middle = (refuted + allowed) / 2
            if not self.low < middle < self.high:  # within rounding of a bound
                break
            if self.log_p(middle, side) <= log_level:
                refuted = middle
            else:
                allowed = middle
        return refuted

    def _capitals(self, bound: float, side: Side) -> Floats:
        """Log capitals before the first look and after each: ``[1 + looks, shares]``."""
        if not self.low < bound < self.high:
            raise ValueError(f"a mean of {bound:g} is not between its bounds, {self.low:g} and {self.high:g}")
        before = np.zeros((1, len(SHARES)))
        if not self.n:
            return before
        origin = self.low if side == "above" else self.high
        ratios = (self._values - origin) / (bound - origin)
        return np.concatenate([before, log_capitals(ratios, self._starts)])
