"""Checks the environment of closed-loop evaluations before training starts, not hours later."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..types import PolicySpec

if TYPE_CHECKING:
    import gymnasium


def check_env(env: gymnasium.Env[Any, Any], spec: PolicySpec) -> None:
    """Resets an environment, takes one step, and compares what it needs and gives with a policy's shapes.

    Raises:
        InputError: an observation isn't ``[obs_dim]`` finite numbers, an action isn't ``[action_dim]``,
            the reward isn't a finite number, or the environment itself fails.
    """
    name, shape = type(env.unwrapped).__name__, getattr(env.action_space, "shape", None)
    if shape != (spec.action_dim,):
        raise InputError(
            f"{name} takes actions of shape {shape}, but task {spec.task!r} has action_dim={spec.action_dim}"
        )
    try:
        first, _ = env.reset(seed=0)
        env.action_space.seed(0)
        second, reward, *_ = env.step(env.action_space.sample())
        finite = math.isfinite(float(reward))
    except Exception as error:  # a user's environment may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name} can't be reset and stepped: {type(error).__name__}: {reason}")
    _require_observation(first, spec, f"{name}.reset")
    _require_observation(second, spec, f"{name}.step")
    if not finite:
        raise InputError(f"{name}.step gives the reward {reward}, which must be a finite number")


def _require_observation(observation: Any, spec: PolicySpec, where: str) -> None:
    observation = np.asarray(observation["numbers"]) if spec.contract.cameras else observation
    if isinstance(observation, dict):
        raise InputError(
            f"{where} gives a dict of {', '.join(map(str, observation))}: flatten it into a vector of "
            f"obs_dim={spec.obs_dim} numbers, in the order of the task's observation"
        )
    values = np.asarray(observation)
    if values.shape != (spec.obs_dim,):
        raise InputError(
            f"{where} gives observations of shape {values.shape}, but task {spec.task!r} has "
            f"obs_dim={spec.obs_dim}"
        )
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise InputError(f"{where} gives an observation that isn't {spec.obs_dim} finite numbers")
