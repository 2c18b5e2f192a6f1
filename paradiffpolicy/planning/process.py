"""Planning in another process, so that nothing that it does can hold up the loop.

Requests and plans go through shared memory (``slot``), which has no name and so can't be left behind; a byte
on the connection wakes the other end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..errors import InputError
from ..process import ChildProcess, Connection, pickled, wake, woken
from ..types import PolicySpec
from .request import PlanMaker, PlanReply, PlanRequest, Plans, warm_up
from .slot import Slot

log = logging.getLogger(__name__)

FAULT_BYTES = 240


class Channel:
    """A request slot and a reply slot in one piece of shared memory."""

    REQUEST = struct.Struct("=qqqd?7x")
    """tick, step, session, asked, whether it commits."""
    REPLY = struct.Struct(f"=qqddqd{FAULT_BYTES}s")
    """tick, session, asked, latency, iterations, residual, fault."""

    def __init__(self, file: int, spec: PolicySpec) -> None:
        self._window, self._plan = (spec.n_obs_steps, spec.obs_dim), (spec.horizon, spec.action_dim)
        self._nothing = bytes(8 * (math.prod(self._plan) + spec.horizon))
        request = self.REQUEST.size + 8 * math.prod(self._window) + len(self._nothing)
        reply = self.REPLY.size + 8 * math.prod(self._plan)
        size = Slot.taken(request) + Slot.taken(reply)
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        memory = memoryview(mmap.mmap(file, size))
        self._requests = Slot(memory, 0, request)
        self._replies = Slot(memory, Slot.taken(request), reply)

    def send_request(self, request: PlanRequest) -> None:
        commits = request.committed is not None
        head = self.REQUEST.pack(request.tick, request.step, request.session, request.asked, commits)
        kept = self._nothing
        if request.committed is not None and request.commitment is not None:
            kept = _bytes(request.committed) + _bytes(request.commitment)
        self._requests.write(head + _bytes(request.window) + kept)

    def receive_request(self) -> PlanRequest | None:
        """The newest, if there is a new one."""
        content = self._requests.read()
        if content is None:
            return None
        tick, step, session, asked, commits = self.REQUEST.unpack_from(content)
        values = np.frombuffer(content, offset=self.REQUEST.size)
        window, committed, commitment = np.split(
            values, np.cumsum([math.prod(self._window), math.prod(self._plan)])
        )
        kept = (committed.reshape(self._plan), commitment) if commits else (None, None)
        return PlanRequest(tick, step, session, asked, window.reshape(self._window), *kept)

    def send_reply(self, reply: PlanReply) -> None:
        numbers = (reply.tick, reply.session, reply.asked, reply.latency, reply.iterations, reply.residual)
        fault = reply.fault.encode()[:FAULT_BYTES]
        self._replies.write(self.REPLY.pack(*numbers, fault) + _bytes(reply.actions))

    def receive_reply(self, clock: Clock) -> PlanReply | None:
        """The newest, if there is a new one; it arrives now."""
        content = self._replies.read()
        if content is None:
            return None
        tick, session, asked, latency, iterations, residual, fault = self.REPLY.unpack_from(content)
        actions = np.frombuffer(content, offset=self.REPLY.size).reshape(self._plan)
        words = fault.rstrip(b"\0").decode(errors="replace") if fault[0] else ""
        return PlanReply(tick, session, asked, latency, iterations, residual, actions, words, clock.now())


def _bytes(values: NDArray[Any]) -> bytes:
    return values.astype(np.float64, copy=False).tobytes()


@dataclass(frozen=True)
class PlannerJob:
    """The other process's settings; goes there by pickle.

    Attributes:
        policy, clock: plan there.
        generator_state: the plans' noise.
        cores: that it may run on; None: any.
        nice: how much less it counts for the scheduler.
        threads: of PyTorch.
        committed: whether requests have actions to keep.
    """

    policy: Plans
    generator_state: torch.Tensor
    clock: Clock
    cores: frozenset[int] | None
    nice: int
    threads: int
    committed: bool = False


class ProcessPlanner:
    """Computes in another process.  Its plans are ``InlinePlanner``'s, to the bit.

    Args:
        policy: goes there by pickle; its programs are captured there.
        generator: its state goes there.
        clock: must be one that both processes see alike, as the monotonic one.
        cores: that it may run on; None: those of this process when the planner was made.
        nice: by how much less it counts for the scheduler than this process.
        start_timeout: seconds in which it must be ready.
    """

    def __init__(
        self,
        policy: Plans,
        generator: torch.Generator,
        clock: Clock,
        *,
        cores: Sequence[int] | None = None,
        nice: int = 5,
        start_timeout: float = 120.0,
    ) -> None:
        chosen = None
        if hasattr(os, "sched_getaffinity"):
            chosen = frozenset(os.sched_getaffinity(0) if cores is None else cores)
        self._spec, self._clock, self._start_timeout = policy.spec, clock, start_timeout
        self._job = PlannerJob(policy, generator.get_state(), clock, chosen, nice, torch.get_num_threads())
        self._child: PlannerProcess | None = None
        self._restarting: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, *, committed: bool = False) -> None:
        """Starts the process and waits until it is ready, which takes seconds.

        Raises:
            InputError: the policy can't be sent there, or the process doesn't get ready.
        """
        self._stopped.clear()
        self._job = replace(self._job, committed=committed)
        log.info("starting the planner's process: loading PyTorch and warming up the policy takes seconds")
        started = time.monotonic()
        self._child = PlannerProcess(self._job, self._spec, self._start_timeout)
        log.info("the planner's process is ready after %.1f s", time.monotonic() - started)

    def request(self, request: PlanRequest) -> None:
        child = self._child
        if child is not None:
            child.channel.send_request(request)
            wake(child.connection)

    def poll(self) -> PlanReply | None:
        child = self._child
        return None if child is None else child.channel.receive_reply(self._clock)

    def wait(self, timeout: float) -> bool:
        child = self._child
        return child is not None and woken(child.connection, timeout)

    @property
    def alive(self) -> bool:
        child = self._child
        return child is not None and child.alive

    @property
    def pid(self) -> int | None:
        """The other process's; None if there is none."""
        return None if self._child is None else self._child.pid

    def restart(self) -> None:
        if self._restarting is not None and self._restarting.is_alive():
            return
        child, self._child = self._child, None
        self._restarting = threading.Thread(target=self._replace, args=(child,), name="planner-restart")
        self._restarting.start()

    def _replace(self, child: PlannerProcess | None) -> None:
        if child is not None:
            child.end(patience=0.0)
        try:
            new = PlannerProcess(self._job, self._spec, self._start_timeout, self._stopped)
        except InputError as error:
            log.error("planner: %s", error)
            return
        self._child = new

    def stop(self) -> None:
        self._stopped.set()
        if self._restarting is not None:
            self._restarting.join()
        child, self._child = self._child, None
        if child is not None:
            child.end()


