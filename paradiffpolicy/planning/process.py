"""Planning in another process, so that nothing that it does can hold up the loop.

Requests and plans go through shared memory (``slot``), which belongs to no name and so can't be left
behind; two pipes wake whoever sleeps.  The process ends when the pipe from this one closes, however
this one ended.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import pickle
import select
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock
from ..errors import InputError
from ..types import PolicySpec
from .planner import PlanMaker, PlanReply, PlanRequest, Plans
from .slot import Slot

log = logging.getLogger(__name__)

FAULT_BYTES = 240


class Channel:
    """A request slot and a reply slot in one piece of shared memory."""

    REQUEST = struct.Struct("=qqqd?7x")
    """tick, step, session, asked, whether it commits."""
    REPLY = struct.Struct(f"=qqddqd{FAULT_BYTES}s")
    """tick, session, asked, latency, rounds, residual, fault."""

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
class Task:
    """What the other process is to do; goes to it by pickle, from this process to its own child."""

    policy: Plans
    generator_state: torch.Tensor
    clock: Clock
    cores: frozenset[int] | None
    nice: int
    threads: int
    committed: bool = False


class ProcessPlanner:
    """Computes in another process.  What it plans is what ``InlinePlanner`` plans, to the bit.

    Args:
        policy: goes there by pickle; its programs are made there.
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
        can_pin = hasattr(os, "sched_getaffinity")
        chosen = frozenset(cores) if cores is not None else None
        if chosen is None and can_pin:
            chosen = frozenset(os.sched_getaffinity(0))
        self._spec, self._clock, self._start_timeout = policy.spec, clock, start_timeout
        self._task = Task(
            policy,
            generator.get_state(),
            clock,
            chosen if can_pin else None,
            nice,
            torch.get_num_threads(),
        )
        self._child: _Child | None = None
        self._restarting: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, *, committed: bool = False) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            InputError: the policy can't be sent there, or the process doesn't get ready.
        """
        self._stopped.clear()
        self._task = replace(self._task, committed=committed)
        self._child = _Child(self._task, self._spec, self._start_timeout)

    def request(self, request: PlanRequest) -> None:
        child = self._child
        if child is not None:
            child.channel.send_request(request)
            child.wake()

    def poll(self) -> PlanReply | None:
        child = self._child
        return None if child is None else child.channel.receive_reply(self._clock)

    @property
    def alive(self) -> bool:
        child = self._child
        return child is not None and child.alive

    @property
    def pid(self) -> int | None:
        """The other process's; None if there is none."""
        return None if self._child is None else self._child.process.pid

    def restart(self) -> None:
        if self._restarting is not None and self._restarting.is_alive():
            return
        child, self._child = self._child, None
        self._restarting = threading.Thread(target=self._replace, args=(child,), name="planner-restart")
        self._restarting.start()

    def _replace(self, child: _Child | None) -> None:
        if child is not None:
            child.end(patience=0.0)
        try:
            new = _Child(self._task, self._spec, self._start_timeout, self._stopped)
        except InputError as error:
            log.error("planner: %s", error)
            return
        self._child = new

    def wait(self, timeout: float) -> bool:
        """Waits for a plan, for whoever has nothing else to do; whether there may be one."""
        child = self._child
        if child is None or not child.wait(timeout):
            return False
        child.heard()
        return True

    def stop(self) -> None:
        self._stopped.set()
        if self._restarting is not None:
            self._restarting.join()
        child, self._child = self._child, None
        if child is not None:
            child.end(patience=2.0)


class _Child:
    """The process, its pipes and its memory."""

    def __init__(
        self, task: Task, spec: PolicySpec, timeout: float, given_up: threading.Event | None = None
    ) -> None:
        try:
            content = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(f"this policy can't go to another process ({error}): plan in a thread")
        with contextlib.ExitStack() as only_there:  # what belongs to the child alone
            memory = only_there.enter_context(tempfile.TemporaryFile(dir=shared_folder()))
            self.channel = Channel(memory.fileno(), spec)
            requested, self._wake = os.pipe()
            self._done, replied = os.pipe()
            only_there.callback(os.close, requested)
            only_there.callback(os.close, replied)
            os.set_blocking(self._wake, False)
            files = (memory.fileno(), requested, replied)
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", *map(str, files)],
                stdin=subprocess.PIPE,
                pass_fds=files,
                # Modules are found there as they are here.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
                start_new_session=True,  # the terminal's Ctrl-C is for the loop, which then ends this one
            )
        # A thread that sleeps until the process ends: whoever asks whether it lives pays nothing.
        self.alive = True
        self._watcher = threading.Thread(target=self._watch, name="planner-watch", daemon=True)
        self._watcher.start()
        try:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write(content)
            self._await_ready(timeout, given_up)
        except BaseException:
            self.end(patience=0.0)
            raise

    def _await_ready(self, timeout: float, given_up: threading.Event | None) -> None:
        for _ in range(max(1, round(timeout / 0.1))):
            if self.wait(0.1):
                if os.read(self._done, 1):
                    return
                raise InputError("the planner's process ended before it was ready: its own words are above")
            if given_up is not None and given_up.is_set():
                raise InputError("the planner was stopped while it was starting again")
        raise InputError(f"the planner's process wasn't ready within {timeout:g} s: give it more time")

    def _watch(self) -> None:
        self.process.wait()
        self.alive = False

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # awake already, or dead
            os.write(self._wake, b".")

    def wait(self, timeout: float) -> bool:
        return bool(select.select([self._done], [], [], timeout)[0])

    def heard(self) -> None:
        """Takes what ``wait`` found."""
        os.read(self._done, 4096)

    def end(self, patience: float) -> None:
        """Ends it: politely first, if it has ``patience`` seconds to finish what it is at."""
        os.close(self._wake)
        self._watcher.join(patience)
        self.process.kill()
        self._watcher.join()
        os.close(self._done)


def shared_folder() -> str | None:
    """Where a file without a name lies in memory; None: wherever temporary files do."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112


# ------------------------------------------------------------------------------- in the other process


def serve(task: Task, file: int, requested: BinaryIO, replied: int) -> None:
    """Plans until ``requested`` closes; a byte to ``replied`` says it is ready, and then one per plan."""
    if task.cores is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, task.cores)
    with contextlib.suppress(OSError):
        os.nice(task.nice)
    torch.set_num_threads(task.threads)
    generator = torch.Generator()
    generator.set_state(task.generator_state)
    channel = Channel(file, task.policy.spec)
    make = PlanMaker(task.policy, generator, task.clock)
    task.policy.warm_up(committed=task.committed)
    os.set_blocking(replied, False)
    os.write(replied, b".")
    while os.read(requested.fileno(), 4096):
        request = channel.receive_request()
        if request is None:
            continue
        channel.send_reply(make(request))
        with contextlib.suppress(BlockingIOError):  # nobody reads them, which is fine
            os.write(replied, b".")


def main() -> None:
    file, requested, replied = map(int, sys.argv[1:])
    task: Task = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(BrokenPipeError), open(requested, "rb", buffering=0) as pipe:  # noqa: PTH123
        serve(task, file, pipe, replied)
