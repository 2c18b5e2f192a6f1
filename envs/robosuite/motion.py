"""How the scripted experts move the hand: targets, manners, and motions that all tasks share.

A script is a generator that looks at a ``SceneView`` and yields ``Target``s, one per control step: it
reads from top to bottom as the task is done.  An ``Expert`` turns targets into actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .rotation import six_d

OPEN, CLOSED = -1.0, 1.0
"""Gripper commands."""
MAX_STEP = 0.05
"""Metres that a goal is ahead of the hand at most."""
MAX_TURN = 0.5
"""Radians that a goal is ahead of the hand at most."""
ARM_OF_TURN = 0.05
"""Metres that a radian counts as, where position and rotation errors are added."""
LED = 30
"""Control steps in which the hand is led to another start of the episode."""
FINGERS = np.array([1.0, 0.0, 0.0])
"""The direction in which fingers close, in the hand's frame."""


@dataclass(frozen=True)
class Target:
    """Where the hand should go."""

    position: NDArray[np.float64]  # [3], metres
    rotation: Rotation
    gripper: float  # OPEN or CLOSED
    steady: bool = False  # with less noise, since precision matters
    eager: float = 1.0  # factor on the manner's gains
    hurry: float = 1.0  # share of MAX_TURN that it is turned ahead at most


@dataclass
class SceneView:
    """robosuite's observations by name, as of now; a policy sees the same (without objects' names)."""

    seen: Mapping[str, NDArray[np.float64]]

    @property
    def hand(self) -> NDArray[np.float64]:
        """The hand's position ``[3]``."""
        return self.seen["robot0_eef_pos"]

    @property
    def rotation(self) -> Rotation:
        """The hand's rotation."""
        return Rotation.from_quat(self.seen["robot0_eef_quat_site"])

    def position(self, name: str) -> NDArray[np.float64]:
        """An object's position ``[3]``."""
        return self.seen[f"{name}_pos"]

    def turn(self, name: str) -> Rotation:
        """An object's rotation."""
        return Rotation.from_quat(self.seen[f"{name}_quat"])

    def fingers_rest(self) -> bool:
        """Whether no finger moves by more than 5 mm/s."""
        return bool(np.abs(self.seen["robot0_gripper_qvel"]).max() < 0.005)

    def near(self, place: NDArray[np.float64], distance: float) -> bool:
        """Whether the hand is within a distance of a place."""
        return bool(np.linalg.norm(self.hand - place) < distance)


@dataclass(frozen=True)
class Manner:
    """How an episode is carried out: fast or slow, high or low, steady or shaky.  Lengths are in metres."""

    gain: float  # share of the way to the target that a goal is ahead
    turn_gain: float  # the same of its rotation
    top_speed: float  # share of MAX_STEP that a goal is ahead at most
    noise: float  # of goals, as a share of MAX_STEP
    hover: float  # above an object before going down to it
    lift: float
    aside: NDArray[np.float64]  # [2], by which it is off where that doesn't matter
    grasp: float  # from where it should be, at which the hand closes
    arrive: float  # aside of a bin's middle, at which the hand goes down into it
    release: float  # the height at which it lets go there
    askew: float  # radians that the hand is turned away from a cube's sides

    @staticmethod
    def draw(rng: np.random.Generator, noise: tuple[float, float]) -> Manner:
        """A random manner; ``noise`` is the range of its noise."""
        # With the same thresholds in all episodes, a policy that stops short of one never saw what follows.
        thresholds = rng.spawn(1)[0]  # a stream apart: one threshold more changes nothing else
        return Manner(
            gain=rng.uniform(0.75, 1.25),
            turn_gain=rng.uniform(0.5, 0.875),
            top_speed=rng.uniform(0.75, 1.0),
            noise=rng.uniform(*noise),
            hover=rng.uniform(0.06, 0.11),
            lift=rng.uniform(0.12, 0.2),
            aside=rng.normal(0, 0.004, 2),
            grasp=thresholds.uniform(0.007, 0.012),
            arrive=thresholds.uniform(0.03, 0.06),  # the controller hangs up to 2.5 cm off, far from the base
            release=thresholds.uniform(0.95, 1.03),
            askew=max(0.0, thresholds.uniform(-np.pi / 4, np.pi / 4)),
        )


Motion = Generator[Target, None, None]
"""Targets, one per control step; after each, the scene has changed."""
Script = Callable[[SceneView, Manner], Motion]
"""How a task is done."""
Start = Callable[[SceneView, np.random.Generator], Target]
"""Draws where the hand is when an episode starts."""


