"""What a control loop drives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError


class Robot(Protocol):
    """A thing with a control rate that can be observed and told what to do.

    Attributes:
        control_hz: how many actions per second it takes.
    """

    control_hz: float

    def observe(self) -> NDArray[Any]:
        """The observation now, ``[O]``."""
        ...

    def apply(self, action: NDArray[Any], n_steps: int) -> tuple[float, bool]:
        """Executes ``action`` ``[A]`` for ``n_steps`` control periods; ``(reward, finished)``."""
        ...

    def hold(self) -> NDArray[Any]:
        """The action that keeps it where it is, ``[A]``."""
        ...


class EnvRobot:
    """A gymnasium environment with ``control_hz`` and ``hold_action``, reset on construction.

    Args:
        env: observations must be vectors.
        seed: of the reset.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        self._env = env
        inner: Any = env.unwrapped
        self.control_hz = float(inner.control_hz)
        self._hold_action: Callable[[], Any] = lambda: inner.hold_action
        self._observation, _ = env.reset(seed=seed)

    def observe(self) -> NDArray[Any]:
        return np.asarray(self._observation)

    def apply(self, action: NDArray[Any], n_steps: int) -> tuple[float, bool]:
        best, finished = 0.0, False
        for _ in range(n_steps):
            self._observation, reward, terminated, truncated, _ = self._env.step(action)
            best = max(best, float(reward))
            finished = terminated or truncated
            if finished:
                break
        return best, finished

    def hold(self) -> NDArray[Any]:
        return np.asarray(self._hold_action())


def steps_per_tick(control_hz: float, rate_hz: float) -> int:
    """How many of the robot's control periods one tick of the loop lasts.

    Raises:
        InputError: ``rate_hz`` isn't above 0 or doesn't divide ``control_hz``.
    """
    if not rate_hz > 0:
        raise InputError(f"rate_hz={rate_hz} must be above 0")
    steps = round(control_hz / rate_hz)
    if steps < 1 or abs(steps * rate_hz - control_hz) > 1e-9 * control_hz:
        raise InputError(
            f"the loop's rate_hz={rate_hz} must divide the robot's control rate, {control_hz} Hz"
        )
    return steps
