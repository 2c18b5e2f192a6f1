r"""Turns a solver into a table by running its algorithm once on symbols.

A solver is written as its paper writes it.  ``x_T``, the network's outputs and the noises are
``LinearForm``s, which can be added and multiplied by numbers and nothing else, so whatever a solver
computes is linear, and its weights are the table:

    def euler(schedule, grid):
        trace = Trace(schedule, grid)
        x = trace.x_T
        for s, t in trace.steps:
            D = trace.denoise(x, s)
            x = t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * D
        return trace.tableau(x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..diffusion.schedule import NoiseSchedule, Point
from ..errors import InputError
from .tableau import Tableau


class LinearForm:
    """A linear form: ``w[0] x_T + sum_j w[1 + 2j] D_j + w[2 + 2j] z_j``."""

    __array_ufunc__ = None  # numpy's numbers leave multiplication to __rmul__

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.weights = weights

    @staticmethod
    def unit(column: int) -> LinearForm:
        """The form of one symbol: 0 is x_T, ``1 + 2j`` D_j, ``2 + 2j`` z_j."""
        weights = np.zeros(column + 1)
        weights[column] = 1.0
        return LinearForm(weights)

    def padded(self, length: int) -> NDArray[np.float64]:
        """The weights, followed by zeros."""
        return np.pad(self.weights, (0, length - len(self.weights)))

    def __add__(self, other: LinearForm) -> LinearForm:
        other = as_form(other, "adds")
        length = max(len(self.weights), len(other.weights))
        return LinearForm(self.padded(length) + other.padded(length))

    def __radd__(self, other: object) -> LinearForm:
        raise _not_linear("adds", other)

    def __sub__(self, other: LinearForm) -> LinearForm:
        return self + (-1.0) * as_form(other, "subtracts")

    def __neg__(self) -> LinearForm:
        return -1.0 * self

    def __mul__(self, factor: float) -> LinearForm:
        return LinearForm(self.weights * _number(factor, "multiplies by"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearForm:
        return LinearForm(self.weights / _number(divisor, "divides by"))


def _not_linear(verb: str, value: object) -> InputError:
    return InputError(
        f"a solver must be linear in x_T, the network's outputs and the noises, but this one {verb} "
        f"{'one of them' if isinstance(value, LinearForm) else f'a {type(value).__name__}'}: add and "
        "subtract them, and multiply them by numbers that are known before the first network call"
    )


def _number(value: Any, verb: str) -> float:
    try:
        return float(value)
    except TypeError:
        raise _not_linear(verb, value)


def as_form(value: object, verb: str) -> LinearForm:
    """``value`` if it is a linear form.

    Raises:
        InputError: it isn't; the message says what the solver does with it, ``verb``.
    """
    if not isinstance(value, LinearForm):
        raise _not_linear(verb, value)
    return value


def forward_variance(s: Point, t: Point) -> float:
    """Variance of ``q(x_s | x_t)`` for t less noisy than s: the noise that is added from t to s."""
    return -(s.sigma**2) * math.expm1(2 * (s.lam - t.lam))


def posterior_variance(s: Point, t: Point) -> float:
    """Variance of ``q(x_t | x_s, x_0)`` for t less noisy than s (Ho et al. 2020, equation 7)."""
    return (t.sigma / s.sigma) ** 2 * forward_variance(s, t)


class Trace:
    """Records a solver's steps on a grid of times.

    Args:
        schedule: the noise schedule.
        grid: ``[n_steps + 1]`` falling times; the last is where the sample stands.

    Attributes:
        points: the grid's times with their alpha, sigma and lambda.
        steps: ``(from, to)``, pairs of neighbours.
        x_T: the initial noise.
    """

    def __init__(self, schedule: NoiseSchedule, grid: Sequence[float]) -> None:
        self.schedule = schedule
        self.points = [schedule.at(float(time)) for time in grid]
        self.steps = list(pairwise(self.points))
        self.x_T = LinearForm.unit(0)
        self._inputs: list[LinearForm] = []
        self._at: list[Point] = []

    def denoise(self, x: LinearForm, at: Point) -> LinearForm:
        """The network's x0_hat for input ``x`` at a time: one more node."""
        self._inputs.append(as_form(x, "calls the network on"))
        self._at.append(at)
        return LinearForm.unit(2 * len(self._inputs) - 1)

    def noise(self) -> LinearForm:
        """Standard normal noise that belongs to the latest node; the same if asked for again."""
        return LinearForm.unit(2 * len(self._inputs))

    def tableau(self, sample: LinearForm) -> Tableau:
        """The table whose last node is ``sample``."""
        n = len(self._inputs)
        rows = np.stack([form.padded(2 * n + 1) for form in [*self._inputs, as_form(sample, "returns")]])
        end = self.points[-1]
        variance = []
        for at in self._at:
            later = [other for other in self._at if other.time < at.time]
            following = max(later, key=lambda point: point.time, default=end)
            variance.append(posterior_variance(at, following) if following.time < at.time else 0.0)

        def table(values: Any) -> torch.Tensor:
            return torch.tensor(np.ascontiguousarray(values), dtype=torch.float64)

        return Tableau(
            timesteps=table([at.time for at in self._at]),
            p=table(rows[:, 0]),
            B=table(rows[:, 1::2]),
            C=table(rows[:, 2::2]),
            variance=table(variance),
            end=end.time,
        )