class Expert:
    """Carries out a script, one episode after the other.

    Args:
        script: how the task is done.
        noise: of goals, as a share of ``MAX_STEP``, in the steadiest and in the shakiest manner.
        start: where every other episode starts, instead of where the environment does; the way there
            isn't demonstrated.
    """

    def __init__(self, script: Script, noise: tuple[float, float], start: Start | None = None) -> None:
        self.script, self.noise, self.start = script, noise, start

    def begin(
        self, env: gymnasium.Env[Any, Any], info: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Starts an episode of a ``RobosuiteEnv`` that has been reset; the info where it starts.

        ``rng`` draws manner, start and noise.
        """
        self._rng, self._manner, self._scene = rng, Manner.draw(rng, self.noise), SceneView(look(env))
        self._targets: Iterator[Target]
        if self.start is not None and rng.random() < 0.5:
            self._targets = itertools.repeat(self.start(self._scene, rng))
            for _ in range(LED):
                *_, info = env.step(self.act(env))
            self._scene.seen = look(env)
        self._targets = self.script(self._scene, self._manner)
        return info

    def act(self, env: gymnasium.Env[Any, Any]) -> NDArray[np.float64]:
        """The absolute action ``[10]`` for the scene as it is."""
        scene, manner, rng = self._scene, self._manner, self._rng
        scene.seen = look(env)
        target = next(self._targets)
        ahead = target.eager * manner.gain * (target.position - scene.hand) / MAX_STEP
        # Slower along the same direction, rather than each coordinate for itself.
        ahead *= min(1.0, manner.top_speed / max(1e-9, float(np.abs(ahead).max())))
        to_turn = (target.rotation * scene.rotation.inv()).as_rotvec()
        turn = target.eager * manner.turn_gain * to_turn / MAX_TURN
        noise = manner.noise * (0.3 if target.steady else 1.0)
        ahead = ahead + rng.normal(0, noise, 3)
        turn = (turn + rng.normal(0, 0.3 * noise, 3)).clip(-target.hurry, target.hurry)
        position = scene.hand + MAX_STEP * ahead.clip(-1, 1)
        rotation = Rotation.from_rotvec(MAX_TURN * turn) * scene.rotation
        return np.concatenate((position, six_d(rotation), [target.gripper]))


def look(env: gymnasium.Env[Any, Any]) -> dict[str, NDArray[np.float64]]:
    """All of robosuite's observations by name."""
    seen: dict[str, NDArray[np.float64]] = env.unwrapped.simulation.observations()  # type: ignore[attr-defined]
    return seen


def up(height: float) -> NDArray[np.float64]:
    """The vector ``[3]`` of that height."""
    return np.array([0.0, 0.0, height])


def yaw(rotation: Rotation) -> float:
    """Radians about the vertical."""
    return float(rotation.as_euler("zyx")[0])


def fingers_along(rotation: Rotation, direction: float, symmetry: float, least: float) -> Rotation:
    """``rotation`` turned about the vertical so that fingers close along ``direction`` (radians), by
    the first turn from ``least`` on that an object with that symmetry allows."""
    now = rotation.apply(FINGERS)
    turn = direction - np.arctan2(now[1], now[0])
    return Rotation.from_euler("z", (turn - least) % symmetry + least) * rotation


def while_fingers_move(scene: SceneView, target: Target) -> Motion:
    """Keeps a target until the fingers rest.

    The expert looks at them instead of counting steps: a policy that learns a fixed wait may stall.
    """
    for _ in range(2):  # they start to move
        yield target
    while not scene.fingers_rest():
        yield target


def coming_down(
    scene: SceneView,
    place: NDArray[np.float64],
    rotation: Rotation,
    hover: float,
    funnel: tuple[float, float],
) -> Target:
    """The way down to a place within a funnel: the nearer to above it and the better turned, the lower.

    It depends only on the present scene.  A policy that learns it can't be in the wrong phase, and goes up
    again where it is off, instead of into something.

    Args:
        scene: as it is.
        place: ``[3]``, where the hand should end.
        rotation: of the hand there.
        hover: metres above the place, outside of the funnel.
        funnel: metres aside: up to the first it goes to the place's height, from the second on to ``hover``.
    """
    aside = scene.hand[:2] - place[:2]
    turn = float((rotation * scene.rotation.inv()).magnitude())
    off = float(np.linalg.norm(aside)) + ARM_OF_TURN * turn
    narrow, wide = funnel
    height = hover * float(np.clip((off - narrow) / (wide - narrow), 0, 1))
    return Target(first_up(scene, place + up(height)), rotation, OPEN, steady=off < wide)


def first_up(scene: SceneView, place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where to go ``[3]``, to be as high as a place before being above it."""
    across = float(np.clip(1 - (place[2] - scene.hand[2] - 0.02) / 0.04, 0.1, 1))
    return np.append(scene.hand[:2] + across * (place - scene.hand)[:2], place[2])


def above(name: str, scene: SceneView, rng: np.random.Generator) -> Target:
    """A random place above an object."""
    place = scene.position(name) + np.append(rng.normal(0, 0.03, 2), rng.uniform(0.09, 0.18))
    return Target(place, scene.rotation, OPEN)
