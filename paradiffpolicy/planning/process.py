"""Planning in another process, so that nothing that it does can hold up the loop.

Requests and plans go through shared memory (``slot``), which has no name and so can't be left behind; a byte
on the connection wakes the other end.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ..clock import Clock
from ..errors import InputError
from ..process import ChildProcess, Connection, pickled, wake, woken
from ..types import PolicySpec
from .backoff import BackOff
from .request import PlanMaker, PlanReply, PlanRequest, Plans, warm_up
from .slot import Slot

log = logging.getLogger(__name__)

FAULT_BYTES = 240


class Channel:
    """A request slot and a reply slot in one piece of shared memory."""

    def __init__(self, file: int, spec: PolicySpec) -> None:
        plan = (spec.horizon, spec.action_dim)
        # The fields of a request and of a reply, in their order.
        numbers = [("tick", "i8"), ("step", "i8"), ("session", "i8"), ("asked", "f8")]
        kept = [("committed", "f8", plan), ("commitment", "f8", plan[:1])]
        window = ("window", spec.observation_dtype, spec.n_obs_steps)
        self._request = np.dtype([*numbers, window, *kept, ("commits", "?")])
        numbers = [("tick", "i8"), ("session", "i8"), ("asked", "f8"), ("latency", "f8")]
        numbers += [("iterations", "i8"), ("residual", "f8")]
        self._reply = np.dtype([*numbers, ("actions", "f8", plan), ("fault", f"S{FAULT_BYTES}")])
        taken = Slot.taken(self._request.itemsize)
        size = taken + Slot.taken(self._reply.itemsize)
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        memory = memoryview(mmap.mmap(file, size))
        self._requests = Slot(memory, 0, self._request.itemsize)
        self._replies = Slot(memory, taken, self._reply.itemsize)

    def send_request(self, request: PlanRequest) -> None:
        numbers = request.tick, request.step, request.session, request.asked
        commits = request.committed is not None
        kept = (request.committed, request.commitment) if commits else (0.0, 0.0)
        self._requests.write(np.array((*numbers, request.window, *kept, commits), self._request).tobytes())

    def receive_request(self) -> PlanRequest | None:
        """The newest, if there is a new one."""
        content = self._requests.read()
        if content is None:
            return None
        values: Any = np.frombuffer(content, self._request)[0]
        tick, step, session, asked = (values[name].item() for name in ("tick", "step", "session", "asked"))
        request = PlanRequest(tick, step, session, asked, values["window"])
        if not values["commits"]:
            return request
        return replace(request, committed=values["committed"], commitment=values["commitment"])

    def send_reply(self, reply: PlanReply) -> None:
        numbers = (reply.tick, reply.session, reply.asked, reply.latency, reply.iterations, reply.residual)
        values = (*numbers, reply.actions, reply.fault.encode()[:FAULT_BYTES])
        self._replies.write(np.array(values, self._reply).tobytes())

    def receive_reply(self, clock: Clock) -> PlanReply | None:
        """The newest, if there is a new one; it arrives now."""
        content = self._replies.read()
        if content is None:
            return None
        values: Any = np.frombuffer(content, self._reply)[0].item()
        fault = values[-1].decode(errors="replace")
        return replace(PlanReply(*values[:-1]), fault=fault, arrived=clock.now())


class PlannerJob(NamedTuple):
    """What goes to the other process."""

    make: PlanMaker
    cores: frozenset[int] | None
    nice: int
    threads: int
    committed: bool


class ProcessPlanner:
    """Computes in another process.  Its plans are ``InlinePlanner``'s, to the bit.

    Args:
        policy, generator: go there by pickle; programs are captured there.
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
        make = PlanMaker(policy, generator, clock)
        self._job = PlannerJob(make, chosen, nice, torch.get_num_threads(), committed=False)
        self._spec, self._clock, self._start_timeout = policy.spec, clock, start_timeout
        self._content = b""
        self._last: IO[bytes] | None = None
        self._child: PlannerProcess | None = None
        self._back_off = BackOff()
        self._restarting: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, *, committed: bool = False) -> None:
        """Starts the process and waits until it is ready, which takes seconds.

        Raises:
            InputError: the policy can't be sent there, or the process doesn't get ready.
        """
        self._stopped.clear()
        job = self._job._replace(committed=committed)
        # Once: in a restart it would hold up the loop, whose interpreter this is.
        self._content = pickled(job, "this policy", "plan in a thread, planner='thread'")
        self._last = unnamed_file()
        log.info("starting the planner's process: loading PyTorch and warming up the policy takes seconds")
        started = time.monotonic()
        self._child = self._started()
        log.info("the planner's process is ready after %.1f s", time.monotonic() - started)

    def _started(self, given_up: threading.Event | None = None) -> PlannerProcess:
        assert self._last is not None
        files = self._content, self._last.fileno()
        return PlannerProcess(*files, self._spec, self._start_timeout, given_up)

    def request(self, request: PlanRequest) -> None:
        child = self._child
        if child is not None:
            child.channel.send_request(request)
            wake(child.connection)

    def poll(self) -> PlanReply | None:
        child = self._child
        reply = None if child is None else child.channel.receive_reply(self._clock)
        if reply is not None:
            self._back_off.succeeded()
        return reply

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
        arguments = child, self._back_off.next()
        self._restarting = threading.Thread(target=self._replace, args=arguments, name="planner-restart")
        self._restarting.start()

    def _replace(self, child: PlannerProcess | None, after: float) -> None:
        if child is not None:
            child.end(patience=0.0)
        if self._stopped.wait(after):
            return
        try:
            self._child = self._started(self._stopped)
        except (InputError, OSError) as error:
            log.error("planner: %s", str(error))  # not the error, which holds the child

    def stop(self) -> None:
        self._stopped.set()
        if self._restarting is not None:
            self._restarting.join()
        child, self._child = self._child, None
        if child is not None:
            child.end()
        if self._last is not None:
            self._last.close()
            self._last = None


