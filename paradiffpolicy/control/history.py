"""The observation window that a policy sees."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray


class History:
    """The last ``n_obs_steps`` observations; before there are so many, the first one repeats."""

    def __init__(self, n_obs_steps: int) -> None:
        self._observations: deque[NDArray[Any]] = deque(maxlen=n_obs_steps)

    def push(self, observation: NDArray[Any]) -> None:
        """Adds an observation ``[O]``."""
        missing = (self._observations.maxlen or 0) - len(self._observations)
        repeat = 1 if self._observations else missing
        self._observations.extend([observation] * repeat)

    def window(self) -> NDArray[Any]:
        """``[To, O]``, oldest first."""
        return np.stack(self._observations)

    def clear(self) -> None:
        self._observations.clear()
