"""A policy as a part of somebody's control loop: ``tick(observation) -> action``, which never waits.

A tick is observe (is it good?), ask (for a plan, if one is due), act (on the newest plan that arrived).
The watchdog is in the same place: what isn't fresh, finite and within the limits isn't acted on, and
what acts then is the fallback.

::

    observation  missing, NaN      the plan goes on until the last good one is ``max_observation_age`` old
    planner      late              the old plan goes on until it ends, or is ``max_plan_age`` old
                 dead, or hung     the same, and it is started again
    plan         NaN, out of range refused: the old one goes on
    action       NaN, out of range refused: fallback
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock, MonotonicClock
from ..errors import InputError, require_positive
from ..history import History
from ..planning.blending import Blending, Grid, Latest
from ..planning.planner import InlinePlanner, MakePlanner, PlanRequest, Plans
from .record import FAULTS, Fault, Record, Tick

log = logging.getLogger(__name__)

Fallback = Callable[[NDArray[np.float64] | None, Fault], NDArray[np.float64] | None]
"""``(the last safe action [A] or None, what is wrong)`` to what to do instead of a plan's action; None:
nothing is safe, so stop the robot.  Called once per tick for as long as it is needed."""

DELAYS = 8
"""Of how many plans the longest lateness is expected of the next."""


def hold_last(last: NDArray[np.float64] | None, faults: Fault) -> NDArray[np.float64] | None:
    """The last safe action again: stands still, where actions are positions."""
    return last


def ticks_per_step(rate_hz: float, policy_hz: float) -> int:
    """How many ticks of the loop one step of a plan lasts.

    Raises:
        InputError: ``rate_hz`` isn't a multiple of ``policy_hz``.
    """
    require_positive(rate_hz=rate_hz, policy_hz=policy_hz)
    stride = round(rate_hz / policy_hz)
    if stride < 1 or abs(stride * policy_hz - rate_hz) > 1e-9 * rate_hz:
        raise InputError(
            f"rate_hz={rate_hz} must be a multiple of the policy's {policy_hz} Hz, since a plan's step lasts "
            "a whole number of ticks"
        )
    return stride


class Controller:
    """Drives from plans that are made beside it.

    Call ``tick`` at ``rate_hz``, from whatever keeps the time; a tick that nobody calls for is left out,
    and the plan goes on by the clock.  ``ControlLoop`` is such a keeper.  All methods may be called from
    any thread.

    Args:
        policy: a ``Policy``, or anything that plans like one.
        rate_hz: ticks per second, a multiple of the policy's own rate: a plan's action lasts so many
            ticks then.
        generator: the plans' noise.
        planner: where plans are made.
        joining: which action runs where plans overlap.
        clock: whose seconds count.
        policy_hz: steps of a plan per second; None: the demonstrations'.
        replan_every: steps from one request to the next; None: Ta; 0: always, back to back.
        limits: ``(low, high)``, each ``[A]``; None: none.
        fallback: what to do without an action.
        max_plan_age: seconds since its observation after which a plan isn't acted on; None: until it
            ends.
        max_observation_age: seconds that a plan is acted on without a good observation; None: as long as
            the policy itself acts on one, Ta steps.
        planner_timeout: seconds after which an unanswered request means that the planner hangs.
        capacity: ticks that ``record`` keeps.

    Raises:
        InputError: the rates don't divide, or a setting is out of range.
    """

    def __init__(
        self,
        policy: Plans,
        rate_hz: float,
        *,
        generator: torch.Generator,
        planner: MakePlanner = InlinePlanner,
        blending: Blending = Latest,
        clock: Clock | None = None,
        policy_hz: float | None = None,
        replan_every: int | None = None,
        limits: tuple[NDArray[Any], NDArray[Any]] | None = None,
        fallback: Fallback = hold_last,
        max_plan_age: float | None = None,
        max_observation_age: float | None = None,
        planner_timeout: float = 10.0,
        capacity: int = 100_000,
    ) -> None:
        spec = policy.spec
        policy_hz = spec.control_hz if policy_hz is None else policy_hz
        stride = ticks_per_step(rate_hz, policy_hz)
        ages = {"max_plan_age": max_plan_age, "max_observation_age": max_observation_age}
        require_positive(
            planner_timeout=planner_timeout, **{name: age for name, age in ages.items() if age is not None}
        )
        replan_every = spec.n_action_steps if replan_every is None else replan_every
        if replan_every < 0:
            raise InputError(f"replan_every={replan_every} must be a number of steps, or 0: back to back")
        if limits is not None and any(np.shape(limit) != (spec.action_dim,) for limit in limits):
            raise InputError(f"limits must be two arrays [action_dim={spec.action_dim}]")
        self.spec, self.rate_hz, self.clock = spec, rate_hz, clock or MonotonicClock()
        self._period, self._stride = 1.0 / rate_hz, stride
        self._planner = planner(policy, generator, self.clock)
        self._blender = blending(Grid(spec, stride))
        self._history = History(spec.n_obs_steps, stride)
        self._ask_every = max(1, replan_every * stride)
        # NaN is within no limits, and neither is infinity within these.
        unlimited = np.full(spec.action_dim, sys.float_info.max)
        self._low: NDArray[Any] = -unlimited if limits is None else np.asarray(limits[0])
        self._high: NDArray[Any] = unlimited if limits is None else np.asarray(limits[1])
        self._unlimited = limits is None
        self._bounds = list(zip(self._low.tolist(), self._high.tolist(), strict=True))
        self._observed, self._fallback = (spec.obs_dim,), fallback
        self._max_plan_age = math.inf if max_plan_age is None else max_plan_age
        self._max_observation_age = (
            spec.n_action_steps / policy_hz if max_observation_age is None else max_observation_age
        )
        self._planner_timeout, self._capacity = planner_timeout, capacity
        self._lock = threading.RLock()
        self._session = 0
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._action = np.zeros(spec.action_dim)
        self.started = False
        self.reset()

    # ------------------------------------------------------------------------------ beginning, ending

    def start(self) -> Controller:
        """Gets the planner ready, which may take seconds; this controller."""
        with self._lock:
            if not self.started:
                self._planner.start(committed=self._blender.commits)
                self.started = True
                self.reset()
        return self

    def stop(self) -> None:
        """Ends the planner."""
        with self._lock:
            self.started = False
            self._planner.stop()

    def __enter__(self) -> Controller:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def reset(self, origin: float | None = None) -> None:
        """Forgets observations, plans and the record, for a new episode.

        Args:
            origin: the moment of tick 0, in the clock's seconds; None: the next call of ``tick``.
        """
        with self._lock:
            self._session += 1
            self._origin = origin
            self._history.clear()
            self._blender.clear()
            self._index, self._ticked, self._due = 0, -1, 0
            self._last: NDArray[np.float64] | None = None
            self._seen = self._waiting_since = math.nan
            self._had_plan = self._queued = False
            self._sensed: tuple[float, NDArray[Any] | None, Fault] = (math.nan, None, Fault.NONE)
            self._faults = Fault.NONE
            self._noted: tuple[Any, ...] | None = None
            self.record = Record(self.spec.action_dim, self._capacity)

    @property
    def latest(self) -> Tick | None:
        """The last tick; None before there was one."""
        return None if self._noted is None else Tick(*self._noted)

    # -------------------------------------------------------------------------------------- each tick

    def tick(self, observation: NDArray[Any] | None, index: int | None = None) -> NDArray[np.float64] | None:
        """One period.

        Args:
            observation: ``[O]``, or None if there is no new one.
            index: which tick it is, if who calls knows; None: the nearest by the clock.

        Returns:
            The action ``[A]`` for now; None: nothing is safe, so stop the robot.

        Raises:
            InputError: the controller wasn't started.
        """
        with self._lock:
            self.sense(observation, index)
            return self.act()

    def sense(self, observation: NDArray[Any] | None, index: int | None = None) -> None:
        """The first half of a tick: takes the observation, and asks for a plan if one is due."""
        if not self.started:
            raise InputError("the controller isn't started: call start(), or use it in a with statement")
        now = self.clock.now()
        if self._origin is None:
            self._origin = now
        if index is None:  # who calls may be a little early or late
            index = math.floor((now - self._origin) * self.rate_hz + 0.5)
        self._index = max(self._index, index)
        faults = Fault.NONE
        if observation is None:
            faults |= Fault.OBSERVATION_MISSING
        else:
            try:
                observation = np.asarray(observation, dtype=np.float64)
            except (TypeError, ValueError):  # no numbers
                observation = None
            if (
                observation is None
                or observation.shape != self._observed
                or not np.isfinite(observation).all()
            ):
                faults |= Fault.OBSERVATION_REFUSED
        if faults:
            self._history.repeat(self._index)
        else:
            assert observation is not None
            self._history.push(observation, self._index)
            self._seen = now
        if not now - self._seen <= self._max_observation_age:
            faults |= Fault.OBSERVATION_STALE
        self._sensed = now, observation, faults
        # A request that still waits for the planner is renewed: the newest observation is to win.
        if not faults and (self._index >= self._due or self._queued):
            self._ask(now)

    def _ask(self, now: float) -> None:
        kept = weight = None
        if self._blender.commits:
            kept, weight = self._blender.commit(self._index, max(self._delays, default=0))
        if self._index >= self._due:
            self._due = self._index + self._ask_every
        if math.isnan(self._waiting_since):
            self._waiting_since = now
        else:
            self._queued = True
        step, window = self._index // self._stride, self._history.window()
        self._planner.request(PlanRequest(self._index, step, self._session, now, window, kept, weight))

    def act(self) -> NDArray[np.float64] | None:
        """The second half: takes plans that have arrived, and decides.  As ``tick``."""
        started, observation, faults = self._sensed
        assert self._origin is not None
        now = self.clock.now()
        # A plan that was computed within this tick may have taken it into a later one.
        index = max(self._index, math.floor((now - self._origin) * self.rate_hz + 1e-6))
        watched = self._watch_planner(index, now)
        if watched:
            faults |= watched
        step, age = -1, math.nan
        if now - self._seen <= self._max_observation_age:
            step = self._blender.act(index, self._action)
            plan = self._blender.plan
            if step >= 0 and plan is not None:
                age = now - plan.asked
                if age > self._max_plan_age:
                    step = -1
            if step < 0 and self._had_plan:
                faults |= Fault.PLAN_LATE
            elif step >= 0 and not self._within(self._action.tolist()):
                step, faults = -1, faults | Fault.ACTION_REFUSED
        fallback_active = step < 0
        action = self._fallback(self._last, faults) if fallback_active else self._action.copy()
        if not fallback_active:
            self._last = action
        self._note(started, observation, action, step, age, faults, fallback_active)
        return action

    def _watch_planner(self, index: int, now: float) -> Fault:
        """Takes a plan that has arrived; restarts a planner that is dead or hangs."""
        faults = Fault.NONE
        reply = self._planner.poll()
        if reply is not None and reply.session == self._session:
            # What was asked for since then is on its way now.
            self._waiting_since, self._queued = now if self._queued else math.nan, False
            ahead = reply.actions[self.spec.n_obs_steps - 1 :]
            refused = bool(reply.fault) or not self._plan_within(ahead)
            delay = index - reply.tick
            self._delays.append(delay)
            self.record.add_plan(
                *(reply.tick, reply.asked, reply.arrived, reply.latency, reply.iterations, reply.residual),
                *(delay, refused),
            )
            if refused:
                faults |= Fault.PLAN_REFUSED
                self._due = 0
            else:
                self._blender.add(reply)
                self._had_plan = True
        hung = now - self._waiting_since > self._planner_timeout
        if hung or not self._planner.alive:
            faults |= Fault.PLANNER_HUNG if hung else Fault.PLANNER_DEAD
            self._planner.restart()
            self._waiting_since, self._queued, self._due = math.nan, False, 0
        return faults

    def _plan_within(self, actions: NDArray[np.float64]) -> bool:
        if self._unlimited:
            return bool(np.isfinite(actions).all())
        return bool((actions >= self._low).all() and (actions <= self._high).all())

    def _within(self, action: list[float]) -> bool:
        """The same for a few numbers, faster so."""
        return all(low <= value <= high for value, (low, high) in zip(action, self._bounds, strict=True))

    def _note(
        self,
        started: float,
        observation: NDArray[Any] | None,
        action: NDArray[np.float64] | None,
        step: int,
        age: float,
        faults: Fault,
        fallback_active: bool,
    ) -> None:
        assert self._origin is not None
        ended = self.clock.now()
        deadline = self._origin + self._index * self._period
        missed = self._index - self._ticked - 1 if self._ticked >= 0 else self._index
        plan = self._blender.plan
        plan_tick = -1 if plan is None else plan.tick
        noted: Any = math.nan if action is None else action
        self.record.add_tick(
            self._index,
            deadline,
            started,
            ended,
            missed,
            plan_tick,
            step,
            age,
            int(faults),
            fallback_active,
            noted,
        )
        self._noted = (
            *(self._index, deadline, started, ended, missed, observation, action, plan, step, age),
            *(faults, fallback_active),
        )
        self._ticked = self._index
        if faults is not self._faults:
            new = [words for fault, words in FAULTS.items() if fault in faults & ~self._faults]
            if new:
                log.warning("tick %d: %s", self._index, "; ".join(new))
            self._faults = faults
