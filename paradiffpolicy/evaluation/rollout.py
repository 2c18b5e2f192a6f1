"""Rolls episodes out side by side: every plan is one batched call over the environments still running."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from ..environment import require_seed
from ..errors import require_count
from ..history import History
from ..policy import Policy
from ..types import Plan
from .episodes import Episode
from .workers import EpisodeSettings, InlineWorkers, MakeEnv, Picture, Workers

T = TypeVar("T")


def rollout(
    policy: Policy,
    make_env: MakeEnv,
    seeds: Sequence[int],
    max_steps: int,
    *,
    keep_infos: bool = False,
    picture: Picture | None = None,
    n_pictured: int = 0,
    workers: Workers | None = None,
    side_by_side: int | None = None,
    success_key: str | None = None,
    scoring: str = "max",
    on_steps: Callable[[int], object] = lambda steps: None,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> list[Episode]:
    """Runs one episode per seed, side by side; the simulation waits for every plan.

    The seed resets the environment and seeds the generator of that episode's noise: two samplers
    that draw the same noise differ only by how they solve, and an episode doesn't depend on its
    neighbours.

    Args:
        make_env: called once per seed.
        max_steps: control steps per episode.
        keep_infos: record the environment's info before every action.
        picture, n_pictured: record pictures of the first episodes.
        workers: where the environments live, which changes no bit of the result; None: in this process.
        side_by_side: episodes at a time, where an environment takes much memory; None: all.
        success_key: of the environment's info; see ``environment.succeeded``.
        scoring: how a score is made of rewards; see ``Episode``.
        on_steps: told how many environment steps (or steps spared by an early end) went by.
        on_stage: told what is starting, since it may take a minute; "" when all goes on.

    Raises:
        InputError: ``max_steps`` or ``side_by_side`` is no count; or see ``ProcessWorkers``.  What an
            environment raises is raised as it is.
    """
    require_count(max_steps=max_steps)
    settings = EpisodeSettings(make_env, max_steps, keep_infos, picture, n_pictured, success_key)
    episodes = [Episode(require_seed(seed), scoring=scoring) for seed in seeds]
    with contextlib.closing(InlineWorkers()) as here:
        for group in in_groups(list(enumerate(episodes)), side_by_side):
            homes = here if workers is None else workers
            _run_together(policy, homes, settings, dict(group), on_steps, on_stage)
    return episodes


def in_groups(items: Sequence[T], side_by_side: int | None) -> list[Sequence[T]]:
    """Splits into groups of at most ``side_by_side``; None: one group.

    Raises:
        InputError: ``side_by_side`` is no count.
    """
    size = max(1, len(items)) if side_by_side is None else side_by_side
    require_count(side_by_side=size)
    return [items[first : first + size] for first in range(0, len(items), size)]


def _run_together(
    policy: Policy,
    workers: Workers,
    settings: EpisodeSettings,
    episodes: Mapping[int, Episode],
    on_steps: Callable[[int], object],
    on_stage: Callable[[str], object],
) -> None:
    """Fills in episodes, by their numbers."""
    histories = {i: History(policy.spec.n_obs_steps) for i in episodes}
    generators = {i: torch.Generator().manual_seed(episode.seed) for i, episode in episodes.items()}
    seeds = {i: episode.seed for i, episode in episodes.items()}
    on_stage(f"starting {len(episodes)} environments")
    for i, observation in workers.begin(settings, seeds).items():
        histories[i].push(observation)

    plan: Plan | None = None
    running = list(episodes)
    while running:
        windows = np.stack([histories[i].window() for i in running])
        first = plan is None
        if first:
            on_stage("compiling the sampler")
        plan = policy.plan(windows, plan, generator=[generators[i] for i in running])
        if first:
            on_stage("first steps")
        actions = plan.executed_actions.cpu().numpy().astype(np.float64)
        stretches = workers.execute(dict(zip(running, actions, strict=True)))
        if first:
            on_stage("")
        going_on = []
        for row, i in enumerate(running):
            episode, stretch = episodes[i], stretches[i]
            episode.iterations.append(int(plan.solution.iterations[row]))
            episode.nfe.append(int(plan.solution.nfe[row]))
            episode.windows.append(windows[row])
            for observation in stretch.observations:
                histories[i].push(observation)
            before = episode.n_steps
            episode.add(stretch.rewards, stretch.success)
            episode.actions += list(actions[row][: len(stretch.rewards)])
            episode.infos += stretch.infos
            episode.frames += stretch.frames
            if stretch.over:
                on_steps(settings.max_steps - before)
            else:
                going_on.append(row)
                on_steps(episode.n_steps - before)
        plan = plan.select(going_on)
        running = [running[row] for row in going_on]
