"""Episodes in lockstep: every plan is one batched call over the environments still running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from ..control.history import History
from ..policy import Policy
from ..types import Plan

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


@dataclass
class Episode:
    """What happened in one episode.

    Attributes:
        seed: of the environment and of the plans' noise.
        score: the largest reward of any step.
        success: the environment terminated it.
        n_steps: its length in control steps.
        rounds, evaluations: per plan.
        windows: per plan, the observation window ``[To, O]`` it was made from.
        actions: per step, ``[A]``.
        infos: per step, the environment's ``info`` before the action, if asked for.
        frames: per step, a picture, if asked for.
    """

    seed: int
    score: float = 0.0
    success: bool = False
    n_steps: int = 0
    rounds: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    windows: list[NDArray[Any]] = field(default_factory=list)
    actions: list[NDArray[Any]] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


def rollout(
    policy: Policy,
    make_env: MakeEnv,
    seeds: Sequence[int],
    max_steps: int,
    *,
    keep_infos: bool = False,
    picture: Callable[[gymnasium.Env[Any, Any]], NDArray[np.uint8]] | None = None,
    n_pictured: int = 0,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> list[Episode]:
    """Runs one episode per seed, all side by side.

    The seed resets the environment and seeds the generator of that episode's noise: two samplers
    that draw the same noise differ only by how they walk it, and an episode doesn't depend on its
    neighbours.

    Args:
        make_env: called once per seed.
        max_steps: control steps per episode.
        keep_infos: record what the environment's info held before every action.
        picture, n_pictured: record pictures of the first episodes.
        on_steps: told how many environment steps (or steps spared by an early end) went by.
    """
    spec = policy.spec
    envs = [make_env() for _ in seeds]
    episodes = [Episode(int(seed)) for seed in seeds]
    histories = [History(spec.n_obs_steps) for _ in seeds]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    infos: list[dict[str, Any]] = []
    for env, episode, history in zip(envs, episodes, histories, strict=True):
        observation, info = env.reset(seed=episode.seed)
        history.push(observation)
        infos.append(info)

    def execute(i: int, actions: NDArray[Any]) -> bool:
        """Applies a plan's actions; whether the episode goes on."""
        episode = episodes[i]
        for action in actions[: max_steps - episode.n_steps]:
            if picture is not None and i < n_pictured:
                episode.frames.append(picture(envs[i]))
            if keep_infos:
                episode.infos.append(infos[i])
            episode.actions.append(action)
            observation, reward, terminated, truncated, infos[i] = envs[i].step(action)
            histories[i].push(observation)
            episode.n_steps += 1
            episode.score = max(episode.score, float(reward))
            episode.success |= terminated
            if terminated or truncated:
                return False
        return episode.n_steps < max_steps

    plan: Plan | None = None
    running = list(range(len(seeds)))
    while running:
        windows = np.stack([histories[i].window() for i in running])
        plan = policy.plan(windows, plan, generator=[generators[i] for i in running])
        actions = plan.executed_actions.cpu().numpy().astype(np.float64)
        going_on = []
        for row, i in enumerate(running):
            episode = episodes[i]
            episode.rounds.append(int(plan.walk.rounds[row]))
            episode.evaluations.append(int(plan.walk.evaluations[row]))
            episode.windows.append(windows[row])
            before = episode.n_steps
            if execute(i, actions[row]):
                going_on.append(row)
                on_steps(episode.n_steps - before)
            else:
                on_steps(max_steps - before)
        plan = plan.select(going_on)
        running = [running[row] for row in going_on]
    for env in envs:
        env.close()
    return episodes
