"""The watchdog of a control loop rejects data that isn't fresh, finite and within the limits."""

from __future__ import annotations

import math
import operator
import sys
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, require_positive
from ..observation import records
from ..planning.request import PlanReply
from ..task import NUMBERS, real_numbers
from ..types import PolicySpec
from .record import FAULTS, Fault

Limits = tuple[NDArray[Any], NDArray[Any]]
"""``(low, high)``, each ``[A]``."""

AHEAD = 0.1
"""Seconds by which a measurement's time may be ahead of the clock, and means now; more is another clock's."""


def checked_limits(limits: Limits | None, action_dim: int) -> Limits:
    """The limits as floats.  Infinite ones, and those of None, bar NaN and infinity only.

    Raises:
        InputError: they aren't two vectors of ``action_dim`` numbers, the first nowhere above the second.
    """
    most = np.full(action_dim, sys.float_info.max)
    given: Any = (-most, most) if limits is None else limits
    bounds = [floats(bound) for bound in given] if hasattr(given, "__iter__") else []
    match bounds:
        case [np.ndarray() as low, np.ndarray() as high]:
            if low.shape == high.shape == (action_dim,) and (low <= high).all():
                return np.maximum(low, -most), np.minimum(high, most)
    raise InputError(
        f"limits must be two arrays [action_dim={action_dim}], low and high, without NaN, low <= high"
    )


