"""A policy as a part of the caller's control loop: ``tick(observation) -> action``, which never blocks.

A tick observes (is it good?), asks for a plan if one is due, and acts on the newest plan that arrived.  The
watchdog rejects data that isn't fresh, finite and within the limits; without a plan the fallback acts::

    observation  missing, NaN      the plan goes on until the last good one is ``max_observation_age`` old
    planner      late              the old plan goes on until it ends, or is ``max_plan_age`` old
                 dead, or hung     the same, and it is restarted
    plan         NaN, out of range rejected: the old one goes on
    action       NaN, out of range rejected: fallback
    fallback     NaN, out of range rejected: the robot is stopped, as when it acts for ``fallback_timeout``
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clock import Clock, MonotonicClock
from ..errors import InputError, is_number, require_count, require_positive
from ..history import History
from ..planning import PLANNERS
from ..planning.blending import BLENDINGS, ROUNDING, Blending, Grid
from ..planning.forward import Forward
from ..planning.interpolation import INTERPOLATIONS, Interpolation
from ..planning.progress import Progress
from ..planning.request import MakePlanner, PlanReply, PlanRequest, Plans
from ..sampling.noise import Seed, generators_for
from .fallback import Fallback, default_fallback
from .rate import ticks_per_step
from .record import Fault, Record, Tick
from .watchdog import Limits, Watchdog

log = logging.getLogger(__name__)


class Controller:
    """Acts on plans that are made beside it.

    ::

        with Controller(policy, rate_hz=10, planner="process") as controller:
            controller.tick(observe())          # asks for the first plan
            controller.wait_ready()             # and waits for it
            while True:                         # 10 times a second
                action = controller.tick(observe())

    Call ``tick`` at ``rate_hz``, from any source of time; ``ControlLoop`` is one.  A tick that isn't called
    is left out, and the plan goes on by the clock.  All methods may be called from any thread.

    Args:
        policy: a ``Policy``, or anything that ``Plans``.
        rate_hz: ticks per second, at least the policy's own steps per second.
        generator: the plans' noise, or its seed.
        planner: where plans are made: a name in ``PLANNERS``, or a planner's class.
        blending: which action runs where plans overlap: a name in ``BLENDINGS``, or a blender's class.
        interpolation: what the command is between a plan's steps: a name in ``INTERPOLATIONS``, or a
            callable; ``auto`` holds an action where a step is a whole number of ticks, and else does as the
            policy's contract says.
        forward: which numbers of the observation the robot's actions move, as ``{"x": "state.0"}``; they are
            rolled forward to when the plan will begin to act (``planning.forward``).
        clock: whose seconds count.
        policy_hz: steps of a plan per second; None: the demonstrations'.
        replan_every: steps from one request to the next; None: Ta; 0: always, back to back.
        limits: ``(low, high)`` of actions, each ``[A]``; None: none.
        fallback: gives the action when no plan does; None: it holds the last one where the policy's contract
            says that actions are absolute, and otherwise stops the robot.
        fallback_timeout: seconds after which a fallback that goes on acting stops the robot.
        max_plan_age: seconds since its request after which a plan isn't acted on; None: until it ends.
        max_observation_age: seconds that a plan is acted on without a good observation; None: Ta steps, as
            long as the policy itself acts on one.
        frozen_after: seconds after which an observation that is still the same, to the last digit, isn't
            believed; None: it is, since without any noise a robot at rest looks like that.
        planner_timeout: seconds after which an unanswered request means that the planner hangs.
        capacity: ticks that ``record`` keeps.

    Attributes:
        spec: of the policy.
        record: the ticks and plans since the last reset.
        latest: the last ``Tick``; None before there was one.
        started: whether it was started, and not stopped since then.

    Raises:
        InputError: the contract's actions can't be given at this rate, or a setting is unknown or out of
            range.
    """

    def __init__(
        self,
        policy: Plans,
        rate_hz: float,
        *,
        generator: Seed = 0,
        planner: str | MakePlanner = "thread",
        blending: str | Blending = "latest",
        interpolation: str | Interpolation = "auto",
        forward: Mapping[str, str] = {},
        clock: Clock | None = None,
        policy_hz: float | None = None,
        replan_every: int | None = None,
        limits: Limits | None = None,
        fallback: Fallback | None = None,
        fallback_timeout: float = 2.0,
        max_plan_age: float | None = None,
        max_observation_age: float | None = None,
        frozen_after: float | None = None,
        planner_timeout: float = 10.0,
        capacity: int = 100_000,
    ) -> None:
        spec = policy.spec
        policy_hz = spec.control_hz if policy_hz is None else policy_hz
        stride = ticks_per_step(rate_hz, policy_hz)
        replan_every = spec.n_action_steps if replan_every is None else replan_every
        if isinstance(replan_every, bool) or not isinstance(replan_every, int) or replan_every < 0:
            raise InputError(f"replan_every={replan_every} must be a number of steps, or 0: back to back")
        require_count(capacity=capacity)
        require_positive(fallback_timeout=fallback_timeout)
        if fallback is not None and not callable(fallback):
            raise InputError(f"{fallback=} must be a function of the last action and the faults")
        age = spec.n_action_steps / policy_hz if max_observation_age is None else max_observation_age
        ages: Any = {"max_observation_age": age, "frozen_after": frozen_after, "max_plan_age": max_plan_age}
        self._watchdog = Watchdog(spec, limits=limits, planner_timeout=planner_timeout, **ages)
        self.spec, self.rate_hz, self.clock = spec, rate_hz, clock or MonotonicClock()
        self._grid = Grid(spec, stride, INTERPOLATIONS.resolve(interpolation)(spec, stride))
        self._ask_every = max(1, math.ceil(replan_every * stride - ROUNDING))
        self._planner = PLANNERS.resolve(planner)(policy, generators_for(generator, 1)[0], self.clock)
        self._forward = Forward(spec, forward)
        self._blender = BLENDINGS.resolve(blending)(self._grid)
        self._in_turn = bool(self._forward) or self._blender.commits  # a plan needs to know the one before
        self._history = History(spec.n_obs_steps, stride, mixed=spec.contract.mixed(spec.obs_dim))
        self._fallback, self._capacity = fallback or default_fallback(spec.contract), capacity
        self._fallback_timeout = fallback_timeout
        self._lock, self._session = threading.RLock(), 0
        self._action = np.zeros(spec.action_dim)
        self.started = False
        self.reset()

    def __repr__(self) -> str:
        parts = f"{type(self._planner).__name__}, {type(self._blender).__name__}"
        state = f"started, {self.record.n_ticks} ticks" if self.started else "not started"
        return f"<Controller of {self.spec.task!r} at {self.rate_hz:g} Hz: {parts}; {state}>"

    def start(self) -> Controller:
        """Starts the planner and waits until it is ready to plan, which may take seconds; returns itself."""
        with self._lock:
            if not self.started:
                self._planner.start(committed=self._blender.commits)
                self.started = True
                self.reset()
        return self

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Blocks until a plan is there, so that the next tick acts.  Call it after a first ``tick``, whose
        observation the plan is made from.

        Raises:
            InputError: no plan was asked for, none came within ``timeout`` seconds, or the plan was rejected.
        """
        deadline, answered = self.clock.now() + timeout, True
        while True:
            with self._lock:
                if not self._had_plan and not self._watchdog.waiting:
                    raise InputError("no plan was asked for: call tick with a good observation first")
                now = self.clock.now()
                if not self._had_plan and (faults := self._take_plan(self._index_at(now), now)):
                    raise InputError(f"not ready: {self._watchdog.in_words(faults)}")
                if self._had_plan:
                    return
            if not answered or now >= deadline:
                raise InputError(f"not ready: no plan came within {timeout:g} s")
            answered = self._planner.wait(deadline - now)  # other threads may tick meanwhile

    def stop(self) -> None:
        """Ends the planner."""
        with self._lock:
            self.started = False
            self._planner.stop()

    def __enter__(self) -> Controller:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def reset(self, origin: float | None = None) -> None:
        """Forgets observations, plans and the record, for a new episode.

        Args:
            origin: the moment of tick 0, in the clock's seconds; None: the next call of ``tick``.
        """
        if origin is not None and not is_number(origin):
            raise InputError(f"{origin=} must be a moment in the clock's seconds")
        with self._lock:
            self._session, self._origin = self._session + 1, origin
            self._history.clear()
            self._blender.clear()
            self._forward.clear()
            self._watchdog.reset()
            self._index, self._ticked, self._due = 0, -1, 0
            self._progress = Progress()
            self._had_plan, self._found, self._faults = False, Fault.NONE, Fault.NONE
            self._fallback_since = math.nan
            self._inside: threading.Thread | None = None  # the thread that ticks now
            self._ticker: threading.Thread | None = None  # and the one that ticked last
            self._last: NDArray[np.float64] | None = None  # the last action of a plan
            self._sensed: tuple[float, NDArray[Any] | None] = (math.nan, None)
            self.latest: Any = None
            self.record = Record(self.spec.action_dim, self._capacity)

    def tick(
        self, observation: NDArray[Any] | None, index: int | None = None, *, time: float | None = None
    ) -> NDArray[np.float64] | None:
        """Takes an observation, and gives the action for now.

        Args:
            observation: ``[O]``, or None if there is no new one.
            index: which tick it is, if the caller knows; None: the nearest by the clock.
            time: when it was measured, in the clock's seconds; None: now.  A plan begins at that moment, so
                of an old observation's plan a later action is due.

        Returns:
            The action ``[A]``; None: nothing is safe, so stop the robot.

        Raises:
            InputError: the controller wasn't started, or the first observation has the wrong shape.  What
                the fallback raises is raised too, after the tick was noted.
        """
        own, inside = threading.current_thread(), self._inside
        with self._lock:
            self._inside = own
            try:
                self.sense(observation, index, time=time)
                other = self._ticker if self._index == self._ticked else inside
                if other not in (None, own):
                    self._watchdog.details[Fault.TWO_THREADS] = f"by {other.name} and {own.name}"
                    self._found |= Fault.TWO_THREADS
                self._ticker = own
                return self.act()
            finally:
                self._inside = None

    def sense(
        self, observation: NDArray[Any] | None, index: int | None = None, *, time: float | None = None
    ) -> None:
        """The first half of a tick: takes the observation, and asks for a plan if one is due."""
        if not self.started:
            raise InputError("the controller isn't started: call start(), or use it in a with statement")
        now = self.clock.now()
        if self._origin is None:
            self._origin = now
        if index is None:  # the caller may be a little early or late
            index = self._index_at(now, early=0.5)
        elif not isinstance(index, int | np.integer):
            raise InputError(f"{index=} must be a tick's number")
        self._index = max(self._index, index)
        self._go_on(self._index)
        observation, faults = self._watchdog.check_observation(observation, now, time)
        observed = self._index
        if time is not None and not faults:
            # The robot didn't move before tick 0: what was seen then is tick 0's.
            observed = max(0, min(observed, math.floor((time - self._origin) * self.rate_hz + 0.5)))
        if observation is not None and not faults:
            self._history.push(observation, observed)
        if not self._watchdog.is_fresh(now):
            faults |= Fault.OBSERVATION_STALE
        if self._in_turn:  # before its commands move a window, or are committed
            faults |= self._take_plan(self._index, now)
        self._sensed, self._found = (now, observation), faults
        # A request that still waits for the planner is renewed: the newest observation counts.
        known = not (self._in_turn and (self._watchdog.waiting or self._forward.waiting))
        if not faults and known and (self._index >= self._due or self._watchdog.queued):
            try:
                self._ask(now, observed)
            except BaseException:  # as a planner of the caller's own may raise
                self._note(None, -1, math.nan)
                raise

    def _index_at(self, now: float, early: float = 1e-6) -> int:
        """The tick of a moment; ``early`` is the part of a period by which the moment may be before it."""
        assert self._origin is not None
        return max(self._index, math.floor((now - self._origin) * self.rate_hz + early))

    def _go_on(self, index: int) -> None:
        self._progress.go_on(index, self.latest is not None and not self.latest.fallback_active)

    def _ask(self, now: float, observed: int) -> None:
        kept = weight = None
        last = self._index + self._watchdog.seconds_left(self._blender.plan, now) * self.rate_hz
        window, begin = self._forward.window(self._history, self._blender, observed, self._index, last)
        if self._blender.commits:
            kept, weight = self._blender.commit(begin, observed + self._forward.delay - begin)
        if self._index >= self._due:
            self._due = self._index + self._ask_every
        self._watchdog.asked(now)
        step = self._grid.steps(self._progress.expected_at(begin))[0]
        self._planner.request(PlanRequest(observed, step, self._session, now, window, kept, weight))
        self.record.n_requests += 1

    def act(self) -> NDArray[np.float64] | None:
        """The second half: takes plans that have arrived, and decides.  Returns as ``tick`` does."""
        now, action, step, age = self.clock.now(), None, -1, math.nan
        # A plan that was computed within this tick may have taken it into a later one.
        index = self._index_at(now)
        try:
            self._found |= self._take_plan(index, now)
            step, age = self._act_on_plan(index, now)
            if step >= 0:
                action = self._last = self._action.copy()
                self._fallback_since = math.nan
            else:
                action = self._fall_back(now)
        finally:
            self._forward.commanded(index, action)
            self._note(action, step, age)  # also when the fallback raises
        return action

    def _act_on_plan(self, index: int, now: float) -> tuple[int, float]:
        """Writes the action that is due; its plan's step, or -1: there is none, and the plan's age."""
        step, age = -1, math.nan
        if self._watchdog.is_fresh(now):
            step, plan = self._blender.act(index, self._action), self._blender.plan
            if step >= 0 and plan is not None:
                age = now - plan.asked
                step = step if age <= self._watchdog.max_plan_age else -1
            if step < 0 and self._had_plan:
                self._found |= Fault.PLAN_LATE
            elif step >= 0 and not self._watchdog.is_within(self._action.tolist()):
                step, self._found = -1, self._found | Fault.ACTION_REFUSED
        if not self._had_plan:
            self._found |= Fault.PLAN_MISSING
        return step, age

    def _fall_back(self, now: float) -> NDArray[np.float64] | None:
        """The fallback's action, if it is one and the fallback may still act."""
        if math.isnan(self._fallback_since):
            self._fallback_since = now
        given = self._fallback(None if self._last is None else self._last.copy(), self._found)
        action = None if given is None else self._watchdog.check_fallback(given)
        if given is not None and action is None:
            self._found |= Fault.FALLBACK_REFUSED
        elif given is not None and now - self._fallback_since > self._fallback_timeout:
            action, self._found = None, self._found | Fault.FALLBACK_TIMEOUT
        return action

    def _note(self, action: NDArray[np.float64] | None, step: int, age: float) -> None:
        started, observation = self._sensed
        assert self._origin is not None
        deadline = self._origin + self._index / self.rate_hz
        missed = max(0, self._index - self._ticked - 1)
        times = self._index, deadline, started, self.clock.now(), missed
        plan, faults = self._blender.plan, self._found
        self.latest = Tick(*times, observation, action, plan, step, age, faults, step < 0)
        self.record.add_tick(
            *times,
            -1 if plan is None else plan.tick - plan.waited,
            *(step, age, int(faults), step < 0, math.nan if action is None else action),
        )
        self._ticked = self._index
        if faults is not self._faults:
            if new := faults & ~self._faults:
                log.warning("tick %d: %s", self._index, self._watchdog.in_words(new))
            self._faults = faults

    def _take_plan(self, index: int, now: float) -> Fault:
        """Takes a plan that has arrived; restarts a planner that is dead or hangs."""
        faults = Fault.NONE
        self._go_on(index)
        reply = self._planner.poll()
        if reply is not None and getattr(reply, "session", self._session) == self._session:
            self._watchdog.answered(now)
            faults = self._watchdog.check_reply(reply, index) or self._take(reply, index)
        if broken := self._watchdog.check_planner(self._planner.alive, now):
            self._planner.restart()
        if plan := self._forward.due(index):
            self._blender.add(plan)
        if faults | broken:
            self._due = 0
        return faults | broken

    def _take(self, reply: PlanReply, index: int) -> Fault:
        asked, reply = reply.tick, self._progress.placed(reply, self._forward.ahead)
        self._forward.delays.append(index - asked)
        # It acts from now, or from its tick, until the next plan, which is asked for later, is here.
        start, next_asked = max(index, reply.tick), asked + self._ask_every
        stop = max(next_asked, start + 1 if self._forward else 0) + self._forward.delay
        faults = self._watchdog.check_plan(reply, self._grid.runs(reply, start, stop))
        self.record.add_plan(
            *(reply.tick - reply.waited, reply.asked, reply.arrived, reply.latency),
            *(reply.iterations, reply.residual, index - asked, bool(faults)),
        )
        if not faults:
            self._forward.waiting = reply
            self._had_plan = True
        return faults
