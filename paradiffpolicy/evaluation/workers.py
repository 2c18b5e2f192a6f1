"""Steps the environments of episodes, in this process or spread over several.

The unit of work is the actions of a whole plan.  ``execute`` takes them for every environment that still
runs, and gives back the observations::

    rollout --- actions [n, A] of every running episode ---> Workers
    rollout <-- a Stretch of each ------------------------- Workers

So one message goes to each process per plan, and one comes back.  gymnasium's ``AsyncVectorEnv`` has a
process per environment and a message per step: then every step waits for the slowest environment, and
pays a pipe's two ways, Ta times as often; environments that ended are stepped on; and a hundred episodes
are a hundred processes.

Nothing here imports torch, which would take a process longer than all the rest of its start.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..environment import finite_reward, require_vectors, succeeded
from ..errors import require_count
from ..process import RemoteObject, end_all, pickled

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]
Picture = Callable[[gymnasium.Env[Any, Any]], NDArray[np.uint8]]


@dataclass(frozen=True)
class EpisodeSettings:
    """Settings that episodes have in common; go to other processes by pickle.

    Attributes:
        make_env: called once per episode, where its environment lives.
        max_steps: an episode's length in control steps, if nothing ends it before.
        keep_infos: give back the environment's info before every action.
        picture, n_pictured: give back pictures of the episodes below ``n_pictured``.
        success_key: of the environment's info; see ``environment.succeeded``.
    """

    make_env: MakeEnv
    max_steps: int
    keep_infos: bool = False
    picture: Picture | None = None
    n_pictured: int = 0
    success_key: str | None = None


@dataclass(frozen=True)
class Stretch:
    """An environment's part of an episode: one plan's actions, k of them if it ended early.

    Attributes:
        observations: ``[k, O]``, each after an action.
        rewards: per action.
        success: the task was done after one of them; None: the environment doesn't say.
        over: the episode is: terminated, truncated, or ``max_steps`` long.
        infos: per action, the info before it; empty unless asked for.
        frames: per action, the picture before it, and at the end one more; empty unless asked for.
    """

    observations: NDArray[Any]
    rewards: list[float]
    success: bool | None
    over: bool
    infos: list[dict[str, Any]]
    frames: list[NDArray[np.uint8]]


class Workers(Protocol):
    """Holds the environments of running episodes, which are known by a number."""

    def begin(self, settings: EpisodeSettings, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        """Makes and resets an environment per seed; earlier ones that still run are closed.

        Args:
            seeds: by episode.

        Returns:
            The first observation ``[O]`` of each.
        """

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        """Steps environments through their actions ``[n, A]``; closes those whose episode ends."""

    def close(self) -> None:
        """Closes every environment; ``begin`` may be called again."""


def make_workers(count: int) -> Workers:
    """Environments in ``count`` processes; 1: in this one."""
    require_count(workers=count)
    return InlineWorkers() if count == 1 else ProcessWorkers(count)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Running:
    """An episode's environment and how far it has come."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.n_steps = env, 0
        self.info: dict[str, Any] = {}

    def reset(self, seed: int) -> NDArray[Any]:
        require_vectors(self.env)
        observation, self.info = self.env.reset(seed=seed)
        return np.array(observation)

    def stretch(self, actions: NDArray[Any], settings: EpisodeSettings, pictured: bool) -> Stretch:
        """Executes ``[n, A]``.  Copies all that it keeps: an environment may use its arrays again."""
        observations, rewards, infos, frames = [], [], [], []
        success: bool | None = None
        terminated = truncated = False
        for action in actions[: settings.max_steps - self.n_steps]:
            if settings.picture is not None and pictured:
                frames.append(np.array(settings.picture(self.env)))
            if settings.keep_infos:
                infos.append(copy.deepcopy(self.info))
            observation, reward, terminated, truncated, self.info = self.env.step(action.copy())
            observations.append(np.array(observation))
            rewards.append(finite_reward(reward))
            done = succeeded(terminated, self.info, settings.success_key)
            success = success if done is None else done or bool(success)
            self.n_steps += 1
            if terminated or truncated:
                break
        over = bool(terminated or truncated) or self.n_steps >= settings.max_steps
        if over and settings.picture is not None and pictured:
            frames.append(np.array(settings.picture(self.env)))
        return Stretch(np.stack(observations), rewards, success, over, infos, frames)


class InlineWorkers:
    """Environments in this process, one after the other."""

    def __init__(self) -> None:
        self._running: dict[int, _Running] = {}
        self._settings: EpisodeSettings | None = None

    def begin(self, settings: EpisodeSettings, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        self.close()
        self._settings, observations = settings, {}
        for episode, seed in seeds.items():
            self._running[episode] = _Running(settings.make_env())
            observations[episode] = self._running[episode].reset(seed)
        return observations

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        settings, stretches = self._settings, {}
        assert settings is not None
        for episode, rows in actions.items():
            stretch = self._running[episode].stretch(rows, settings, episode < settings.n_pictured)
            if stretch.over:  # at once: an environment may hold much memory
                self._running.pop(episode).env.close()
            stretches[episode] = stretch
        return stretches

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].env.close()


class ProcessWorkers:
    """Environments in other processes, which make, reset and step them at the same time while this one
    waits.  The results are ``InlineWorkers``', to the bit.

    Processes are started when ``begin`` first needs them and stay until ``close``.  An exception in one
    of them is raised here; after any exception all are ended, and the next ``begin`` starts new ones.
    They end when this process does, however it ends.

    Args:
        count: how many at most; an episode needs no more than one.

    Raises:
        InputError: from ``begin``, the settings can't be sent to another process; from either call, a
            process died.
    """

    REMEDY = "fewer workers or fewer episodes side by side need less memory; workers=1 needs no process"

    def __init__(self, count: int) -> None:
        require_count(workers=count)
        self._count = count
        self._remotes: list[RemoteObject] = []
        self._homes: dict[int, RemoteObject] = {}

    @property
    def pids(self) -> list[int]:
        return [remote.pid for remote in self._remotes]

    def begin(self, settings: EpisodeSettings, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        functions = "make_env and picture must be functions of a module, or functools.partial of one"
        pickled(settings, "this environment", f"{functions}; or workers=1")
        while len(self._remotes) < min(self._count, len(seeds)):
            name = f"environments-{len(self._remotes) + 1}"
            self._remotes.append(RemoteObject(_registered, name=name, remedy=self.REMEDY))
        # By turns: short episodes are spread over all, and so are those with pictures.
        self._homes = {
            episode: self._remotes[turn % len(self._remotes)] for turn, episode in enumerate(seeds)
        }
        return self._ask("begin", seeds, settings)

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        return self._ask("execute", actions)

    def _ask(self, method: str, parts: Mapping[int, Any], *common: Any) -> dict[int, Any]:
        """Calls the method in every process with its part; the results together."""
        orders: dict[RemoteObject, dict[int, Any]] = {remote: {} for remote in self._remotes}
        for episode, part in parts.items():
            orders[self._homes[episode]][episode] = part
        results: dict[int, Any] = {}
        try:
            asked = [remote for remote, order in orders.items() if order or method == "begin"]
            for remote in asked:
                remote.ask(method, *common, orders[remote])
            for remote in asked:
                results |= remote.answer()
        except BaseException:
            self.close()  # some still owe a result, which must not be taken for a later one
            raise
        return results

    def close(self) -> None:
        remotes, self._remotes = self._remotes, []
        end_all(remotes)


def _registered() -> InlineWorkers:
    """Workers in a new process, which knows the package's environments."""
    from .. import envs  # noqa: F401  registers them

    return InlineWorkers()
