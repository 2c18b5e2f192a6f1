"""One thread that plans, and a bounded queue before it; what fits together is planned together."""

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
from ..sampling.capture.sampler import padded_size
from ..types import Committed, Plan
from .protocol import BusyError, Options, Work, generator_at, state_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What came of one piece of work.

    Attributes:
        plan: the plan, on the policy's device, or why there is none.
        states: of the generators, now.
    """

    plan: Plan | Exception
    states: tuple[bytes, ...]


@dataclass(frozen=True)
class Planned(Result):
    """The same with its times in seconds: before its batch began, and of its batch."""

    queue_seconds: float
    infer_seconds: float


def planned_together(policy: Policy, works: Sequence[Work]) -> list[Result]:
    """A result for each piece of work, all with the same options, and all or none with a previous plan,
    and with something committed.

    If there is no plan for one of them, each is planned by itself: its neighbours get theirs.
    """
    generators = [[generator_at(state) for state in work.generators] for work in works]
    previous = [work.previous for work in works if work.previous is not None]
    committed = [work.committed for work in works if work.committed is not None]
    try:
        plan = policy.plan(
            torch.cat([work.window for work in works]),
            Plan.cat(previous) if len(previous) > 1 else previous[0] if previous else None,
            generator=[generator for own in generators for generator in own],
            committed=Committed.cat(committed) if committed else None,
            **dict(works[0].options),
        )
    except Exception as error:
        if len(works) > 1:
            return [result for work in works for result in planned_together(policy, [work])]
        if not isinstance(error, InputError):
            log.exception("planning failed")
        return [Result(error, _states(generators[0]))]  # which may have been drawn from, as in a local plan
    if len(works) == 1:
        return [Result(plan, _states(generators[0]))]
    results, first = [], 0
    for own in generators:
        elements = range(first, first := first + len(own))
        results.append(Result(plan.select(elements), _states(own)))
    return results


def _states(generators: Sequence[torch.Generator]) -> tuple[bytes, ...]:
    return tuple(map(state_of, generators))


@dataclass(frozen=True)
class _Waiting:
    work: Work
    since: float
    planned: asyncio.Future[Planned]

    @property
    def key(self) -> tuple[bool, bool, Options]:
        """Equal for what one call can plan."""
        return self.work.previous is None, self.work.committed is None, self.work.options


class Batcher:
    """Plans what is asked for, in the order of asking, together with whatever fits and waits too.

    Nothing waits for company: a request that comes alone is planned alone, at once.

    Args:
        policy: plans, always in the same thread.
        max_batch: batch elements planned at once.
        max_queue: requests that may wait.
        clock: whose seconds count.
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
        self._lock = threading.Lock()  # of the queue, and of whether somebody works through it

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    async def warm_up(self, on_size: Callable[[], object]) -> None:
        """Makes the programs of every batch size; calls ``on_size`` after each of ``sizes``."""
        for size in self.sizes:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._policy.warm_up, size)
            on_size()

    @property
    def sizes(self) -> list[int]:
        """The batch sizes whose programs serve all."""
        return sorted({min(padded_size(k + 1), self._max_batch) for k in range(self._max_batch)})

    async def plan(self, work: Work) -> Planned:
        """What came of the work.

        Raises:
            BusyError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(work, self._clock.now(), loop.create_future())
        with self._lock:
            if len(self._queue) >= self._max_queue:
                raise BusyError(f"busy: max_queue={self._max_queue} requests wait already; try again")
            self._queue.append(waiting)
            if not self._working:
                self._working = True
                self._thread.submit(self._work_through, loop)
        return await waiting.planned

    def stop(self) -> None:
        """Ends the thread, once it has planned what waits."""
        self._thread.shutdown()

    def _work_through(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: batch after batch, until nothing waits."""
        while batch := self._take():
            begun = self._clock.now()
            results = planned_together(self._policy, [waiting.work for waiting in batch])
            loop.call_soon_threadsafe(self._deliver, batch, results, begun, self._clock.now() - begun)

    def _deliver(
        self, batch: Sequence[_Waiting], results: Sequence[Result], begun: float, seconds: float
    ) -> None:
        self._on_batch(sum(len(waiting.work.generators) for waiting in batch), seconds)
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.planned.done():  # whoever asked may be gone
                queued = begun - waiting.since
                waiting.planned.set_result(Planned(result.plan, result.states, queued, seconds))

    def _take(self) -> list[_Waiting]:
        """The oldest request, and what can be planned with it; none when nothing waits."""
        with self._lock:
            if not self._queue:
                self._working = False
                return []
            first = self._queue.popleft()
            batch, rest, room = [first], deque[_Waiting](), self._max_batch - len(first.work.generators)
            for waiting in self._queue:
                size = len(waiting.work.generators)
                if waiting.key == first.key and size <= room:
                    batch.append(waiting)
                    room -= size
                else:
                    rest.append(waiting)
            self._queue = rest
            return batch
