"""Planning in a thread."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import torch

from ..clock import Clock
from ..process import PATIENCE
from .backoff import BackOff
from .request import PlanMaker, PlanReply, PlanRequest, Plans, warm_up

log = logging.getLogger(__name__)


class ThreadPlanner:
    """Computes in a thread of this process.

    While a captured plan computes, other threads run; an eager one takes turns with them.  A thread can't be
    killed: one that hangs is left alone, with its policy, when the planner is restarted, and a copy plans in
    another thread.  While one that was left alone still hangs, no other is: threads don't pile up.
    """

    def __init__(self, policy: Plans, generator: torch.Generator, clock: Clock) -> None:
        self._make, self._committed = PlanMaker(policy, generator, clock), False
        self._changed = threading.Condition()
        self._request: PlanRequest | None = None
        self._reply: PlanReply | None = None
        self._thread: threading.Thread | None = None
        self._left: threading.Thread | None = None
        self._ready, self._back_off = False, BackOff()

    def start(self, *, committed: bool = False) -> None:
        self._committed = committed
        warm_up(self._make.policy, committed=committed)
        self._begin(after=0.0)

    def _begin(self, *, after: float, anew: bool = False) -> None:
        self._request = self._reply = None
        self._ready = not anew and not after
        self._thread = threading.Thread(target=self._run, args=(after, anew), name="planner", daemon=True)
        self._thread.start()

    def _run(self, after: float, anew: bool) -> None:
        own = threading.current_thread()
        with self._changed:
            self._changed.wait_for(lambda: self._thread is not own, after)
        try:
            make = self._make
            if anew:
                make = make.anew()
                warm_up(make.policy, committed=self._committed)
        except Exception:
            log.exception("planner: a copy of the policy can't plan")
            return
        with self._changed:
            if self._thread is own:
                self._make, self._ready = make, True
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
                    self._back_off.succeeded()
                    self._changed.notify_all()

    def request(self, request: PlanRequest) -> None:
        with self._changed:
            self._request = request
            self._changed.notify_all()

    def poll(self) -> PlanReply | None:
        with self._changed:
            reply, self._reply = self._reply, None
        return None if reply is None else replace(reply, arrived=self._make.clock.now())

    def wait(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._reply is not None, timeout)

    @property
    def alive(self) -> bool:
        return self._ready and self._thread is not None and self._thread.is_alive()

    def restart(self) -> None:
        with self._changed:
            thread = self._thread
            hangs = thread is not None and thread.is_alive()
            if hangs and (not self._ready or (self._left is not None and self._left.is_alive())):
                return  # on its way; or the second one that hangs
            self._left = thread if hangs else self._left
            self._begin(after=self._back_off.next(), anew=hangs)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            thread, self._thread = self._thread, None
            self._request = self._reply = None
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout=PATIENCE)
