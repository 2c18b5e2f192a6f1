"""What a policy's spec decides about its sampling."""

from __future__ import annotations

from typing import Any

from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError
from ..types import PolicySpec
from .sampler import Sampler, make_sampler
from .tableau import Tableau

ONE_CALL = {"solver": "ddim", "n_steps": 1, "spacing": "trailing"}
"""A student's sampler: from pure noise to the plan."""


def spec_schedule(spec: PolicySpec) -> NoiseSchedule:
    """The noise schedule of a spec."""
    betas = {"beta_start": spec.beta_start, "beta_end": spec.beta_end}
    return NoiseSchedule.named(spec.schedule, spec.n_train_steps, **(betas | spec.schedule_options))


def spec_sampler(spec: PolicySpec, **settings: Any) -> Sampler:
    """A sampler for a spec's policies; ``settings`` as ``make_sampler`` takes them, by default the spec's, or
    one network call for a student.

    Raises:
        InputError: a setting is unusable.
    """
    if not settings:
        settings = ONE_CALL if spec.student_timesteps else spec.sampler
    return make_sampler(spec_schedule(spec), executed=spec.executed, **settings)


def check_student(spec: PolicySpec, tableau: Tableau) -> None:
    """Makes sure that a student is sampled as it learnt.

    Raises:
        InputError: the table calls the network at a timestep that it doesn't know.
    """
    known, asked = spec.student_timesteps, tableau.timesteps.tolist()
    if known and not set(asked) <= set(known):
        raise InputError(
            f"the policy is a student that learnt {len(known)} timesteps ({known[0]:g} to {known[-1]:g}) and "
            f"plans of one network call; this sampler asks for {len(asked)}, at timesteps that it doesn't "
            "know: choose the sampler student or student_warm"
        )
