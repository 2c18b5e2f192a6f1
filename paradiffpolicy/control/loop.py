"""The fixed-rate control loop: observe, act, apply, tell the observers.

Deadlines are absolute: tick k is due at ``start + k / rate_hz``, whenever earlier ticks ended.  A tick that
runs past later deadlines misses those; the loop goes on at the first one that is still ahead.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..robots.robot import Robot
from .controller import Controller
from .record import Record, Tick
from .scheduling import Scheduling, scheduled

Observer = Callable[[Tick], object]

log = logging.getLogger(__name__)


@dataclass
class ControlLoop:
    """Runs a controller and a robot at the controller's rate.

    Attributes:
        controller: gives the actions; its clock counts.
        robot: is observed and commanded.
        observers: called with every ``Tick``, after its action was applied.
        scheduling: requests to the operating system while it runs.
    """

    controller: Controller
    robot: Robot
    observers: Sequence[Observer] = field(default=(), kw_only=True)
    scheduling: Scheduling = field(default=Scheduling(), kw_only=True)

    def run(self, n_ticks: int, until: Callable[[], bool] = lambda: False) -> Record:
        """Runs for ``n_ticks`` periods, or until ``until`` returns true after one of them; returns
        ``controller.record``.  However it ends, the robot is stopped, and the record is complete up to there.

        A controller that isn't started is started, and stopped afterwards.
        """
        controller, robot, clock = self.controller, self.robot, self.controller.clock
        period = 1.0 / controller.rate_hz
        with contextlib.ExitStack() as ending:  # in reverse order, all of it, whatever raises
            if not controller.started:
                controller.start()
                ending.callback(controller.stop)
            for line in ending.enter_context(scheduled(self.scheduling)):
                log.warning("scheduling: %s", line)
            ending.callback(robot.stop)
            start, index = clock.now(), 0
            controller.reset(start)
            while index < n_ticks:
                clock.sleep_until(start + index * period)
                observation = robot.observe()
                action = controller.tick(observation, index, time=getattr(robot, "observed_at", None))
                robot.stop() if action is None else robot.apply(action)
                with contextlib.ExitStack() as telling:  # all observers, also if one raises
                    for observer in reversed(self.observers):
                        telling.callback(observer, controller.latest)
                if until():
                    break
                over = (clock.now() - start) * controller.rate_hz
                index = max(index + 1, math.ceil(over - 1e-6))
        return controller.record
