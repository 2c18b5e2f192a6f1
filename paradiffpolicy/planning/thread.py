"""Planning in a thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from ..clock import Clock
from ..process import PATIENCE
from .request import PlanMaker, PlanReply, PlanRequest, Plans, warm_up


class ThreadPlanner:
    """Computes in a thread of this process.

    While a captured plan computes, other threads run; an eager one takes turns with them.  A thread can't be
    killed: one that hangs is left alone when the planner is restarted.
    """

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self._policy, self._generator, self._clock = policy, generator, clock
        self._changed = threading.Condition()
        self._request: PlanRequest | None = None
        self._reply: PlanReply | None = None
        self._thread: threading.Thread | None = None

    def start(self, *, committed: bool = False) -> None:
        warm_up(self._policy, committed=committed)
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
            thread.join(timeout=PATIENCE)
