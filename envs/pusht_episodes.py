"""Recorded episodes of PushT: their mirror images, and how much of the target they cover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from .pusht import GOAL_POSE, KEYPOINTS, WORLD, placed_t, to_world


def mirrored(episode: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Mirrors a recorded episode.

    The T is symmetric about its stem, and the target's stem lies on the world's diagonal
    ``x + y = 512``; reflecting everything there, ``(x, y) -> (512 - y, 512 - x)`` and
    ``angle -> pi / 2 - angle``, gives an episode of the same task (the walls shift by 1 px).

    Args:
        episode: ``state`` ``[n, 5]``, ``action`` ``[n, 2]``, and what there is of ``keypoint`` ``[n, 9, 2]``,
            ``n_contacts`` and pictures ``img`` ``[n, H, H, 3]``.
    """

    def reflect(points: NDArray[Any]) -> NDArray[Any]:
        return WORLD - points[..., ::-1]

    state = episode["state"].astype(np.float64)
    angle = (np.pi / 2 - state[:, 4]) % (2 * np.pi)
    flipped = np.column_stack((reflect(state[:, :2]), reflect(state[:, 2:4]), angle))
    changed = {"state": flipped, "action": reflect(episode["action"])}
    if "keypoint" in episode:
        changed["keypoint"] = np.stack([to_world(KEYPOINTS, x, y, a) for x, y, a in flipped[:, 2:]])
    if "n_contacts" in episode:
        changed["n_contacts"] = episode["n_contacts"]
    if "img" in episode:  # [n, y, x, 3]
        changed["img"] = episode["img"][:, ::-1, ::-1].swapaxes(1, 2)
    return {name: values.astype(episode[name].dtype) for name, values in changed.items()}


def coverages(states: NDArray[Any]) -> NDArray[np.float64]:
    """The share of the target that the block covers, ``[n]``, in states ``[n, 5]``."""
    goal = placed_t(*GOAL_POSE)
    blocks = np.array([placed_t(*map(float, state[2:])) for state in states])
    found: NDArray[np.float64] = shapely.area(shapely.intersection(goal, blocks)) / goal.area
    return found


def final_coverage(episode: Mapping[str, NDArray[Any]], threshold: float = 0.85, below: float = 0.0) -> float:
    """The weight of a recorded episode: 1 if its last state covers the threshold, else ``below``.

    Args:
        episode: ``state`` ``[n, 5]``.
        threshold: share of the target, 0 … 1.  Half of the human demonstrations end above 0.85, none above
            0.91.
    """
    covered = float(coverages(episode["state"][-1:])[0])
    return 1.0 if covered >= threshold else float(below)


def until_best_coverage(episode: Mapping[str, NDArray[Any]]) -> int:
    """How many steps a recorded episode has until the first of its largest coverage, that step included.

    Args:
        episode: ``state`` ``[n, 5]``.
    """
    return int(np.argmax(coverages(episode["state"]))) + 1