class PlannerProcess(ChildProcess):
    """The planner's process, ready to plan, and the memory that it shares with this one."""

    def __init__(
        self, content: bytes, last: int, spec: PolicySpec, timeout: float, given_up: threading.Event | None
    ) -> None:
        with unnamed_file() as memory:
            self.channel = Channel(memory.fileno(), spec)
            super().__init__(serve, content, name="planner", files=[memory.fileno(), last])
        self.await_ready(timeout, given_up)
        os.set_blocking(self.connection.fileno(), False)


def unnamed_file() -> IO[bytes]:
    """A file in memory, if the system has such, that is gone when the last process has closed it."""
    in_memory = Path("/dev/shm")
    return tempfile.TemporaryFile(dir=in_memory if in_memory.is_dir() else None)


# ------------------------------------------------------------------------------- in the other process


def serve(connection: Connection, job: PlannerJob, memory: int, last: int) -> None:
    """Plans until the connection closes.  A message says that it is ready, then a byte each plan.

    ``last`` is a file for the last plan, which the process after this one continues.
    """
    if job.cores is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, job.cores)
    with contextlib.suppress(OSError):
        os.nice(job.nice)
    torch.set_num_threads(job.threads)
    channel = Channel(memory, job.make.policy.spec)
    warm_up(job.make.policy, committed=job.committed)
    recall(last, job.make)
    connection.send_bytes(b"ready")
    os.set_blocking(connection.fileno(), False)
    while woken(connection, None):
        request = channel.receive_request()
        if request is not None:
            channel.send_reply(job.make(request))
            wake(connection)
            remember(last, job.make)


LAST = struct.Struct("=QI")
"""The size of what follows, and its checksum."""


def remember(file: int, make: PlanMaker) -> None:
    """Writes down the last plan, and the state of the noise."""
    if make.last is not None:
        plan, *rest = make.last
        content = pickle.dumps((plan.to(torch.device("cpu")), plan.actions.device, rest, make.generator))
        os.pwrite(file, LAST.pack(len(content), zlib.crc32(content)) + content, 0)


def recall(file: int, make: PlanMaker) -> None:
    """Takes up what ``remember`` wrote, unless there is nothing, or its process died as it wrote."""
    size, checksum = LAST.unpack(os.pread(file, LAST.size, 0).ljust(LAST.size, b"\0"))
    content = os.pread(file, size, LAST.size)
    if content and zlib.crc32(content) == checksum:
        plan, device, rest, make.generator = pickle.loads(content)
        make.last = plan.to(device), *rest
