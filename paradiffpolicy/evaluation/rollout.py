"""Episodes in lockstep: every plan is one batched call over the environments still running."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import require_count
from ..history import History
from ..policy import Policy
from ..types import Plan
from .workers import InlineWorkers, MakeEnv, Picture, Scene, Workers

T = TypeVar("T")


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
    iterations: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
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
    picture: Picture | None = None,
    n_pictured: int = 0,
    workers: Workers | None = None,
    side_by_side: int | None = None,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> list[Episode]:
    """Runs one episode per seed, side by side.

    The seed resets the environment and seeds the generator of that episode's noise: two samplers
    that draw the same noise differ only by how they walk it, and an episode doesn't depend on its
    neighbours.

    Args:
        make_env: called once per seed.
        max_steps: control steps per episode.
        keep_infos: record what the environment's info held before every action.
        picture, n_pictured: record pictures of the first episodes.
        workers: where the environments live, which changes no bit of the result; None: in this process.
        side_by_side: episodes at a time, where an environment takes much memory; None: all.
        on_steps: told how many environment steps (or steps spared by an early end) went by.

    Raises:
        InputError: ``max_steps`` or ``side_by_side`` is no count; or see ``ProcessWorkers``.  What an
            environment raises is raised as it is.
    """
    require_count(max_steps=max_steps)
    scene = Scene(make_env, max_steps, keep_infos, picture, n_pictured)
    episodes = [Episode(int(seed)) for seed in seeds]
    with contextlib.closing(InlineWorkers()) as here:
        for group in in_groups(list(enumerate(episodes)), side_by_side):
            _run_together(policy, here if workers is None else workers, scene, dict(group), on_steps)
    return episodes


def in_groups(items: Sequence[T], side_by_side: int | None) -> list[Sequence[T]]:
    """So many at a time; None: all.

    Raises:
        InputError: ``side_by_side`` is no count.
    """
    size = max(1, len(items)) if side_by_side is None else side_by_side
    require_count(side_by_side=size)
    return [items[first : first + size] for first in range(0, len(items), size)]


def _run_together(
    policy: Policy,
    workers: Workers,
    scene: Scene,
    episodes: Mapping[int, Episode],
    on_steps: Callable[[int], object],
) -> None:
    """Fills in episodes, by their numbers."""
    histories = {i: History(policy.spec.n_obs_steps) for i in episodes}
    generators = {i: torch.Generator().manual_seed(episode.seed) for i, episode in episodes.items()}
    seeds = {i: episode.seed for i, episode in episodes.items()}
    for i, observation in workers.begin(scene, seeds).items():
        histories[i].push(observation)

    plan: Plan | None = None
    running = list(episodes)
    while running:
        windows = np.stack([histories[i].window() for i in running])
        plan = policy.plan(windows, plan, generator=[generators[i] for i in running])
        actions = plan.executed_actions.cpu().numpy().astype(np.float64)
        stretches = workers.execute(dict(zip(running, actions, strict=True)))
        going_on = []
        for row, i in enumerate(running):
            episode, stretch = episodes[i], stretches[i]
            episode.iterations.append(int(plan.solution.iterations[row]))
            episode.nfe.append(int(plan.solution.nfe[row]))
            episode.windows.append(windows[row])
            for observation in stretch.observations:
                histories[i].push(observation)
            before = episode.n_steps
            episode.n_steps += len(stretch.rewards)
            episode.actions += list(actions[row][: len(stretch.rewards)])
            episode.infos += stretch.infos
            episode.frames += stretch.frames
            episode.score = max(episode.score, *stretch.rewards)
            episode.success |= stretch.terminated
            if stretch.over:
                on_steps(scene.max_steps - before)
            else:
                going_on.append(row)
                on_steps(episode.n_steps - before)
        plan = plan.select(going_on)
        running = [running[row] for row in going_on]
