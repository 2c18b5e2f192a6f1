"""A policy's rollouts, or a scripted expert's successes, to demonstrations."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .building import env_maker, env_workers, load_policy, sampling_policy, worker_count

if TYPE_CHECKING:
    import gymnasium
    from numpy.typing import NDArray

    from ..collection.demonstrations import Demonstrator
    from ..data.replay_buffer import ReplayBuffer
    from .schema import CollectConfig

MANY_FAILURES = 20
"""That an expert may have, however few its successes."""


def collect(cfg: CollectConfig) -> None:
    """Rollouts of a policy or of a scripted expert, appended to a dataset."""
    if cfg.expert is None:
        collect_rollouts(cfg)
    else:
        collect_demonstrations(cfg)


def collect_demonstrations(cfg: CollectConfig) -> None:
    """A scripted expert's successes, appended to a dataset."""
    from tqdm import tqdm

    from ..collection.demonstrations import demonstrations
    from ..data.replay_buffer import ReplayBuffer

    workers = worker_count(cfg.workers)
    expert = named_expert(cfg)
    out = Path(cfg.out)
    buffer = (
        ReplayBuffer.open(out, "r+") if out.exists() else ReplayBuffer.create(out, attributes=about_env(cfg))
    )
    first = next_seed(buffer) if cfg.first_seed is None else cfg.first_seed
    written = failed = 0
    episodes = demonstrations(
        env_maker(cfg), expert, first, cfg.task.max_steps, cfg.task.record, scene, workers
    )
    with tqdm(total=cfg.episodes, unit="episode", dynamic_ncols=True) as bar, contextlib.closing(episodes):
        for episode in episodes:
            if episode.success:
                buffer.append(stored(episode.steps), episode.texts)
                written += 1
                bar.update()
            else:
                failed += 1
                if failed > max(MANY_FAILURES, written):
                    raise InputError(
                        f"the expert failed {failed} of {failed + written} times: it isn't for task "
                        f"{cfg.task.name!r} as it is configured"
                    )
            bar.set_postfix(failed=failed)
            if written == cfg.episodes:
                break
    share = written / (written + failed)
    print(f"{written} episodes written, {failed} failures left out: success {share:.1%}")
    print(f"{out}: {buffer.n_episodes} episodes, {buffer.n_steps} steps")


def about_env(cfg: CollectConfig) -> dict[str, Any]:
    """What replaying a dataset's episodes needs to know about their environment."""
    env = env_maker(cfg)()
    try:
        described = getattr(env.unwrapped, "env_args", None)
        return {} if described is None else {"env_args": described}
    finally:
        env.close()


def scene(env: gymnasium.Env[Any, Any]) -> dict[str, str]:
    """What replaying an episode needs: the model of its objects, whose sizes may have been drawn."""
    simulation = getattr(env.unwrapped, "simulation", None)
    return {} if simulation is None else {"model": simulation.model}


def next_seed(buffer: ReplayBuffer) -> int:
    """The one after the last that a store's episodes came from; failures in between are not counted."""
    if "seed" in buffer.texts:
        return int(buffer.text("seed", buffer.n_episodes - 1)) + 1
    return buffer.n_episodes


def stored(steps: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Single precision, but for states, from which episodes are replayed."""
    kept = ("states",)
    return {name: values if name in kept else values.astype("float32") for name, values in steps.items()}


def named_expert(cfg: CollectConfig) -> Demonstrator:
    """Who demonstrates the task."""
    from ..envs.robosuite.experts import EXPERTS

    if cfg.task.expert is None:
        raise InputError(
            f"task {cfg.task.name!r} has no scripted expert: tasks with one are {', '.join(EXPERTS)}"
        )
    return EXPERTS[cfg.task.expert]()


def collect_rollouts(cfg: CollectConfig) -> None:
    """A policy's rollouts, appended to a dataset."""
    import numpy as np
    from tqdm import tqdm

    from ..data.replay_buffer import ReplayBuffer
    from ..evaluation.rollout import rollout

    workers = env_workers(cfg.workers)
    policy = load_policy(cfg)
    policy = sampling_policy(cfg, cfg.sampler_name, policy)
    make_env = env_maker(cfg, policy.spec)
    out = Path(cfg.out)
    buffer = ReplayBuffer.open(out, "r+") if out.exists() else ReplayBuffer.create(out)
    first = next_seed(buffer) if cfg.first_seed is None else cfg.first_seed
    written, scores = 0, []
    with (
        contextlib.closing(workers),
        tqdm(total=cfg.episodes * cfg.task.max_steps, unit="step", dynamic_ncols=True) as bar,
    ):
        for begin in range(first, first + cfg.episodes, cfg.batch):
            seeds = range(begin, min(begin + cfg.batch, first + cfg.episodes))
            episodes = rollout(
                policy,
                make_env,
                seeds,
                cfg.task.max_steps,
                keep_infos=True,
                workers=workers,
                on_steps=bar.update,
            )
            for episode in episodes:
                scores.append(episode.score)
                if episode.score < cfg.min_score:
                    continue
                steps = {key: np.stack([info[key] for info in episode.infos]) for key in cfg.task.record}
                steps["action"] = np.stack(episode.actions)
                buffer.append(stored(steps))
                written += 1
            bar.set_postfix(written=written, score=f"{np.mean(scores):.3f}")
    print(f"{written} of {cfg.episodes} episodes written, mean score {np.mean(scores):.3f}")
    print(f"{out}: {buffer.n_episodes} episodes, {buffer.n_steps} steps")
