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
        self._back = np.arange(-(n_obs_steps - 1) * stride, 1, stride)  # from the newest observation's tick
        self._kept: NDArray[Any] = np.empty(0)  # a place per tick, over and over
        self._tick: int | None = None

    def push(self, observation: NDArray[Any], tick: int | None = None) -> None:
        """Adds an observation ``[O]``, made at ``tick``: one after the last unless given."""
        length = 1 - int(self._back[0])
        if self._tick is None:
            self._tick = 0 if tick is None else tick
            self._kept = np.repeat(observation[None].astype(np.float64), length, axis=0)
            return
        before, self._tick = self._tick, max(self._tick, self._tick + 1 if tick is None else tick)
        for gap in range(max(before + 1, self._tick - length), self._tick):
            self._kept[gap % length] = self._kept[before % length]
        self._kept[self._tick % length] = observation

    def window(self) -> NDArray[Any]:
        """``[To, O]``, oldest first."""
        assert self._tick is not None
        return self._kept[(self._tick + self._back) % len(self._kept)]

    @property
    def empty(self) -> bool:
        return self._tick is None

    def clear(self) -> None:
        self._tick = None
