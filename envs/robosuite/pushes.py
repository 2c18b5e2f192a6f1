"""A push that an object gets while the hand comes near, so that it isn't where a plan was made for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Push:
    """One push.

    Attributes:
        distance: metres between the hand and the object below which it is given, once.
        velocity: ``[2]``, horizontal, m/s, that the object has more from then on.
    """

    distance: float
    velocity: NDArray[np.float64]


@dataclass(frozen=True)
class PushRange:
    """How near, how hard and where to: each is uniform, directions too.

    On Lift's table friction stops the cube within 0.1 s: it slides some 2 cm at 0.6 m/s, 3 cm at 0.8 m/s.

    Attributes:
        distance: range of a push's distance, metres.
        speed: range of the speed that it adds, m/s.

    Raises:
        ValueError: a range isn't two finite numbers, not below 0, in their order.
    """

    distance: Sequence[float] = (0.1, 0.2)
    speed: Sequence[float] = (0.6, 0.8)

    def __post_init__(self) -> None:
        for name in ("distance", "speed"):
            values = getattr(self, name)
            if len(values) != 2 or not 0 <= values[0] <= values[1] < math.inf:
                raise ValueError(f"push: {name}={values} must be two numbers, not below 0, in their order")

    def draw(self, rng: np.random.Generator) -> Push:
        """Draws a push."""
        (nearest, farthest), (slowest, fastest) = self.distance, self.speed
        distance, speed = rng.uniform(nearest, farthest), rng.uniform(slowest, fastest)
        direction = rng.uniform(0, 2 * math.pi)
        return Push(distance, speed * np.array([math.cos(direction), math.sin(direction)]))
