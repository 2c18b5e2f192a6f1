"""Sampling loops on diffusers, as diffusion_policy and LeRobot run them: the baselines of the benchmark.

Each takes normalised conditions ``[batch, G]`` to samples ``[batch, T, A]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..observation import Observation
from ..policy import Policy
from ..types import PolicySpec

Loop = Callable[[Policy, Tensor, torch.Generator], tuple[Tensor, int]]
"""``(policy, condition, generator)`` to samples and the number of network calls in a row."""


def schedule_of(name: str, spec: PolicySpec) -> Any:
    """One of diffusers' schedulers for a policy's noise schedule.

    Raises:
        InputError: diffusers isn't installed, or has no such schedule or prediction.
    """
    try:
        import diffusers
    except ImportError:
        raise InputError(
            "the benchmark's baselines need diffusers: scripts/setup dev, or pip install diffusers"
        )
    schedule = {"squared_cosine": "squaredcos_cap_v2"}.get(spec.schedule, spec.schedule)
    prediction = {"v": "v_prediction"}.get(spec.prediction, spec.prediction)
    if schedule == "flow" or schedule.startswith("vp") or prediction in ("score", "velocity"):
        raise InputError(
            f"diffusers has no schedule={spec.schedule} with prediction={spec.prediction}: the benchmark's "
            "baselines need a policy with another"
        )
    return getattr(diffusers, name)(
        spec.n_train_steps,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        beta_schedule=schedule,
        clip_sample=spec.clip is not None,
        clip_sample_range=spec.clip or 1.0,
        prediction_type=prediction,
    )


def diffusers_scheduler(name: str, policy: Policy, n_steps: int) -> Any:
    """One of diffusers' schedulers for the policy's noise schedule, ready for ``n_steps``."""
    scheduler = schedule_of(name, policy.spec)
    scheduler.set_timesteps(n_steps)
    return scheduler


def _noise(policy: Policy, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, policy.spec.horizon, policy.spec.action_dim)
    return torch.randn(*shape, generator=generator).to(policy.device)


def _one_by_one(scheduler: Any, policy: Policy, condition: Tensor, generator: torch.Generator) -> Tensor:
    network, x = policy.denoiser.network, _noise(policy, len(condition), generator)
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)).to(x.device), condition)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


@torch.inference_mode()
def ddpm(policy: Policy, condition: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """diffusion_policy's and LeRobot's loop: ``DDPMScheduler``, one network call per timestep."""
    n = policy.spec.n_train_steps
    return _one_by_one(diffusers_scheduler("DDPMScheduler", policy, n), policy, condition, generator), n


@torch.inference_mode()
def ddim(policy: Policy, condition: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """The same with ``DDIMScheduler`` and 10 steps, as both run on robots."""
    return _one_by_one(diffusers_scheduler("DDIMScheduler", policy, 10), policy, condition, generator), 10


@torch.inference_mode()
def paradigms(
    policy: Policy,
    condition: Tensor,
    generator: torch.Generator,
    window: int = 20,
    tolerance: float = 0.1,
) -> tuple[Tensor, int]:
    """ParaDDPM on ``DDPMParallelScheduler`` (Shih et al. 2023, algorithm 1), for one robot."""
    n = policy.spec.n_train_steps
    scheduler = diffusers_scheduler("DDPMParallelScheduler", policy, n)
    timesteps = scheduler.timesteps.to(policy.device)
    x_T = _noise(policy, 1, generator)
    variance = torch.stack([scheduler._get_variance(t) for t in scheduler.timesteps]).to(x_T)
    z = torch.stack([_noise(policy, 1, generator) for _ in range(n)])
    z = z * variance.sqrt().view(-1, 1, 1, 1)
    unit = torch.cat((variance[1:], variance.new_full((1,), torch.inf)))  # the sample itself always passes
    x = x_T.expand(n + 1, *x_T.shape).clone()
    begin, iterations = 0, 0
    while begin < n:
        end = min(begin + window, n)
        t, old = timesteps[begin:end], x[begin:end]
        output = policy.denoiser.network(old[:, 0], t, condition.expand(end - begin, -1))
        step = scheduler.batch_step_no_noise(output, t, old[:, 0])[:, None]
        new = x[begin] + (step - old + z[begin:end]).cumsum(dim=0)
        error = (new - x[begin + 1 : end + 1]).square().mean(dim=(1, 2, 3))
        x[begin + 1 : end + 1] = new
        x[end + 1 :] = new[-1]
        moved = (error > tolerance**2 * unit[begin:end]).cpu().tolist()
        begin += moved.index(True) + 1 if True in moved else end - begin
        iterations += 1
    return x[n], iterations


BASELINES: dict[str, Loop] = {
    "diffusers DDPM-100": ddpm,
    "diffusers DDIM-10": ddim,
    "diffusers ParaDiGMS": paradigms,
}
"""All of them by name, the one that others are compared with first."""


def baseline_plan(
    loop: Loop, policy: Policy, observation: Observation, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Plans by a loop: observations as ``Policy.plan`` takes them to raw actions, and its iterations."""
    window = policy.checked(observation)
    sample, iterations = loop(policy, policy.condition(window), generator)
    return policy.action_frame(window).unnormalize(sample), iterations
