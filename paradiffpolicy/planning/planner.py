"""Planning beside the control loop: who asks is never kept waiting, and the newest observation wins.

::

    Controller --- PlanRequest (tick k, its observation window) ---> Planner
    Controller <-- PlanReply (made for tick k, L ticks later) ------ Planner

``InlinePlanner`` computes within ``request``, ``ThreadPlanner`` in a thread,
``process.ProcessPlanner`` in another process; ``DelayedPlanner`` hands its plans out when a latency has
passed on a clock, which is how latency is simulated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..policy import InvalidObservationError, InvalidPlanError
from ..types import Committed, Plan, PolicySpec


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is to be made from.

    Attributes:
        tick: of the window's newest observation.
        step: the policy step that the tick belongs to; from one request to the next they say how many
            steps of the last plan have been executed.
        session: a plan doesn't continue one of another session.
        asked: when, in the clock's seconds.
        window: ``[To, O]``.
        committed: ``[T, A]``, actions to keep, or None.
        commitment: ``[T]``, their weight, or None.
    """

    tick: int
    step: int
    session: int
    asked: float
    window: NDArray[Any]
    committed: NDArray[Any] | None = None
    commitment: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class PlanReply:
    """A plan, and the tick that it was made for.

    Attributes:
        tick, session, asked: of the request.
        latency: seconds that it took to compute.
        rounds: network rounds.
        residual: see ``Plan``; NaN if it wasn't measured.
        actions: ``[T, A]``; step To - 1 is for ``tick``.
        fault: why there is no plan (``actions`` are NaN then), or "".
        arrived: when it was handed out, in the clock's seconds; NaN before.
    """

    tick: int
    session: int
    asked: float
    latency: float
    iterations: int
    residual: float
    actions: NDArray[np.float64]
    fault: str = ""
    arrived: float = float("nan")


