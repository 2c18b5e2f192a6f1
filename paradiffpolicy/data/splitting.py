"""Holds episodes out of training, whole ones: neighbouring windows are nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import InputError
from .dataset import WindowDataset


def held_out_episodes(n_episodes: int, share: float, seed: int) -> list[int]:
    """The episodes that are held out: a share of them, at least one, drawn by a seed; none for a share of 0.

    Raises:
        InputError: none would be left.
    """
    n_held_out = max(1, round(share * n_episodes)) if share else 0
    if n_held_out and n_held_out >= n_episodes:
        raise InputError(
            f"validation={share} of {n_episodes} episodes leaves none to train on: a smaller share, or 0"
        )
    return sorted(np.random.default_rng((seed, n_episodes)).permutation(n_episodes)[:n_held_out].tolist())


def split(
    data: WindowDataset, episodes: Sequence[int], twins: int = 1
) -> tuple[WindowDataset, WindowDataset]:
    """The windows of all other episodes, and of these; with their steps alone, so that normalizers don't
    know the others'.

    Args:
        twins: episodes of the data, one after the other, that were made of one of the store's.

    Raises:
        InputError: one of the two has no windows.
    """
    if data.episode_ends is None:
        raise InputError("windows without the ends of their episodes can't be split")
    episode_of_step = torch.searchsorted(data.episode_ends, torch.arange(len(data.actions)), right=True)
    held_out = torch.isin(episode_of_step // twins, torch.tensor(list(episodes), dtype=torch.int64))
    parts = tuple(_steps(data, chosen) for chosen in (~held_out, held_out))
    for name, part in zip(("to train on", "to validate with"), parts, strict=True):
        if not len(part):
            raise InputError(f"no windows are left {name}: another validation share, or longer episodes")
    return parts[0], parts[1]


def _steps(data: WindowDataset, chosen: torch.Tensor) -> WindowDataset:
    """The windows of the episodes whose steps are chosen."""
    assert data.episode_ends is not None
    moved = chosen.cumsum(0) - 1
    last = data.episode_ends - 1
    return replace(
        data,
        observations=data.observations[chosen],
        actions=data.actions[chosen],
        steps=moved[data.steps[chosen[data.steps[:, 0]]]],
        episode_ends=moved[last[chosen[last]]] + 1,
        references=None if data.references is None else data.references[chosen],
        weights=None if data.weights is None else data.weights[chosen[data.steps[:, 0]]],
        pictured=(torch.arange(len(chosen)) if data.pictured is None else data.pictured)[chosen],
    )
