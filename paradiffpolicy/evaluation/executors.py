"""Where blocks of episodes run, by name: in this process, or on workers of a Ray cluster.

A block is the seeds that run side by side, and its episodes depend on nothing else: wherever it runs, the
same function makes the same episodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError, first_line
from ..registry import Registry
from .episodes import Episode
from .workers import usable_cores

if TYPE_CHECKING:  # it imports torch, which a process of demonstrations doesn't need
    from .blocks import Blocks


@dataclass(frozen=True)
class BlockTask:
    """A call that makes a block's episodes.

    Attributes:
        run: the function, which holds the policy; the same object in tasks that share it.
        arguments: of this block, by name.
        here: further arguments, which mean something in this process alone: who is told about the progress,
            the processes of its environments.
    """

    run: Callable[..., list[Episode]]
    arguments: Mapping[str, Any]
    here: Mapping[str, Any] = field(default_factory=dict)


class BlockProgress:
    """Counts steps of blocks one after the other, also of those that tell none: of a block that ran
    elsewhere, or was kept, all are told at its end.

    Args:
        tell: told how many steps went by.
    """

    def __init__(self, tell: Callable[[int], object]) -> None:
        self._tell, self._told = tell, 0

    def steps(self, n: int) -> None:
        self._told += n
        self._tell(n)

    def block_ended(self, n_steps: int) -> None:
        """Tells the steps of a block of ``n_steps`` that weren't told yet."""
        self._tell(n_steps - self._told)
        self._told = 0


@dataclass(frozen=True)
class Resources:
    """What an executor may take.

    Attributes:
        workers: processes; None: as many as there is room for.
        threads: that each computes with.
        gpus: of a worker; a share if several have one together.
    """

    workers: int | None = None
    threads: int = 1
    gpus: float = 0.0


class BlockExecutor(Protocol):
    """Runs blocks."""

    def __call__(self, tasks: Iterable[BlockTask]) -> Iterator[list[Episode]]:
        """Gives the episodes of every block, in the blocks' order.  It takes no more tasks than it has room
        for, so there may be any number of them."""

    def close(self) -> None:
        """Ends what was started."""


def block_episodes(
    turns: Sequence[tuple[str, int]],
    task: Callable[[str, int], BlockTask],
    blocks: Blocks,
    executor: BlockExecutor,
) -> Iterator[tuple[str, int, list[Episode]]]:
    """Blocks and their episodes in order: kept ones; others are run, whatever comes of each other, and kept.

    Args:
        turns: whose block, and which.
        task: what makes it.
    """
    made = executor([task(name, k) for name, k in turns if not blocks.has(name, k)])
    for name, k in turns:
        yield name, k, blocks.episodes(name, k, partial(next, made))


class LocalExecutor:
    """Runs each block in this process, when its episodes are asked for."""

    def __call__(self, tasks: Iterable[BlockTask]) -> Iterator[list[Episode]]:
        return (task.run(**task.arguments, **task.here) for task in tasks)

    def close(self) -> None:
        """Nothing was started."""


class RayExecutor:
    """Runs blocks on Ray workers, each with the policy and the environments of its block.

    ``RAY_ADDRESS`` names the cluster (``auto``: the one on this machine); without it a cluster is started
    here that ends with ``close``.  A worker that dies is started again and its block is run again.

    Args:
        resources: what it takes of the cluster.

    Raises:
        InputError: there is no such cluster, or it has too few cores or GPUs; from a call, a block's worker
            died again and again.  What a block raises is raised as it is.
    """

    RETRIES = 3
    """Of a block whose worker died."""

    def __init__(self, resources: Resources) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray, threads, gpus = ray, resources.threads, resources.gpus
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if "RAY_ADDRESS" not in os.environ:
            cores = threads * (resources.workers or max(1, usable_cores() // threads))
            options |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
        try:
            ray.init(**options)
        except Exception as error:  # its own are of many types
            raise InputError(f"no Ray cluster ({first_line(error)}): RAY_ADDRESS must name one that runs")
        workers = resources.workers
        most = self._room(threads, gpus)
        if not 0 < (most if workers is None else workers) <= most:
            self.close()
            raise InputError(
                f"the Ray cluster has room for {most} workers of {threads} threads and {gpus:g} GPUs: "
                f"workers={most}, or a larger cluster"
            )
        limits: dict[str, Any] = {"max_restarts": -1, "max_task_retries": self.RETRIES}
        actor = ray.remote(num_cpus=threads, num_gpus=gpus, **limits)(_RayWorker)
        self._actors = [actor.remote(threads) for _ in range(workers or most)]

    def _room(self, threads: int, gpus: float) -> int:
        """How many workers the cluster's machines can hold together."""
        has = self._ray.cluster_resources()
        cores = int(has.get("CPU", 0) // threads)
        return min(cores, int(has.get("GPU", 0) // gpus)) if gpus else cores

    def __call__(self, tasks: Iterable[BlockTask]) -> Iterator[list[Episode]]:
        from ray.util import ActorPool

        pool, waiting = ActorPool(self._actors), iter(tasks)
        sent: dict[int, tuple[Any, list[Any]]] = {}  # with the function, whose id would be another's without

        def submit(task: BlockTask) -> None:
            if id(task.run) not in sent:  # a policy goes there once
                sent[id(task.run)] = task.run, [self._ray.put(task.run)]
            _, reference = sent[id(task.run)]
            pool.submit(lambda actor, arguments: actor.run.remote(reference, arguments), task.arguments)

        for task in islice(waiting, len(self._actors)):
            submit(task)
        while pool.has_next():
            episodes = self._next(pool)
            for task in islice(waiting, 1):
                submit(task)
            yield episodes

    def _next(self, pool: Any) -> list[Episode]:
        try:
            episodes: list[Episode] = pool.get_next()
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause
        except self._ray.exceptions.RayError as error:
            raise InputError(
                f"the Ray worker of a block of episodes died {1 + self.RETRIES} times ({first_line(error)}): "
                "fewer episodes at a time (side_by_side, batch) need less memory; finished blocks are kept"
            )
        return episodes

    def close(self) -> None:
        self._ray.shutdown()


class _RayWorker:
    """Runs blocks in a process of the cluster.  It keeps the last function, whose policy's programs are
    captured there."""

    def __init__(self, threads: int) -> None:
        import torch

        from .. import envs  # noqa: F401  registers them

        torch.set_num_threads(threads)
        self._reference: list[Any] | None = None
        self._run: Any = None

    def run(self, reference: list[Any], arguments: Mapping[str, Any]) -> list[Episode]:
        """Calls the function that a reference, in a list, leads to."""
        import ray

        if reference != self._reference:
            self._reference, self._run = None, None  # before its memory is needed again
            self._reference, self._run = reference, ray.get(reference[0])
        return self._run(**arguments)


EXECUTORS: Registry[Callable[[Resources], BlockExecutor]] = Registry(
    "executor", {"local": lambda resources: LocalExecutor(), "ray": RayExecutor}
)
"""Every executor by name."""
