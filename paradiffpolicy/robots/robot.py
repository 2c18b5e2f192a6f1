"""What a control loop drives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..clock import Clock
from ..errors import InputError


class Robot(Protocol):
    """Something that can be observed and told what to do.  No call may block: the loop's rate is at
    stake."""

    def observe(self) -> NDArray[Any] | None:
        """The newest observation ``[O]``; None if none has come since the last call."""
        ...

    def apply(self, action: NDArray[Any]) -> None:
        """Sends a command ``[A]``; the robot keeps to it until the next."""
        ...

    def stop(self) -> None:
        """Stops in a safe way: called when no action is safe, and at the end of a run."""
        ...


class EnvRobot:
    """A gymnasium environment whose time is the clock's: the world goes on at its own rate, whether it
    gets new actions or not.

    The environment's steps happen when somebody looks: ``observe`` takes all that the clock says are
    over.  A step has one action, so one that comes in the middle of a period counts for all of it; an
    environment with a higher ``control_hz`` has finer ones.

    Args:
        env: observations must be vectors.
        seed: of the reset.
        clock: whose seconds count.  A reset is the moment 0 of the world.
        control_hz: its steps per second; None: the environment's attribute of that name.
        hold: gives the action that keeps it where it is; None: the environment's ``hold_action``.

    Attributes:
        score: the largest reward so far, NaN before the first step.
        best_step: the step that had it.
        reward: of the last step.
        success: the environment terminated.
        finished: it terminated, or was truncated.
        n_steps: steps so far.

    Raises:
        InputError: the environment doesn't say its rate, or how to hold.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        seed: int,
        clock: Clock,
        *,
        control_hz: float | None = None,
        hold: Callable[[], Any] | None = None,
    ) -> None:
        self.env, self._clock = env, clock
        inner: Any = env.unwrapped
        for name, given in (("control_hz", control_hz), ("hold_action", hold)):
            if given is None and name not in dir(inner):  # a property may need a reset first
                raise InputError(f"{type(inner).__name__} has no {name}: say it with {name.split('_a')[0]}=…")
        self.control_hz = float(inner.control_hz if control_hz is None else control_hz)
        self._hold = (lambda: inner.hold_action) if hold is None else hold
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begins another episode, now."""
        self._observation, _ = self.env.reset(seed=seed)
        self.score = self.reward = math.nan
        self.success, self.finished, self.n_steps, self.best_step = False, False, 0, 0
        self._action = np.asarray(self._hold())
        self._begun = self._clock.now()

    def advance(self) -> None:
        """Takes the steps that the clock says are over."""
        over = (self._clock.now() - self._begun) * self.control_hz
        over = math.floor(over + 1e-6)  # a deadline computed in floats is the world's moment too
        while self.n_steps < over and not self.finished:
            self._observation, reward, terminated, truncated, _ = self.env.step(self._action)
            self.n_steps += 1
            self.reward = float(reward)
            if not self.reward <= self.score:
                self.score, self.best_step = self.reward, self.n_steps
            self.success |= terminated
            self.finished = terminated or truncated

    def observe(self) -> NDArray[Any]:
        self.advance()
        return np.asarray(self._observation)

    def apply(self, action: NDArray[Any]) -> None:
        self.advance()
        self._action = np.array(action)

    def stop(self) -> None:
        self.advance()
        self._action = np.asarray(self._hold())
