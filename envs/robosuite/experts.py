"""Scripted experts for robomimic's tasks: they make demonstrations as people do, each in a manner of its
own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .motion import (
    ARM_OF_TURN,
    CLOSED,
    OPEN,
    Expert,
    Manner,
    Motion,
    SceneView,
    Target,
    above,
    coming_down,
    fingers_along,
    first_up,
    up,
    while_fingers_move,
    yaw,
)
from .tool_hang import tool_hang

EAGER = 2.0
"""Factor on a manner's gains, with which the controller hangs off by half as much."""
CUBE_FUNNEL, CAN_FUNNEL, NUT_FUNNEL = (0.008, 0.02), (0.005, 0.012), (0.006, 0.014)
"""Metres aside of the object: see ``coming_down``."""
TRY = 160
"""Control steps after which an attempt to grasp is given up."""
BIN = np.array([0.1975, 0.4025])
"""Where the can belongs, ``[2]``."""
PEG = np.array([0.23, 0.1])
"""Where the square nut belongs, ``[2]``."""
ON_PEG, PEG_WIDTH = 0.895, 0.02
"""Metres: the nut is on the peg below that height, and within that distance."""
PEG_TOP = 0.945
"""Metres: the nut is around the peg below that height."""
PEG_FUNNEL = (0.005, 0.01)
"""Metres of the nut aside of the peg."""
CALM = 0.5
"""Hurry with which the arm turns by its last joint, whose way is long: faster, it folds itself up."""
LEAST_TURN = -0.9
"""Radians: a wrist that has turned less from its start comes to its end."""
MOST_TURN = 1.9
"""Radians from there to where the nut is put down."""
NUT_HANDLE = np.array([0.054, 0.0, 0.0])
"""In the nut's frame."""


def lift(scene: SceneView, manner: Manner) -> Motion:
    """Picks the cube up."""
    start = scene.rotation

    def place() -> NDArray[np.float64]:
        return scene.position("cube") - up(0.005)

    def grasp() -> Rotation:
        # Any will do.  Between two sides of the cube, a policy that learns the turn to the nearer one may
        # not turn at all, and has the cube by its corners: that is demonstrated too.
        aligned = fingers_along(start, yaw(scene.turn("cube")), np.pi / 2, -np.pi / 4)
        return Rotation.from_euler("z", manner.askew) * aligned

    while not scene.near(place(), manner.grasp):
        yield coming_down(scene, place(), grasp(), manner.hover, CUBE_FUNNEL)
    held, rotation = place(), grasp()
    yield from while_fingers_move(scene, Target(held, rotation, CLOSED, steady=True))
    while True:
        yield Target(held + up(manner.lift), rotation, CLOSED)


def can(scene: SceneView, manner: Manner) -> Motion:
    """Puts the can into its bin; takes it up again if it slips."""
    start = scene.rotation
    high = np.array([*(BIN + 3 * manner.aside), 1.05])
    while np.linalg.norm(scene.position("Can")[:2] - BIN) > 0.08:
        yield from place_can(scene, manner, start, high)
    while True:  # it only counts when the hand has left
        yield Target(high, start, OPEN)


def place_can(scene: SceneView, manner: Manner, start: Rotation, high: NDArray[np.float64]) -> Motion:
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


class Nut:
    """The square nut and its peg, seen from the hand that carries it."""

    def __init__(self, scene: SceneView) -> None:
        self.scene = scene

    @property
    def position(self) -> NDArray[np.float64]:
        return self.scene.position("SquareNut")

    @property
    def turn(self) -> Rotation:
        return self.scene.turn("SquareNut")

    @property
    def handle(self) -> NDArray[np.float64]:
        return self.position + self.turn.apply(NUT_HANDLE)

    @property
    def on_peg(self) -> bool:
        return bool(self.position[2] <= ON_PEG and np.linalg.norm(self.position[:2] - PEG) < PEG_WIDTH)

    @property
    def lost(self) -> bool:
        """Whether it is askew in the hand, or elsewhere."""
        level = self.turn.apply(up(1.0))[2]
        return not self.scene.near(self.handle, 0.03) or bool(level < 0.95)

    @property
    def tilt(self) -> NDArray[np.float64]:
        """The rotation vector ``[3]`` that levels it."""
        axis: NDArray[np.float64] = np.cross(self.turn.apply(up(1.0)), up(1.0))
        return axis

    def to_go(self, angle: float) -> float:
        """Radians from its yaw to an angle, within half a turn."""
        return float((angle - yaw(self.turn) + np.pi) % (2 * np.pi) - np.pi)

    def quarter(self, start: Rotation) -> float:
        """The angle on the peg that is turned to most easily; the wrist came from ``start``."""
        # With the handle away from the base the arm is at its end, and the nut comes down askew.
        turned = float((self.scene.rotation * start.inv()).as_rotvec()[2])
        quarters = [q for q in np.pi / 2 * np.arange(4) if abs(turned + self.to_go(q)) < MOST_TURN]
        return float(min(quarters, key=lambda q: (np.cos(q).round(), abs(self.to_go(q)))))

    def carried(self, height: float, angle: float) -> tuple[NDArray[np.float64], Rotation]:
        """Position ``[3]`` and rotation of the hand when the nut is level above the peg."""
        turn = Rotation.from_euler("z", self.to_go(angle))
        hand = np.array([*PEG, height]) + turn.apply(self.scene.hand - self.position)
        return hand, turn * Rotation.from_rotvec(self.tilt) * self.scene.rotation


