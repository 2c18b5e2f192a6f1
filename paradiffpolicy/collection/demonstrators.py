"""Scripted experts demonstrate a task, in several processes.

Nothing here imports torch, which would take a process longer than all the rest of its start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..environment import finite_reward, recorded, succeeded
from ..errors import InputError
from ..evaluation.episodes import Episode
from ..evaluation.executors import BlockExecutor, BlockTask
from ..evaluation.workers import MakeEnv
from ..process import RemoteObject, end_all

HELD = 3
"""Control steps that an episode goes on after its success, which must last as long."""
CHUNK = 4
"""Episodes that a process is given at a time: making an environment takes as long as one of them."""


class Demonstrator(Protocol):
    """An expert that does a task from everything the environment knows."""

    def begin(
        self, env: gymnasium.Env[Any, Any], info: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Begins an episode; ``rng`` draws its manner.  It may go elsewhere first: returns the info there."""
        ...

    def act(self, env: gymnasium.Env[Any, Any]) -> NDArray[Any]:
        """The action ``[A]`` for the environment's present state."""
        ...


def about(env: gymnasium.Env[Any, Any], seed: int) -> dict[str, str]:
    """Texts about the episode that an environment has begun."""
    simulation = getattr(env.unwrapped, "simulation", None)
    # Objects' sizes may have been drawn: replaying needs the model.
    return {"seed": str(seed)} | ({} if simulation is None else {"model": simulation.model})


def demonstrate(
    env: gymnasium.Env[Any, Any],
    demonstrator: Demonstrator,
    seed: int,
    max_steps: int,
    record: Sequence[str],
    success_key: str | None = None,
) -> Episode:
    """Demonstrates one episode; successful if the task was done, and stayed so for ``HELD`` steps.

    Args:
        record: fields of the environment's info to keep.
        success_key: of the environment's info; see ``environment.succeeded``.

    Raises:
        InputError: the environment doesn't say whether the task is done.
    """
    _, info = env.reset(seed=seed)
    episode = Episode(seed, texts=about(env, seed))
    info = demonstrator.begin(env, info, np.random.default_rng((seed, 1)))  # the environment drew from (seed)
    done = 0
    for _ in range(max_steps):
        action = demonstrator.act(env)
        # Copies: environments and experts may reuse their arrays.
        episode.infos.append(recorded(info, record))
        episode.actions.append(np.array(action))
        _, reward, terminated, _, info = env.step(action)
        episode.add([finite_reward(reward)], success=None)
        now = succeeded(terminated, info, success_key)
        if now is None:
            raise InputError("the environment doesn't say when the task is done: set task.success_key")
        done = done + 1 if now else 0
        if done > HELD:
            break
    episode.success = done > HELD
    return episode


@dataclass(frozen=True)
class Demonstrating:
    """Demonstrates seeds, in one environment; see ``demonstrate``."""

    make_env: MakeEnv
    demonstrator: Demonstrator
    max_steps: int
    record: Sequence[str]
    success_key: str | None = None

    def all(self, seeds: Sequence[int]) -> list[Episode]:
        """An episode per seed."""
        with contextlib.closing(self.make_env()) as env:
            how = (self.max_steps, self.record, self.success_key)
            return [demonstrate(env, self.demonstrator, seed, *how) for seed in seeds]

    def close(self) -> None:
        """Does nothing: environments are closed already."""


def demonstrations(
    make_env: MakeEnv,
    demonstrator: Demonstrator,
    first_seed: int,
    max_steps: int,
    record: Sequence[str],
    workers: int,
    success_key: str | None = None,
    executor: BlockExecutor | None = None,
) -> Generator[Episode, None, None]:
    """Yields episodes of one seed after the other, without an end; ``workers`` processes, or an executor's,
    work ahead.

    The episodes don't depend on their number.  ``make_env`` and ``demonstrator`` are pickled.
    """
    make = partial(Demonstrating, make_env, demonstrator, max_steps, record, success_key)
    chunks = (range(first, first + CHUNK) for first in count(first_seed, CHUNK))
    if executor is None:
        with contextlib.closing(in_processes(make, chunks, workers)) as made:
            yield from chain.from_iterable(made)
    else:
        run = make().all
        yield from chain.from_iterable(executor(BlockTask(run, {"seeds": seeds}) for seeds in chunks))


def in_processes(
    make: Callable[[], Demonstrating], chunks: Iterator[range], workers: int
) -> Generator[list[Episode], None, None]:
    """Yields the episodes of an endless row of chunks of seeds, which processes make by turns."""
    remotes: list[RemoteObject] = []
    try:
        for k in range(workers):
            name = f"demonstrations-{k + 1}"
            remotes.append(RemoteObject(make, name=name, remedy="fewer workers need less memory"))
        for turn, seeds in enumerate(chunks):
            remote = remotes[turn % workers]
            done = remote.answer() if turn >= workers else []
            remote.ask("all", seeds)
            yield done
    finally:
        end_all(remotes)
