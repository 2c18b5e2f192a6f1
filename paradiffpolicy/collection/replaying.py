"""Recorded demonstrations in simulation: what a file doesn't have is computed from its states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.formats.demonstration import Demonstration, check_poses
from ..data.formats.env_args import EnvArgs
from ..envs.robosuite.env import observation_keys
from ..envs.robosuite.replay import (
    Followed,
    follow,
    hands_at,
    observations_at,
    supported,
    to_deltas,
    to_poses,
)
from ..envs.robosuite.simulation import Simulation, import_robosuite
from ..errors import InputError

HAND_TOLERANCE = 0.01
"""Metres that a hand may be from where it was recorded, if states are to mean the same."""


def understood(args: EnvArgs) -> tuple[dict[str, Any], str, list[str]]:
    """``env_kwargs`` for the installed robosuite, its version, and notes on what they mean differently.

    Raises:
        InputError: it isn't installed, doesn't know the environment, or the controller is unknown.
    """
    kwargs, notes = args.for_robosuite_1_5()
    try:
        version = str(import_robosuite().__version__)
        kwargs, unknown = supported(args.env_name, kwargs)
    except ImportError as error:
        raise InputError(str(error))
    except ValueError as error:
        raise InputError(f"{args.where}: env_args: {error}: correct them")
    if unknown:
        notes.append(f"{args.where}: robosuite {version} has no {', '.join(unknown)}: left out")
    if args.env_version and args.env_version.split(".")[:2] != version.split(".")[:2]:
        notes.append(f"{args.where} was made with robosuite {args.env_version}, and is read with {version}")
    return kwargs, version, notes


def as_installed(args: EnvArgs) -> EnvArgs:
    """The same environment as the installed robosuite describes it."""
    if not args.is_robosuite or not args.is_before_1_5:
        return args
    kwargs, version, _ = understood(args)
    return replace(args, env_kwargs=kwargs, env_version=version)


@dataclass
class Simulations:
    """A dataset's environment, made when it is needed, once for each kind of actions.

    Attributes:
        env_args: the environment's description, if it is known.
        tell: takes a line that the user should know.
    """

    env_args: EnvArgs | None
    tell: Callable[[str], object]
    made: dict[str | None, Simulation] = field(default_factory=dict)

    def of(self, kind: str | None, demo: str) -> Simulation:
        """The simulation whose controllers take ``kind`` of actions; ``None``: as described.

        Raises:
            InputError: the environment isn't described, isn't robosuite's, or can't be made.
        """
        if kind not in self.made:
            self.made[kind] = self._make(kind, demo)
        return self.made[kind]

    def _make(self, kind: str | None, demo: str) -> Simulation:
        if self.env_args is None:
            raise InputError(
                f"{demo}: its actions can't be converted without env_args, which say what they mean: name "
                "the task, as task=lift, or convert them as they are with actions=recorded"
            )
        args = self.env_args if kind is None else self.env_args.with_kind(kind)
        kwargs, _, notes = understood(args)
        try:
            simulation = Simulation(args.env_name, kwargs)
        except ValueError as error:
            raise InputError(f"{args.where}: env_args: {error}: correct them")
        for line in notes if not self.made else ():
            self.tell(line)
        return simulation


class Replay:
    """A demonstration in its dataset's simulations.

    Args:
        simulations: the dataset's.
        demo: needs states and a model.
        where: names it in error lines.
        check_hands: whether states must put hands where they were recorded.

    Raises:
        InputError: (all methods) the demonstration lacks states or model, or can't be replayed.
    """

    def __init__(self, simulations: Simulations, demo: Demonstration, where: str, check_hands: bool) -> None:
        self.simulations, self.demo, self.where, self.check_hands = simulations, demo, where, check_hands

    @property
    def possible(self) -> bool:
        """Whether it has states and a model."""
        return self.demo.states is not None and self.demo.model is not None

    def poses(self) -> NDArray[np.float64]:
        """Where its actions meant the hands to go, ``[N, 7 n]``."""
        poses = self._compute(None, to_poses, self.demo.actions)
        check_poses(poses, f"{self.where}/absolute poses")
        return poses

    def deltas(self, poses: NDArray[Any]) -> tuple[NDArray[np.float64], int]:
        """The deltas ``[N, 7 n]`` that mean the same as poses, and in how many steps they were clipped."""
        return self._compute("delta", to_deltas, poses)

    def observations(self, keys: Sequence[str] = ()) -> dict[str, NDArray[np.float64]]:
        """Observations ``[N, ...]`` by key in its states; no keys: robomimic's low-dim ones."""
        arms = len(self.simulations.of(None, self.where).hands())
        return self._compute(None, observations_at, keys or observation_keys(arms))

    def differences(self) -> dict[str, float]:
        """By how much its observations differ from those that this robosuite makes in the same states."""
        known = self.simulations.of(None, self.where).observations()
        recorded = {key: values for key, values in self.demo.observations.items() if key in known}
        seen = self._compute(None, observations_at, list(recorded)) if recorded else {}
        return {key: _apart(seen[key], values) for key, values in recorded.items()}

    def follow(self, kind: str | None, actions: NDArray[Any]) -> Followed:
        """Plays actions of a kind from its first state on."""
        return self._compute(kind, follow, np.asarray(actions))

    @cached_property
    def _scene(self) -> tuple[str, NDArray[np.float64]]:
        model, states = self.demo.model, self.demo.states
        if model is None or states is None:
            raise InputError(
                f"{self.where} has no {'states' if states is None else 'model_file'}, without which actions "
                "and observations can't be computed: convert it with actions=recorded "
                "observations=recorded, or leave it out with a mask"
            )
        return model, np.asarray(states, dtype=np.float64)

    def _require_hands(self) -> None:
        hands = np.array(self._compute(None, hands_at))
        for arm in range(hands.shape[1]):
            recorded = self.demo.observations.get(f"robot{arm}_eef_pos")
            if recorded is None or recorded.shape != hands[:, arm].shape:
                continue
            apart = _apart(hands[:, arm], recorded)
            if apart > HAND_TOLERANCE:
                raise InputError(
                    f"{self.where}: its states put the hand {apart:.2g} m from the recorded "
                    f"robot{arm}_eef_pos, so they mean something else in this robosuite: convert it with "
                    "actions=recorded"
                )

    def _compute(self, kind: str | None, compute: Callable[..., Any], *arguments: Any) -> Any:
        model, states = self._scene
        if self.check_hands:
            self.check_hands = False  # once
            self._require_hands()
        simulation = self.simulations.of(kind, self.where)
        try:
            return compute(simulation, model, states, *arguments)
        except ValueError as error:
            args = self.simulations.env_args
            version = f" (made with robosuite {args.env_version})" if args and args.env_version else ""
            raise InputError(
                f"{self.where} can't be replayed{version}: {error}: convert it with actions=recorded "
                "observations=recorded, or leave it out with a mask"
            )


def _apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference; infinite between different shapes."""
    return float(np.abs(one - other).max()) if one.shape == other.shape else np.inf
