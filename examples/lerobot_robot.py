"""A LeRobot robot under this package's control loop.

    cd examples
    paradiffpolicy run robot=lerobot plugins=lerobot_robot checkpoint=PATH rate_hz=50 'robot_options={
        module: lerobot.robots.so_follower, type: so101_follower, port: /dev/ttyACM0, id: follower}'

``get_observation`` and ``send_action`` of a LeRobot ``Robot`` take milliseconds on a serial bus, which only
one thread may use.  So a thread of its own reads an observation and sends the newest action, in turns, and
the loop waits for neither.  LeRobot knows no stop: the arm is commanded to where it is; to switch its torque
off, or to hold against a load, is up to the robot.

Tried with a simulated robot of LeRobot 0.4.4's ``Robot`` class, not with an arm (``tests/test_examples.py``).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

import paradiffpolicy as pdp
from paradiffpolicy.clock import Clock
from paradiffpolicy.robots.robot import RobotSettings, RobotSetup


class LeRobotArm:
    """A LeRobot ``Robot`` as a robot of a control loop: ``observe``, ``apply`` and ``stop`` don't wait.

    Args:
        robot: connected.
        clock: the loop's.
        observed: keys of its observations, in the policy's order; None: its scalars, in its own order.

    Attributes:
        observed_at: when the newest observation was read, in the clock's seconds.
        error: what ended the thread, or None.

    Raises:
        InputError: a key isn't one of the robot's, or it can't be told to stay where it is.
    """

    def __init__(self, robot: Any, clock: Clock, observed: Sequence[str] | None = None) -> None:
        scalars = [key for key, kind in robot.observation_features.items() if kind is float]
        self._observed, self._commanded = list(observed or scalars), list(robot.action_features)
        if wrong := [key for key in self._observed if key not in scalars]:
            raise pdp.InputError(f"observed={wrong}: the robot observes the numbers {', '.join(scalars)}")
        if wrong := [key for key in self._commanded if key not in scalars]:
            raise pdp.InputError(f"the robot doesn't observe {wrong}, so it can't be stopped where it is")
        self._robot, self._clock = robot, clock
        self._lock, self._over = threading.Lock(), threading.Event()
        self._newest: np.ndarray | None = None
        self._action: np.ndarray | None = None
        self._stopping = False
        self.observed_at: float | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lerobot", daemon=True)

    def observe(self) -> np.ndarray | None:
        if self.error is not None:
            raise self.error
        with self._lock:
            newest, self._newest = self._newest, None
        return newest

    def apply(self, action: np.ndarray) -> None:
        with self._lock:
            self._action, self._stopping = np.array(action), False

    def stop(self) -> None:
        with self._lock:
            self._action, self._stopping = None, True

    def pump(self) -> None:
        """One turn on the bus: reads an observation, then sends the newest command, if there is one."""
        values = self._robot.get_observation()
        with self._lock:
            self._newest, self.observed_at = (
                np.array([values[key] for key in self._observed]),
                self._clock.now(),
            )
            action, self._action = self._action, None
            if self._stopping:  # once, where it was then: again and again it would sink
                action, self._stopping = np.array([values[key] for key in self._commanded]), False
        if action is not None:
            self._robot.send_action(dict(zip(self._commanded, action.tolist(), strict=True)))

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self.pump()
            self.pump()  # the last command, which is the stop
        except Exception as error:
            self.error = error

    def start(self) -> LeRobotArm:
        """Lets the thread take turns."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the thread after a last turn; then disconnects the robot."""
        self._over.set()
        self._thread.join(timeout=5.0)
        self._robot.disconnect()


def build(settings: RobotSettings) -> RobotSetup:
    """Of ``robot_options``: the ``module`` and ``type`` of the robot's config, ``observed``, and the config's
    own settings."""
    options = dict(settings.options)
    module, kind, observed = (options.pop(name, None) for name in ("module", "type", "observed"))
    if not module or not kind:
        raise pdp.InputError(
            "robot_options needs module and type, as lerobot.robots.so_follower, so101_follower"
        )
    try:
        importlib.import_module(module)
        robots = importlib.import_module("lerobot.robots")
    except ImportError as error:
        raise pdp.InputError(f"robot=lerobot: {error}; pip install lerobot, into an environment of its own")
    robot = robots.make_robot_from_config(robots.RobotConfig.get_choice_class(kind)(**options))
    robot.connect()
    arm = LeRobotArm(robot, settings.clock, observed).start()
    return RobotSetup(arm, close=arm.close)


pdp.ROBOTS.register("lerobot", build)
