"""Confidence sequences for the mean of bounded values, by betting.

Against the hypothesis that a mean is at most m, a gambler stakes the share f of a capital of 1 on every value x,
at odds that are fair where the mean is m. With all values moved to [0, 1], each multiplies the capital by

    1 - f + f x / m,    0 < f <= 1

Where the hypothesis is true the capital's expectation never grows, so by Ville's inequality the chance that it *ever*
reaches 1/a is at most a, however often one looks and for whatever reason one stops. Which share is best depends on
a spread that isn't known, so the capital is spread over ``SHARES`` beforehand, and its sum is what is tested:
a mixture, which is an e-process as each of its parts is. The means that are not refuted are a confidence sequence.

The stakes don't depend on the values seen before, so the capital doesn't depend on their order, and it falls as m
rises: the means that are refuted lie on one side of those that aren't.

No test of the mean of values in [0, 1] is quicker, without further assumptions, than -log(a) / -log(1 - d / m)
values for a distance d, even where all are equal: one value in a few at the bound would move the mean by d.

Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting"; Cover (1991), "Universal
portfolios".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Side = Literal["above", "below"]

SHARES = 2.0 ** -np.arange(7)
"""Shares that are staked: from all, best where values hardly vary, to little, best where they differ as much as
they can."""

WEIGHTS = np.full(len(SHARES), 1 / len(SHARES))
"""The part of the capital that begins with each share; they sum to one."""

_STEPS = 50
"""Halvings of the range in search for an interval's end."""


def log_capitals(ratios: NDArray[Any]) -> Floats:
    """Logarithms of what a capital of 1 has become by each share.

    Args:
        ratios: x / m of each value, ``[..., n]``, not negative.

    Returns:
        ``[..., shares]``.
    """
    with np.errstate(divide="ignore"):  # all is lost where all was staked and the value is 0
        return np.log1p(SHARES * (np.asarray(ratios)[..., None] - 1)).sum(axis=-2)


def log_mixture(capitals: Floats) -> Floats:
    """Logarithm of the whole capital, of ``log_capitals``' sum over all values: ``[..., shares]`` to ``[...]``."""
    return np.logaddexp.reduce(capitals + np.log(WEIGHTS), axis=-1)


class BoundedMean:
    """Anytime-valid inference for the mean of values within known bounds.

    Each call of ``add`` is a look. Where the mean is a running maximum or intersection, it is over the looks: the
    order of the values of one call doesn't matter.

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
        self._looks: list[int] = []  # where the values of each look begin

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
            self._looks.append(self.n)
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
        """Log of the e-process now, against the hypothesis that the mean is at most ("above"), or at least
        ("below"), ``bound``.

        Raises:
            ValueError: ``bound`` is not between the bounds of the values.
        """
        return float(log_mixture(self._capitals(bound, side)[-1]))

    def log_p(self, bound: float, side: Side) -> float:
        """Log of the anytime-valid p-value of that hypothesis: 1 over the e-process's largest value at any look, or 1.

        Raises:
            ValueError: as ``log_e``.
        """
        return -max(0.0, float(log_mixture(self._capitals(bound, side)).max()))

    def growth(self, bound: float, side: Side) -> float:
        """Growth of the log capital per value, by the share that has been the best so far; NaN without values.

        Raises:
            ValueError: as ``log_e``.
        """
        return float(self._capitals(bound, side)[-1].max()) / self.n if self.n else math.nan

    def interval(self, error: float) -> tuple[float, float]:
        """The means that no look has refuted, at ``error / 2`` on each side.

        At all looks together it misses the mean with a chance of at most ``error``. Where the looks contradict
        each other none is left, which is no more likely; it then lies between the ends that refute each other.

        Raises:
            ValueError: ``error`` is not in (0, 1).
        """
        if not 0 < error < 1:
            raise ValueError(f"an interval's error must be in (0, 1): {error:g}")
        ends = self._end("above", math.log(error / 2)), self._end("below", math.log(error / 2))
        return min(ends), max(ends)

    def _end(self, side: Side, log_level: float) -> float:
        """The mean next to those that are refuted."""
        refuted, allowed = (self.low, self.high) if side == "above" else (self.high, self.low)
        for _ in range(_STEPS):
            middle = (refuted + allowed) / 2
            if self.log_p(middle, side) <= log_level:
                refuted = middle
            else:
                allowed = middle
        return refuted

    def _capitals(self, bound: float, side: Side) -> Floats:
        """Log capitals after each look, and before the first: ``[1 + looks, shares]``."""
        if not self.low < bound < self.high:
            raise ValueError(f"a mean of {bound:g} is not between its bounds, {self.low:g} and {self.high:g}")
        origin = self.low if side == "above" else self.high
        ratios = (self._values - origin) / (bound - origin)
        parts = [log_capitals(ratios[start:end]) for start, end in itertools.pairwise([*self._looks, self.n])]
        return np.cumsum([np.zeros(len(SHARES)), *parts], axis=0)
