"""Demonstrations to a checkpoint, and a policy's rollouts to demonstrations."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, nearest, require_count
from ..provenance import machine
from .building import (
    Config,
    capture_settings,
    choose_device,
    env_maker,
    env_workers,
    load_policy,
    locate,
    named_sampler,
    observation_fields,
    plain,
    sampling_policy,
    typed,
    worker_count,
)

if TYPE_CHECKING:
    import gymnasium
    from numpy.typing import NDArray

    from ..checkpoint import Checkpoint
    from ..collection.demonstrations import Demonstrator
    from ..data.replay_buffer import Augment, ReplayBuffer

MANY_FAILURES = 20
"""That an expert may have, however few its successes."""


def train(cfg: Config) -> None:
    """Demonstrations to a checkpoint; run again to resume."""
    from ..checkpoint import Checkpoint, read_metadata
    from ..data.dataset import WindowDataset, recorded_fields
    from ..data.replay_buffer import ReplayBuffer, augmented
    from ..evaluation.rollout import rollout
    from ..evaluation.statistics import standard_error
    from ..policy import Policy
    from ..training.train import Trainer, TrainSettings
    from ..types import PolicySpec

    device = choose_device(cfg)
    settings_of_capture = capture_settings(cfg) | {"cache": None}  # weights change
    spec = PolicySpec(
        task=cfg.task.name,
        obs_dim=cfg.task.obs_dim,
        action_dim=cfg.task.action_dim,
        control_hz=float(cfg.task.control_hz),
        **typed(PolicySpec, cfg.policy) | {"down_dims": tuple(cfg.policy.down_dims)},
    )
    settings = TrainSettings(**typed(TrainSettings, cfg.training))
    sampler = named_sampler(cfg, cfg.evaluation.sampler, spec)
    workers = env_workers(cfg.evaluation.workers)
    buffer = ReplayBuffer.open(locate(cfg.dataset))
    fields = recorded_fields(buffer, observation_fields(cfg), cfg.task.name)
    keys = [field.key for field in fields] + ["action"]
    init = Checkpoint.load(locate(cfg.init)) if cfg.init else None
    about_data = {
        "name": Path(cfg.dataset).name,
        "n_episodes": buffer.n_episodes,
        "n_steps": buffer.n_steps,
        "fingerprint": buffer.fingerprint(keys),
        "augmentation": cfg.augmentation,
    }
    data = WindowDataset.of(
        augmented(buffer, named_augmentation(cfg.augmentation), keys) if cfg.augmentation else buffer,
        fields,
        n_obs_steps=spec.n_obs_steps,
        horizon=spec.horizon,
        n_action_steps=spec.n_action_steps,
    )
    sizes = (data.observations.shape[1], data.actions.shape[1])
    if sizes != (spec.obs_dim, spec.action_dim):
        raise InputError(
            f"{buffer.name} has obs_dim, action_dim {sizes}, task {spec.task!r} needs "
            f"{(spec.obs_dim, spec.action_dim)}: another dataset or task"
        )
    seeds = range(cfg.evaluation.first_seed, cfg.evaluation.first_seed + cfg.evaluation.seeds)

    def evaluate_policy(checkpoint: Checkpoint) -> dict[str, float]:
        policy = Policy(checkpoint, sampler, device).captured(**settings_of_capture)
        with contextlib.closing(workers):  # until the next evaluation
            episodes = rollout(policy, env_maker(cfg), seeds, cfg.task.max_steps, workers=workers)
        scores = [episode.score for episode in episodes]
        return {
            "score": round(sum(scores) / len(scores), 4),
            "standard_error": round(standard_error(scores), 4),
            "success_rate": sum(episode.success for episode in episodes) / len(episodes),
            "n_seeds": len(seeds),
            "first_seed": seeds.start,
        }

    info = {
        "dataset": about_data,
        "init": {"sha256": read_metadata(locate(cfg.init))["weights"]["sha256"]} if init else {},
        "evaluation": {
            "sampler": plain(cfg.sampler[cfg.evaluation.sampler]),
            "max_steps": cfg.task.max_steps,
        },
        "machine": machine(),
    }
    trainer = Trainer(
        data,
        spec,
        settings,
        Path(cfg.run),
        info=info,
        init=init,
        evaluate=evaluate_policy if cfg.evaluation.seeds else None,
        device=device,
    )
    if trainer.step:
        print(f"resuming {cfg.run} at step {trainer.step} of {settings.n_steps}")
    checkpoint = trainer.run()
    places = [Path(cfg.run) / "checkpoint"]
    if cfg.checkpoint:
        checkpoint.save(cfg.checkpoint)
        places.append(Path(cfg.checkpoint))
    for score in trainer.scores[-1:]:
        print(f"score {score['score']:.3f} ± {score['standard_error']:.3f} over {score['n_seeds']} seeds")
    print("\n".join(map(str, places)))


def collect(cfg: Config) -> None:
    """Rollouts of a policy or of a scripted expert, appended to a dataset."""
    if cfg.expert is None:
        collect_rollouts(cfg)
    else:
        collect_demonstrations(cfg)


def collect_demonstrations(cfg: Config) -> None:
    """A scripted expert's successes, appended to a dataset."""
    from tqdm import tqdm

    from ..collection.demonstrations import demonstrations
    from ..data.replay_buffer import ReplayBuffer

    require_count(episodes=cfg.episodes)
    workers = worker_count(cfg.workers)
    expert = named_expert(cfg)
    out = Path(cfg.out)
    buffer = (
        ReplayBuffer.open(out, "r+") if out.exists() else ReplayBuffer.create(out, attributes=about_env(cfg))
    )
    first = next_seed(buffer) if cfg.first_seed is None else cfg.first_seed
    written = failed = 0
    episodes = demonstrations(
        env_maker(cfg), expert, first, cfg.task.max_steps, list(cfg.task.record), scene, workers
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


def about_env(cfg: Config) -> dict[str, Any]:
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


def named_expert(cfg: Config) -> Demonstrator:
    """Who demonstrates the task."""
    from ..envs.robosuite.experts import EXPERTS

    if cfg.expert != "scripted":
        raise InputError(f"unknown expert {cfg.expert!r}; known: scripted, or null: a policy")
    if cfg.task.name not in EXPERTS:
        raise InputError(
            f"no expert is scripted for task {cfg.task.name!r}; there is one for {', '.join(EXPERTS)}"
        )
    return EXPERTS[cfg.task.name]()


def collect_rollouts(cfg: Config) -> None:
    """A policy's rollouts, appended to a dataset."""
    import numpy as np
    from tqdm import tqdm

    from ..data.replay_buffer import ReplayBuffer
    from ..evaluation.rollout import rollout

    require_count(episodes=cfg.episodes, batch=cfg.batch)
    workers = env_workers(cfg.workers)
    policy = load_policy(cfg)
    policy = sampling_policy(cfg, cfg.sampler_name, policy)
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
                env_maker(cfg),
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


def named_augmentation(name: str) -> Augment:
    """What makes a second episode of every recorded one."""
    from ..envs.pusht import mirrored

    augmentations = {"pusht_mirror": mirrored}
    if name not in augmentations:
        raise InputError(f"unknown augmentation {name!r}{nearest(name, augmentations)}")
    return augmentations[name]
