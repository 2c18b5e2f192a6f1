"""The scripted expert of ToolHang: assembles the frame and hangs the tool on its hook."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .carrying import CALM, EAGER, Carried, carry
from .motion import CLOSED, OPEN, Manner, Motion, SceneView, Target, coming_down, up, while_fingers_move, yaw

TRY = 160
"""Control steps after which an attempt to grasp is given up."""
FUNNEL = (0.006, 0.014)
"""Metres aside of what is grasped: see ``coming_down``."""
HELD = 0.04
"""Metres from the hand to where it grasped an object, up to which it has it."""
HOLE = np.array([0.0, 0.045, 0.155])
"""The upper end of the stand's hole, from its base."""
NARROW = 0.003
"""Metres that the frame's tip may be aside of the hole when it goes down."""
GRIP, TIP = np.array([0.0, 0.0, -0.03375]), np.array([0.0, 0.0, -0.2207])
"""Where the frame is grasped, and its lower end, from its corner; its rod is its z axis, its bar -x."""
POST, FOOT = np.array([-0.0875, 0.0, 0.00975]), np.array([-0.084, 0.0, 0.002])
"""The post at the end of the frame's bar, and where it stands on the bar."""
RING = np.array([-0.0935, 0.0, 0.0])
"""The middle of the tool's ring, in the tool's frame."""
FRAME_GRASP = Rotation.from_matrix([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
"""The hand that has the frame, in the frame's frame: it comes from above while the frame lies, and from the
left once it is upright."""
TOOL_GRASP = Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
"""The hand that has the tool, in the tool's frame; turned half way round, the wrist would come near its
end."""
UPRIGHT = Rotation.from_euler("z", np.pi)
"""The frame when its bar points away from the robot."""
THREADED, HUNG = 0.4, 1.0
"""Radians that the tool is tilted when its ring goes over the post, and then before it is let go: let go
level, the ring jams on the post."""
HIGH = 1.2
"""The height at which the hand passes above the frame."""


def tool_hang(scene: SceneView, manner: Manner) -> Motion:
    """Puts the frame into the stand and hangs the tool on it; does again what fails."""
    start = scene.rotation
    frame, tool = Carried(scene, "frame"), Carried(scene, "tool")
    while not (scene.seen["frame_is_assembled"][0] and scene.seen["tool_on_frame"][0]):
        if scene.seen["frame_is_assembled"][0]:
            yield from hang(tool, frame, manner, start)
        else:
            yield from assemble(frame, manner)
    there, rotation = scene.hand + up(0.1), scene.rotation
    while True:
        yield Target(there, rotation, OPEN)


def grasp(thing: Carried, offset: NDArray[np.float64], turn: Rotation, manner: Manner) -> Motion:
    """Grasps an object; ``turn`` is the hand's in the object's frame.  May end without it."""
    scene = thing.scene
    for _ in range(TRY):
        place, rotation = thing.point(offset) + up(0.002), thing.turn * turn
        if scene.near(place, manner.grasp):
            yield from while_fingers_move(scene, Target(place, rotation, CLOSED, steady=True))
            return
        way_down = coming_down(scene, place, rotation, manner.hover, FUNNEL)
        yield replace(way_down, eager=EAGER, hurry=CALM)


def assemble(frame: Carried, manner: Manner) -> Motion:
    """One attempt to put the frame into the stand: ends when it is let go there, or lost."""
    scene = frame.scene
    base = scene.position("base")
    top = base + HOLE

    def lost() -> bool:
        return not scene.near(frame.point(GRIP), HELD)

    def way_in() -> NDArray[np.float64]:
        tip = frame.point(TIP)
        if tip[2] > top[2] - 0.004 and np.linalg.norm((tip - top)[:2]) > NARROW:
            return top + up(0.012)
        return np.array([*top[:2], max(tip[2] - 0.03, base[2] + 0.01)])

    yield from grasp(frame, GRIP, FRAME_GRASP, manner)
    held, rotation = scene.hand, frame.turn * FRAME_GRASP
    while scene.hand[2] < 1.0:
        if lost():
            return
        yield Target(held + up(0.3), rotation, CLOSED)
    yield from carry(frame, TIP, lambda: top + up(0.05), UPRIGHT, lambda off: off < 0.03 or lost())
    yield from carry(frame, TIP, lambda: top + up(0.012), UPRIGHT, lambda off: off < 0.004 or lost())
    yield from carry(
        frame, TIP, way_in, UPRIGHT, lambda _: lost() or bool(frame.point(TIP)[2] < base[2] + 0.015)
    )
    yield from let_go(scene, 0.15 * scene.rotation.apply([0.0, 0.0, -1.0]))


def hang(tool: Carried, frame: Carried, manner: Manner, start: Rotation) -> Motion:
    """One attempt to hang the tool: ends when it is let go on the hook, or lost."""
    scene = tool.scene

    def lost() -> bool:
        return not scene.near(tool.position, HELD)

    def there(near: float, off: float) -> bool:
        return off < near or lost()

    def on_bar() -> bool:
        return bool(tool.point(RING)[2] < frame.position[2] + 0.0115)

    def above_post(height: float) -> NDArray[np.float64]:
        return frame.point(POST) + up(height)

    def way_down() -> NDArray[np.float64]:
        height = max(tool.point(RING)[2] - 0.015, frame.position[2] + 0.006)
        return np.array([*frame.point(POST)[:2], height])

    def tilted(angle: float) -> Rotation:
        """The tool when its handle points away from the frame, and down by that angle."""
        return Rotation.from_euler("z", yaw(frame.turn) + np.pi) * Rotation.from_euler("y", angle)

    yield from pass_above(tool, start)
    yield from grasp(tool, np.zeros(3), TOOL_GRASP, manner)
    held, rotation = scene.hand, tool.turn * TOOL_GRASP
    while scene.hand[2] < 1.1:
        if lost():
            return
        yield Target(np.array([*held[:2], 1.25]), rotation, CLOSED)
    for height, near in ((0.06, 0.03), (0.022, 0.004)):
        yield from carry(tool, RING, partial(above_post, height), tilted(THREADED), partial(there, near))
    yield from carry(tool, RING, way_down, tilted(THREADED), lambda _: lost() or on_bar(), limit=60)
    yield from carry(tool, RING, lambda: frame.point(FOOT), tilted(HUNG), partial(there, 0.004), limit=25)
    yield from let_go(scene, up(0.12))


def pass_above(tool: Carried, start: Rotation) -> Motion:
    """Brings the hand above the tool, high enough for the frame; ``start`` is its rotation while it rises."""
    scene = tool.scene
    for _ in range(TRY):
        if np.linalg.norm((scene.hand - tool.position)[:2]) < 0.05:
            return
        above = scene.hand if scene.hand[2] < HIGH - 0.03 else tool.position
        rotation = start if scene.hand[2] < HIGH - 0.05 else tool.turn * TOOL_GRASP
        yield Target(np.array([*above[:2], HIGH + 0.05]), rotation, OPEN, eager=EAGER, hurry=CALM)


def let_go(scene: SceneView, way: NDArray[np.float64]) -> Motion:
    """Opens the hand and takes it away by ``way`` ``[3]``."""
    yield from while_fingers_move(scene, Target(scene.hand, scene.rotation, OPEN))
    there, rotation = scene.hand + way, scene.rotation
    for _ in range(40):
        if scene.near(there, 0.03):
            return
        yield Target(there, rotation, OPEN)
