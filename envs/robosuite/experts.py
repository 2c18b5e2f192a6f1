"""Scripted experts for robomimic's tasks: they make demonstrations, as people do, but tirelessly.

An expert sees what the policy will see (and names of objects), and says where the hand should go.
Each of its episodes is carried out in a manner of its own, drawn at the beginning: how fast, how high
above things, how long fingers are given to close, how shaky.

A script is a generator that looks at the ``Scene`` and yields ``Target``s, one per control step: it
reads from top to bottom as the task is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .rotation import six_d

OPEN, CLOSED = -1.0, 1.0
MAX_STEP = 0.05
"""Metres that a goal is ahead of the hand at most."""
MAX_TURN = 0.5
"""Radians, likewise."""
EAGER = 2.0
"""Times a manner's gains: the controller hangs off by half as much."""
BIN = np.array([0.1975, 0.4025])
"""Where the can belongs."""
PEG = np.array([0.23, 0.1])
"""Where the square nut belongs."""
ON_PEG, PEG_WIDTH = 0.895, 0.02
"""Metres: the nut is on the peg below that height, and within that distance."""
PEG_TOP = 0.945
"""Metres: the nut is around the peg below that height."""
CUBE_FUNNEL, CAN_FUNNEL, NUT_FUNNEL = (0.008, 0.02), (0.005, 0.012), (0.006, 0.014)
"""Metres aside of the object: up to the first the hand may be at its height, from the second on above it."""
PEG_FUNNEL = (0.005, 0.01)
"""Likewise of the peg, for the nut."""
ARM_OF_TURN = 0.05
"""Metres aside that a radian counts as."""
LED = 30
"""Control steps that the hand is led for to where an episode begins."""
TRY = 160
"""Control steps after which an attempt to grasp is given up."""
CALM = 0.5
"""Hurry with which the arm turns by its last joint, whose way is long: faster, it folds itself up."""
LEAST_TURN = -0.9
"""Radians: a wrist that has turned less from where it starts comes to its end."""
MOST_TURN = 1.9
"""Radians from there to where the nut is put down."""
NUT_HANDLE = np.array([0.054, 0.0, 0.0])
"""In the nut's frame."""
FINGERS = np.array([1.0, 0.0, 0.0])
"""The direction in which fingers close, in the hand's frame."""


@dataclass(frozen=True)
class Target:
    """Where the hand should go.

    Attributes:
        position: ``[3]``.
        rotation: of the hand.
        gripper: ``OPEN`` or ``CLOSED``.
        steady: with less noise, since it matters.
        eager: times the manner's gains.
        hurry: share of ``MAX_TURN`` that it is turned ahead at most.
    """

    position: NDArray[np.float64]
    rotation: Rotation
    gripper: float
    steady: bool = False
    eager: float = 1.0
    hurry: float = 1.0


@dataclass
class Scene:
    """What is to be seen now: robosuite's observations by name."""

    seen: Mapping[str, NDArray[np.float64]]

    @property
    def hand(self) -> NDArray[np.float64]:
        """``[3]``."""
        return self.seen["robot0_eef_pos"]

    @property
    def rotation(self) -> Rotation:
        """Of the hand."""
        return Rotation.from_quat(self.seen["robot0_eef_quat_site"])

    def position(self, name: str) -> NDArray[np.float64]:
        """Of an object, ``[3]``."""
        return self.seen[f"{name}_pos"]

    def turn(self, name: str) -> Rotation:
        """Of an object."""
        return Rotation.from_quat(self.seen[f"{name}_quat"])

    def fingers_rest(self) -> bool:
        """Whether none moves by more than 5 mm/s."""
        return bool(np.abs(self.seen["robot0_gripper_qvel"]).max() < 0.005)

    def near(self, place: NDArray[np.float64], distance: float) -> bool:
        """Whether the hand is."""
        return bool(np.linalg.norm(self.hand - place) < distance)


