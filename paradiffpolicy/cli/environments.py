"""Tasks and their environments, from configs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..registry import import_plugins
from ..training.augmentation import AUGMENTATIONS
from ..training.selection import TRIMS, WEIGHTS
from .settings import lazily

if TYPE_CHECKING:
    import gymnasium

    from ..evaluation.realtime import MakeEnvAt
    from ..evaluation.workers import MakeEnv, Workers
    from ..policy import Policy
    from ..task import Contract
    from ..types import PolicySpec
    from .parts import TaskConfig, TaskedConfig


def contract(task: TaskConfig) -> Contract:
    """What the task's policies observe, and what their actions mean."""
    from dataclasses import asdict

    from ..task import Contract

    action = {f"action_{name}": value for name, value in asdict(task.action).items()}
    observed = {name: [asdict(each) for each in getattr(task, name)] for name in ("observation", "cameras")}
    return Contract.from_dict({**observed, **action})


def task_env(
    task: TaskConfig,
    plugins: Sequence[str],
    spec: PolicySpec | None = None,
    disturbances: Mapping[str, float] = {},
    **changes: Any,
) -> gymnasium.Env[Any, Any]:
    """Makes the task's environment, also in another process.

    Args:
        spec: of a policy, whose observations and actions it must have; None: any.
        disturbances: their strengths, by name.
        changes: other arguments of ``gymnasium.make``.

    Raises:
        InputError: the task names none, it can't be made, or it has other sizes.
    """
    from ..disturbances import disturbed
    from ..environment import make_env, require_vectors
    from ..recorded_env import RecordedEnv

    import_plugins(list(plugins))
    if task.env.id is None:
        raise InputError(f"task {task.name!r} names no environment: set task.env.id, as my_module:Reach-v0")
    env = make_env(task.env.id, **{"max_episode_steps": task.max_steps, **task.env.kwargs, **changes})
    try:
        if spec is not None and spec.contract.cameras:
            return disturbed(RecordedEnv(env, spec.contract, task.env.renamed), disturbances)
        if spec is not None:
            require_vectors(env)
            found = [space.shape for space in (env.observation_space, env.action_space)]
            if found != [(spec.obs_dim,), (spec.action_dim,)]:
                raise InputError(
                    f"{task.env.id} has observations {found[0]} and actions {found[1]}, but the policy of "
                    f"task {task.name!r} has obs_dim={spec.obs_dim}, action_dim={spec.action_dim}"
                )
        return disturbed(env, disturbances)
    except InputError:
        env.close()
        raise


def env_maker(cfg: TaskedConfig, spec: PolicySpec | None = None, **disturbances: float) -> MakeEnv:
    """Makes the task's environment, disturbed, also in another process; compares it with a policy's sizes."""
    return functools.partial(task_env, cfg.task, tuple(cfg.plugins), spec, disturbances)


def env_maker_at(cfg: TaskedConfig, spec: PolicySpec | None = None, **disturbances: float) -> MakeEnvAt:
    """Makes the task's environment, disturbed, for a control rate, without an end."""
    from ..environment import control_rate

    # -1: an episode's length is a matter of seconds here.
    make_any: Any = env_maker(cfg, spec, **disturbances)
    make_env: Any = functools.partial(make_any, max_episode_steps=-1)

    def make(rate_hz: float) -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any]
        try:
            env = make_env(control_hz=rate_hz)
            return env
        except InputError as error:
            if "control_hz" not in str(error):
                raise InputError(f"rate_hz={rate_hz:g}: {error}")
        env = make_env()
        own = control_rate(env, cfg.task.control_hz)
        if own != rate_hz:
            raise InputError(
                f"rate_hz={rate_hz:g}: {cfg.task.env.id} takes no control_hz; its own is {own:g}"
            )
        return env

    return make


def env_workers(count: int | str) -> Workers:
    """Where environments live, for a config's ``workers``."""
    from ..evaluation.workers import make_workers

    return make_workers(worker_count(count))


def worker_count(count: int | str) -> int:
    """How many processes a config's ``workers`` means."""
    from ..evaluation.workers import usable_cores

    return usable_cores() if isinstance(count, str) else count


def recorded_windows(cfg: Any, guide: Policy, count: int, seed: int | None = None) -> list[Any]:
    """Observation windows ``[To, O]`` of an episode that ``guide`` runs, again from its start if short; of
    the config's ``first_seed``, unless another is given."""
    from ..evaluation.rollout import rollout

    seeds = [cfg.first_seed if seed is None else seed]
    episode = rollout(guide, env_maker(cfg, guide.spec), seeds, cfg.task.max_steps)[0]
    return [episode.windows[k % len(episode.windows)] for k in range(count)]


AUGMENTATIONS.register("pusht_mirror", lazily("envs.pusht_episodes", "mirrored"))
WEIGHTS.register("pusht_final_coverage", lazily("envs.pusht_episodes", "final_coverage"))
TRIMS.register("pusht_best_coverage", lazily("envs.pusht_episodes", "until_best_coverage"))
