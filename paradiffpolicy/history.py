"""Keeps the observation window of a policy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """Keeps observations by tick.  The first one stands for all before it, and in a gap the one before does.

    Args:
        n_obs_steps: To, observations in a window.
        stride: ticks from one of them to the next; need not be a whole number.
        mixed: ``[O]``, which numbers are interpolated linearly where an observation of the window lies
            between two ticks; the others, and pictures, are the nearer tick's.  None: all numbers are.
    """

    def __init__(
        self, n_obs_steps: int, stride: float = 1, *, mixed: NDArray[np.bool_] | None = None
    ) -> None:
        # From the newest observation's tick.
        places = np.arange(-(n_obs_steps - 1), 1) * stride
        self._back = np.floor(places + 1e-9).astype(int)
        part = np.where(places - self._back > 1e-9, places - self._back, 0.0)
        self._part = part[:, None] if part.any() else None
        self._mixed = mixed
        self._kept: NDArray[Any] = np.empty(0)  # a place per tick, over and over
        self._tick: int | None = None

    def push(self, observation: NDArray[Any], tick: int | None = None) -> None:
        """Adds an observation ``[O]``, or a record, made at ``tick``: one after the last unless given."""
        length = 1 - int(self._back[0])
        if self._tick is None:
            self._tick = 0 if tick is None else tick
            first = np.asarray(observation)
            kind = first.dtype if first.dtype.names else np.dtype(np.float64)
            self._kept = np.repeat(first[None].astype(kind), length, axis=0)
            return
        before, self._tick = self._tick, max(self._tick, self._tick + 1 if tick is None else tick)
        for gap in range(max(before + 1, self._tick - length), self._tick):
            self._kept[gap % length] = self._kept[before % length]
        self._kept[self._tick % length] = observation

    def window(self) -> NDArray[Any]:
        """``[To, O]``, or records ``[To]``, oldest first."""
        assert self._tick is not None
        window = self._kept[(self._tick + self._back) % len(self._kept)]
        if self._part is None:
            return window
        # The newest lies on a tick.
        after = self._kept[(self._tick + np.minimum(self._back + 1, 0)) % len(self._kept)]
        if not window.dtype.names:
            return self._between(window, after)
        nearest, numbers = np.where(self._part[:, 0] < 0.5, window, after), window.dtype.names[0]
        nearest[numbers] = self._between(window[numbers], after[numbers])
        return nearest

    def numbers(self) -> History:
        """A copy that goes on by itself, of the vectors alone where observations have pictures."""
        other, names = copy.copy(self), self._kept.dtype.names
        other._kept = (self._kept[names[0]] if names else self._kept).copy()
        return other

    def _between(self, window: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
        """Numbers between those at two ticks, ``[To, O]`` each."""
        assert self._part is not None
        mix = window + self._part * (after - window)
        if self._mixed is None:
            return mix
        return np.where(self._mixed, mix, np.where(self._part < 0.5, window, after))

    @property
    def empty(self) -> bool:
        return self._tick is None

    def clear(self) -> None:
        self._tick = None