def square(scene: SceneView, manner: Manner) -> Motion:
    """Puts the square nut onto its peg; takes it up again if it slips."""
    start, nut = scene.rotation, Nut(scene)
    while not nut.on_peg:
        yield from place_nut(nut, manner, start)
    there, rotation = scene.hand, scene.rotation
    while True:
        yield Target(there + up(0.1), rotation, OPEN)


def place_nut(nut: Nut, manner: Manner, start: Rotation) -> Motion:
    """One attempt: ends when the nut is on the peg and let go, or not in the hand any more, or when it
    takes too long."""
    scene = nut.scene

    def grasp() -> Rotation:
        return fingers_along(start, yaw(nut.turn) + np.pi / 2, np.pi, LEAST_TURN)

    for _ in range(TRY):
        if scene.near(nut.handle, manner.grasp):
            break
        way_down = coming_down(scene, nut.handle, grasp(), manner.hover, NUT_FUNNEL)
        yield replace(way_down, eager=EAGER, hurry=CALM)
    else:
        return
    held, rotation = nut.handle, grasp()
    yield from while_fingers_move(scene, Target(held, rotation, CLOSED, steady=True))
    while scene.hand[2] < 1.0:
        if nut.lost:
            return
        yield Target(held + up(0.2), rotation, CLOSED)
    yield from lower_onto_peg(nut, nut.quarter(start))
    if nut.on_peg:
        yield from while_fingers_move(scene, Target(scene.hand, scene.rotation, OPEN))


def lower_onto_peg(nut: Nut, angle: float) -> Motion:
    """Carries the nut above the peg and down; ends when it is on it, or lost."""
    scene = nut.scene
    # The controller has no integral term and hangs a centimetre low under the nut's weight.
    droop = np.zeros(3)
    narrow, wide = PEG_FUNNEL
    while not nut.on_peg and not nut.lost:
        turn = np.hypot(nut.to_go(angle), np.linalg.norm(nut.tilt))
        off = float(np.linalg.norm(nut.position[:2] - PEG) + ARM_OF_TURN * turn)
        down = off < narrow or bool(nut.position[2] < PEG_TOP and off < PEG_WIDTH)
        height = 0.85 if down else 0.965 + 0.015 * min(1, (off - narrow) / (wide - narrow))
        hand, rotation = nut.carried(height, angle)
        error = hand - scene.hand
        if np.linalg.norm(error[:2] if down else error) < 0.03:
            droop = (droop + 0.04 * error).clip(-0.03, 0.03)
        if down:
            hand[:2] += droop[:2]
            hand[2] = max(hand[2], scene.hand[2] - 0.03)
        else:
            hand = first_up(scene, hand + droop)
        yield Target(hand, rotation, CLOSED, steady=off < 0.03, eager=EAGER, hurry=CALM)


EXPERTS: dict[str, Callable[[], Expert]] = {
    "lift": partial(Expert, lift, noise=(0.02, 0.12)),
    "can": partial(Expert, can, noise=(0.005, 0.03), start=partial(above, "Can")),
    "square": partial(Expert, square, noise=(0.005, 0.03), start=partial(above, "SquareNut")),
    "tool_hang": partial(Expert, tool_hang, noise=(0.005, 0.03)),
}
"""Makes a task's expert."""
