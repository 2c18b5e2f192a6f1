"""Training windows of demonstrations, by diffusion_policy's rule.

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
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..task import NUMBERS, Camera, Contract, ObservationField
from ..types import Relative
from .normalizer import Normalizer
from .pictures import picture_bytes
from .relative import references
from .replay_buffer import ReplayBuffer, require_finite

RANGE_AT_ONCE = 2**20
"""Numbers of windows' actions that are in memory at a time while their range is looked for."""


def recorded_fields(
    buffer: ReplayBuffer, fields: Sequence[ObservationField], task: str | None = None
) -> tuple[ObservationField, ...]:
    """The fields with the shapes that the store has them in: the observation contract of its policies.

    Args:
        buffer: a store with at least one episode.
        fields: what the observation vector consists of.
        task: whose fields these are, for the error line.

    Raises:
        InputError: the store has no episodes, lacks a field, or has another shape.
    """
    if not buffer.n_episodes:
        raise InputError(f"{buffer.name} has no episodes yet: record some with 'paradiffpolicy collect'")
    for field in fields:
        if field.key not in buffer.fields:
            since = f", since these belong to task {task}" if task else ""
            raise InputError(
                f"{buffer.name} has no {field.key!r}: it has {', '.join(buffer.fields)}; name its fields in "
                f"the task's observation:{since}"
            )
        if field.shape not in (None, buffer.shape(field.key)):
            raise InputError(
                f"{buffer.name}: data/{field.key} is {buffer.shape(field.key)} per step, but the task's "
                f"observation says shape={list(field.shape or ())}"
            )
    return tuple(replace(field, shape=buffer.shape(field.key)) for field in fields)


def observation_matrix(buffer: ReplayBuffer, fields: Sequence[ObservationField]) -> NDArray[np.float64]:
    """The observation vector of every step, ``[n_steps, O]``: the fields side by side."""
    columns = []
    for field in fields:
        values = _numbers(buffer, field.key)
        columns.append(values.reshape(len(values), -1)[:, field.start : field.stop])
    return np.concatenate(columns, axis=1)


def _numbers(buffer: ReplayBuffer, field: str) -> NDArray[np.float64]:
    """All steps of a field, which normalised are numbers of single precision."""
    values = buffer.read(field).astype(np.float64)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    require_finite(single, f"{buffer.name}: data/{field}, in single precision,", "scale it")
    return values


def window_steps(
    episode_ends: NDArray[np.int64], horizon: int, pad_before: int, pad_after: int
) -> NDArray[np.int64]:
    """The steps ``[n_windows, T]`` of every window, those outside its episode replaced by the nearest."""
    windows = []
    for start, end in zip([0, *episode_ends[:-1]], episode_ends, strict=True):
        first = np.arange(start - pad_before, end - horizon + pad_after + 1)
        windows.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
    return np.concatenate(windows)