class PlannerProcess(ChildProcess):
    """The planner's process, ready to plan, and the memory that it shares with this one."""

    def __init__(
        self, job: PlannerJob, spec: PolicySpec, timeout: float, given_up: threading.Event | None = None
    ) -> None:
        content = pickled(job, "this policy", "plan in a thread, planner='thread'")
        with tempfile.TemporaryFile(dir=shared_folder()) as memory:
            self.channel = Channel(memory.fileno(), spec)
            super().__init__(serve, content, name="planner", files=[memory.fileno()])
        self.await_ready(timeout, given_up)
        os.set_blocking(self.connection.fileno(), False)


def shared_folder() -> str | None:
    """The folder whose unnamed files lie in memory; None: the one for temporary files."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112


# ------------------------------------------------------------------------------- in the other process


def serve(connection: Connection, job: PlannerJob, memory: int) -> None:
    """Plans until the connection closes.  A message says that it is ready, then a byte each plan."""
    if job.cores is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, job.cores)
    with contextlib.suppress(OSError):
        os.nice(job.nice)
    torch.set_num_threads(job.threads)
    generator = torch.Generator()
    generator.set_state(job.generator_state)
    channel = Channel(memory, job.policy.spec)
    make = PlanMaker(job.policy, generator, job.clock)
    warm_up(job.policy, committed=job.committed)
    connection.send_bytes(b"ready")
    os.set_blocking(connection.fileno(), False)
    while woken(connection, None):
        request = channel.receive_request()
        if request is not None:
            channel.send_reply(make(request))
            wake(connection)
