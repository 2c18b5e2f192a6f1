"""A request for a plan, its reply, and the planners' protocol: planning beside the control loop.

::

    Controller --- PlanRequest (tick k, its observation window) ---> Planner
    Controller <-- PlanReply (made for tick k, L ticks later) ------ Planner

``inline`` plans within ``request``, ``thread`` in a thread, ``process`` in another process; ``delayed`` hands
plans out when a latency has passed on a clock, which is how latency is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..observation import InvalidObservationError
from ..policy import InvalidPlanError
from ..types import Committed, Plan, PolicySpec


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A request for a plan.

    Attributes:
        tick: of the window's newest observation.
        step: the policy step that the tick belongs to; the difference between two requests is how many steps
            of the first one's plan were executed in between.
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
        latency: seconds of computation.
        iterations: network calls that had to wait for one another.
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
    arrived: float = math.nan


class Plans(Protocol):
    """Anything that plans: a ``Policy``, or an object of the caller's own with these two members.

    It may also have ``warm_up(*, committed: bool = False)``, which is called once before the first plan.  To
    refuse a request, raise ``InvalidObservationError`` or ``InvalidPlanError``; any other exception ends the
    planner.
    """

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
    ) -> Plan:
        """A plan for a window ``[To, O]``, a batch of one; see ``Policy.plan``."""
        ...


def warm_up(policy: Plans, *, committed: bool) -> None:
    """Calls the policy's ``warm_up``, if it has one."""
    method = getattr(policy, "warm_up", None)
    if method is not None:
        method(committed=committed)


class PlanMaker:
    """Turns requests into replies, for every planner.  It remembers the last plan, to continue it."""

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self.policy, self.generator, self.clock = policy, generator, clock
        self._plan: Plan | None = None
        self._step, self._session = 0, -1

    def __call__(self, request: PlanRequest) -> PlanReply:
        started = self.clock.now()
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
            return self.failed(request, str(error), self.clock.now() - started)
        return self.made(request, plan, self.clock.now() - started)

    def previous(self, request: PlanRequest) -> tuple[Plan | None, int]:
        """The plan that the request continues, and how many of its steps have been executed."""
        moved = request.step - self._step
        going_on = request.session == self._session and 0 <= moved < self.policy.spec.horizon
        return (self._plan, moved) if going_on and self._plan is not None else (None, 0)

    def made(self, request: PlanRequest, plan: Plan, latency: float) -> PlanReply:
        """The reply with a plan, which the next one may continue."""
        self._plan, self._step, self._session = plan, request.step, request.session
        actions = plan.actions[0].to("cpu", torch.float64).numpy()
        iterations = int(plan.solution.iterations[0])
        residual = math.nan if plan.residual is None else float(plan.residual[0])
        return PlanReply(request.tick, request.session, request.asked, latency, iterations, residual, actions)

    def failed(self, request: PlanRequest, fault: str, latency: float) -> PlanReply:
        """The reply without a plan; the next one is a cold start."""
        self._plan = None
        nothing = np.full((self.policy.spec.horizon, self.policy.spec.action_dim), np.nan)
        return PlanReply(request.tick, request.session, request.asked, latency, 0, math.nan, nothing, fault)


def committed_tensors(requests: list[PlanRequest]) -> Committed | None:
    """The actions that a batch of requests commits to; None if they don't."""
    if requests[0].committed is None:
        return None
    parts: Any = zip(*((request.committed, request.commitment) for request in requests), strict=True)
    return Committed(*(torch.from_numpy(np.stack(part)).float() for part in parts))


class Planner(Protocol):
    """Plans beside the control loop.  Only ``start``, ``wait`` and ``stop`` may block."""

    def start(self, *, committed: bool = False) -> None:
        """Returns when it is ready to plan; ``committed``: requests will have actions to keep."""
        ...

    def request(self, request: PlanRequest) -> None:
        """Asks for a plan.  A request that hasn't been begun when the next one comes is dropped."""
        ...

    def poll(self) -> PlanReply | None:
        """The newest plan that hasn't been handed out yet, or None."""
        ...

    def wait(self, timeout: float) -> bool:
        """Blocks up to ``timeout`` seconds for a reply; whether ``poll`` may have one now."""
        ...

    @property
    def alive(self) -> bool:
        """Whether plans can be expected of it."""
        ...

    def restart(self) -> None:
        """Gives up the request at hand and starts again, without blocking: ``alive`` when it is ready."""
        ...

    def stop(self) -> None:
        """Ends it, and everything that belongs to it; it can be started again."""
        ...


MakePlanner = Callable[[Plans, torch.Generator, Clock], Planner]
"""``(policy, generator, clock)`` to a planner: a planner's class, or a ``functools.partial`` of it."""
