"""A 500 Hz loop in ros2_control's shape (read, update, write) beside a planner in a process of its own.

    python examples/ros2_control_loop.py                  # PushT for 10 s, linear between a plan's steps
    python examples/ros2_control_loop.py --interpolation cubic --rate 1000 --priority 50

The policy's plans have 10 steps per second.  Between them every one of the 500 commands per second is
interpolated, so that the setpoint moves as a servo drive wants it to.  Prints deadline errors, the cost of a
tick, and by how much the setpoint moved from tick to tick.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import gymnasium
import numpy as np

import paradiffpolicy as pdp
import paradiffpolicy.envs  # registers PushT
from paradiffpolicy.clock import Clock, MonotonicClock
from paradiffpolicy.control.record import Record
from paradiffpolicy.control.scheduling import Scheduling, scheduled
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.tables import console
from paradiffpolicy.telemetry.summary import summary, summary_table

WORLD_HZ = 100
"""Of the simulated drive: it takes the newest setpoint 100 times per second."""


class Hardware:
    """A hardware interface: states are read, commands written, neither waits."""

    def __init__(self, clock: Clock, seed: int) -> None:
        name = "paradiffpolicy/PushT-v0"
        env = gymnasium.make(name, obs_type="keypoints", control_hz=WORLD_HZ, max_episode_steps=-1)
        self.robot = EnvRobot(env, seed, clock, control_hz=WORLD_HZ)

    def read(self) -> np.ndarray:
        return self.robot.observe()

    def write(self, command: np.ndarray | None) -> None:
        self.robot.stop() if command is None else self.robot.apply(command)


def run(
    seconds: float = 10.0,
    rate: float = 500.0,
    *,
    clock: Clock | None = None,
    scheduling: Scheduling = Scheduling(freeze_gc=True),  # noqa: B008  frozen
    seed: int = 100_000,
    **options: Any,
) -> tuple[Record, float]:
    """Runs the loop; returns its record and the episode's score.

    Args:
        options: of the ``Controller``.
    """
    clock = clock or MonotonicClock()
    policy = pdp.load_policy("checkpoints/pusht_keypoints", sampler="rti")
    n_ticks = round(seconds * rate)
    options = {"planner": "process", "blending": "rtc", "interpolation": "linear", **options}
    options |= {"clock": clock, "capacity": n_ticks}
    hardware = Hardware(clock, seed)
    with pdp.Controller(policy, rate, **options) as controller, scheduled(scheduling):
        controller.tick(hardware.read())
        controller.wait_ready()
        start, tick = clock.now(), 0
        hardware.robot.reset(seed)
        controller.reset(start)
        while tick < n_ticks:
            clock.sleep_until(start + tick / rate)
            state = hardware.read()
            command = controller.tick(state, tick)
            hardware.write(command)
            tick = max(tick + 1, math.ceil((clock.now() - start) * rate - 1e-6))
        hardware.write(None)
    return controller.record, hardware.robot.score


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=500.0, help="ticks per second")
    parser.add_argument("--interpolation", default="linear", help="hold, linear or cubic")
    parser.add_argument("--priority", type=int, help="under SCHED_FIFO, 1 to 99")
    given = parser.parse_args()
    scheduling = Scheduling(priority=given.priority, freeze_gc=True)
    record, score = run(given.seconds, given.rate, scheduling=scheduling, interpolation=given.interpolation)
    title = f"PushT at {given.rate:g} Hz, {given.interpolation} between 10 steps per second"
    console().print(summary_table(summary(record) | {"score": score}, title))
    moved = np.linalg.norm(np.diff(record.ticks["action"], axis=0), axis=1)
    print(
        f"setpoint's change per tick: p99 {np.nanquantile(moved, 0.99):.2f} px, max {np.nanmax(moved):.2f} px"
    )


if __name__ == "__main__":
    main()