@dataclass(frozen=True)
class WindowDataset:
    """All windows of a store, in memory.

    Attributes:
        observations: ``[n_steps, O]`` raw units.
        actions: ``[n_steps, A]`` raw units.
        steps: ``[n_windows, T]`` int64, the (clamped) step that each window position reads.
        n_obs_steps: To.
        episode_ends: ``[n_episodes]`` int64, the exclusive end of each episode's steps; None: not known.
        pixels: ``[n_pictures, P]`` uint8, the cameras' pictures ``[H, W, 3]`` of a step one after the other;
            None: there are no cameras.
        pictured: ``[n_steps]`` int64, which row of ``pixels`` shows a step; None: its own.
        references: ``[n_steps, A]`` float64, what the actions of a plan from a step on are relative to; None:
            they are absolute.
        weights: ``[n_windows]`` float64, how often a window is drawn, relative to others; None: all alike.
    """

    observations: Tensor
    actions: Tensor
    steps: Tensor
    n_obs_steps: int
    episode_ends: Tensor | None = None
    pixels: Tensor | None = None
    pictured: Tensor | None = None
    references: Tensor | None = None
    weights: Tensor | None = None

    @staticmethod
    def of(
        buffer: ReplayBuffer,
        fields: Sequence[ObservationField],
        *,
        n_obs_steps: int,
        horizon: int,
        n_action_steps: int,
        cameras: Sequence[Camera] = (),
    ) -> WindowDataset:
        """Cuts all windows.

        Raises:
            InputError: the store has no episodes, no windows, no readable field of that name, or actions
                that aren't vectors.
        """
        fields = recorded_fields(buffer, fields)
        if len(buffer.shape("action")) != 1:
            raise InputError(
                f"{buffer.name}: data/action is {buffer.shape('action')} per step, it must be a vector"
            )
        # Before windows are cut: episodes' ends may be beyond all that is there.
        observations, actions = observation_matrix(buffer, fields), _numbers(buffer, "action")
        steps = window_steps(buffer.episode_ends, horizon, n_obs_steps - 1, n_action_steps - 1)
        if not len(steps):
            raise InputError(
                f"{buffer.name}: every episode is shorter than {horizon - n_action_steps + 1} steps"
            )
        return WindowDataset(
            observations=torch.from_numpy(observations),
            actions=torch.from_numpy(actions),
            steps=torch.from_numpy(steps),
            n_obs_steps=n_obs_steps,
            episode_ends=torch.from_numpy(buffer.episode_ends),
            pixels=picture_bytes(buffer, cameras) if cameras else None,
        )

    def __len__(self) -> int:
        return len(self.steps)

    def drawn(self, batch_size: int, step: int, seed: int) -> Tensor:
        """Window indices ``[batch_size]`` of a training step: see ``batch_windows``."""
        return batch_windows(len(self), batch_size, step, seed, self.weights)

    def weighted(self, weights: Tensor) -> WindowDataset:
        """The same windows, drawn as often as the weights ``[n_episodes]`` of their episodes say."""
        assert self.episode_ends is not None
        episodes = torch.searchsorted(self.episode_ends, self.steps[:, 0].contiguous(), right=True)
        return replace(self, weights=weights.double()[episodes])

    def batch(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Observations ``[batch, To, O]`` and actions ``[batch, T, A]`` of windows ``[batch]``."""
        steps = self.steps[windows]
        actions, reference = self.actions[steps], self.reference(windows)
        if reference is not None:
            actions = (actions - reference[:, None]).to(self.observations.dtype)
        return self.observations[steps[:, : self.n_obs_steps]], actions

    def reference(self, windows: Tensor) -> Tensor | None:
        """What the actions of windows ``[batch]`` are relative to, ``[batch, A]``; None: nothing."""
        newest = self.steps[windows, self.n_obs_steps - 1]
        return None if self.references is None else self.references[newest]

    def relative_to(self, relative: Relative) -> WindowDataset:
        """The same windows, of raw units, with actions relative to observations (``data.relative``)."""
        if not relative:
            return self
        found = references(self.observations, relative, self.actions.shape[-1])
        return replace(self, references=found)

    def action_range(self) -> Tensor:
        """The lowest and the highest actions ``[2, A]`` of all windows, relative ones if they are."""
        at_once = max(1, RANGE_AT_ONCE // (self.steps.shape[1] * self.actions.shape[1]))
        parts = (self.batch(part)[1].flatten(0, 1) for part in torch.arange(len(self)).split(at_once))
        low, high = zip(*(part.aminmax(dim=0) for part in parts), strict=True)
        return torch.stack((torch.stack(low).amin(dim=0), torch.stack(high).amax(dim=0)))

    def action_normalizer(self) -> Normalizer:
        """A normalizer of the windows' actions; of absolute ones, of all steps'."""
        return Normalizer.fit(self.actions if self.references is None else self.action_range())

    def normalized(
        self, observations: Normalizer, actions: Normalizer, device: torch.device | str = "cpu"
    ) -> WindowDataset:
        """The windows of raw units, normalised, on a device."""
        if self.references is None:
            normal, moved = actions.normalize(self.actions), None
        else:  # in float64 until the difference is taken
            normal = (self.actions.double() - actions.middle) * actions.scale
            moved = (self.references * actions.scale).to(device)
        return replace(
            self,
            observations=observations.normalize(self.observations).to(device),
            actions=normal.to(device),
            steps=self.steps.to(device),
            references=moved,
        )

    def records(self, windows: Tensor, contract: Contract) -> NDArray[Any]:
        """Observation windows as a robot would give them: ``[batch, To, O]``, or records ``[batch, To]``."""
        numbers, pixels = self.batch(windows)[0].cpu().numpy(), self.pictures(windows)
        if pixels is None:
            return numbers
        records = np.zeros(numbers.shape[:2], contract.record_dtype(numbers.shape[2]))
        records[NUMBERS] = numbers
        records.view(np.uint8).reshape(*numbers.shape[:2], -1)[..., -pixels.shape[2] :] = pixels.numpy()
        return records

    def pictures(self, windows: Tensor) -> Tensor | None:
        """Pictures ``[batch, To, P]`` uint8 of windows ``[batch]``, on the CPU; None: there are none."""
        if self.pixels is None:
            return None
        steps = self.steps[windows, : self.n_obs_steps].cpu()
        return self.pixels[steps if self.pictured is None else self.pictured[steps]]


def batch_windows(
    n_windows: int, batch_size: int, step: int, seed: int, weights: Tensor | None = None
) -> Tensor:
    """Window indices ``[batch_size]`` of training step ``step`` (0-based).

    A pure function, so that a resumed run continues exactly: each epoch is a permutation seeded by (seed,
    epoch), without its incomplete last batch.  With ``weights`` ``[n_windows]`` an epoch has a window as
    often as its share of all weights times ``n_windows`` says, rounded up or down by chance.
    """
    batch_size = min(batch_size, n_windows)
    epoch, position = divmod(step, n_windows // batch_size)
    order = _epoch_order(n_windows, epoch, seed, weights)
    return torch.from_numpy(order[position * batch_size : (position + 1) * batch_size].copy())


@lru_cache(maxsize=1)  # ten million windows take a second to permute; a tensor's hash is its identity
def _epoch_order(n_windows: int, epoch: int, seed: int, weights: Tensor | None) -> NDArray[np.int64]:
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(n_windows)
    if weights is None:
        return order
    # Systematic sampling: a comb of n_windows equal teeth, moved by chance, over the weights side by side.
    ends = np.cumsum(weights.cpu().numpy())
    comb = (np.arange(n_windows) + draw.uniform()) * (ends[-1] / n_windows)
    # The last tooth may be rounded up to the end, beyond which there is no window of any weight.
    last = np.searchsorted(ends, ends[-1])
    return np.minimum(np.searchsorted(ends, comb, side="right"), last)[order]
