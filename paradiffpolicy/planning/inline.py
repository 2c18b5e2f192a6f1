"""Planning within the control loop."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..clock import Clock
from .request import PlanMaker, PlanReply, PlanRequest, Plans, warm_up


class InlinePlanner:
    """Computes within ``request``, while the caller waits.  The reference for the other planners."""

    alive = True

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._make = PlanMaker(policy, generator, clock)
        self._reply: PlanReply | None = None

    def start(self, *, committed: bool = False) -> None:
        warm_up(self._policy, committed=committed)

    def request(self, request: PlanRequest) -> None:
        self._reply = self._make(request)

    def poll(self) -> PlanReply | None:
        reply, self._reply = self._reply, None
        return None if reply is None else replace(reply, arrived=self._clock.now())

    def wait(self, timeout: float) -> bool:
        return self._reply is not None

    def restart(self) -> None:
        """Does nothing: no request is under way outside ``request``."""

    def stop(self) -> None:
        self._reply = None
