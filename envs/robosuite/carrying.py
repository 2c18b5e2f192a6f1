"""Carrying objects by their own poses: an object slips in the hand and the controller droops, so the scripted
experts place what is carried, not the hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from .motion import ARM_OF_TURN, CLOSED, Motion, SceneView, Target

EAGER = 2.0
"""Factor on a manner's gains, with which the controller hangs off by half as much."""
CALM = 0.6
"""Hurry with which objects are turned."""
CLOSE = 0.03
"""Metres from its place at which an error begins to be integrated."""
SHARE = 0.1
"""Of an error, added to its integral per control step."""
MOST_DROOP, MOST_TWIST = 0.04, 0.3
"""Bounds of the integrals, metres and radians."""


class Carried:
    """An object seen from the hand that carries it, or comes for it."""

    def __init__(self, scene: SceneView, name: str) -> None:
        self.scene, self.name = scene, name

    @property
    def position(self) -> NDArray[np.float64]:
        return self.scene.position(self.name)

    @property
    def turn(self) -> Rotation:
        return self.scene.turn(self.name)

    def point(self, offset: ArrayLike) -> NDArray[np.float64]:
        """Where in the world a point of the object is, ``[3]``; ``offset`` in the object's frame."""
        return self.position + self.turn.apply(offset)

    def hand_for(
        self, offset: ArrayLike, place: NDArray[np.float64], rotation: Rotation
    ) -> tuple[NDArray[np.float64], Rotation]:
        """Position ``[3]`` and rotation of the hand when that point is at a place, and the object is turned
        so."""
        turn = rotation * self.turn.inv()
        return place + turn.apply(self.scene.hand - self.point(offset)), turn * self.scene.rotation


def carry(
    thing: Carried,
    offset: NDArray[np.float64],
    aim: Callable[[], NDArray[np.float64]],
    rotation: Rotation,
    until: Callable[[float], bool],
    limit: int = 200,
) -> Motion:
    """Carries a point of an object to a place.

    The controller has no integral term and hangs low under a weight: close to the place, errors are
    integrated.

    Args:
        thing: in the hand.
        offset: ``[3]``, the point, in the object's frame.
        aim: the place ``[3]`` as of now.
        rotation: of the object, there.
        until: ends it, given the metres that it is off (a radian counts as ``ARM_OF_TURN``).
        limit: control steps after which it ends in any case.
    """
    droop, twist = np.zeros(3), np.zeros(3)
    for _ in range(limit):
        place = aim()
        error, to_turn = place - thing.point(offset), (rotation * thing.turn.inv()).as_rotvec()
        distance = float(np.linalg.norm(error))
        off = distance + ARM_OF_TURN * float(np.linalg.norm(to_turn))
        if until(off):
            return
        if distance < CLOSE:
            droop = (droop + SHARE * error).clip(-MOST_DROOP, MOST_DROOP)
            twist = (twist + SHARE * to_turn).clip(-MOST_TWIST, MOST_TWIST)
        hand, turned = thing.hand_for(offset, place, rotation)
        turned = Rotation.from_rotvec(twist) * turned
        yield Target(hand + droop, turned, CLOSED, steady=off < 0.05, eager=EAGER, hurry=CALM)
