"""Robots that a control loop drives.

``paradiffpolicy run robot=NAME`` builds the robot that ``ROBOTS`` calls so.  One of one's own, in a module
that ``plugins`` names::

    def build(settings: RobotSettings) -> RobotSetup:
        arm = MyArm(settings.options["port"])       # observe(), apply(action), stop()
        return RobotSetup(arm, close=arm.disconnect)

    ROBOTS.register("my_arm", build)
"""

from __future__ import annotations

from ..registry import Registry
from .env import build_env
from .robot import BuildRobot
from .udp import build_udp

ROBOTS: Registry[BuildRobot] = Registry("robot", {"env": build_env, "udp": build_udp})
"""Functions that build robots, by name."""
