"""Training windows cut from demonstrations, as diffusion_policy cuts them.

::

    step of the episode   s-1   s   s+1  …  s+7  …  s+14
    observations (To=2)    o    o
    plan         (T=16)    a    a    a   …   a   …   a        trained on
    executed     (Ta=8)         a    a   …   a                in the control loop

A window may hang over an episode's start by To-1 steps and over its end by Ta-1; what hangs over
repeats the first or last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .replay_buffer import ReplayBuffer


@dataclass(frozen=True)
class ObservationField:
    """A part of the observation vector: one recorded field, flattened, columns ``start … stop``."""

    key: str
    start: int = 0
    stop: int | None = None


def observation_matrix(buffer: ReplayBuffer, fields: Sequence[ObservationField]) -> NDArray[np.float32]:
    """The observation vector of every step, ``[n_steps, O]``: the fields side by side."""
    columns = []
    for field in fields:
        values = buffer.read(field.key).astype(np.float32)
        columns.append(values.reshape(len(values), -1)[:, field.start : field.stop])
    return np.concatenate(columns, axis=1)


def window_starts(
    episode_ends: NDArray[np.int64], horizon: int, pad_before: int, pad_after: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First step (it may lie before the episode) and episode of every window."""
    starts, episodes = [], []
    for episode, (begin, end) in enumerate(zip([0, *episode_ends[:-1]], episode_ends, strict=True)):
        first, last = begin - pad_before, end - horizon + pad_after
        starts.append(np.arange(first, last + 1))
        episodes.append(np.full(max(0, last + 1 - first), episode))
    return np.concatenate(starts), np.concatenate(episodes)


@dataclass(frozen=True)
class WindowDataset:
    """Every window of a store, in memory.

    Attributes:
        observations: ``[n_steps, O]`` raw units.
        actions: ``[n_steps, A]`` raw units.
        steps: ``[n_windows, T]`` int64, the (clamped) step that each window position reads.
        n_obs_steps: To.
    """

    observations: Tensor
    actions: Tensor
    steps: Tensor
    n_obs_steps: int

    @staticmethod
    def of(
        buffer: ReplayBuffer,
        fields: Sequence[ObservationField],
        *,
        n_obs_steps: int,
        horizon: int,
        n_action_steps: int,
    ) -> WindowDataset:
        """Cuts all windows.

        Raises:
            InputError: the store has no episodes, no windows, or unreadable fields.
        """
        if not buffer.n_episodes:
            raise InputError(f"{buffer.name} has no episodes yet: record some with 'paradiffpolicy collect'")
        ends = buffer.episode_ends
        starts, episode = window_starts(ends, horizon, n_obs_steps - 1, n_action_steps - 1)
        if len(starts) == 0:
            raise InputError(
                f"{buffer.name}: every episode is shorter than {horizon - n_action_steps + 1} steps"
            )
        starts = np.concatenate(([0], ends[:-1]))
        steps = starts[:, None] + np.arange(horizon)
        steps = np.clip(steps, starts[episode][:, None], ends[episode][:, None] - 1)
        return WindowDataset(
            observations=torch.from_numpy(observation_matrix(buffer, fields)),
            actions=torch.from_numpy(buffer.read("action").astype(np.float32)),
            steps=torch.from_numpy(steps),
            n_obs_steps=n_obs_steps,
        )

    def __len__(self) -> int:
        return len(self.steps)

    def batch(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Observations ``[batch, To, O]`` and actions ``[batch, T, A]`` of windows ``[batch]``."""
        steps = self.steps[windows]
        return self.observations[steps[:, : self.n_obs_steps]], self.actions[steps]


def batch_windows(n_windows: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Window indices ``[batch_size]`` of training step ``step`` (0-based).

    A pure function: each epoch is a permutation seeded by (seed, epoch) without its incomplete
    last batch, so a resumed run continues exactly where it stopped.
    """
    batch_size = min(batch_size, n_windows)
    epoch, position = divmod(step, n_windows // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(n_windows)
    return torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
