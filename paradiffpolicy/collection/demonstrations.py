"""Demonstrations by a scripted expert, in several processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..evaluation.workers import MakeEnv
from ..process import RemoteObject, end_all

HELD = 3
"""Control steps that an episode goes on after its success, which must last as long."""
CHUNK = 4
"""Episodes that a process is given at a time: making an environment takes as long as one of them."""


class Demonstrator(Protocol):
    """Who knows how to do it."""

    def begin(
        self, env: gymnasium.Env[Any, Any], info: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        """An episode; ``rng`` draws the manner of it.  It may go elsewhere first: returns the info there."""
        ...

    def act(self, env: gymnasium.Env[Any, Any]) -> NDArray[Any]:
        """The action ``[A]`` for what there is to be seen."""
        ...


@dataclass(frozen=True)
class Demonstration:
    """An episode.

    Attributes:
        seed: of the environment and of the demonstrator.
        success: the task was done, and stayed so.
        steps: ``[n, ...]`` by name: what the environment's info held before each action, ``action`` and
            ``rewards``.
        texts: what there is to tell about it.
    """

    seed: int
    success: bool
    steps: Mapping[str, NDArray[Any]]
    texts: Mapping[str, str]


Tell = Callable[[gymnasium.Env[Any, Any]], Mapping[str, str]]
"""What there is to tell about an episode that has begun."""


def nothing(_: gymnasium.Env[Any, Any]) -> dict[str, str]:
    """There is nothing to tell."""
    return {}


def demonstrate(
    env: gymnasium.Env[Any, Any],
    demonstrator: Demonstrator,
    seed: int,
    max_steps: int,
    record: Sequence[str],
    tell: Tell = nothing,
) -> Demonstration:
    """One episode of at most ``max_steps``; ``record`` names parts of the environment's info."""
    _, info = env.reset(seed=seed)
    texts = {**tell(env), "seed": str(seed)}
    info = demonstrator.begin(env, info, np.random.default_rng((seed, 1)))  # the environment drew from (seed)
    steps: dict[str, list[Any]] = {name: [] for name in (*record, "action", "rewards")}
    done = 0
    for _ in range(max_steps):
        action = demonstrator.act(env)
        before = info
        _, reward, terminated, _, info = env.step(action)
        for name in record:
            steps[name].append(before[name])
        steps["action"].append(action)
        steps["rewards"].append(reward)
        done = done + 1 if terminated else 0
        if done > HELD:
            break
    return Demonstration(seed, done > HELD, {name: np.stack(values) for name, values in steps.items()}, texts)


@dataclass(frozen=True)
class Demonstrating:
    """Demonstrates seeds in this process; the arguments are those of ``demonstrations``."""

    make_env: MakeEnv
    demonstrator: Demonstrator
    max_steps: int
    record: Sequence[str]
    tell: Tell = nothing

    def all(self, seeds: Sequence[int]) -> list[Demonstration]:
        """An episode per seed."""
        env = self.make_env()
        try:
            return [
                demonstrate(env, self.demonstrator, seed, self.max_steps, self.record, self.tell)
                for seed in seeds
            ]
        finally:
            env.close()

    def close(self) -> None:
        """Does nothing: environments are closed already."""


def demonstrations(
    make_env: MakeEnv,
    demonstrator: Demonstrator,
    first_seed: int,
    max_steps: int,
    record: Sequence[str],
    tell: Tell,
    workers: int,
) -> Generator[Demonstration, None, None]:
    """Episodes of one seed after the other, without an end; ``workers`` processes work ahead.

    What comes doesn't depend on their number.  ``make_env``, ``demonstrator`` and ``tell`` are pickled.
    """
    make = partial(Demonstrating, make_env, demonstrator, max_steps, record, tell)
    remedy = "fewer workers need less memory"
    remotes: list[RemoteObject] = []
    try:
        for k in range(workers):
            remotes.append(RemoteObject(make, name=f"demonstrations-{k + 1}", remedy=remedy))
        for chunk in count():
            remote, first = remotes[chunk % workers], first_seed + CHUNK * chunk
            done = remote.answer() if chunk >= workers else []
            remote.ask("all", range(first, first + CHUNK))
            yield from done
    finally:
        end_all(remotes)
