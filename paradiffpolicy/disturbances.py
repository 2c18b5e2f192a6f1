"""Disturbances of an environment: of a policy's actions, of what it observes, of the physics.

Each has a strength, and strength 0 changes no bit of an episode.  What is random comes from a generator of
its own, begun by the reset's seed and the disturbance's name: all policies meet the same disturbances on a
seed, wherever and beside whichever others the episode runs.  Infos and pictures stay those of the world.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np

from .errors import InputError, is_number
from .registry import Registry

Env = gymnasium.Env[Any, Any]
Strengths = Mapping[str, float]
"""Strengths of disturbances, by name."""
Step = tuple[Any, Any, bool, bool, dict[str, Any]]


class _SeededWrapper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Has a generator, begun by every reset that has a seed."""

    name: ClassVar[str]

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self._draw = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._draw = np.random.default_rng([seed, *self.name.encode()])
        return self.env.reset(seed=seed, options=options)


class ActionNoise(_SeededWrapper):
    """Adds Gaussian noise to every action, without leaving the action space's bounds (farther than the action
    itself does).

    Args:
        env: whose actions are a bounded box.
        strength: standard deviation, as a share of the range (high - low) of each of the action's numbers.

    Raises:
        InputError: the actions have no range.
    """

    name = "action_noise"

    def __init__(self, env: Env, strength: float) -> None:
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
            raise InputError(
                f"action_noise is a share of the actions' range, and those of {type(env.unwrapped).__name__} "
                f"are {space}: they must be a box with bounds"
            )
        self._low, self._high = space.low, space.high
        self._deviation = strength * (space.high.astype(np.float64) - space.low)

    def step(self, action: Any) -> Step:
        action = np.asarray(action)
        noisy = action + self._deviation * self._draw.normal(size=self._deviation.shape)
        low, high = np.minimum(self._low, action), np.maximum(self._high, action)
        return self.env.step(noisy.clip(low, high).astype(action.dtype))


class DroppedObservations(_SeededWrapper):
    """Shows the last observation again in place of a new one, now and then; the first is always shown.

    Args:
        env: observes anything that can be copied.
        strength: probability that a step's observation is dropped.
    """

    name = "dropped_observations"

    def __init__(self, env: Env, strength: float) -> None:
        super().__init__(env)
        self._probability = strength

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        self._shown = copy.deepcopy(observation)  # environments may reuse their arrays
        return observation, info

    def step(self, action: Any) -> Step:
        observation, *rest = self.env.step(action)
        if self._draw.random() >= self._probability:
            self._shown = copy.deepcopy(observation)
        return self._shown, *rest


class ObservationDelay(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Shows what was observed some steps ago, and the first observation until then.

    Args:
        env: observes anything that can be copied.
        strength: steps, a whole number.
    """

    def __init__(self, env: Env, strength: float) -> None:
        super().__init__(env)
        self._observed: deque[Any] = deque(maxlen=1 + int(strength))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._observed.clear()
        self._observed.append(copy.deepcopy(observation))  # environments may reuse their arrays
        return observation, info

    def step(self, action: Any) -> Step:
        observation, *rest = self.env.step(action)
        self._observed.append(copy.deepcopy(observation))
        return self._observed[0], *rest


def change_friction(env: Env, strength: float) -> Env:
    """Changes the friction of the environment's physics, by its method ``change_friction``.

    Raises:
        InputError: it has none, or takes no such change.
    """
    inner: Any = env.unwrapped
    if not hasattr(inner, "change_friction"):
        raise InputError(f"friction: {type(inner).__name__} has no change_friction(change): leave it out")
    try:
        inner.change_friction(strength)
    except ValueError as error:
        raise InputError(f"friction={strength:g}: {error}")
    return env


@dataclass(frozen=True)
class Disturbance:
    """A way to disturb an environment.

    Attributes:
        apply: gives the disturbed environment, of an environment and a strength that isn't 0.
        low, high: the least and the largest strength.
        whole: whether it must be a whole number.
    """

    apply: Callable[[Env, float], Env]
    low: float = 0
    high: float = 1
    whole: bool = False

    def require(self, name: str, strength: object) -> None:
        """Raises ``InputError``, which has the name, unless it is a strength."""
        within = is_number(strength) and self.low <= strength <= self.high
        if not within or (self.whole and strength % 1):  # type: ignore[operator]
            kind = "whole number" if self.whole else "number"
            raise InputError(f"{name}={strength!r:.40} must be a {kind} from {self.low:g} to {self.high:g}")


DISTURBANCES: Registry[Disturbance] = Registry(
    "disturbance",
    {
        "friction": Disturbance(change_friction, low=-1, high=10),
        "action_noise": Disturbance(ActionNoise),
        "dropped_observations": Disturbance(DroppedObservations),
        "observation_delay": Disturbance(ObservationDelay, high=100, whole=True),
    },
)
"""Every disturbance by name, in the order in which they are applied: observations that come late are
those that weren't dropped."""


def require_disturbances(strengths: Mapping[str, object]) -> None:
    """Raises ``InputError`` unless all are strengths of disturbances, by name."""
    for name, strength in strengths.items():
        DISTURBANCES.named(name).require(name, strength)


def disturbed(env: Env, strengths: Strengths) -> Env:
    """The environment with disturbances, by name; it is the given one if all strengths are 0.

    Raises:
        InputError: there is no such disturbance or strength, or not for this environment.
    """
    require_disturbances(strengths)
    for name, disturbance in DISTURBANCES.items():
        if strengths.get(name):
            env = disturbance.apply(env, strengths[name])
    return env


def in_title(strengths: Strengths) -> str:
    """What a report's title says of disturbances, after a comma; nothing if there are none."""
    return "".join(f", {name} {strength:g}" for name, strength in strengths.items() if strength)
