"""Requests to the operating system that help a loop meet its deadlines.  The loop runs without those that are
refused, and logs a line for each."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MCL_CURRENT, MCL_FUTURE = 1, 2


@dataclass(frozen=True)
class Scheduling:
    """Requests for the thread that runs the loop, and for its process.

    Attributes:
        priority: real-time priority under SCHED_FIFO, 1 to 99; None: none.  Threads and processes that
            begin later don't inherit it.
        cores: that the thread may run on; None: any.
        lock_memory: nothing of the process is swapped out (mlockall).
        freeze_gc: the garbage collector doesn't run.
        awake: idle cores don't sleep (Linux's PM QoS): they wake faster, for more power.
    """

    priority: int | None = None
    cores: Sequence[int] | None = None
    lock_memory: bool = False
    freeze_gc: bool = False
    awake: bool = False


@contextlib.contextmanager
def scheduled(requests: Scheduling) -> Iterator[list[str]]:
    """Applies the requests; yields a line for each that is refused.  Afterwards everything is restored,
    except that all memory is unlocked; where the system refuses that, a line is logged."""
    cores, priority = requests.cores, requests.priority
    grants: list[tuple[bool, str, Callable[..., None], tuple[Any, ...]]] = [
        (requests.freeze_gc, "a frozen garbage collector", _freeze_gc, ()),
        (requests.awake, "cores that stay awake", _stay_awake, ()),
        (requests.lock_memory, "locked memory", _lock_memory, ()),
        (cores is not None, f"cores {cores}", _pin, (cores,)),
        (priority is not None, f"real-time priority {priority}", _fifo, (priority,)),
    ]
    refused: list[str] = []
    with contextlib.ExitStack() as stack:
        for wanted, name, grant, options in grants:
            try:
                if wanted:
                    grant(stack, *options)
            except (OSError, ValueError, AttributeError) as error:
                reason = error.strerror if isinstance(error, OSError) else f"not on {sys.platform}"
                refused.append(f"{name}: {reason}; running without")
        yield refused


def _freeze_gc(stack: contextlib.ExitStack) -> None:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    stack.callback(gc.unfreeze)
    if was_enabled:
        stack.callback(gc.enable)


def _stay_awake(stack: contextlib.ExitStack) -> None:
    # The request for a wake-up latency of 0 holds for as long as the file is open.
    file = stack.enter_context(Path("/dev/cpu_dma_latency").open("wb", buffering=0))  # noqa: SIM115
    file.write(bytes(4))


def _lock_memory(stack: contextlib.ExitStack) -> None:
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    stack.callback(libc.munlockall)


def _pin(stack: contextlib.ExitStack, cores: Sequence[int]) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    stack.callback(_restore, os.sched_setaffinity, (before,))


def _fifo(stack: contextlib.ExitStack, priority: int) -> None:
    policy, before = os.sched_getscheduler(0), os.sched_getparam(0)
    # Reset on fork: a planner that is started again must not compete with the loop.
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    # Only a privileged process may clear it again.  Kept, it says nothing new: children aren't real-time.
    alternatives = policy, policy | os.SCHED_RESET_ON_FORK
    stack.callback(_restore, os.sched_setscheduler, *((policy, before) for policy in alternatives))


def _restore(change: Callable[..., None], *alternatives: Any) -> None:
    """The first of the alternatives that the system grants; that none is, ends no run."""
    for values in alternatives:
        try:
            change(0, *values)
            return
        except OSError as error:
            refusal = error
    log.warning("scheduling: %s isn't restored: %s", change.__name__, refusal.strerror)
