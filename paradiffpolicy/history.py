"""Keeps the observation window of a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """Keeps observations by tick.  The first one stands for all before it, and in a gap the one before does.

    Args:
        n_obs_steps: To, observations in a window.
        stride: ticks from one of them to the next.
    """

    def __init__(self, n_obs_steps: int, stride: int = 1) -> None:
        # A place per tick, and every observation in two, a length apart: then any window is a slice.
        self._length, self._stride = (n_obs_steps - 1) * stride + 1, stride
        self._kept: NDArray[Any] = np.empty((2 * self._length, 0))
        self._tick: int | None = None

    def push(self, observation: NDArray[Any], tick: int | None = None) -> None:
        """Adds an observation ``[O]``, made at ``tick``: one after the last unless given."""
        if self._tick is None:
            self._kept = np.empty((2 * self._length, *observation.shape))
            self._kept[:] = observation
            self._tick = 0 if tick is None else tick
            return
        before, tick = self._tick, self._tick + 1 if tick is None else tick
        for gap in range(max(before + 1, tick - self._length), tick):
            self._put(gap, self._kept[before % self._length])
        self._tick = max(tick, before)
        self._put(self._tick, observation)

    def _put(self, tick: int, observation: NDArray[Any]) -> None:
        place = tick % self._length
        self._kept[place] = self._kept[place + self._length] = observation

    def window(self) -> NDArray[Any]:
        """``[To, O]``, oldest first."""
        assert self._tick is not None
        end = self._tick % self._length + self._length + 1
        return self._kept[end - self._length : end : self._stride].copy()

    @property
    def empty(self) -> bool:
        return self._tick is None

    def clear(self) -> None:
        self._tick = None
