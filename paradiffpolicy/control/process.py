"""Planning in another process, so that nothing that it does can hold up the loop.

Requests and plans go through shared memory (``slot``), which belongs to no name and so can't be left
behind; two pipes wake whoever sleeps.  The process ends when the pipe from this one closes, however
this one ended.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import select
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

from ..errors import InputError
from ..types import PolicySpec
from .clock import Clock
from .planner import PlanMaker, PlanReply, PlanRequest, Plans
from .slot import Slot

log = logging.getLogger(__name__)

FAULT_BYTES = 240


class Channel:
    """A request slot and a reply slot in one piece of shared memory."""

    def __init__(self, file: int, spec: PolicySpec) -> None:
        plan = (spec.horizon, spec.action_dim)
        request = np.dtype(
            [
                *(("tick", "i8"), ("step", "i8"), ("session", "i8"), ("asked", "f8")),
                *(("window", "f8", (spec.n_obs_steps, spec.obs_dim)), ("commits", "?")),
                *(("committed", "f8", plan), ("commitment", "f8", (spec.horizon,))),
            ]
        )
        reply = np.dtype(
            [
                *(("tick", "i8"), ("session", "i8"), ("asked", "f8"), ("latency", "f8")),
                *(
                    ("rounds", "i8"),
                    ("residual", "f8"),
                    ("fault", f"S{FAULT_BYTES}"),
                    ("actions", "f8", plan),
                ),
            ]
        )
        size = Slot.size(request) + Slot.size(reply)
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        self._memory = mmap.mmap(file, size)
        self._requests = Slot(self._memory, request)
        self._replies = Slot(self._memory, reply, Slot.size(request))
        self._request, self._reply = np.zeros(1, request), np.zeros(1, reply)

    def send_request(self, request: PlanRequest) -> None:
        row = self._request[0]
        row["tick"], row["step"], row["session"] = request.tick, request.step, request.session
        row["asked"], row["window"], row["commits"] = (
            request.asked,
            request.window,
            request.committed is not None,
        )
        if request.committed is not None:
            row["committed"], row["commitment"] = request.committed, request.commitment
        self._requests.write(self._request)

    def receive_request(self) -> PlanRequest | None:
        """The newest, if there is a new one."""
        record = self._requests.read()
        if record is None:
            return None
        row = record[0]
        committed: tuple[NDArray[Any] | None, NDArray[Any] | None] = (None, None)
        if row["commits"]:
            committed = row["committed"].copy(), row["commitment"].copy()
        numbers = (int(row["tick"]), int(row["step"]), int(row["session"]), float(row["asked"]))
        return PlanRequest(*numbers, row["window"].copy(), *committed)

    def send_reply(self, reply: PlanReply) -> None:
        row = self._reply[0]
        for name in ("tick", "session", "asked", "latency", "rounds", "residual", "actions"):
            row[name] = getattr(reply, name)
        row["fault"] = reply.fault.encode()[:FAULT_BYTES]
        self._replies.write(self._reply)

    def receive_reply(self) -> PlanReply | None:
        record = self._replies.read()
        if record is None:
            return None
        row = record[0]
        return PlanReply(
            tick=int(row["tick"]),
            session=int(row["session"]),
            asked=float(row["asked"]),
            latency=float(row["latency"]),
            rounds=int(row["rounds"]),
            residual=float(row["residual"]),
            actions=row["actions"].copy(),
            fault=row["fault"].decode(errors="replace"),
        )


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
        reply = None if child is None else child.channel.receive_reply()
        return None if reply is None else replace(reply, arrived=self._clock.now())

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
        return self._child is not None and self._child.wait(timeout)

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

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # awake already, or dead
            os.write(self._wake, b".")

    def wait(self, timeout: float) -> bool:
        return bool(select.select([self._done], [], [], timeout)[0])

    def end(self, patience: float) -> None:
        """Ends it: politely first, if it has ``patience`` seconds to finish what it is at."""
        os.close(self._wake)
        try:
            if patience:
                self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.process.kill()
            self.process.wait()
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
