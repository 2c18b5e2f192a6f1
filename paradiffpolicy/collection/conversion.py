"""Demonstrations converted: actions of the other kind, observations computed anew."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.formats.demonstration import POSE, Demonstration, Source
from ..data.formats.store import WIDE_POSE
from ..envs.robosuite.mjcf import modern_model
from ..envs.robosuite.replay import Followed
from ..envs.robosuite.rotation import absolute_action, pose_action
from ..errors import InputError, nearest
from .replaying import Replay, Simulations, as_installed

log = logging.getLogger(__name__)

ACTIONS = ("absolute", "delta", "recorded")
OBSERVATIONS = ("recorded", "states")
NOTABLE = 1e-3
"""A difference between observations that is worth a line."""
FAR = 0.5
"""Metres from the hand that half of the goals don't exceed."""


def chosen(source: Source, mask: str | None) -> list[str]:
    """Names of the demonstrations in a subset, in the file's order.

    Raises:
        InputError: there is no such subset, it is empty, or it names demonstrations that don't exist.
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
class Conversion:
    """Converts a source's demonstrations one by one.

    Attributes:
        source: the file or store.
        to_store: for a zarr store, whose absolute actions have two rows per rotation.
        actions: one of ``ACTIONS``; ``None``: absolute, but recorded where the environment has one kind.
        observations: one of ``OBSERVATIONS``.
        keys: observations to keep; ``None``: all.
        check: how many demonstrations to play again.
        tell: takes a line that the user should know.
        n_steps: converted so far.

    Raises:
        InputError: there is no such option, or the source's controllers can't take such actions.
    """

    source: Source
    to_store: bool
    actions: str | None = None
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
            if value not in known and value is not None:
                raise InputError(f"unknown {name}={value}{nearest(str(value), known)}")
        if isinstance(self.check, bool) or not isinstance(self.check, int) or self.check < 0:
            raise InputError(f"check={self.check} must be a whole number, not below 0")
        args = self.source.env_args
        has_one_kind = self.source.kind == "recorded" if args is None else not args.is_robosuite
        if self.actions is None:
            self.actions = "recorded" if has_one_kind else "absolute"
        elif has_one_kind and self.actions != "recorded":
            raise InputError(
                f"{self.source.name}: its environment has one kind of actions, which can't be made "
                f"{self.actions}: convert them as they are with actions=recorded"
            )
        if args is None and self.actions not in ("recorded", self.source.kind):
            raise InputError(
                f"{self.source.name} doesn't say in which environment it was made, so what its actions mean: "
                "name the task, as task=lift, or convert them as they are with actions=recorded"
            )
        for why in self.source.skipped if self.keys is None else ():
            self.tell(f"{why}: left out")
        self.simulations = Simulations(args, self.tell)
        self.env_args = args if args is None or self.actions == "recorded" else args.with_kind(self.actions)
        if self.env_args is not None and self.observations == "states":
            self.env_args = as_installed(self.env_args)
        self._clipped = 0
        self._different: set[str] = set()
        self._followed: list[Followed] = []

    def demonstrations(self, names: Iterable[str]) -> Iterator[Demonstration]:
        """Reads and converts one after the other.

        Raises:
            InputError: one can't be read or converted.
        """
        hands = [key for key in self.source.keys if re.fullmatch(r"robot\d+_eef_pos", key)]
        for index, name in enumerate(names):
            old = self.source.read(name, hands if self.observations == "states" else self.keys)
            replay = Replay(self.simulations, old, f"{self.source.name}: {name}", index < self.check)
            poses = self._poses(old, replay)
            new = self._with_actions(old, poses, replay)
            if self.observations == "states":
                seen = replay.observations(self.keys or list(self.source.keys))
                new = replace(new, observations=seen, model=modern_model(str(old.model)))
            if index == 0:
                self._mention_version()
            if index < self.check and self.simulations.made and replay.possible:
                self._check(new, poses, replay)
            self.n_steps += len(new)
            yield new

    def summary(self) -> list[str]:
        """Lines on what was clipped and how replays went."""
        lines = []
        if self._clipped:
            lines.append(
                f"{self._clipped} steps pursue goals farther away than a delta can say: theirs were cut to ±1"
            )
        if self._followed:
            worst = max(followed.largest for followed in self._followed)
            done = sum(followed.success for followed in self._followed)
            lines.append(
                f"played again from their first states: {done} of {len(self._followed)} do the task; "
                f"positions differ from the recorded by at most {worst:.2g} (m, rad)"
            )
        return lines

    def _is_wide(self, demo: Demonstration) -> bool:
        """Whether its absolute actions are a store's, 10 numbers per arm."""
        args = self.source.env_args
        if self.source.kind != "absolute" or args is None:
            return False
        return bool(demo.actions.shape[1] == WIDE_POSE * len(args.robots))

    def _poses(self, demo: Demonstration, replay: Replay) -> Any:
        """``[N, 7 n]``; ``None`` where they aren't needed or known."""
        kind, args = self.source.kind, self.source.env_args
        if self._is_wide(demo):
            try:
                return pose_action(np.asarray(demo.actions, dtype=np.float64))
            except ValueError as error:
                raise InputError(f"{replay.where}: data/action: {error}; leave the demo out with a mask")
        if self.actions == "recorded":
            return demo.poses
        if kind == "absolute" and args is not None and args.with_kind("absolute") is args:
            _require_near_hands(demo, replay.where)
            return demo.actions
        if demo.poses is not None or (self.actions == kind == "delta"):
            return demo.poses
        return replay.poses()

    def _with_actions(self, demo: Demonstration, poses: Any, replay: Replay) -> Demonstration:
        """With actions of the wanted kind; a robomimic file has the poses beside them."""
        if self.actions == "recorded" and (self.to_store or not self._is_wide(demo)):
            return demo
        actions = demo.actions
        if self.actions in ("absolute", "recorded"):
            wide = self.to_store
            actions = absolute_action(np.asarray(poses, dtype=np.float64)) if wide else poses
        elif self.source.kind != "delta":
            actions, clipped = replay.deltas(poses)
            self._clipped += clipped
        return replace(demo, actions=actions, poses=None if self.to_store else poses)

    def _mention_version(self) -> None:
        args = self.source.env_args
        if args and args.is_robosuite and args.is_before_1_5 and not self.simulations.made:
            self.tell(
                f"{self.source.name} was made with robosuite {args.env_version or 'before 1.5'}, whose "
                "observations of objects 1.5 makes differently: observations=states computes them anew"
            )

    def _check(self, new: Demonstration, poses: Any, replay: Replay) -> None:
        """Whether actions do the same as recorded, and observations would be the same."""
        for key, apart in replay.differences().items() if self.observations == "recorded" else ():
            if apart > NOTABLE and key not in self._different:
                self._different.add(key)
                self.tell(
                    f"{replay.where}/obs/{key} differs by up to {apart:.2g} from what this robosuite "
                    "observes in the same states: observations=states writes what a policy will see"
                )
        kind = self.source.kind if self.actions == "recorded" else self.actions
        played = poses if kind == "absolute" else new.actions
        if played is not None:
            self._followed.append(replay.follow(kind, played))


def _require_near_hands(demo: Demonstration, where: str) -> None:
    """Raises ``InputError`` if actions that are said to be absolute poses aren't near the recorded hands."""
    for arm, goals in enumerate(np.moveaxis(demo.actions.reshape(len(demo), -1, POSE)[..., :3], 1, 0)):
        hands = demo.observations.get(f"robot{arm}_eef_pos")
        if hands is None or hands.shape != goals.shape:
            continue
        apart = float(np.median(np.linalg.norm(goals - hands, axis=-1)))
        if apart > FAR:
            raise InputError(
                f"{where}: its actions are {apart:.2g} m from robot{arm}_eef_pos, so they aren't absolute "
                "poses: name the task with the controller that they were for, as "
                "task.env.kwargs.action_type=delta"
            )
