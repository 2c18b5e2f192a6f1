"""An environment as a robot that can be looked at while it is driven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..clock import Clock
from .robot import EnvRobot


class _KeepInfo(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Remembers the last ``info``."""

    info: Mapping[str, Any]

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, self.info = self.env.reset(**options)
        return observation, dict(self.info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, self.info = self.env.step(action)
        return observation, reward, terminated, truncated, dict(self.info)


class WatchedEnvRobot(EnvRobot):
    """``EnvRobot`` with what an observer may ask of it, and a world that waits for the loop.

    The world begins when it is first observed, half a step before: ticks then come in the middle of its
    steps, where being a little early or late doesn't make it another step.

    Attributes:
        info: the environment's, at the last observation.
    """

    info: Mapping[str, Any]

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int, clock: Clock) -> None:
        self._kept = _KeepInfo(env)
        super().__init__(self._kept, seed, clock)

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self.info = self._kept.info
        self._drawn: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self._waits = True

    def observe(self) -> NDArray[Any]:
        if self._waits:
            self._begun = self._clock.now() - 0.5 / self.control_hz
            self._waits = False
        observation = super().observe()
        # Noted now: by the time that an observer asks, the world may have gone on.
        self.info = self._kept.info
        return observation

    def stop(self) -> None:
        if not self._waits:
            super().stop()

    def fields(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Those of ``info``'s values."""
        return {name: np.asarray(self.info[name]) for name in names}

    def picture(self, size: int) -> NDArray[np.uint8]:
        """``[size, size, 3]`` RGB; drawn once per step of the world, however many ask."""
        step, picture = self._drawn.get(size, (-1, None))
        if picture is None or step != self.n_steps:
            inner: Any = self.env.unwrapped
            picture = inner.picture(size)
            self._drawn[size] = self.n_steps, picture
        return picture
