"""Rotations for networks, the first two rows of the matrix (Zhou et al. 2019), and robomimic's rotation
vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation


def six_d(rotation: Rotation) -> NDArray[np.float64]:
    """The first two rows of the matrix ``[..., 6]``: continuous in the rotation, unlike rotation vectors,
    which jump near a half turn (a gripper that points down)."""
    matrix = rotation.as_matrix()
    return matrix[..., :2, :].reshape(*matrix.shape[:-2], 6)


def rotation_of(rows: NDArray[np.float64]) -> Rotation:
    """The rotation of two rows ``[..., 6]``, made orthonormal by Gram-Schmidt.

    Raises:
        ValueError: they are parallel, or zero.
    """
    first, second = rows[..., :3], rows[..., 3:]
    x = _unit(first)
    y = _unit(second - (x * second).sum(-1, keepdims=True) * x)
    return Rotation.from_matrix(np.stack((x, y, np.cross(x, y)), axis=-2))


def absolute_action(pose_actions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Converts robomimic's absolute actions ``[..., 7 n]`` (per arm: position, rotation vector, gripper)
    to ``[..., 10 n]`` (position, two rows, gripper)."""
    arms = pose_actions.reshape(*pose_actions.shape[:-1], -1, 7)
    rows = six_d(Rotation.from_rotvec(arms[..., 3:6].reshape(-1, 3))).reshape(*arms.shape[:-1], 6)
    wide = np.concatenate((arms[..., :3], rows, arms[..., 6:]), axis=-1)
    return wide.reshape(*pose_actions.shape[:-1], -1)


def pose_action(absolute_actions: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of ``absolute_action``: ``[..., 10 n]`` to ``[..., 7 n]``.

    Raises:
        ValueError: two rows are parallel, or zero.
    """
    arms = absolute_actions.reshape(*absolute_actions.shape[:-1], -1, 10)
    vectors = rotation_of(arms[..., 3:9].reshape(-1, 6)).as_rotvec().reshape(*arms.shape[:-1], 3)
    narrow = np.concatenate((arms[..., :3], vectors, arms[..., 9:]), axis=-1)
    return narrow.reshape(*absolute_actions.shape[:-1], -1)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (length > 1e-6).all():
        raise ValueError("a rotation's two rows are parallel or zero: no rotation is near them")
    return vectors / length