class Plans(Protocol):
    """What planners plan with: ``Policy``, or anything that plans like one."""

    @property
    def spec(self) -> PolicySpec: ...

    def plan(
        self,
        observation_window: Any,
        previous: Plan | None = None,
        *,
        generator: Any,
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan: ...

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> Any: ...


class PlanMaker:
    """Requests to replies: what the planners share.  Remembers the last plan, to continue it.

    Args:
        policy: plans.
        generator: the plans' noise.
        clock: times them.
    """

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self.policy, self.generator, self.clock = policy, generator, clock
        self._plan: Plan | None = None
        self._step, self._session = 0, -1

    def __call__(self, request: PlanRequest) -> PlanReply:
        begun = self.clock.now()
        previous, moved = self.previous(request)
        try:
            plan = self.policy.plan(
                request.window,
                previous,
                generator=self.generator,
                executed_steps=moved,
                committed=committed_tensors([request]),
            )
        except (InvalidObservationError, InvalidPlanError) as error:
            return self.failed(request, str(error), self.clock.now() - begun)
        return self.made(request, plan, self.clock.now() - begun)

    def previous(self, request: PlanRequest) -> tuple[Plan | None, int]:
        """The plan that the request continues, and how many of its steps have been executed."""
        moved = request.step - self._step
        going_on = request.session == self._session and 0 <= moved < self.policy.spec.horizon
        return (self._plan, moved) if going_on and self._plan is not None else (None, 0)

    def made(self, request: PlanRequest, plan: Plan, latency: float) -> PlanReply:
        """The reply, and a plan to go on from."""
        self._plan, self._step, self._session = plan, request.step, request.session
        actions = plan.actions[0].to("cpu", torch.float64).numpy()
        iterations = int(plan.solution.iterations[0])
        residual = float("nan") if plan.residual is None else float(plan.residual[0])
        return PlanReply(request.tick, request.session, request.asked, latency, iterations, residual, actions)

    def failed(self, request: PlanRequest, fault: str, latency: float) -> PlanReply:
        """The reply when there is no plan; the next one starts afresh."""
        self._plan = None
        spec = self.policy.spec
        nothing = np.full((spec.horizon, spec.action_dim), np.nan)
        return PlanReply(
            request.tick, request.session, request.asked, latency, 0, float("nan"), nothing, fault
        )


def committed_tensors(requests: list[PlanRequest]) -> Committed | None:
    """What a batch of requests commits to; None if they don't."""
    if requests[0].committed is None:
        return None
    actions: list[Any] = [request.committed for request in requests]
    weights: list[Any] = [request.commitment for request in requests]
    return Committed(*(torch.from_numpy(np.stack(part)).float() for part in (actions, weights)))


class Planner(Protocol):
    """Plans beside whoever asks.  Only ``start`` and ``stop`` may take their time."""

    def start(self, *, committed: bool = False) -> None:
        """Returns when it is ready to plan, from requests that commit to something or from such that
        don't."""
        ...

    def request(self, request: PlanRequest) -> None:
        """Asks for a plan.  A request that hasn't been begun when the next one comes is dropped."""
        ...

    def poll(self) -> PlanReply | None:
        """The newest plan that hasn't been handed out yet, or None."""
        ...

    @property
    def alive(self) -> bool:
        """Whether plans can be expected of it."""
        ...

    def restart(self) -> None:
        """Gives up what it is at, and begins again without keeping anybody waiting: it is ``alive``
        when it is ready."""
        ...

    def stop(self) -> None:
        """Ends it, and everything that belongs to it; it can be started again."""
        ...


MakePlanner = Callable[[Plans, torch.Generator, Clock], Planner]
"""``(policy, generator, clock)`` to a planner: a planner's class, or a ``functools.partial`` of it."""


class InlinePlanner:
    """Computes within ``request``: whoever asks waits.  The reference for the others."""

    alive = True

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._make = PlanMaker(policy, generator, clock)
        self._reply: PlanReply | None = None

    def start(self, *, committed: bool = False) -> None:
        self._policy.warm_up(committed=committed)

    def request(self, request: PlanRequest) -> None:
        self._reply = self._make(request)

    def poll(self) -> PlanReply | None:
        reply, self._reply = self._reply, None
        return None if reply is None else replace(reply, arrived=self._clock.now())

    def restart(self) -> None:
        """There is nothing to give up."""

    def stop(self) -> None:
        self._reply = None


class DelayedPlanner:
    """Hands plans out when a latency has passed on the clock.  With a virtual clock: what a planner
    beside the loop would do, to be repeated bit by bit.

    Like a planner of its own, it does one thing at a time: requests that come while it is at one wait,
    and of those the newest wins.

    Args:
        begin: begins a plan; what it gives back gives the plan, once it is needed.
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
        """It always is ready."""

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
        """Does what would have been done by now: the next plan begins when the one before is due."""
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

    def restart(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._next = self._at = self._ready = None


class ThreadPlanner:
    """Computes in a thread of this process.

    A captured plan leaves Python to the others while it computes; an eager one takes turns with
    them.  A thread can't be killed: one that hangs is left alone when it is restarted.
    """

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self._policy, self._generator, self._clock = policy, generator, clock
        self._changed = threading.Condition()
        self._request: PlanRequest | None = None
        self._reply: PlanReply | None = None
        self._thread: threading.Thread | None = None

    def start(self, *, committed: bool = False) -> None:
        self._policy.warm_up(committed=committed)
        self._begin()

    def _begin(self) -> None:
        self._request = self._reply = None
        self._thread = threading.Thread(target=self._run, name="planner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        make = PlanMaker(self._policy, self._generator, self._clock)
        own = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._request is not None or self._thread is not own)
                if self._thread is not own:
                    return
                request, self._request = self._request, None
            assert request is not None
            reply = make(request)
            with self._changed:
                if self._thread is own:
                    self._reply = reply
                    self._changed.notify_all()

    def request(self, request: PlanRequest) -> None:
        with self._changed:
            self._request = request
            self._changed.notify_all()

    def poll(self) -> PlanReply | None:
        with self._changed:
            reply, self._reply = self._reply, None
        return None if reply is None else replace(reply, arrived=self._clock.now())

    def wait(self, timeout: float) -> bool:
        """Waits for a plan, for whoever has nothing else to do; whether there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: self._reply is not None, timeout)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def restart(self) -> None:
        with self._changed:
            self._begin()
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            thread, self._thread = self._thread, None
            self._request = self._reply = None
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout=5.0)
