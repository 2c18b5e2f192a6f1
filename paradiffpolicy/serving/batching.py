"""Plans in one thread behind a bounded queue; requests that fit together are planned as one batch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..clock import Clock
from ..errors import InputError
from ..observation import Window
from ..policy import Policy
from ..sampling.capture.executor import padded_size
from ..types import Committed, Plan
from .protocol import BusyError, PlanJob, generator_at, state_of

log = logging.getLogger(__name__)

ALONE_AGAIN = 2.0
"""Seconds after the last job that wasn't spare from which on spare ones are planned together."""


@dataclass(frozen=True)
class JobResult:
    """The result of one job.

    Attributes:
        plan: the plan, on the policy's device, or why there is none.
        states: of the generators, after the plan.
        queue_seconds, infer_seconds: before its batch started, and of its batch.
    """

    plan: Plan | Exception
    states: tuple[bytes, ...]
    queue_seconds: float = 0.0
    infer_seconds: float = 0.0


def planned_together(policy: Policy, jobs: Sequence[PlanJob]) -> list[JobResult]:
    """Plans jobs as one batch: all have the same ``executed_steps``, all or none a previous plan, and all
    or none committed actions.

    If planning fails for one of them, each is planned by itself, so that the others get their plans.
    """
    generators = [[generator_at(state) for state in job.generators] for job in jobs]
    previous = [job.previous for job in jobs if job.previous is not None]
    committed = [job.committed for job in jobs if job.committed is not None]
    try:
        plan = policy.plan(
            Window.cat([job.window for job in jobs]),
            Plan.cat(previous) if len(previous) > 1 else previous[0] if previous else None,
            generator=[generator for own in generators for generator in own],
            committed=Committed.cat(committed) if committed else None,
            executed_steps=jobs[0].executed_steps,
        )
    except Exception as error:
        if len(jobs) > 1:
            return [result for job in jobs for result in planned_together(policy, [job])]
        if not isinstance(error, InputError):
            log.exception("planning failed")
        plans: list[Plan | Exception] = [error]  # its generators may have been drawn from, as in a local plan
    else:
        ends = list(itertools.accumulate(map(len, generators)))
        plans = [plan.select(range(end - len(own), end)) for end, own in zip(ends, generators, strict=True)]
    states = [tuple(map(state_of, own)) for own in generators]
    return [JobResult(*result) for result in zip(plans, states, strict=True)]


@dataclass(frozen=True, eq=False)
class _Waiting:
    job: PlanJob
    spare: bool
    since: float
    planned: asyncio.Future[JobResult]

    @property
    def key(self) -> tuple[bool, bool, bool, int | None]:
        """Equal for jobs that are planned in one call."""
        job = self.job
        return self.spare, job.previous is None, job.committed is None, job.executed_steps


class Batcher:
    """Plans jobs in the order of their requests, each together with those that wait and fit.

    Requests are never delayed to fill a batch: one that comes alone is planned alone, at once.  Spare jobs,
    of clients that ask for more plans than a robot needs, are planned when no other waits; one by one while
    there are others, which then wait for one at most.

    Args:
        policy: plans, always in the same thread.
        max_batch: batch elements planned at once.
        max_queue: jobs that may wait.
        clock: measures the times.
        on_batch: called with each batch's size and seconds.
    """

    def __init__(
        self,
        policy: Policy,
        max_batch: int,
        max_queue: int,
        clock: Clock,
        on_batch: Callable[[int, float], object],
    ) -> None:
        self._policy, self._clock, self._on_batch = policy, clock, on_batch
        self._max_batch, self._max_queue = max_batch, max_queue
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._working, self._last_needed = False, -math.inf
        self._lock = threading.Lock()  # of the queue, and of whether the thread is working

    def __len__(self) -> int:
        """Counts the waiting jobs."""
        return len(self._queue)

    async def warm_up(self, on_size: Callable[[], object]) -> None:
        """Compiles the programs of every batch size; calls ``on_size`` after each of ``sizes``."""
        for size in self.sizes:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._policy.warm_up, size)
            on_size()

    @property
    def sizes(self) -> list[int]:
        """The batch sizes whose programs are needed."""
        return sorted({min(padded_size(k + 1), self._max_batch) for k in range(self._max_batch)})

    async def plan(self, job: PlanJob, *, spare: bool = False) -> JobResult:
        """Waits for a job's result.

        Raises:
            BusyError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job, spare, self._clock.now(), loop.create_future())
        with self._lock:
            if len(self._queue) >= self._max_queue:
                raise BusyError(f"busy: max_queue={self._max_queue} requests wait already; try again")
            self._queue.append(waiting)
            if not self._working:
                self._working = True
                self._thread.submit(self._work_through, loop)
        return await waiting.planned

    def stop(self) -> None:
        """Ends the thread, once it has planned all waiting jobs."""
        self._thread.shutdown()

    def _work_through(self, loop: asyncio.AbstractEventLoop) -> None:
        """Plans batch after batch, in the thread, until no job waits."""
        while batch := self._take():
            started = self._clock.now()
            results = planned_together(self._policy, [waiting.job for waiting in batch])
            loop.call_soon_threadsafe(self._deliver, batch, results, started, self._clock.now() - started)

    def _deliver(
        self, batch: Sequence[_Waiting], results: Sequence[JobResult], started: float, seconds: float
    ) -> None:
        self._on_batch(sum(len(waiting.job.generators) for waiting in batch), seconds)
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.planned.done():  # the client may be gone
                waiting.planned.set_result(
                    replace(result, queue_seconds=started - waiting.since, infer_seconds=seconds)
                )

    def _take(self) -> list[_Waiting]:
        """Takes the oldest job, and those that can be planned with it, off the queue."""
        with self._lock:
            if not self._queue:
                self._working = False
                return []
            first = next((waiting for waiting in self._queue if not waiting.spare), self._queue[0])
            self._queue.remove(first)
            batch, rest, room = [first], deque[_Waiting](), self._max_batch - len(first.job.generators)
            if not first.spare:
                self._last_needed = self._clock.now()
            elif self._clock.now() < self._last_needed + ALONE_AGAIN:
                room = 0
            for waiting in self._queue:
                size = len(waiting.job.generators)
                if waiting.key == first.key and size <= room:
                    batch.append(waiting)
                    room -= size
                else:
                    rest.append(waiting)
            self._queue = rest
            return batch
