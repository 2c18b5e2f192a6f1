"""The sampling loops that people run today, on diffusers: what the benchmark compares with."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..diffusion.diffusers_unet import BETAS, PREDICTION_TYPES
from ..errors import InputError
from ..policy import Policy


def diffusers_ddpm(policy: Policy, condition: Tensor, generator: torch.Generator) -> Tensor:
    """diffusion_policy's and LeRobot's loop: ``DDPMScheduler``, one network call per timestep.

    Args:
        condition: ``[batch, G]`` normalised.

    Returns:
        ``[batch, T, A]`` normalised.

    Raises:
        InputError: diffusers isn't installed, or has no such schedule or prediction.
    """
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        raise InputError(
            "the benchmark's baseline needs diffusers: scripts/setup dev, or pip install diffusers"
        )
    spec = policy.spec
    schedules = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    if spec.schedule not in schedules or spec.prediction not in predictions:
        raise InputError(
            f"diffusers has no schedule={spec.schedule} with prediction={spec.prediction}: the benchmark's "
            "baseline needs a policy with another"
        )
    scheduler: Any = DDPMScheduler(
        spec.n_train_steps,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        beta_schedule=schedules[spec.schedule],
        clip_sample=spec.clip is not None,
        clip_sample_range=spec.clip or 1.0,
        prediction_type=predictions[spec.prediction],
    )
    scheduler.set_timesteps(spec.n_train_steps)
    network = policy.denoiser.network
    x = torch.randn(len(condition), spec.horizon, spec.action_dim, generator=generator)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = network(x, t.expand(len(x)), condition)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def baseline_plan(policy: Policy, window: Tensor, generator: torch.Generator) -> Tensor:
    """``diffusers_ddpm`` from a raw observation window ``[batch, To, O]`` to raw actions."""
    normalized = policy.observation_normalizer.normalize(window)
    sample = diffusers_ddpm(policy, rearrange(normalized, "b t o -> b (t o)"), generator)
    return policy.action_normalizer.unnormalize(sample)
