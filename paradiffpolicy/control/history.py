"""The observation window that a policy sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """Observations by tick; before the first one it repeats, and in a gap the one before does.

    Args:
        n_obs_steps: To, observations in a window.
        stride: ticks from one of them to the next.
    """

    def __init__(self, n_obs_steps: int, stride: int = 1) -> None:
        # Dense, a place per tick: a window is read without a search.
        self._n, self._stride = n_obs_steps, stride
        self._length = (n_obs_steps - 1) * stride + 1
        self._kept: NDArray[Any] | None = None
        self._tick: int | None = None

    def push(self, observation: NDArray[Any], tick: int | None = None) -> None:
        """Adds an observation ``[O]``, made at ``tick``: one after the last unless given."""
        if self._kept is None or self._kept.shape[1:] != observation.shape:
            self._kept, self._tick = np.empty((self._length, *observation.shape)), None
        if self._tick is None:
            self._tick = 0 if tick is None else tick
            self._kept[:] = observation
            return
        tick = self._tick + 1 if tick is None else tick
        before = self._kept[self._tick % self._length]
        for gap in range(self._tick + 1, min(tick, self._tick + self._length)):
            self._kept[gap % self._length] = before
        self._tick = max(tick, self._tick)
        self._kept[self._tick % self._length] = observation

    def repeat(self, tick: int) -> None:
        """The last observation stands for ``tick``'s too; nothing before there is one."""
        if self._kept is not None and self._tick is not None:
            self.push(self._kept[self._tick % self._length], tick)

    def window(self) -> NDArray[Any]:
        """``[To, O]``, oldest first."""
        assert self._kept is not None and self._tick is not None
        ticks = self._tick - self._stride * np.arange(self._n - 1, -1, -1)
        return self._kept[ticks % self._length]

    @property
    def empty(self) -> bool:
        return self._tick is None

    def clear(self) -> None:
        self._tick = None