def floats(given: Any) -> NDArray[np.float64] | None:
    """``real_numbers``; None: they aren't."""
    try:
        return real_numbers(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor that needs a gradient
        return None


class Watchdog:
    """Checks observations, plans, actions and the planner, with ``Controller``'s settings.

    Attributes:
        details: by fault, the numbers of its last occurrence.
        queued: whether a request was sent while another was unanswered.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        spec: PolicySpec,
        *,
        max_observation_age: float,
        limits: Limits | None = None,
        max_plan_age: float | None = None,
        frozen_after: float | None = None,
        planner_timeout: float = 10.0,
    ) -> None:
        require_positive(max_observation_age=max_observation_age, planner_timeout=planner_timeout)
        for name, seconds in {"max_plan_age": max_plan_age, "frozen_after": frozen_after}.items():
            if seconds is not None:
                require_positive(**{name: seconds})
        self._low, self._high = checked_limits(limits, spec.action_dim)
        self._bounds = list(zip(self._low.tolist(), self._high.tolist(), strict=True))
        self._spec, self._planned = spec, (spec.horizon, spec.action_dim)
        self._executed_from = spec.executed.start
        self._max_observation_age, self._planner_timeout = max_observation_age, planner_timeout
        self.max_plan_age = math.inf if max_plan_age is None else max_plan_age
        self._frozen_after = frozen_after
        self._any_observation = False
        self.details: dict[Fault, str] = {}
        self.reset()

    def in_words(self, faults: Fault) -> str:
        """Faults for people, with the numbers of their last occurrence."""
        return "; ".join(
            f"{words}: {self.details[fault]}" if fault in self.details else words
            for fault, words in FAULTS.items()
            if fault in faults
        )

    def reset(self) -> None:
        """Forgets when there was a good observation or an unanswered request."""
        self._seen = self._stamp = self._waiting_since = math.nan
        self._unchanged: tuple[float, NDArray[Any] | None] = (math.nan, None)
        self.queued = False

    def check_observation(
        self, given: object, now: float, time: object = None
    ) -> tuple[NDArray[Any] | None, Fault]:
        """An observation as floats, or a record (None: it can't be), and its fault.

        Args:
            time: when it was measured; None: now.

        Raises:
            InputError: it is the first one ever, and has the wrong shape.
        """
        if given is None:
            return None, Fault.OBSERVATION_MISSING
        observation: NDArray[Any] | None
        observation, detail = (self._recorded if self._spec.contract.cameras else self._vector)(given)
        first, self._any_observation = not self._any_observation, True
        if detail:
            if first:
                raise InputError(f"the first observation has the wrong shape: {detail}")
            self.details[Fault.OBSERVATION_SHAPE] = detail
            return observation, Fault.OBSERVATION_SHAPE
        assert observation is not None
        seen: Any = observation
        numbers = seen[NUMBERS] if seen.dtype.names else seen
        if not np.isfinite(numbers).all():
            return observation, Fault.OBSERVATION_NOT_FINITE
        return observation, self._check_time(observation, now, time)

    def _vector(self, given: object) -> tuple[NDArray[np.float64] | None, str]:
        """An observation as floats, and why it isn't one of the policy's."""
        observation, wanted = floats(given), (self._spec.obs_dim,)
        if observation is not None and observation.shape == wanted:
            return observation, ""
        got = f"a {type(given).__name__} without numbers" if observation is None else observation.shape
        return observation, f"got {got}, expected {wanted}"

    def _recorded(self, given: Any) -> tuple[NDArray[Any] | None, str]:
        """An observation as a record of its own, and why it isn't one of the policy's."""
        try:
            observation = np.array(records(self._spec, given))
        except Exception as error:  # a robot may give anything
            return None, str(error) or type(error).__name__
        return (observation, "") if observation.ndim == 0 else (None, f"got {observation.shape} records")

    def _check_time(self, observation: NDArray[Any], now: float, time: Any) -> Fault:
        measured, detail = now, ""
        if time is not None:
            try:
                stamp = math.nan if isinstance(time, bool | str) else float(time)
            except (TypeError, ValueError, OverflowError):
                stamp = math.nan
            if not -math.inf < stamp <= now + AHEAD:
                self.details[Fault.OBSERVATION_TIME] = f"{time} s, where the clock says {now:.3f} s"
                return Fault.OBSERVATION_TIME
            if stamp <= self._stamp:
                detail = f"of {stamp:.3f} s, where the last one was of {self._stamp:.3f} s"
            measured, self._stamp = min(stamp, now), stamp
        if self._frozen_after is not None and not detail:
            since, last = self._unchanged
            if last is None or observation.tobytes() != last.tobytes():
                self._unchanged = measured, observation.copy()
            elif measured - since > self._frozen_after:
                detail = f"the same numbers for {measured - since:.3f} s"
        if detail:
            self.details[Fault.OBSERVATION_FROZEN] = detail
            return Fault.OBSERVATION_FROZEN
        self._seen = measured
        return Fault.NONE

    def is_fresh(self, now: float) -> bool:
        """Whether the last good observation is recent enough to act on a plan."""
        return now - self._seen <= self._max_observation_age

    def check_reply(self, reply: Any, index: int) -> Fault:
        """The fault of what a planner handed out, where that isn't a reply to a tick until this one."""
        try:
            made_for, iterations, times = reply.tick, reply.iterations, reply.asked + reply.latency
            float(reply.residual)
            if (
                0 <= operator.index(made_for) <= index
                and operator.index(iterations) >= 0
                and math.isfinite(times)
            ):
                return Fault.NONE
        except (AttributeError, TypeError, ValueError):
            pass
        self.details[Fault.PLAN_REFUSED] = f"{short(reply)}, which isn't a reply to a tick until {index}"
        return Fault.PLAN_REFUSED

    def check_plan(self, reply: PlanReply, runs: slice) -> Fault:
        """The fault of a plan.

        Args:
            runs: its steps that will be acted on.  The limits bind these; later ones, which run only if the
                next plan is late, are checked as actions.
        """
        detail = reply.fault
        if not detail:
            actions = np.asarray(reply.actions)
            detail = f"made for tick {reply.tick - reply.waited}"
            if actions.dtype.kind not in "fiu" or actions.shape != self._planned:
                detail += f", its shape {actions.shape} in place of {self._planned}"
            elif np.isfinite(actions[self._executed_from :]).all():
                acted = actions[runs]
                if ((acted >= self._low) & (acted <= self._high)).all():
                    return Fault.NONE
        self.details[Fault.PLAN_REFUSED] = detail
        return Fault.PLAN_REFUSED

    def seconds_left(self, plan: PlanReply | None, now: float) -> float:
        """For how long a plan may still be acted on."""
        return self.max_plan_age - (0.0 if plan is None else now - plan.asked)

    def is_within(self, action: list[float]) -> bool:
        """Whether an action is finite and within the limits.  Of a list: faster for a few numbers."""
        return all(low <= value <= high for value, (low, high) in zip(action, self._bounds, strict=True))

    def check_fallback(self, given: object) -> NDArray[np.float64] | None:
        """A fallback's action as floats of its own; None: it isn't one, or beyond the limits."""
        action = floats(given)
        if action is not None and action.shape == self._low.shape and self.is_within(action.tolist()):
            return action
        self.details[Fault.FALLBACK_REFUSED] = f"it gave {given!r}"
        return None

    @property
    def waiting(self) -> bool:
        """Whether a request is unanswered."""
        return not math.isnan(self._waiting_since)

    def asked(self, now: float) -> None:
        """Notes a request."""
        self.queued = self.waiting
        self._waiting_since = self._waiting_since if self.waiting else now

    def answered(self, now: float) -> None:
        """Notes a reply; the planner begins with the queued request, if there is one, now."""
        self._waiting_since, self.queued = now if self.queued else math.nan, False

    def check_planner(self, alive: bool, now: float) -> Fault:
        """Whether the planner is dead or hangs; its unanswered requests are forgotten then."""
        hung = now - self._waiting_since > self._planner_timeout
        if alive and not hung:
            return Fault.NONE
        self._waiting_since, self.queued = math.nan, False
        return Fault.PLANNER_HUNG if hung else Fault.PLANNER_DEAD
