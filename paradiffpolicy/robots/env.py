"""A gymnasium environment as a robot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from .. import environment
from ..clock import Clock
from ..errors import InputError
from ..task import Contract
from .robot import EpisodeProgress, RobotSettings, RobotSetup


class EnvRobot:
    """Any gymnasium environment as a robot in the clock's time: the world goes on at its own rate, with or
    without new actions.

    Steps are taken when they are needed: ``observe`` takes all that are over by the clock.  A step has one
    action, so one that comes in the middle of a period counts for all of it; an environment with a higher
    ``control_hz`` has shorter ones.

    Args:
        env: observations must be vectors, actions a box.
        seed: of the reset.
        clock: whose seconds count.  A reset is the moment 0 of the world.
        control_hz: its steps per second; None: see ``environment.control_rate``.
        hold: gives the action that stops it; None: see ``environment.hold_action``, or where that gives none,
            zero (or the bound next to it) if the contract says that actions are relative, and before there
            was an action; else the last one.
        contract: says what its actions are.
        success_key: see ``environment.succeeded``.
        scoring: how a score is made of rewards, a name in ``environment.SCORINGS``.

    Attributes:
        info: the environment's, at the last observation.
        score: of the rewards so far, by ``scoring``; NaN before the first step.
        best, best_step: the largest reward so far, and the step that had it.
        reward: of the last step; NaN before the first.
        success: the task was done at some step; None: the environment doesn't say.
        finished: it terminated, or was truncated.
        n_steps: steps so far.

    Raises:
        InputError: its rate isn't known.
    """

    info: Mapping[str, Any]

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        seed: int,
        clock: Clock,
        *,
        control_hz: float | None = None,
        hold: Callable[[], Any] | None = None,
        contract: Contract = Contract(),  # noqa: B008  frozen
        success_key: str | None = None,
        scoring: str = "max",
    ) -> None:
        self.env, self._clock, self._hold, self._success_key = env, clock, hold, success_key
        self._contract, self.scoring = contract, scoring
        environment.require_vectors(env)
        self.control_hz = environment.control_rate(env, control_hz)
        self._drawn: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begins another episode, now."""
        self._observation, self._info = self.env.reset(seed=environment.require_seed(seed))
        self.info = self._info
        self.score = self.reward = self.best = math.nan
        self.success: bool | None = None
        self.finished, self.n_steps, self.best_step = False, 0, 0
        space = self.env.action_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise InputError(f"the environment's actions are {space}: a robot's must be a box")
        self._action = self._zero = np.clip(np.zeros(space.shape), space.low, space.high)
        self._action = self._holding()
        self._drawn.clear()
        self._begun = self._clock.now()

    def _holding(self) -> NDArray[Any]:
        action = (self._hold or partial(environment.hold_action, self.env))()
        if action is None:
            return self._zero if self._contract.is_relative else self._action
        return np.asarray(action)

    def advance(self) -> None:
        """Takes the steps that are over by the clock."""
        over = (self._clock.now() - self._begun) * self.control_hz
        over = math.floor(over + 1e-6)  # a deadline computed in floats is the world's moment too
        while self.n_steps < over and not self.finished:
            self._observation, reward, terminated, truncated, self._info = self.env.step(self._action)
            self.n_steps += 1
            self.reward = environment.finite_reward(reward)
            self.score = environment.scored(self.scoring, self.score, self.reward, self.n_steps)
            if not self.reward <= self.best:
                self.best, self.best_step = self.reward, self.n_steps
            done = environment.succeeded(terminated, self._info, self._success_key)
            self.success = self.success if done is None else done or bool(self.success)
            self.finished = terminated or truncated

    def observe(self) -> NDArray[Any]:
        self.advance()
        # Noted now: when an observer asks, the world may have gone on.
        self.info = self._info
        return np.asarray(self._observation)

    def apply(self, action: NDArray[Any]) -> None:
        self.advance()
        self._action = np.array(action)

    def stop(self) -> None:
        self.advance()
        self._action = self._holding()

    def fields(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Values of ``info`` by name."""
        return environment.recorded(self.info, names)

    def progress(self) -> EpisodeProgress:
        """How the episode goes."""
        seconds, best_at = self.n_steps / self.control_hz, self.best_step / self.control_hz
        return EpisodeProgress(seconds, self.reward, self.best, best_at, self.finished)

    def picture(self, size: int) -> NDArray[np.uint8]:
        """``[size, size, 3]`` RGB; drawn once per step of the world."""
        step, picture = self._drawn.get(size, (-1, None))
        if picture is None or step != self.n_steps:
            picture = environment.picture(self.env, size)
            self._drawn[size] = self.n_steps, picture
        return picture


class PacedEnvRobot(EnvRobot):
    """``EnvRobot`` for the machine's clock: its world begins when it is first observed, half a step before.

    Ticks then come in the middle of its steps, where being a little early or late doesn't make it another
    step.
    """

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._waits = True

    def observe(self) -> NDArray[Any]:
        if self._waits:
            self._begun, self._waits = self._clock.now() - 0.5 / self.control_hz, False
        return super().observe()

    def stop(self) -> None:
        if not self._waits:
            super().stop()


def build_env(settings: RobotSettings) -> RobotSetup:
    """The task's environment at the clock's pace."""
    if settings.make_env is None:
        raise InputError("robot=env drives the task's environment, and this task has none")
    env, rate, size = settings.make_env(settings.rate_hz), settings.rate_hz, settings.picture_size
    options: dict[str, Any] = {"control_hz": rate, "success_key": settings.success_key}
    options |= {"scoring": settings.scoring, "contract": settings.spec.contract}
    robot = PacedEnvRobot(env, settings.seed, settings.clock, **options)
    space: Any = env.action_space

    def project(actions: Any) -> NDArray[Any]:
        """A plane's position to pixels."""
        return np.asarray((np.asarray(actions) - space.low) / (space.high - space.low) * size)

    return RobotSetup(
        robot,
        fields=lambda: robot.fields(settings.recorded),
        picture=lambda: robot.picture(size),
        project=project if space.shape == (2,) else None,
        finished=lambda: robot.finished,
        progress=robot.progress,
        outcome=lambda: {
            "score": robot.score if robot.n_steps else None,
            "scoring": robot.scoring,
            "success": robot.success,
        },
        close=env.close,
    )
