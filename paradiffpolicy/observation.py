"""Observations as callers have them, to observations as policies take them.

An observation is a vector of numbers ``[O]``.  Of a policy with cameras it is one numpy record: ``numbers``
``[O]``, and by the key of each camera its picture ``[H, W, 3]``, in bytes.  So a window is one array wherever
it goes, ``[To, O]`` or ``[To]`` of records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .errors import InputError
from .task import NUMBERS, real_numbers
from .types import Batched, PolicySpec, require_real

Observation = ArrayLike | Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Numbers, records, or dicts by field name."""


class InvalidObservationError(InputError):
    """An observation that no plan should be made from: wrong shape, NaN or infinity."""


@dataclass(frozen=True, eq=False)
class Window(Batched):
    """Observation windows, ready to plan from.

    Attributes:
        numbers: ``[batch, To, O]`` float64.
        pixels: ``[batch, To, P]`` uint8, the pictures of each step, one camera after the other; None: the
            policy has no cameras.
    """

    numbers: Tensor
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)


def observation_window(spec: PolicySpec, observation: Observation) -> Window:
    """Observation windows, ready to plan from.

    Args:
        observation: ``[batch, To, O]`` or ``[To, O]``, oldest first; or ``[O]``, which stands for the whole
            window.  With cameras, records ``[batch, To]``, ``[To]`` or one.  A dict by field and camera name,
            as the contract has them, stands for one step, and a list of them for a window.

    Raises:
        InvalidObservationError: it has the wrong shape, or NaN or infinity in it.
        InputError: a field or camera of a dict is missing or has the wrong size.
    """
    if spec.contract.cameras:
        return _recorded_window(spec, records(spec, observation))
    return Window(numbers_window(spec, numbers(spec, observation)))


def _recorded_window(spec: PolicySpec, given: NDArray[Any]) -> Window:
    window = given
    if window.ndim == 0:
        window = np.repeat(window[None], spec.n_obs_steps)
    if window.ndim == 1:
        window = window[None]
    if window.ndim != 2 or window.shape[1] != spec.n_obs_steps:
        raise InvalidObservationError(
            f"observation records {given.shape} for task {spec.task!r} must be one, "
            f"[n_obs_steps={spec.n_obs_steps}] or [batch, n_obs_steps]"
        )
    window = np.array(window)  # of its own: the caller's may change, or be read-only
    content = torch.from_numpy(window.view(np.uint8).reshape(*window.shape, -1))
    vectors = torch.from_numpy(np.ascontiguousarray(window[NUMBERS]))
    return Window(numbers_window(spec, vectors), content[..., spec.obs_dim * 8 :])


def numbers_window(spec: PolicySpec, given: Tensor) -> Tensor:
    """The numbers of observation windows, ``[batch, To, O]`` float64, of ``[O]``, ``[To, O]`` or that.

    Raises:
        InvalidObservationError: they have the wrong shape, or NaN or infinity in them.
    """
    window = given
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


def observation_rows(spec: PolicySpec, observations: Observation) -> tuple[NDArray[Any], bool]:
    """Successive observations ``[k, O]``, or records ``[k]``, and whether one was given alone: ``[O]``, a
    record or a dict.

    Raises:
        InvalidObservationError: they have the wrong shape, or NaN or infinity in them.
        InputError: a field of a dict is missing or has the wrong size.
    """
    if spec.contract.cameras:
        kept = records(spec, observations)
        _numbers_rows(spec, torch.from_numpy(np.ascontiguousarray(np.atleast_1d(kept)[NUMBERS])))
        return np.atleast_1d(kept), kept.ndim == 0
    given = numbers(spec, observations)
    return _numbers_rows(spec, given).cpu().numpy(), given.ndim == 1


def _numbers_rows(spec: PolicySpec, given: Tensor) -> Tensor:
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
    return rows


def records(spec: PolicySpec, observation: Observation) -> NDArray[Any]:
    """Observations of a policy with cameras as records.

    Raises:
        InvalidObservationError: they aren't records of the policy's, nor dicts.
        InputError: a field or camera of a dict is missing, or has another size or type.
    """
    if isinstance(observation, Mapping):
        return spec.contract.record(observation)
    if isinstance(observation, list | tuple) and observation and isinstance(observation[0], Mapping):
        return np.stack([spec.contract.record(each) for each in observation])
    wanted = spec.contract.record_dtype(spec.obs_dim)
    found = observation.dtype if isinstance(observation, np.ndarray | np.void) else type(observation).__name__
    if found != wanted:
        cameras = ", ".join(repr(camera.key) for camera in spec.contract.cameras)
        raise InvalidObservationError(
            f"task {spec.task!r} sees through {cameras}: give a dict with its pictures and its fields, "
            f"or records of them, not {found!s:.80}"
        )
    return np.asarray(observation)


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
