r"""The fixed-rate control loop: observe, act, apply, tell the observers.

Deadlines are absolute: tick k is due at ``start + k / rate_hz``, whenever the ones before ended.  A
tick that runs into later deadlines misses them; the loop goes on at the first one still ahead.
Planning happens inside the tick that needs a plan.

::

    tick      0        8        16
    plan      0------- 1------- 2---     each from its tick's observation window
    action    o o o o  …                 plan step To-1, To, …, To-2+Ta
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..policy import InvalidObservationError, InvalidPlanError, Policy
from ..types import Plan, Tick
from .clock import Clock
from .history import History
from .robot import Robot, steps_per_tick

Observer = Callable[[Tick], None]

log = logging.getLogger(__name__)


class ControlLoop:
    """Drives a robot with a policy.

    An observation of the wrong shape or with NaN in it, or a plan with NaN in it, is a fault: the
    loop applies the last safe action again (before there was one, the robot's own ``hold``), says
    so in the tick and in the log, and plans afresh from the next good observation.

    Args:
        policy: planned from every Ta ticks.
        robot: what to drive.
        rate_hz: ticks per second; must divide the robot's control rate.
        clock: whose seconds count.
        generator: the plans' noise.
        observers: called with every tick's record, after its action was applied.

    Raises:
        InputError: the rates don't divide.
    """

    def __init__(
        self,
        policy: Policy,
        robot: Robot,
        *,
        rate_hz: float,
        clock: Clock,
        generator: torch.Generator,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._policy, self._robot, self._clock = policy, robot, clock
        self._generator, self._observers = generator, observers
        self._steps_per_tick = steps_per_tick(robot.control_hz, rate_hz)
        self._period = 1.0 / rate_hz
        self._history = History(policy.spec.n_obs_steps)
        self._plan: Plan | None = None
        self._actions: NDArray[Any] | None = None
        self._next_index = 0
        self._safe_action: NDArray[Any] | None = None

    def run(self, n_ticks: int) -> list[Tick]:
        """Runs until the robot is finished, at most ``n_ticks`` ticks."""
        ticks: list[Tick] = []
        deadline = self._clock.now()
        for index in range(n_ticks):
            self._clock.sleep_until(deadline)
            started = self._clock.now()
            action, plan_index, latency, rounds, fault = self._act(self._robot.observe())
            if fault:
                log.warning("tick %d: holding the last safe action: %s", index, fault)
            reward, finished = self._robot.apply(action, self._steps_per_tick)
            over = self._clock.now() - (deadline + self._period)
            missed = max(0, math.ceil(over / self._period))
            tick = Tick(index, deadline, started, missed, action, plan_index, latency, rounds, fault, reward)
            for observer in self._observers:
                observer(tick)
            ticks.append(tick)
            if finished:
                break
            deadline += (1 + missed) * self._period
        return ticks

    def _act(self, observation: NDArray[Any]) -> tuple[NDArray[Any], int, float, int, str | None]:
        """``(action, plan index, plan latency, rounds, fault)`` for this tick."""
        latency, rounds = 0.0, 0
        try:
            self._admit(observation)
            if self._actions is None or self._next_index == len(self._actions):
                begun = self._clock.now()
                self._plan_anew()
                latency = self._clock.now() - begun
                rounds = int(self._plan.walk.rounds[0]) if self._plan else 0
        except (InvalidObservationError, InvalidPlanError) as error:
            self._plan = self._actions = None
            self._history.clear()
            held = self._robot.hold() if self._safe_action is None else self._safe_action
            return held, -1, latency, rounds, str(error)
        assert self._actions is not None
        index = self._next_index
        self._next_index += 1
        self._safe_action = self._actions[index]
        return self._actions[index], index + self._policy.spec.executed.start, latency, rounds, None

    def _admit(self, observation: NDArray[Any]) -> None:
        wanted = (self._policy.spec.obs_dim,)
        observation = np.asarray(observation)
        if observation.shape != wanted:
            raise InvalidObservationError(
                f"observation has shape {observation.shape}, the policy needs {wanted}"
            )
        if not np.isfinite(observation).all():
            column = int(np.argmin(np.isfinite(observation)))
            raise InvalidObservationError(
                f"observation has NaN or infinity in column {column}: check the sensor"
            )
        self._history.push(observation)

    def _plan_anew(self) -> None:
        plan = self._policy.plan(self._history.window(), self._plan, generator=self._generator)
        actions = plan.executed_actions[0].cpu().numpy().astype(np.float64)
        self._plan, self._actions, self._next_index = plan, actions, 0
