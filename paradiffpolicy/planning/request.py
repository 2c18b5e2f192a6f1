"""A request for a plan, its reply, and the planners' protocol: planning beside the control loop.

::

    Controller --- PlanRequest (tick k, its observation window) ---> Planner
    Controller <-- PlanReply (made for tick k, L ticks later) ------ Planner

``inline`` plans within ``request``, ``thread`` in a thread, ``process`` in another process; ``delayed`` hands
plans out when a latency has passed on a clock, which is how latency is simulated.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..errors import InputError
from ..policy import InvalidPlanError
from ..types import Committed, Plan, PolicySpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A request for a plan.

    Attributes:
        tick: of the window's newest observation.
        step: how many steps have been executed since the reset when the plan begins; the difference between
            two requests is how many of the first one's plan are, in between.
        session: a plan doesn't continue one of another session.
        asked: when, in the clock's seconds.
        window: ``[To, O]``; its state may be rolled forward to when the plan begins (``forward``).
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
        tick, session, asked: of the request; see ``waited``.
        latency: seconds of computation.
        iterations: network calls that had to wait for one another.
        residual: see ``Plan``; NaN if it wasn't measured.
        actions: ``[T, A]``; step To - 1 is for ``tick``.
        fault: why there is no plan (``actions`` are NaN then), or "".
        arrived: when it was handed out, in the clock's seconds; NaN before.
        waited: ticks from the request to its arrival in which no plan was executed.  ``Controller`` counts
            them, and puts ``tick`` off by as many before a blender takes the plan: the robot stood still, so
            no action of the plan has been executed in its place.  So it does with a plan whose window was
            rolled forward, by as many ticks as that was.
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
    waited: int = 0


class Plans(Protocol):
    """Anything that plans: a ``Policy``, or an object of the caller's own with these two members.

    It may also have ``warm_up(*, committed: bool = False)``, which is called once before the first plan.  To
    refuse a request, raise an exception: it becomes a fault of the tick that the plan was for, in its words.
    A copy of it (``copy.copy``) plans in its place where a call hangs.
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
    """Turns requests into replies, for every planner; whatever the policy raises becomes a reply's fault.

    Attributes:
        last: the last plan, its request's step and its session.  The next plan continues it, also after
            requests that gave none: a cold start takes longer, which a fault is no reason for.
    """

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self.policy, self.generator, self.clock = policy, generator, clock
        self.last: tuple[Plan, int, int] | None = None
        self._fault: Exception | None = None

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
            reply = self.made(request, plan, self.clock.now() - started)
        except Exception as error:
            return self._failed(request, error, self.clock.now() - started)
        self._fault = None
        return reply

    def previous(self, request: PlanRequest) -> tuple[Plan | None, int]:
        """The plan that the request continues, and how many of its steps have been executed."""
        if self.last is not None:
            plan, step, session = self.last
            if request.session == session and 0 <= request.step - step < self.policy.spec.horizon:
                return plan, request.step - step
        return None, 0

    def made(self, request: PlanRequest, plan: Plan, latency: float) -> PlanReply:
        """The reply with a plan, which the next one may continue.

        Raises:
            InvalidPlanError: it has another shape than the policy's plans.
        """
        actions = plan.actions[0].to("cpu", torch.float64).numpy()
        wanted = (self.policy.spec.horizon, self.policy.spec.action_dim)
        if actions.shape != wanted:
            raise InvalidPlanError(f"the plan has the shape {actions.shape}, expected {wanted}")
        iterations = int(plan.solution.iterations[0])
        residual = math.nan if plan.residual is None else float(plan.residual[0])
        self.last = plan, request.step, request.session
        return PlanReply(request.tick, request.session, request.asked, latency, iterations, residual, actions)

    def _failed(self, request: PlanRequest, error: Exception, latency: float) -> PlanReply:
        before, self._fault = self._fault, error
        if isinstance(error, InvalidPlanError) and isinstance(before, InvalidPlanError):
            self.last = None  # what it continues may be the cause
        fault = str(error)
        if not isinstance(error, InputError):
            fault = f"{type(error).__name__}: {error}"
            if str(before) != str(error):  # once, with its traceback
                log.error("planning failed", exc_info=error)
        nothing = np.full((self.policy.spec.horizon, self.policy.spec.action_dim), np.nan)
        return PlanReply(
            request.tick, request.session, request.asked, latency, 0, math.nan, nothing, fault or repr(error)
        )

    def anew(self) -> PlanMaker:
        """One that goes on with a copy of the policy, whose locks and programs aren't this one's."""
        generator = torch.Generator(self.generator.device)
        generator.set_state(self.generator.get_state())
        another = PlanMaker(copy.copy(self.policy), generator, self.clock)
        another.last = self.last
        return another


def committed_tensors(requests: list[PlanRequest]) -> Committed | None:
    """The actions that a batch of requests commits to; None if they don't."""
    if requests[0].committed is None:
        return None
    parts: Any = zip(*((request.committed, request.commitment) for request in requests), strict=True)
    actions, weight = (torch.from_numpy(np.stack(part)) for part in parts)
    return Committed(actions, weight.float())  # actions may lie far from zero


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
