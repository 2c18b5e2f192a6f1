"""How much each demonstration counts in training, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, first_line, is_number
from .replay_buffer import ReplayBuffer, in_memory

Weigh = Callable[[Mapping[str, NDArray[Any]]], float]
"""An episode's weight, of its fields ``[length, ...]`` but pictures: 0 leaves it out, 2 counts twice."""
Trim = Callable[[Mapping[str, NDArray[Any]]], int]
"""How many steps of an episode are kept, of the same fields."""


def episode_weights(buffer: ReplayBuffer, weigh: Weigh) -> NDArray[np.float64]:
    """Every episode's weight, ``[n_episodes]``.

    Raises:
        InputError: one can't be weighed, a weight is no number from 0 on, or all are 0.
    """
    weights = [_asked(buffer, index, weigh, "weighed") for index in range(buffer.n_episodes)]
    for index, weight in enumerate(weights):
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise InputError(
                f"{buffer.name}: the weight of episode {index} is {weight!r:.40}: it must be 0 or more"
            )
    if not any(weights):
        raise InputError(f"{buffer.name}: all {len(weights)} episodes have weight 0: a lower threshold")
    return np.array(weights, dtype=np.float64)


def trimmed(buffer: ReplayBuffer, trim: Trim, fields: Iterable[str]) -> ReplayBuffer:
    """Copies the named fields, and all numbers, of the first steps of every episode into memory.

    Raises:
        InputError: an episode can't be trimmed, or no step, or more than it has, would be kept.
    """

    copied = dict.fromkeys([*fields, *_numbers(buffer)])

    def first_steps(index: int) -> dict[str, NDArray[Any]]:
        kept, episode = _asked(buffer, index, trim, "trimmed"), buffer.episode(index, copied)
        length = len(next(iter(episode.values())))
        if not isinstance(kept, int | np.integer) or not 1 <= kept <= length:
            raise InputError(
                f"{buffer.name}: {kept!r:.40} steps of episode {index} can't be kept, of {length} it has"
            )
        return {name: values[:kept] for name, values in episode.items()}

    return in_memory(map(first_steps, range(buffer.n_episodes)), f"{buffer.name}, trimmed")


def _asked(
    buffer: ReplayBuffer, index: int, ask: Callable[[Mapping[str, NDArray[Any]]], Any], done: str
) -> Any:
    """The answer of a function about an episode."""
    episode = buffer.episode(index, _numbers(buffer))
    try:
        return ask(episode)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{buffer.name}: episode {index} can't be {done} ({reason})")


def _numbers(buffer: ReplayBuffer) -> list[str]:
    """All fields but pictures."""
    return [field for field in buffer.fields if len(buffer.shape(field)) < 3]
