"""A demonstration, independent of the file that it comes from or goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .env_args import EnvArgs

POSE = 7
"""Numbers per arm of a pose action: position in metres, rotation vector in radians, gripper."""
OTHERS = {"action": "actions", "poses": "poses", "states": "states", "rewards": "rewards", "dones": "dones"}
"""Fields that aren't observations, and the attributes of a ``Demonstration`` that they are."""
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

    @staticmethod
    def of(name: str, fields: Mapping[str, NDArray[Any]], where: str) -> Demonstration:
        """A demonstration of fields side by side, those in ``OTHERS`` and observations.

        Raises:
            InputError: actions aren't ``[N, A]``, or another field hasn't their length.
        """
        actions = fields["action"]
        if actions.ndim != 2 or not actions.size:
            raise InputError(f"{where}: action is {actions.shape}: it must be steps x numbers, both above 0")
        for key, values in fields.items():
            if len(values) != len(actions):
                raise InputError(
                    f"{where}: {key} has {len(values)} steps, action has {len(actions)}: write it anew"
                )
        others: dict[str, Any] = {OTHERS[key]: values for key, values in fields.items() if key in OTHERS}
        observations = {key: values for key, values in fields.items() if key not in OTHERS}
        return Demonstration(name=name, observations=observations, **others)


@dataclass(frozen=True)
class About:
    """What is told of a dataset as a whole, where it is written.

    Attributes:
        env_args: the environment's description, if it is known.
        actions: their kind, as ``Source.kind``.
        demos: names of the demonstrations, in order.
        masks: names of demonstrations, by the name of their subset.
        control_hz: steps per second, if they are known.
    """

    env_args: EnvArgs | None = None
    actions: str | None = None
    demos: Sequence[str] = ()
    masks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    control_hz: float | None = None


def numbers_of(source: Source) -> list[str]:
    """The observations of a source that aren't decoded from videos or compressed pictures."""
    return [key for key in source.keys if key not in source.cameras]


class Source(Protocol):
    """A dataset: demonstrations that are read one by one.

    Attributes:
        name: for error lines.
        env_args: the environment's description, if it is known.
        control_hz: steps per second, if they are known.
        kind: of the actions: ``absolute``, ``delta``, ``recorded`` (neither), or ``None``: not known.
        demos: names of the demonstrations, in order.
        masks: names of demonstrations, by the name of their subset.
        keys: of the observations.
        cameras: the shapes ``[H, W, 3]`` of the observations that are decoded from videos or compressed
            pictures, which takes long, by key.
        skipped: lines on observations that aren't among them.
    """

    @property
    def name(self) -> str: ...
    @property
    def env_args(self) -> EnvArgs | None: ...
    @property
    def control_hz(self) -> float | None: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def demos(self) -> Sequence[str]: ...
    @property
    def masks(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def cameras(self) -> Mapping[str, tuple[int, int, int]]: ...
    @property
    def skipped(self) -> Sequence[str]: ...

    def length(self, demo: str) -> int:
        """Steps of a demonstration, whose values aren't read."""
        ...

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """Reads and checks one demonstration, with some observations (all by default).

        Raises:
            InputError: a key doesn't exist, values don't fit together or aren't finite.
        """
        ...

    def close(self) -> None: ...


def fields_of(demo: Demonstration, where: str) -> dict[str, NDArray[Any]]:
    """The fields of a demonstration side by side: its observations and those in ``OTHERS``.

    Raises:
        InputError: an observation has the name of another.
    """
    taken = set(demo.observations) & set(OTHERS)
    if taken:
        raise InputError(f"{where}: an observation can't be called {sorted(taken)} there: leave it out")
    others = {key: getattr(demo, attribute) for key, attribute in OTHERS.items()}
    return {**demo.observations, **{f: np.asarray(v) for f, v in others.items() if v is not None}}


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
