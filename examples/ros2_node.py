"""A ROS 2 node that lets a policy drive an arm: joint states in, position commands out.

    source /opt/ros/jazzy/setup.bash        # an rclpy of the same Python version
    python examples/ros2_node.py --ros-args -p checkpoint:=checkpoints/mine -p rate:=100.0 \
        -p joints:="[joint1, joint2, joint3]" -r ~/commands:=/forward_position_controller/commands
    ros2 service call /policy/arm std_srvs/srv/SetBool "{data: true}"

It starts disarmed, and moves nothing until it is armed.  Whatever stops it, ``~/stop`` says so, also to
those that subscribe later, and it stays stopped until it is armed again.  The robot's driver must obey
``~/stop``, and have a watchdog of its own: when this process dies, commands just cease.

It was run against a stand-in of rclpy's interfaces, not under ROS 2 (``tests/test_examples.py``).
"""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool

import paradiffpolicy as pdp
from paradiffpolicy.clock import Clock, MonotonicClock

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


class Commander:
    """Decides whether a controller's actions reach the robot.

    ``disarmed`` → ``arm()`` → ``arming``: the first plan is made → ``armed``: actions → ``stopped``: nothing
    was safe, for good until ``arm()``.  ROS isn't in it.

    Attributes:
        state: one of these words.
        reason: why it is in that state.
    """

    def __init__(self, controller: pdp.Controller, *, timeout: float = 10.0) -> None:
        self.controller, self.timeout = controller, timeout
        self.state, self.reason = "disarmed", "not asked to move yet"
        self._observation: np.ndarray | None = None
        self._time = self._armed_at = 0.0

    def observe(self, observation: np.ndarray, time: float) -> None:
        """Takes an observation ``[O]``, measured at ``time`` by the controller's clock."""
        self._observation, self._time = observation, time

    def arm(self) -> bool:
        """Asks for the first plan; whether it could."""
        if self._observation is None:
            self.reason = "can't be armed: there is no new observation"
            return False
        self.controller.reset()
        self._armed_at = self.controller.clock.now()
        self.state, self.reason = "arming", "waits for the first plan"
        return True

    def disarm(self, reason: str) -> None:
        """Sends no more actions."""
        self.state, self.reason = "disarmed", reason

    def tick(self) -> np.ndarray | None:
        """The action ``[A]`` to send now; None: none."""
        if self.state not in ("arming", "armed"):
            return None
        observation, self._observation = self._observation, None
        action = self.controller.tick(observation, time=None if observation is None else self._time)
        if action is not None:
            self.state, self.reason = "armed", "the policy drives"
        elif self.state == "armed" or self.controller.clock.now() - self._armed_at > self.timeout:
            self.state, self.reason = "stopped", self.controller.latest.faults.name or "nothing was safe"
        return action


class PolicyNode(Node):
    """The ROS side: parameters, topics, a timer, a service."""

    def __init__(self, clock: Clock | None = None, **options: Any) -> None:
        super().__init__("policy")
        self._clock = clock or MonotonicClock()
        names = {"checkpoint": "checkpoints/pusht_keypoints", "sampler": "rti", "rate": 50.0, "joints": [""]}
        set_to = {name: self.declare_parameter(name, default).value for name, default in names.items()}
        policy = pdp.load_policy(set_to["checkpoint"], sampler=set_to["sampler"])
        self._joints = [name for name in set_to["joints"] if name]
        if len(self._joints) != policy.spec.obs_dim:
            raise pdp.InputError(
                f"joints: {len(self._joints)} names, the policy observes {policy.spec.obs_dim}"
            )
        options = {"planner": "process", **options}
        self.commander = Commander(
            pdp.Controller(policy, set_to["rate"], clock=self._clock, **options).start()
        )
        self._commands = self.create_publisher(Float64MultiArray, "~/commands", COMMAND)
        self._stop = self.create_publisher(Bool, "~/stop", LATCHED)
        self._status = self.create_publisher(String, "~/status", LATCHED)
        self.create_subscription(JointState, "joint_states", self._on_joints, SENSOR)
        self.create_service(SetBool, "~/arm", self._on_arm)
        self.create_timer(1.0 / set_to["rate"], self._on_timer)
        self._said = ""
        self._tell()

    def _on_joints(self, message: JointState) -> None:
        where = {name: k for k, name in enumerate(message.name)}
        if any(name not in where for name in self._joints):
            return  # of another part of the robot: joint states may come in pieces
        numbers = np.array([message.position[where[name]] for name in self._joints])
        stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
        age = self.get_clock().now().nanoseconds * 1e-9 - stamp if stamp else 0.0
        self.commander.observe(numbers, self._clock.now() - max(age, 0.0))

    def _on_arm(self, request: Any, response: Any) -> Any:
        if request.data:
            response.success = self.commander.arm()
        else:
            self.commander.disarm("asked to")
            response.success = True
        response.message = self.commander.reason
        self._tell()
        return response

    def _on_timer(self) -> None:
        action = self.commander.tick()
        self._tell()
        if action is not None:
            self._commands.publish(Float64MultiArray(data=action.tolist()))

    def _tell(self) -> None:
        """Publishes the state when it changed: the stop first."""
        words = f"{self.commander.state}: {self.commander.reason}"
        if words != self._said:
            self._said = words
            self._stop.publish(Bool(data=self.commander.state != "armed"))
            self._status.publish(String(data=words))

    def close(self) -> None:
        """Stops the robot, then the planner."""
        self.commander.disarm("shut down")
        self._tell()
        self.commander.controller.stop()
        self.destroy_node()


def main() -> None:
    # rclpy's own handler would end the context before the stop is published.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = PolicyNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.close()
        rclpy.shutdown()


if __name__ == "__main__":
    main()
