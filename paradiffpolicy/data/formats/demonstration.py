"""A demonstration, independent of the file that it comes from or goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .env_args import EnvArgs

POSE = 7
"""Numbers per arm of a pose action: position in metres, rotation vector in radians, gripper."""
REACH = 1.5
"""Metres from the world's origin, in each coordinate, that a goal may lie away: environments clip there."""


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode; ``observations[t]`` and ``states[t]`` precede ``actions[t]``.

    Attributes:
        name: ``demo_0``, …
        actions: ``[N, A]``, those of its file.
        observations: ``[N, ...]`` each.
        states: ``[N, D]``: time, positions, velocities.
        poses: ``[N, 7 n]`` for n arms: the goal that each action meant for the hands, in the world.
        rewards: ``[N]``.
        dones: ``[N]``.
        model: MJCF.
    """

    name: str
    actions: NDArray[Any]
    observations: Mapping[str, NDArray[Any]]
    states: NDArray[Any] | None = None
    poses: NDArray[Any] | None = None
    rewards: NDArray[Any] | None = None
    dones: NDArray[Any] | None = None
    model: str | None = None

    def __len__(self) -> int:
        return len(self.actions)


class Source(Protocol):
    """A file of demonstrations.

    Attributes:
        name: for error lines.
        env_args: the environment's description, if it is known.
        kind: of the actions: ``absolute``, ``delta``, ``recorded`` (neither), or ``None``: not known.
        demos: names of the demonstrations, in order.
        masks: names of demonstrations, by the name of their subset.
        keys: of the observations.
        skipped: lines on observations that aren't among them.
    """

    @property
    def name(self) -> str: ...
    @property
    def env_args(self) -> EnvArgs | None: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def demos(self) -> Sequence[str]: ...
    @property
    def masks(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def skipped(self) -> Sequence[str]: ...

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """Reads and checks one demonstration, with some observations (all by default).

        Raises:
            InputError: a key doesn't exist, values don't fit together or aren't finite.
        """
        ...

    def close(self) -> None: ...


def check_poses(poses: NDArray[Any], where: str) -> None:
    """Checks pose actions ``[N, 7 n]``.

    Raises:
        InputError: positions are farther away than environments let hands go, rotation vectors are more
            than a turn, or gripper commands are beyond ±1.
    """
    if poses.ndim != 2 or poses.shape[1] % POSE or not poses.shape[1]:
        raise InputError(
            f"{where} is {poses.shape}: absolute poses are 7 numbers per arm (position, rotation vector, "
            "gripper): leave them out, or write them anew"
        )
    arms = poses.reshape(len(poses), -1, POSE)
    turns = np.linalg.norm(arms[..., 3:6], axis=-1)
    for values, limit, what in (
        (np.abs(arms[..., :3]), REACH, "a position of {:.3g} m"),
        (turns[..., None], 2 * np.pi + 1e-6, "a rotation vector of {:.3g} rad"),
        (np.abs(arms[..., 6:]), 1 + 1e-6, "a gripper command of {:.3g}"),
    ):
        excess = values.reshape(len(values), -1).max(axis=1)
        if (excess > limit).any():
            step = int(np.argmax(excess > limit))
            raise InputError(
                f"{where} has {what.format(excess[step])} at step {step}, at most {limit:.3g} is possible: "
                "wrong units or another frame; write absolute poses in the world's frame, in m and rad"
            )
