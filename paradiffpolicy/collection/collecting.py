"""Appends episodes to a dataset: a policy's rollouts, or an expert's successes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..data.replay_buffer import ReplayBuffer
from ..environment import recorded, require_seed
from ..errors import InputError, require_count
from ..evaluation.compare import Progress, no_progress
from ..evaluation.episodes import Episode
from ..evaluation.executors import BlockExecutor, BlockProgress, BlockTask, LocalExecutor
from ..evaluation.rollout import in_groups, rollout
from ..evaluation.workers import MakeEnv, Workers
from ..policy import Policy
from .demonstrators import Demonstrator, about, demonstrations

MANY_FAILURES = 20
"""Failures that an expert may have, however few its successes."""
DOUBLE = ("states",)
"""Fields kept in double precision: episodes are replayed from them."""


@dataclass
class Collection:
    """A dataset that episodes are appended to, and how many were.

    Attributes:
        path: of the zarr store; made with the first episode if it isn't there.
        record: fields of the environment's info to store, beside ``action``.
        buffer: the store, once it is there.
        attributes: of a new store.
        written, failed: episodes stored and left out.
        scores: of all.
    """

    path: Path
    record: Sequence[str]
    attributes: dict[str, Any] = field(default_factory=dict, init=False)
    written: int = field(default=0, init=False)
    failed: int = field(default=0, init=False)
    scores: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.buffer = ReplayBuffer.open(self.path, "r+") if self.path.exists() else None

    @property
    def mean_score(self) -> float:
        return float(np.mean(self.scores))

    def next_seed(self, given: int | None = None) -> int:
        """The seed given, or the one after the last that the store's episodes came from; failures in
        between are not counted."""
        if given is not None:
            return given
        if self.buffer is None or "seed" not in self.buffer.texts:
            return self.buffer.n_episodes if self.buffer else 0
        last = self.buffer.text("seed", self.buffer.n_episodes - 1)
        if not last.isdecimal() or len(last) > 10:
            raise InputError(f"{self.path}: the last episode's seed is {last[:20]!r}: name first_seed")
        return int(last) + 1

    def prepare(
        self,
        make_env: MakeEnv,
        seeds: range,
        texts: Callable[[gymnasium.Env[Any, Any], int], dict[str, str]] = lambda env, seed: {},
        more: Sequence[str] = (),
    ) -> None:
        """Makes an environment, which describes a new store; raises ``InputError`` where ``add`` would refuse
        its episodes, so that none is run in vain."""
        require_count(episodes=len(seeds))
        first, _ = require_seed(seeds[0]), require_seed(seeds[-1])
        with contextlib.closing(make_env()) as env:
            _, info = env.reset(seed=first)
            action = np.zeros(env.action_space.shape or ())
            begun = Episode(first, rewards=[0.0], actions=[action], infos=[info], texts=texts(env, first))
            columns = stored(begun.columns([*self.record, "action", *more]))
            described = getattr(env.unwrapped, "env_args", None)
        self.attributes = {} if described is None else {"env_args": described}
        if self.buffer is None:
            ReplayBuffer.require_new(str(self.path), columns)
        else:
            self.buffer.check(columns, begun.texts)

    def add(self, episode: Episode, good: bool, *more: str) -> None:
        """Stores an episode if it is good; ``more`` are further columns."""
        self.scores.append(episode.score)
        if not good:
            self.failed += 1
            return
        if self.buffer is None:
            self.buffer = ReplayBuffer.create(self.path, attributes=self.attributes)
        self.buffer.append(stored(episode.columns([*self.record, "action", *more])), episode.texts)
        self.written += 1

    def __str__(self) -> str:
        if self.buffer is None:
            return f"{self.path}: no episodes, so it isn't there"
        return f"{self.path}: {self.buffer.n_episodes} episodes, {self.buffer.n_steps} steps"


def stored(columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Columns in single precision, except those in ``DOUBLE``."""
    return {name: v if name in DOUBLE else v.astype("float32") for name, v in columns.items()}


def collect_demonstrations(
    path: Path,
    make_env: MakeEnv,
    expert: Demonstrator,
    n_episodes: int,
    max_steps: int,
    record: Sequence[str],
    *,
    first_seed: int | None = None,
    workers: int = 1,
    success_key: str | None = None,
    executor: BlockExecutor | None = None,
    progress: Progress = no_progress,
) -> Collection:
    """Appends an expert's next ``n_episodes`` successes to a dataset.

    Args:
        first_seed: None: goes on after the dataset's last.
        workers: processes.
        success_key: see ``demonstrate``.
        executor: where episodes are made, which changes none; None: in ``workers`` processes.

    Raises:
        InputError: it fails more often than it succeeds.
    """
    made = Collection(path, record)
    first = made.next_seed(first_seed)
    made.prepare(make_env, range(first, first + n_episodes), about, ["rewards"])
    episodes = demonstrations(make_env, expert, first, max_steps, record, workers, success_key, executor)
    with progress("demonstrations", n_episodes, "episode") as bar, contextlib.closing(episodes):
        for episode in episodes:
            made.add(episode, bool(episode.success), "rewards")
            if made.failed > max(MANY_FAILURES, made.written):
                tried = made.failed + made.written
                raise InputError(
                    f"the expert failed {made.failed} of {tried} times: it isn't for this task as configured"
                )
            bar.update(int(bool(episode.success)))
            bar.set_postfix(failed=made.failed)
            if made.written == n_episodes:
                break
    return made


def collect_rollouts(
    path: Path,
    policy: Policy,
    make_env: MakeEnv,
    n_episodes: int,
    max_steps: int,
    record: Sequence[str],
    *,
    min_score: float = -np.inf,
    scoring: str = "max",
    first_seed: int | None = None,
    batch: int = 50,
    workers: Workers | None = None,
    executor: BlockExecutor | None = None,
    progress: Progress = no_progress,
) -> Collection:
    """Appends those of a policy's next ``n_episodes`` rollouts that score at least ``min_score``.

    Args:
        scoring: see ``rollout``.
        first_seed: None: goes on after the dataset's last.
        batch: episodes side by side.
        workers: where the environments of batches live that run in this process; see ``rollout``.
        executor: where batches run, which changes no episode; None: in this process.
    """
    made = Collection(path, record)
    first = made.next_seed(first_seed)
    seeds = range(first, first + n_episodes)
    made.prepare(make_env, seeds)
    run = partial(recorded_rollout, policy, make_env, max_steps, record, scoring=scoring)
    groups = in_groups(seeds, batch)
    with progress("rollouts", n_episodes * max_steps, "step") as bar:
        steps = BlockProgress(bar.update)
        here = {"workers": workers, "on_steps": steps.steps}
        execute = LocalExecutor() if executor is None else executor
        blocks = execute(BlockTask(run, {"seeds": group}, here) for group in groups)
        for group, episodes in zip(groups, blocks, strict=True):
            for episode in episodes:
                made.add(episode, episode.score >= min_score)
            steps.block_ended(len(group) * max_steps)
            bar.set_postfix(written=made.written, score=f"{made.mean_score:.3f}")
    return made


def recorded_rollout(
    policy: Policy,
    make_env: MakeEnv,
    max_steps: int,
    record: Sequence[str],
    seeds: Sequence[int],
    **options: Any,
) -> list[Episode]:
    """Runs ``rollout``, and keeps of the episodes only what is stored: they may come from another machine."""
    episodes = rollout(policy, make_env, seeds, max_steps, keep_infos=True, **options)
    for episode in episodes:
        episode.infos = [dict(recorded(info, record)) for info in episode.infos]
        episode.windows.clear()
    return episodes
