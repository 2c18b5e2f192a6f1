"""Pushes that an object gets now and then, so that it isn't where a plan was made for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Push:
    """One push.

    Attributes:
        time: seconds since the reset.
        velocity: ``[2]``, horizontal, m/s, that the object has more from then on.
    """

    time: float
    velocity: NDArray[np.float64]


@dataclass(frozen=True)
class PushSchedule:
    """When, where and how hard an object is pushed: a Poisson process; directions and speeds are uniform.

    On Lift's table friction stops the cube within 0.1 s: it slides some 2 cm at 0.6 m/s, 5 cm at 1 m/s.

    Attributes:
        rate: pushes per second; 0: none.
        speed: range of the velocity that a push adds, m/s.

    Raises:
        ValueError: a number isn't finite or is below 0, or the range's end is below its start.
    """

    rate: float = 0.5
    speed: Sequence[float] = (0.6, 1.2)

    def __post_init__(self) -> None:
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"pushes: rate={self.rate} must be a number, not below 0")
        if len(self.speed) != 2 or not 0 <= self.speed[0] <= self.speed[1] < math.inf:
            raise ValueError(f"pushes: speed={self.speed} must be two numbers, not below 0, in their order")

    def pushes(self, draw: np.random.Generator) -> Iterator[Push]:
        """Draws pushes without end, in their order."""
        time = 0.0
        while self.rate:
            time += draw.exponential(1 / self.rate)
            direction, speed = draw.uniform(0, 2 * math.pi), draw.uniform(*self.speed)
            yield Push(time, speed * np.array([math.cos(direction), math.sin(direction)]))