@dataclass(frozen=True)
class Manner:
    """How an episode is carried out.

    Attributes:
        gain, turn_gain: shares of the way to the target that a goal is ahead.
        top_speed: share of ``MAX_STEP`` that a goal is ahead at most.
        noise: of goals, as a share of ``MAX_STEP``.
        hover: metres above an object before going down to it.
        lift: metres.
        aside: metres ``[2]`` by which it is off where that doesn't matter.
        grasp: metres from where it should be, at which the hand closes.
        arrive: metres aside of a bin's middle, at which the hand goes down into it.
        release: metres, the height at which it lets go there.
        askew: radians that the hand is turned away from a cube's sides.
    """

    gain: float
    turn_gain: float
    top_speed: float
    noise: float
    hover: float
    lift: float
    aside: NDArray[np.float64]
    grasp: float
    arrive: float
    release: float
    askew: float

    @staticmethod
    def draw(rng: np.random.Generator, noise: tuple[float, float]) -> Manner:
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


Somewhere = Callable[[Scene, np.random.Generator], Target]
"""Draws where the hand is when an episode begins."""
Script = Callable[[Scene, Manner], Generator[Target, None, None]]
"""Yields a target per control step; after each, the scene has changed."""


class Expert:
    """Carries out a script, an episode after the other.

    Args:
        script: what to do.
        noise: of goals, as a share of ``MAX_STEP``, in the steadiest and in the shakiest manner.
        somewhere: where every other episode begins, instead of where the environment does; what leads
            there isn't demonstrated.
    """

    def __init__(
        self, script: Script, noise: tuple[float, float], somewhere: Somewhere | None = None
    ) -> None:
        self.script, self.noise, self.somewhere = script, noise, somewhere

    def begin(
        self, env: gymnasium.Env[Any, Any], info: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """An episode of a ``RobosuiteEnv``; ``rng`` draws manner, beginning and noise."""
        self._rng, self._manner = rng, Manner.draw(rng, self.noise)
        self._scene = Scene(look(env))
        self._targets: Iterator[Target]
        if self.somewhere is not None and rng.random() < 0.5:
            self._targets = itertools.repeat(self.somewhere(self._scene, rng))
            for _ in range(LED):
                *_, info = env.step(self.act(env))
            self._scene.seen = look(env)
        self._targets = self.script(self._scene, self._manner)
        return info

    def act(self, env: gymnasium.Env[Any, Any]) -> NDArray[np.float64]:
        """An absolute action ``[10]``."""
        scene, manner, rng = self._scene, self._manner, self._rng
        scene.seen = look(env)
        target = next(self._targets)
        ahead = target.eager * manner.gain * (target.position - scene.hand) / MAX_STEP
        # Slower along the same direction, rather than each coordinate for itself.
        ahead *= min(1.0, manner.top_speed / max(1e-9, float(np.abs(ahead).max())))
        turn = (
            target.eager * manner.turn_gain * (target.rotation * scene.rotation.inv()).as_rotvec() / MAX_TURN
        )
        noise = manner.noise * (0.3 if target.steady else 1.0)
        ahead = ahead + rng.normal(0, noise, 3)
        turn = (turn + rng.normal(0, 0.3 * noise, 3)).clip(-target.hurry, target.hurry)
        position = scene.hand + MAX_STEP * ahead.clip(-1, 1)
        rotation = Rotation.from_rotvec(MAX_TURN * turn) * scene.rotation
        return np.concatenate((position, six_d(rotation), [target.gripper]))


def look(env: gymnasium.Env[Any, Any]) -> dict[str, NDArray[np.float64]]:
    """All that robosuite observes, by name."""
    seen: dict[str, NDArray[np.float64]] = env.unwrapped.simulation.observations()  # type: ignore[attr-defined]
    return seen


def up(height: float) -> NDArray[np.float64]:
    return np.array([0.0, 0.0, height])


def yaw(rotation: Rotation) -> float:
    return float(rotation.as_euler("zyx")[0])


def fingers_along(rotation: Rotation, direction: float, symmetry: float, least: float) -> Rotation:
    """``rotation`` turned about the vertical so that fingers close along ``direction`` (radians), by
    the first turn from ``least`` on that an object with that symmetry allows."""
    now = rotation.apply(FINGERS)
    turn = direction - np.arctan2(now[1], now[0])
    return Rotation.from_euler("z", (turn - least) % symmetry + least) * rotation


def lift(scene: Scene, manner: Manner) -> Generator[Target, None, None]:
    """Picks the cube up."""
    start = scene.rotation

    def place() -> NDArray[np.float64]:
        return scene.position("cube") - up(0.005)

    def grasp() -> Rotation:
        # Any will do.  Between two sides of the cube, whoever imitates the turn to the nearer one may
        # not turn at all, and has the cube by its corners: that is demonstrated too.
        aligned = fingers_along(start, yaw(scene.turn("cube")), np.pi / 2, -np.pi / 4)
        return Rotation.from_euler("z", manner.askew) * aligned

    while not scene.near(place(), manner.grasp):
        yield coming_down(scene, place(), grasp(), manner.hover, CUBE_FUNNEL)
    held, rotation = place(), grasp()
    yield from while_fingers_move(scene, Target(held, rotation, CLOSED, steady=True))
    while True:
        yield Target(held + up(manner.lift), rotation, CLOSED)


def while_fingers_move(scene: Scene, target: Target) -> Generator[Target, None, None]:
    """They are seen to: whoever imitates a count of steps may wait for ever."""
    for _ in range(2):  # they begin to
        yield target
    while not scene.fingers_rest():
        yield target


def coming_down(
    scene: Scene,
    place: NDArray[np.float64],
    rotation: Rotation,
    hover: float,
    funnel: tuple[float, float],
) -> Target:
    """The way down to a place, within a funnel: as low as the hand is above it and turned right.

    It depends on nothing but what is to be seen now.  Whoever imitates it can't be in the wrong phase, and
    goes up again where it is off, instead of into something.
    """
    aside = scene.hand[:2] - place[:2]
    turn = float((rotation * scene.rotation.inv()).magnitude())
    off = float(np.linalg.norm(aside)) + ARM_OF_TURN * turn
    narrow, wide = funnel
    height = hover * float(np.clip((off - narrow) / (wide - narrow), 0, 1))
    return Target(first_up(scene, place + up(height)), rotation, OPEN, steady=off < wide)


def first_up(scene: Scene, place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where to go, to be as high as a place before being there."""
    across = float(np.clip(1 - (place[2] - scene.hand[2] - 0.02) / 0.04, 0.1, 1))
    return np.append(scene.hand[:2] + across * (place - scene.hand)[:2], place[2])


def above(name: str, scene: Scene, rng: np.random.Generator) -> Target:
    """Somewhere there, higher than the object."""
    place = scene.position(name) + np.append(rng.normal(0, 0.03, 2), rng.uniform(0.09, 0.18))
    return Target(place, scene.rotation, OPEN)


def can(scene: Scene, manner: Manner) -> Generator[Target, None, None]:
    """Puts the can into its bin; takes it up again if it slips."""
    start = scene.rotation
    high = np.array([*(BIN + 3 * manner.aside), 1.05])
    while np.linalg.norm(scene.position("Can")[:2] - BIN) > 0.08:
        yield from place_can(scene, manner, start, high)
    while True:  # it only counts when the hand has left
        yield Target(high, start, OPEN)


def place_can(
    scene: Scene, manner: Manner, start: Rotation, high: NDArray[np.float64]
) -> Generator[Target, None, None]:
    """One attempt: ends when the can is let go over its bin, or isn't in the hand any more."""

    def held() -> bool:
        return scene.near(scene.position("Can"), 0.03)

    for _ in range(TRY):
        place = scene.position("Can") + up(0.01)
        if scene.near(place, manner.grasp):
            break
        yield replace(coming_down(scene, place, start, manner.hover + 0.03, CAN_FUNNEL), eager=EAGER)
    else:
        return
    yield from while_fingers_move(scene, Target(place, start, CLOSED, steady=True))
    while scene.hand[2] < 1.02:
        if not held():
            return
        yield Target(place + up(0.21), start, CLOSED)
    while np.linalg.norm((scene.hand - high)[:2]) > manner.arrive:
        if not held():
            return
        yield Target(high, start, CLOSED, eager=EAGER)
    # Well below where it lets go: the controller hangs a centimetre high of its goal.
    low = np.array([*high[:2], 0.9])
    for _ in range(25):  # it may already stand on something
        if scene.hand[2] < manner.release:
            break
        yield Target(low, start, CLOSED)
    yield from while_fingers_move(scene, Target(low, start, OPEN))


def square(scene: Scene, manner: Manner) -> Generator[Target, None, None]:
    """Puts the square nut onto its peg; takes it up again if it slips."""
    start = scene.rotation
    while not nut_on_peg(scene):
        yield from place_nut(scene, manner, start)
    there, rotation = scene.hand, scene.rotation
    while True:
        yield Target(there + up(0.1), rotation, OPEN)


def nut_on_peg(scene: Scene) -> bool:
    nut = scene.position("SquareNut")
    return bool(nut[2] <= ON_PEG and np.linalg.norm(nut[:2] - PEG) < PEG_WIDTH)


def place_nut(scene: Scene, manner: Manner, start: Rotation) -> Generator[Target, None, None]:
    """One attempt: ends when the nut is on the peg and let go, or not in the hand any more, or when it
    takes too long."""

    def handle() -> NDArray[np.float64]:
        return scene.position("SquareNut") + scene.turn("SquareNut").apply(NUT_HANDLE)

    def grasp() -> Rotation:
        return fingers_along(start, yaw(scene.turn("SquareNut")) + np.pi / 2, np.pi, LEAST_TURN)

    def lost() -> bool:
        """Whether the nut is askew, or elsewhere."""
        level = scene.turn("SquareNut").apply(up(1.0))[2]
        return not scene.near(handle(), 0.03) or bool(level < 0.95)

    for _ in range(TRY):
        if scene.near(handle(), manner.grasp):
            break
        way_down = coming_down(scene, handle(), grasp(), manner.hover, NUT_FUNNEL)
        yield replace(way_down, eager=EAGER, hurry=CALM)
    else:
        return
    held, rotation = handle(), grasp()
    yield from while_fingers_move(scene, Target(held, rotation, CLOSED, steady=True))
    while scene.hand[2] < 1.0:
        if lost():
            return
        yield Target(held + up(0.2), rotation, CLOSED)

    def to_go(angle: float) -> float:
        return float((angle - yaw(scene.turn("SquareNut")) + np.pi) % (2 * np.pi) - np.pi)

    # With the handle away from the base the arm is at its end, and the nut comes down askew.
    turned = float((rotation * start.inv()).as_rotvec()[2])
    quarters = [q for q in np.pi / 2 * np.arange(4) if abs(turned + to_go(q)) < MOST_TURN]
    angle = min(quarters, key=lambda q: (np.cos(q).round(), abs(to_go(q))))

    def tilt() -> NDArray[np.float64]:
        """How to turn the nut to have it level, ``[3]``, radians."""
        axis: NDArray[np.float64] = np.cross(scene.turn("SquareNut").apply(up(1.0)), up(1.0))
        return axis

    def carrying(height: float) -> tuple[NDArray[np.float64], Rotation]:
        """Where the hand is when the nut is level above the peg."""
        nut, turn = scene.position("SquareNut"), Rotation.from_euler("z", to_go(angle))
        hand = np.array([*PEG, height]) + turn.apply(scene.hand - nut)
        return hand, turn * Rotation.from_rotvec(tilt()) * scene.rotation

    # The controller has no integral term and hangs a centimetre low under the nut's weight.
    droop = np.zeros(3)
    narrow, wide = PEG_FUNNEL
    while not nut_on_peg(scene):
        if lost():
            return
        nut, turn = scene.position("SquareNut"), np.hypot(to_go(angle), np.linalg.norm(tilt()))
        off = float(np.linalg.norm(nut[:2] - PEG) + ARM_OF_TURN * turn)
        down = off < narrow or bool(nut[2] < PEG_TOP and off < PEG_WIDTH)
        height = 0.85 if down else 0.965 + 0.015 * min(1, (off - narrow) / (wide - narrow))
        hand, rotation = carrying(height)
        error = hand - scene.hand
        if np.linalg.norm(error[:2] if down else error) < 0.03:
            droop = (droop + 0.04 * error).clip(-0.03, 0.03)
        if down:
            hand[:2] += droop[:2]
            hand[2] = max(hand[2], scene.hand[2] - 0.03)
        else:
            hand = first_up(scene, hand + droop)
        yield Target(hand, rotation, CLOSED, steady=off < 0.03, eager=EAGER, hurry=CALM)
    yield from while_fingers_move(scene, Target(scene.hand, scene.rotation, OPEN))


EXPERTS: dict[str, Callable[[], Expert]] = {
    "lift": partial(Expert, lift, noise=(0.02, 0.12)),
    "can": partial(Expert, can, noise=(0.005, 0.03), somewhere=partial(above, "Can")),
    "square": partial(Expert, square, noise=(0.005, 0.03), somewhere=partial(above, "SquareNut")),
}
"""Makes one, by task."""
