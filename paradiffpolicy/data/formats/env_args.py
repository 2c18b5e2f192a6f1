"""robomimic's ``env_args``: the description of the environment in which a dataset was made.

robosuite's controllers were configured in two ways::

    1.2 … 1.4   {"type": "OSC_POSE", "control_delta": true, "damping": 1, ...}     per robot
    1.5         {"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "delta",
                 "input_ref_frame": "world", "damping_ratio": 1, ...}}}            per robot

1.5 takes the older form too, but ignores its ``control_delta`` (absolute actions would be taken for
deltas), and reads deltas in the frame of the robot's base, where older versions meant the world's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import InputError, first_line, is_number, nearest

ROBOSUITE_TYPE, GYM_TYPE = 1, 2
"""robomimic's numbers for kinds of environments."""
PARTS = ("IK_POSE", "JOINT_POSITION", "JOINT_TORQUE", "JOINT_VELOCITY", "OSC_POSE", "OSC_POSITION")
COMPOSITES = ("BASIC", "HYBRID_MOBILE_BASE", "WHOLE_BODY_EXTERNAL_IK", "WHOLE_BODY_IK", "WHOLE_BODY_MINK_IK")
RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
"""Settings of 1.2's controllers that were renamed since."""
NEEDED = {"interpolation": None, "ramp_ratio": 0.2}
"""Settings that 1.5 requires."""
DEEPEST = 20
"""Settings in each other."""
WIDTHS = {"OSC_POSE": 6, "OSC_POSITION": 3}
ONE_COMMAND_GRIPPERS = ("IIWA", "Kinova3", "Panda", "Sawyer", "UR5e")
"""Robots whose own gripper takes one number."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class EnvArgs:
    """A parsed ``env_args``; all but ``parse`` raise ``InputError`` where a controller is unknown.

    Attributes:
        env_name: robosuite's name, as ``NutAssemblySquare``.
        env_kwargs: for ``robosuite.make``; empty where the file has none.
        env_version: robosuite's, as ``1.4.1``, if it is known.
        type: robomimic's number for the kind of environment.
        where: the file, for error lines.
    """

    env_name: str
    env_kwargs: Settings
    env_version: str | None
    type: int
    where: str

    @staticmethod
    def parse(text: str | bytes | Mapping[str, Any], where: str) -> EnvArgs:
        """Parses a file's JSON, or takes its values.

        Raises:
            InputError: it isn't robomimic's description of an environment.
        """
        try:
            values = json.loads(text) if isinstance(text, str | bytes) else dict(text)
            if not _is_shallow(values):
                raise ValueError(f"they are nested more than {DEEPEST} times")
            kwargs = dict(values.get("env_kwargs") or {})
            robots = kwargs.get("robots", [])
            if not isinstance(robots, str | list):
                raise TypeError(f"robots are {robots!r}")
            return EnvArgs(
                env_name=str(values["env_name"]),
                env_kwargs=kwargs,
                env_version=None if values.get("env_version") is None else str(values["env_version"]),
                type=int(values.get("type", ROBOSUITE_TYPE)),
                where=where,
            )
        except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: env_args aren't robomimic's ({type(error).__name__}: {first_line(error)}): they "
                "must be JSON with env_name, env_version, type and env_kwargs"
            )

    def to_dict(self) -> Settings:
        """The values that ``parse`` takes."""
        return {
            "env_name": self.env_name,
            "env_version": self.env_version,
            "type": self.type,
            "env_kwargs": copy.deepcopy(self.env_kwargs),
        }

    @property
    def is_robosuite(self) -> bool:
        return self.type == ROBOSUITE_TYPE

    @property
    def control_hz(self) -> float | None:
        """Steps per second, if they are told."""
        stated = self.env_kwargs.get("control_freq")
        return float(stated) if is_number(stated) and stated > 0 else None

    @property
    def robots(self) -> list[str]:
        robots = self.env_kwargs.get("robots", [])
        return [robots] if isinstance(robots, str) else [str(robot) for robot in robots]

    @property
    def is_before_1_5(self) -> bool:
        """Whether robosuite was older than 1.5; without a version, the controller's form decides."""
        if self.env_version is not None:
            try:
                return tuple(int(part) for part in self.env_version.split(".")[:2]) < (1, 5)
            except ValueError:
                pass
        return any(config.get("type") in PARTS for config in self._configs())

    @property
    def controllers(self) -> list[Settings]:
        """The settings of every arm's controller; empty where the file leaves them to robosuite."""
        return [part for config in self._configs() for part in self._arms(config)]

    @property
    def kind(self) -> str | None:
        """``absolute`` or ``delta``: the kind of actions of the arms' controllers; ``None``: not known."""
        if not self.is_robosuite:
            return None
        kinds = {_kind(part) for part in self.controllers}
        if not kinds:  # a robot's own controller: since 1.5 OSC_POSE's deltas
            return None if self.is_before_1_5 or not self.env_kwargs else "delta"
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def action_dim(self) -> int | None:
        """Numbers that an action must have, if the description determines it."""
        kwargs = self.env_kwargs
        plain_hands = kwargs.get("gripper_types", "default") in ("default", None)
        if not self.is_robosuite or not plain_hands or set(self.robots) - set(ONE_COMMAND_GRIPPERS):
            return None
        parts = self.controllers
        if not parts or any(part["type"] not in WIDTHS for part in parts):
            return None
        if any(part.get("impedance_mode", "fixed") != "fixed" for part in parts):
            return None
        per_arm = [WIDTHS[part["type"]] + 1 for part in parts]
        return per_arm[0] * len(self.robots) if len(parts) == 1 else sum(per_arm)

    def require_width(self, width: int, where: str, *others: int) -> None:
        """Raises ``InputError`` if actions of that many numbers can't be the environment's."""
        wanted = self.action_dim
        if wanted is not None and width not in (wanted, *others):
            controllers = " and ".join(sorted({part["type"] for part in self.controllers}))
            raise InputError(
                f"{where} has {width} numbers per step, but {controllers} of {', '.join(self.robots)} takes "
                f"{wanted}: correct controller_configs in env_args, or name the task that it is for"
            )

    def with_kind(self, kind: str) -> EnvArgs:
        """The same environment with controllers that take absolute poses in the world, or deltas.

        Raises:
            InputError: an arm's controller isn't OSC_POSE, the only one that takes both.
        """
        in_world = all(self._frame(part) == "world" for part in self.controllers)
        if kind == self.kind and (kind == "delta" or in_world):
            return self
        if not self.controllers:
            raise InputError(f"{self.where}: env_args name no controller: add controller_configs, OSC_POSE's")
        new = replace(self, env_kwargs=copy.deepcopy(self.env_kwargs))
        for part in new.controllers:
            frame = new._frame(part)
            if part["type"] != "OSC_POSE":
                raise InputError(
                    f"{self.where}: actions of {part['type']} can't be turned into {kind} ones, only "
                    "OSC_POSE's can: convert them as they are with actions=recorded"
                )
            if self.is_before_1_5:
                part["control_delta"] = kind == "delta"
            else:
                part.pop("control_delta", None)
                part |= {"input_type": kind, "input_ref_frame": "world" if kind == "absolute" else frame}
        return new

    def for_robosuite_1_5(self) -> tuple[Settings, list[str]]:
        """``env_kwargs`` for robosuite 1.5 with the meaning that these had where they were written, without
        pictures; and notes for the user.

        Raises:
            InputError: it isn't a robosuite environment.
        """
        if not self.is_robosuite:
            raise InputError(
                f"{self.where} was made in {self.env_name}, which isn't robosuite's (type {self.type}): "
                "convert it as it is with actions=recorded observations=recorded"
            )
        notes = []
        seen = ("camera_", "render", "has_renderer", "has_offscreen")
        kwargs = {key: value for key, value in self.env_kwargs.items() if not key.startswith(seen)}
        old = any("control_delta" in part for part in self.controllers)
        configs = copy.deepcopy(self._configs())
        translated = [self._translated(config) for config in configs]
        if old:
            kinds = sorted({_kind(part) for config in translated for part in self._arms(config)})
            notes.append(
                f"{self.where}: controller_configs with control_delta are an older robosuite's, 1.5 ignores "
                f"it; taken as input_type={' and '.join(kinds)} in the world's frame"
            )
        if translated:
            kwargs["controller_configs"] = translated[0] if len(translated) == 1 else translated
        if self.is_before_1_5:
            # Earlier versions computed the dynamics twice per physics step.
            kwargs["lite_physics"] = False
        quiet = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False}
        return {**kwargs, **quiet, "use_object_obs": True, "ignore_done": True, "hard_reset": True}, notes

    def describe(self) -> dict[str, str]:
        """A description by topic, for a table."""
        rows = {"environment": self.env_name}
        if self.is_robosuite:
            unknown = "before 1.5" if self.is_before_1_5 else "version unknown"
            rows["robosuite"] = self.env_version or unknown
            rows["robots"] = ", ".join(self.robots) or "unknown"
            rows["controller"] = ", ".join(
                f"{part['type']}, {_kind(part)}, {self._frame(part)} frame" for part in self.controllers
            )
        if "control_freq" in self.env_kwargs:
            rows["control_hz"] = str(self.env_kwargs["control_freq"])
        return rows

    def _configs(self) -> list[Settings]:
        """Controller settings, one per robot, or one for all."""
        configs = self.env_kwargs.get("controller_configs")
        configs = [c for c in (configs if isinstance(configs, list) else [configs]) if c is not None]
        for config in configs:
            if not isinstance(config, dict):
                raise InputError(f"{self.where}: controller_configs must be settings, not {config!r}")
        return configs

    def _arms(self, config: Settings) -> Iterator[Settings]:
        """The arms' part of a robot's configuration."""
        if "body_parts" not in config:
            yield self._known(config, PARTS)
            return
        self._known(config, COMPOSITES)
        parts = config["body_parts"]
        if not isinstance(parts, dict) or not isinstance(parts.get("arms", {}), dict):
            raise InputError(f"{self.where}: body_parts must be settings by part, not {parts!r}")
        for name, part in {**parts, **parts.get("arms", {})}.items():
            if name in ("right", "left"):
                yield self._known(part, PARTS)

    def _known(self, config: Settings, types: tuple[str, ...]) -> Settings:
        kind = config.get("type") if isinstance(config, dict) else config
        if not isinstance(config, dict) or kind not in types:
            raise InputError(
                f"{self.where}: unknown controller {kind!r}{nearest(str(kind), types)}; correct env_args"
            )
        return config

    def _frame(self, part: Settings) -> str:
        """The frame of deltas and poses: by default the robot's base in 1.5, the world before."""
        return str(part.get("input_ref_frame", "world" if self.is_before_1_5 else "base"))

    def _translated(self, config: Settings) -> Settings:
        if "body_parts" in config:
            for part in self._arms(config):
                if "control_delta" in part:
                    part |= {"input_type": _kind(part), "input_ref_frame": self._frame(part)}
                    del part["control_delta"]
            nested = config["body_parts"].pop("arms", {})
            return {**config, "body_parts": {**config["body_parts"], **nested}}
        named = {RENAMED.get(key, key): value for key, value in config.items() if key != "control_delta"}
        part = NEEDED | named
        if config["type"].startswith("OSC"):
            part |= {"input_type": _kind(config), "input_ref_frame": self._frame(config)}
        return {"type": "BASIC", "body_parts": {"right": {**part, "gripper": {"type": "GRIP"}}}}


def _is_shallow(value: Any, left: int = DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not inner or (left > 0 and all(_is_shallow(one, left - 1) for one in inner))


def _kind(part: Settings) -> str:
    if "input_type" in part:
        return str(part["input_type"])
    return "delta" if part.get("control_delta", True) else "absolute"
