"""Demonstrations as they are wanted: actions of the other kind, observations computed anew."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import InputError, nearest

if TYPE_CHECKING:
    from ..data.formats.demonstration import Demonstration, Source
    from ..data.formats.env_args import EnvArgs
    from ..envs.robosuite.simulation import Simulation

T = TypeVar("T")

log = logging.getLogger(__name__)

ACTIONS = ("absolute", "delta", "recorded")
OBSERVATIONS = ("recorded", "states")
HAND_TOLERANCE = 0.01
"""Metres that a hand may be from where it was recorded, if states are to mean the same."""
NOTABLE = 1e-3
"""A difference between observations that is worth a line."""


def chosen(source: Source, mask: str | None) -> list[str]:
    """Names of the demonstrations in a subset, in the file's order.

    Raises:
        InputError: there is no such subset, it is empty, or it names what isn't there.
    """
    if mask is None:
        return list(source.demos)
    if mask not in source.masks:
        raise InputError(f"{source.name} has no mask/{mask}{nearest(str(mask), source.masks)}")
    named = set(source.masks[mask])
    for missing in sorted(named - set(source.demos)):
        raise InputError(f"{source.name}: mask/{mask} names {missing}, which isn't there: correct the mask")
    if not named:
        raise InputError(f"{source.name}: mask/{mask} is empty")
    return [name for name in source.demos if name in named]


@dataclass
class Simulations:
    """The environment of a dataset, made when it is needed, for each kind of actions once."""

    env_args: EnvArgs | None
    tell: Callable[[str], object]

    def __post_init__(self) -> None:
        self._made: dict[str | None, Simulation] = {}

    @property
    def used(self) -> bool:
        return bool(self._made)

    def of(self, kind: str | None, demo: str) -> Simulation:
        """With controllers for ``kind``; ``None``: as described.

        Raises:
            InputError: it isn't described, isn't robosuite's, or can't be made.
        """
        if kind not in self._made:
            self._made[kind] = self._make(kind, demo)
        return self._made[kind]

    def _make(self, kind: str | None, demo: str) -> Simulation:
        from ..envs.robosuite.simulation import Simulation

        if self.env_args is None:
            raise InputError(
                f"{demo}: its actions can't be converted without env_args, which say what they mean: name "
                "the task, as task=lift, or convert them as they are with actions=recorded"
            )
        args = self.env_args if kind is None else self.env_args.with_kind(kind)
        kwargs, notes, unknown, version = understood(args)
        try:
            simulation = Simulation(args.env_name, kwargs)
        except ValueError as error:
            raise InputError(f"{args.where}: env_args: {error}: correct them")
        if not self.used:
            for line in notes:
                self.tell(line)
            if unknown:
                self.tell(f"{args.where}: robosuite {version} has no {', '.join(unknown)}: left out")
            if args.env_version and args.env_version.split(".")[:2] != version.split(".")[:2]:
                self.tell(
                    f"{args.where} was made with robosuite {args.env_version}, and is read with {version}"
                )
        return simulation


def understood(args: EnvArgs) -> tuple[dict[str, Any], list[str], list[str], str]:
    """``env_kwargs`` for the installed robosuite, what to know about them, which it doesn't have, and its
    version.

    Raises:
        InputError: it isn't installed, doesn't know the environment, or the controller is unknown.
    """
    from ..envs.robosuite.replay import supported
    from ..envs.robosuite.simulation import import_robosuite

    kwargs, notes = args.for_robosuite_1_5()
    try:
        version = str(import_robosuite().__version__)
        kwargs, unknown = supported(args.env_name, kwargs)
    except ImportError as error:
        raise InputError(str(error))
    except ValueError as error:
        raise InputError(f"{args.where}: env_args: {error}: correct them")
    return kwargs, notes, unknown, version


def as_installed(args: EnvArgs) -> EnvArgs:
    """The same environment as the installed robosuite would describe it."""
    if not args.is_robosuite or not args.is_before_1_5:
        return args
    kwargs, _, _, version = understood(args)
    return replace(args, env_kwargs=kwargs, env_version=version)


@dataclass
class Conversion:
    """Each demonstration, with actions and observations as they are wanted.

    Attributes:
        source: where from.
        to_store: whether it goes to a zarr store, whose absolute actions have two rows per rotation.
        actions, observations: one of ``ACTIONS``, ``OBSERVATIONS``.
        keys: observations to keep; ``None``: all.
        check: how many demonstrations to play again.
        tell: takes a line that a person should know.
        n_steps: converted so far.

    Raises:
        InputError: there is no such option.
    """

    source: Source
    to_store: bool
    actions: str = "absolute"
    observations: str = "recorded"
    keys: Sequence[str] | None = None
    check: int = 0
    tell: Callable[[str], object] = log.warning
    n_steps: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("actions", self.actions, ACTIONS),
            ("observations", self.observations, OBSERVATIONS),
        ):
            if value not in known:
                raise InputError(f"unknown {name}={value}{nearest(str(value), known)}")
        if isinstance(self.check, bool) or not isinstance(self.check, int) or self.check < 0:
            raise InputError(f"check={self.check} must be a whole number, not below 0")
        self.simulations = Simulations(self.source.env_args, self.tell)
        args = self.source.env_args
        if (
            self.source.kind is None
            and self.actions != "recorded"
            and (args is None or not args.is_robosuite)
        ):
            # PushT's, for instance: there is one kind.
            self.actions = "recorded"
        self._clipped = 0
        self._different: set[str] = set()
        self._checking = False
        self._followed: list[tuple[float, bool]] = []
        self.env_args = args
        if args is not None and self.actions != "recorded":
            self.env_args = args.with_kind(self.actions)
        if self.env_args is not None and self.observations == "states":
            self.env_args = as_installed(self.env_args)

    def demonstrations(self, names: Iterable[str]) -> Iterator[Demonstration]:
        """Reads and converts one after the other.

        Raises:
            InputError: one can't be.
        """
        from ..envs.robosuite.replay import modern_model

        for index, name in enumerate(names):
            self._checking = index < self.check
            hands = [key for key in self.source.keys if re.fullmatch(r"robot\d+_eef_pos", key)]
            told = self.source.read(name, hands if self.observations == "states" else self.keys)
            poses = self._poses(told) if self.actions != "recorded" or self._is_wide(told) else told.poses
            new = replace(told, actions=self._actions(told, poses), poses=None if self.to_store else poses)
            if self.to_store and self.actions == "recorded":
                new = replace(told)
            if self.observations == "states":
                new = replace(new, observations=self._observed(told), model=modern_model(str(told.model)))
            if index == 0:
                self._mention_version()
            if self._checking and self.simulations.used:
                self._check(told, new, poses)
            self.n_steps += len(new)
            yield new

    def summary(self) -> list[str]:
        """What to know about it, in lines."""
        lines = []
        if self._clipped:
            lines.append(
                f"{self._clipped} steps pursue goals farther away than a delta can say: theirs were cut to ±1"
            )
        if self._followed:
            worst = max(error for error, _ in self._followed)
            done = sum(success for _, success in self._followed)
            lines.append(
                f"played again from their first states: {done} of {len(self._followed)} do the task; "
                f"positions differ from the recorded by at most {worst:.2g} (m, rad)"
            )
        return lines

    def _is_wide(self, demo: Demonstration) -> bool:
        """Whether absolute actions are a store's, 10 numbers per arm."""
        args = self.source.env_args
        return bool(
            self.source.kind == "absolute" and args and demo.actions.shape[1] == 10 * len(args.robots)
        )

    def _poses(self, demo: Demonstration) -> Any:
        """``[N, 7 n]``."""
        from ..data.formats.demonstration import check_poses
        from ..envs.robosuite.replay import to_poses
        from ..envs.robosuite.rotation import pose_action

        where = f"{self.source.name}: {demo.name}"
        if self._is_wide(demo):
            try:
                return pose_action(np.asarray(demo.actions, dtype=np.float64))
            except ValueError as error:
                raise InputError(f"{where}: data/action: {error}; leave the demo out with a mask")
        args = self.source.env_args
        if self.source.kind == "absolute" and args is not None and args.with_kind("absolute") is args:
            return demo.actions
        if demo.poses is not None:
            return demo.poses
        if self.actions == "delta" and self.source.kind == "delta":
            return None  # nobody asks
        model, states = self._scene(demo)
        simulation = self.simulations.of(None, where)
        poses = self._tried(where, lambda: to_poses(simulation, model, states, demo.actions))
        check_poses(poses, f"{where}/absolute poses")
        return poses

    def _actions(self, demo: Demonstration, poses: Any) -> Any:
        from ..envs.robosuite.replay import to_deltas
        from ..envs.robosuite.rotation import absolute_action

        where = f"{self.source.name}: {demo.name}"
        if self.actions == "absolute":
            return absolute_action(np.asarray(poses, dtype=np.float64)) if self.to_store else poses
        if self.actions == "recorded":
            return poses if self._is_wide(demo) else demo.actions
        if self.source.kind == "delta":
            return demo.actions
        model, states = self._scene(demo)
        simulation = self.simulations.of("delta", where)
        deltas, clipped = self._tried(where, lambda: to_deltas(simulation, model, states, poses))
        self._clipped += clipped
        return deltas

    def _observed(self, demo: Demonstration) -> dict[str, Any]:
        """Anew, from the states."""
        from ..envs.robosuite.env import observation_keys
        from ..envs.robosuite.replay import observations_at

        where = f"{self.source.name}: {demo.name}"
        model, states = self._scene(demo)
        simulation = self.simulations.of(None, where)
        arms = len(simulation.hands())
        keys = self.keys or list(self.source.keys) or observation_keys(arms)
        return dict(self._tried(where, lambda: observations_at(simulation, model, states, keys)))

    def _scene(self, demo: Demonstration) -> tuple[str, Any]:
        where = f"{self.source.name}: {demo.name}"
        for what, value in (("states", demo.states), ("model_file", demo.model)):
            if value is None:
                raise InputError(
                    f"{where} has no {what}, without which actions and observations can't be computed: "
                    "convert it with actions=recorded observations=recorded, or leave it out with a mask"
                )
        assert demo.model is not None and demo.states is not None
        states = np.asarray(demo.states, dtype=np.float64)
        if self._checking:
            self._require_hands(demo, demo.model, states)
        return demo.model, states

    def _require_hands(self, demo: Demonstration, model: str, states: Any) -> None:
        """Whether states mean what they meant.

        Raises:
            InputError: hands are elsewhere than recorded.
        """
        from ..envs.robosuite.replay import hands_at

        where = f"{self.source.name}: {demo.name}"
        simulation = self.simulations.of(None, where)
        hands = np.array(self._tried(where, lambda: hands_at(simulation, model, states)))
        for arm in range(hands.shape[1]):
            recorded = demo.observations.get(f"robot{arm}_eef_pos")
            if recorded is None or recorded.shape != hands[:, arm].shape:
                continue
            apart = float(np.abs(hands[:, arm] - recorded).max())
            if apart > HAND_TOLERANCE:
                raise InputError(
                    f"{where}: its states put the hand {apart:.2g} m from the recorded robot{arm}_eef_pos, "
                    "so they mean something else in this robosuite: convert it with actions=recorded"
                )

    def _tried(self, where: str, compute: Callable[[], T]) -> T:
        try:
            return compute()
        except ValueError as error:
            args = self.source.env_args
            version = f" (made with robosuite {args.env_version})" if args and args.env_version else ""
            raise InputError(
                f"{where} can't be replayed{version}: {error}: convert it with actions=recorded "
                "observations=recorded, or leave it out with a mask"
            )

    def _mention_version(self) -> None:
        args = self.source.env_args
        if args and args.is_robosuite and args.is_before_1_5 and not self.simulations.used:
            self.tell(
                f"{self.source.name} was made with robosuite {args.env_version or 'before 1.5'}, whose "
                "observations of objects 1.5 makes differently: observations=states computes them anew"
            )

    def _check(self, old: Demonstration, new: Demonstration, poses: Any) -> None:
        """Whether actions do what they did, and observations would be the same."""
        from ..envs.robosuite.replay import follow, observations_at

        if old.states is None or old.model is None:
            return
        where = f"{self.source.name}: {old.name}"
        model, states = old.model, np.asarray(old.states, dtype=np.float64)
        simulation = self.simulations.of(None, where)
        observed = {key: v for key, v in old.observations.items() if key in simulation.observations()}
        if self.observations == "recorded" and observed:
            seen = self._tried(where, lambda: observations_at(simulation, model, states, list(observed)))
            for key, values in observed.items():
                same = seen[key].shape == values.shape
                apart = float(np.abs(seen[key] - values).max()) if same else np.inf
                if apart > NOTABLE and key not in self._different:
                    self._different.add(key)
                    self.tell(
                        f"{where}/obs/{key} differs by up to {apart:.2g} from what this robosuite observes "
                        "in the same states: observations=states writes what a policy will see"
                    )
        kind = self.source.kind if self.actions == "recorded" else self.actions
        played = poses if kind == "absolute" else new.actions
        if played is not None:
            player = self.simulations.of(kind, where)
            followed = self._tried(where, lambda: follow(player, model, states, np.asarray(played)))
            self._followed.append((followed.largest, followed.success))
