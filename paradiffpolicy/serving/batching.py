"""Plans in one thread behind a bounded queue; requests that fit together are planned as one batch."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..clock import Clock
from ..errors import InputError
from ..policy import Policy
from ..sampling.capture.executor import padded_size
from ..types import Committed, Plan
from .protocol import BusyError, Options, PlanJob, generator_at, state_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """The result of one job.

    Attributes:
        plan: the plan, on the policy's device, or why there is none.
        states: of the generators, after the plan.
    """

    plan: Plan | Exception
    states: tuple[bytes, ...]


@dataclass(frozen=True)
class TimedResult(JobResult):
    """A result with the seconds before its batch started, and those of its batch."""

    queue_seconds: float
    infer_seconds: float


def planned_together(policy: Policy, jobs: Sequence[PlanJob]) -> list[JobResult]:
    """Plans jobs as one batch: all have the same options, all or none a previous plan, and all or none
    committed actions.

    If planning fails for one of them, each is planned by itself, so that the others get their plans.
    """
    generators = [[generator_at(state) for state in job.generators] for job in jobs]
    previous = [job.previous for job in jobs if job.previous is not None]
    committed = [job.committed for job in jobs if job.committed is not None]
    try:
        plan = policy.plan(
            torch.cat([job.window for job in jobs]),
            Plan.cat(previous) if len(previous) > 1 else previous[0] if previous else None,
            generator=[generator for own in generators for generator in own],
            committed=Committed.cat(committed) if committed else None,
            **dict(jobs[0].options),
        )
    except Exception as error:
        if len(jobs) > 1:
            return [result for job in jobs for result in planned_together(policy, [job])]
        if not isinstance(error, InputError):
            log.exception("planning failed")
        return [
            JobResult(error, _states(generators[0]))
        ]  # which may have been drawn from, as in a local plan
    if len(jobs) == 1:
        return [JobResult(plan, _states(generators[0]))]
    results, first = [], 0
    for own in generators:
        elements = range(first, first := first + len(own))
        results.append(JobResult(plan.select(elements), _states(own)))
    return results


def _states(generators: Sequence[torch.Generator]) -> tuple[bytes, ...]:
    return tuple(map(state_of, generators))


@dataclass(frozen=True)
class _Waiting:
    job: PlanJob
    since: float
    planned: asyncio.Future[TimedResult]

    @property
    def key(self) -> tuple[bool, bool, Options]:
        """Equal for jobs that one call can plan."""
        return self.job.previous is None, self.job.committed is None, self.job.options


class Batcher:
    """Plans jobs in the order of their requests, each together with those that wait and fit.

    Requests are never delayed to fill a batch: one that comes alone is planned alone, at once.

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
        self._working = False
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

    async def plan(self, job: PlanJob) -> TimedResult:
        """Waits for a job's result.

        Raises:
            BusyError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job, self._clock.now(), loop.create_future())
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
                queued = started - waiting.since
                waiting.planned.set_result(TimedResult(result.plan, result.states, queued, seconds))

    def _take(self) -> list[_Waiting]:
        """Takes the oldest job, and those that can be planned with it, off the queue."""
        with self._lock:
            if not self._queue:
                self._working = False
                return []
            first = self._queue.popleft()
            batch, rest, room = [first], deque[_Waiting](), self._max_batch - len(first.job.generators)
            for waiting in self._queue:
                size = len(waiting.job.generators)
                if waiting.key == first.key and size <= room:
                    batch.append(waiting)
                    room -= size
                else:
                    rest.append(waiting)
            self._queue = rest
            return batch
