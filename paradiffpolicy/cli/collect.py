"""Appends a policy's rollouts, or a scripted expert's successes, to a dataset."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..tables import bar
from .building import load_policy, sampling_policy
from .environments import env_maker, env_workers, worker_count
from .executing import block_executor, policy_gpus

if TYPE_CHECKING:
    from ..collection.collecting import Collection
    from ..collection.demonstrators import Demonstrator
    from .schema import CollectConfig


def collect(cfg: CollectConfig) -> None:
    """Rollouts of a policy or of a scripted expert, appended to a dataset."""
    if cfg.expert is None:
        made = rollouts(cfg)
        print(f"{made.written} of {cfg.episodes} episodes written, mean score {made.mean_score:.3f}")
    else:
        made = demonstrations(cfg)
        share = made.written / (made.written + made.failed)
        print(f"{made.written} episodes written, {made.failed} failures left out: success {share:.1%}")
    print(made)


def demonstrations(cfg: CollectConfig) -> Collection:
    """A scripted expert's successes."""
    from ..collection.collecting import collect_demonstrations

    expert = named_expert(cfg)
    # Here an expert has processes of its own.
    executor = None if cfg.executor == "local" else block_executor(cfg)
    with contextlib.nullcontext() if executor is None else contextlib.closing(executor):
        return collect_demonstrations(
            Path(cfg.out),
            env_maker(cfg),
            expert,
            cfg.episodes,
            cfg.task.max_steps,
            cfg.task.record,
            first_seed=cfg.first_seed,
            workers=worker_count(cfg.workers),
            success_key=cfg.task.success_key,
            executor=executor,
            progress=bar,
        )


def rollouts(cfg: CollectConfig) -> Collection:
    """A policy's rollouts."""
    from ..collection.collecting import collect_rollouts

    workers = env_workers(cfg.workers)
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))
    executor = block_executor(cfg, policy_gpus(cfg))
    with contextlib.closing(workers), contextlib.closing(executor):
        return collect_rollouts(
            Path(cfg.out),
            policy,
            env_maker(cfg, policy.spec),
            cfg.episodes,
            cfg.task.max_steps,
            cfg.task.record,
            min_score=-math.inf if cfg.min_score is None else cfg.min_score,
            scoring=cfg.task.scoring,
            first_seed=cfg.first_seed,
            batch=cfg.batch,
            workers=workers,
            executor=executor,
            progress=bar,
        )


def named_expert(cfg: CollectConfig) -> Demonstrator:
    """The task's scripted expert."""
    from ..collection.experts import EXPERTS

    if cfg.task.expert is None:
        raise InputError(
            f"task {cfg.task.name!r} has no scripted expert: tasks with one are {', '.join(EXPERTS)}"
        )
    return EXPERTS.named(cfg.task.expert)()
