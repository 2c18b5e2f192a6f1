"""Simulated planning latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..clock import Clock
from .request import PlanReply, PlanRequest


class DelayedPlanner:
    """Hands plans out when a latency has passed on the clock.  With a virtual clock this simulates a planner
    beside the loop, reproducible bit by bit.

    Like a real one it computes one plan at a time: of the requests that come meanwhile, the newest is next.

    Args:
        begin: begins a plan; returns a function that gives the plan, called once it is needed.
        clock: whose seconds count.
        latency: gives every plan's, in seconds.
    """

    alive = True

    def __init__(
        self,
        begin: Callable[[PlanRequest], Callable[[], PlanReply]],
        clock: Clock,
        latency: Callable[[], float],
    ) -> None:
        self._begin_plan, self._clock, self._latency = begin, clock, latency
        self._next: PlanRequest | None = None
        self._at: tuple[float, float, Callable[[], PlanReply]] | None = None  # due, latency, plan
        self._ready: tuple[float, float, Callable[[], PlanReply]] | None = None

    def start(self, *, committed: bool = False) -> None:
        """Does nothing: it is always ready."""

    def request(self, request: PlanRequest) -> None:
        now = self._clock.now()
        self._catch_up(now)
        self._next = request
        self._begin(now)

    def _begin(self, now: float) -> None:
        if self._next is not None and self._at is None:
            request, self._next = self._next, None
            latency = self._latency()
            self._at = now + latency, latency, self._begin_plan(request)

    def _catch_up(self, now: float) -> None:
        """Finishes the plans that are due by ``now``; the next plan begins when the one before is due."""
        # Half a nanosecond: a clock's grid isn't a decimal one.
        while self._at is not None and self._at[0] <= now + 5e-10:
            self._ready, self._at = self._at, None
            self._begin(self._ready[0])

    def poll(self) -> PlanReply | None:
        self._catch_up(self._clock.now())
        if self._ready is None:
            return None
        (due, latency, made), self._ready = self._ready, None
        return replace(made(), latency=latency, arrived=due)

    def wait(self, timeout: float) -> bool:
        """Lets the clock go on to when the plan is due, at most by ``timeout`` seconds."""
        self._catch_up(self._clock.now())
        if self._ready is None and self._at is not None:
            self._clock.sleep_until(min(self._at[0], self._clock.now() + timeout))
            self._catch_up(self._clock.now())
        return self._ready is not None

    def restart(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._next = self._at = self._ready = None
