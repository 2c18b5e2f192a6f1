"""Observations as callers have them, to observations as policies take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .errors import InputError
from .task import real_numbers
from .types import PolicySpec, require_real

Observation = ArrayLike | Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Numbers, or dicts of numbers by field name."""


class InvalidObservationError(InputError):
    """An observation that no plan should be made from: wrong shape, NaN or infinity."""


def observation_window(spec: PolicySpec, observation: Observation) -> Tensor:
    """An observation window, ready to plan from: float64 ``[batch, To, O]``.

    Args:
        observation: ``[batch, To, O]`` or ``[To, O]``, oldest first; or ``[O]``, which stands for the whole
            window.  A dict by field name, as the contract has them, stands for ``[O]``.

    Raises:
        InvalidObservationError: it has the wrong shape, or NaN or infinity in it.
        InputError: a field of a dict is missing or has the wrong size.
    """
    window = given = numbers(spec, observation)
    if window.ndim == 1:
        window = window.expand(spec.n_obs_steps, -1)
    if window.ndim == 2:
        window = window[None]
    if window.ndim != 3 or tuple(window.shape[1:]) != (spec.n_obs_steps, spec.obs_dim):
        raise InvalidObservationError(
            f"observation {tuple(given.shape)} for task {spec.task!r} must be [obs_dim={spec.obs_dim}], "
            f"[n_obs_steps={spec.n_obs_steps}, obs_dim] or [batch, n_obs_steps, obs_dim]"
        )
    usable = window.float().isfinite()  # a network computes in float32
    if not usable.all():
        b, step, column = (int(i[0]) for i in torch.where(~usable))
        raise InvalidObservationError(
            f"observation window {b} has NaN or infinity at step {step}, column {column}: check the sensor"
        )
    return window


def observation_rows(spec: PolicySpec, observations: Observation) -> tuple[Tensor, bool]:
    """Successive observations ``[k, O]``, and whether one was given alone, as ``[O]`` or as a dict.

    Raises:
        InvalidObservationError: they have the wrong shape, or NaN or infinity in them.
        InputError: a field of a dict is missing or has the wrong size.
    """
    given = numbers(spec, observations)
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != spec.obs_dim:
        raise InvalidObservationError(
            f"observations {tuple(given.shape)} for task {spec.task!r} must be [obs_dim={spec.obs_dim}], or "
            "[k, obs_dim], one after each executed action"
        )
    usable = rows.float().isfinite()
    if not usable.all():
        row, column = (int(i[0]) for i in torch.where(~usable))
        raise InvalidObservationError(
            f"observation {row} has NaN or infinity in column {column}: check the sensor"
        )
    return rows, given.ndim == 1


def numbers(spec: PolicySpec, observation: Observation) -> Tensor:
    """An observation as float64, dicts flattened by the contract.

    Raises:
        InvalidObservationError: it has no numbers.
        InputError: a field of a dict is missing or has the wrong size.
    """
    vector = spec.contract.vector
    if isinstance(observation, Mapping):
        observation = vector(observation)
    elif isinstance(observation, list | tuple) and observation and isinstance(observation[0], Mapping):
        observation = np.stack([vector(each) for each in observation])
    try:
        if isinstance(observation, Tensor):
            require_real(observation=observation)
            return observation.to(torch.float64)
        return torch.from_numpy(real_numbers(observation))
    except (TypeError, ValueError, OverflowError, RuntimeError, InputError) as error:
        raise InvalidObservationError(f"the observation is no array of numbers ({error})")
