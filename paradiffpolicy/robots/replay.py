"""A robot that replays recorded observations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class ReplayRobot:
    """Gives recorded observations and ignores commands, to time a loop by itself.

    Args:
        observations: ``[n, O]``, again from the first after the last.
    """

    def __init__(self, observations: NDArray[Any]) -> None:
        self._observations, self._next = observations, 0

    def observe(self) -> NDArray[Any]:
        self._next = (self._next + 1) % len(self._observations)
        return np.asarray(self._observations[self._next])

    def apply(self, action: NDArray[Any]) -> None:
        pass

    def stop(self) -> None:
        pass
