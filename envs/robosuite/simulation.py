"""robosuite's simulation, seeded, observed as of now, saved and restored exactly."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .camera import VARIABLES
from .mjcf import parsed, require_own_files
from .stepping import LeanStep, fits

SETUP = "scripts/setup robosuite, or pip install 'paradiffpolicy[robosuite]'"

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Position ``[3]`` and rotation matrix ``[3, 3]``."""


class MissingRobosuiteError(ImportError):
    """robosuite, or a package that it needs, isn't installed."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a simulation: with the same actions, the same future.

    Attributes:
        name: of the simulation, robosuite's.
        model: MJCF; objects' sizes may differ from reset to reset.
        physics: MuJoCo's integration state: time, positions, velocities, the solver's warm start, …
        arms: per arm, the gripper's last command, filtered; the posture that the controller's null space
            prefers; position ``[3]`` and rotation ``[3, 3]`` of its goal.
        step: control steps since the reset.
        time: seconds since the reset, as robosuite counts them.
    """

    name: str
    model: str
    physics: NDArray[np.float64]
    arms: list[tuple[NDArray[np.float64], ...]]
    step: int
    time: float


class Simulation:
    """A robosuite environment; actions are those of its controllers.

    Args:
        name: robosuite's, as ``NutAssemblySquare``.
        kwargs: for ``robosuite.make``; robomimic's ``env_kwargs``.

    Raises:
        MissingRobosuiteError: robosuite can't be imported.
        ValueError: robosuite doesn't know the name, the robot or the controller.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        robosuite = import_robosuite()
        self.name, self.kwargs = name, dict(kwargs)
        try:
            self._env = robosuite.make(name, **copy.deepcopy(self.kwargs))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"robosuite can't make {name!r}: {str(error) or type(error).__name__}")
        self._env.set_xml_processor(self._see_built)
        self._keeps_scene, self._friction, self._scaled = False, 1.0, None
        self._model = str(self._env.model.get_xml())
        self._take_over()

    def reset(self, seed: int) -> None:
        """Starts the seed's episode, independent of all earlier ones."""
        env, start = self._env, np.random.default_rng(seed).bit_generator.state
        env.rng.bit_generator.state = start  # in place: placement samplers hold the generator itself
        env._observables = self._sensors  # it sets them up anew
        # Where building the scene draws nothing, the present one is kept: compiling it takes as long as
        # thirty steps.
        env.hard_reset = not self._keeps_scene
        env.reset()
        if env.hard_reset:
            self._keeps_scene = self._after_building == start
            self._model = str(env.model.get_xml())
        self._take_over()
        # The solver starts from its last solution, also from one before the reset.
        self.mujoco_data.qacc_warmstart[:] = 0
        env.sim.forward()
        self._forget_derived()

    def step(self, action: NDArray[np.float64]) -> float:
        """Takes a control step with the controllers' action ``[action_dim]``; returns the reward after it."""
        import mujoco

        action = np.array(action, dtype=np.float64)
        self.require_size(action.shape)
        self._advance(action)
        # Physics have integrated positions, but not yet computed where bodies are, which changes no future.
        mujoco.mj_kinematics(self.mujoco_model, self.mujoco_data)
        return float(self._env.reward(action))

    def position(self, joint: str) -> NDArray[np.float64]:
        """Where the body of a free joint is, in the world, ``[3]``."""
        first = self.mujoco_model.joint(joint).qposadr[0]
        return np.array(self.mujoco_data.qpos[first : first + 3])

    def push(self, joint: str, velocity: NDArray[np.float64]) -> None:
        """Adds to the velocity of the body of a free joint ``[2]``, horizontally, in m/s."""
        first = self.mujoco_model.joint(joint).dofadr[0]
        self.mujoco_data.qvel[first : first + 2] += velocity

    def require_size(self, shape: tuple[int, ...]) -> None:
        """Raises ``ValueError`` unless it is the shape of an action."""
        if shape != (self.action_dim,):
            numbers = " x ".join(map(str, shape))
            raise ValueError(
                f"an action has {numbers} numbers; the controllers take {self.action_dim} numbers"
            )

    def observations(self) -> dict[str, NDArray[np.float64]]:
        """All of robosuite's observations as of now, by name; and robomimic's ``object``, all those of
        objects in one vector.

        robosuite's own observations are taken at the start of the control step, and relative ones even
        before.  Here sensors are read directly; those that use others' values twice.
        """
        values: dict[str, Any] = {}
        for name in (*self._observed, *self._relative):
            values[name] = np.array(self._sensors[name]._sensor(values), dtype=np.float64)
        parts = [values[name].reshape(-1) for name in self._objects]
        return {**values, "object": np.concatenate(parts or [np.zeros(0)])}

    @property
    def success(self) -> bool:
        return bool(self._env._check_success())

    @property
    def action_dim(self) -> int:
        return int(self._env.action_dim)

    @property
    def model(self) -> str:
        """The scene's MJCF, robomimic's ``model_file``: the text it was built from, since MuJoCo's own is
        rounded."""
        return self._model

    @property
    def states(self) -> NDArray[np.float64]:
        """``[1 + nq + nv]``: time, positions, velocities; robomimic's ``states``."""
        return np.array(self._env.sim.get_state().flatten())

    @property
    def mujoco_model(self) -> Any:
        """``mujoco.MjModel``."""
        return self._env.sim.model._model

    @property
    def mujoco_data(self) -> Any:
        """``mujoco.MjData``."""
        return self._env.sim.data._data

    def goals(self) -> list[Pose]:
        """Each controller's goal, in the world."""
        poses = []
        for _, _, part in self._arms():
            origin, turn = _frame(part)
            poses.append((origin + turn @ part.goal_pos, turn @ part.goal_ori))
        return poses

    def hands(self) -> list[Pose]:
        """Each arm's hand (the site that its controller moves), in the world."""
        data = self._env.sim.data
        return [
            (np.array(data.get_site_xpos(part.ref_name)), np.array(data.get_site_xmat(part.ref_name)))
            for _, _, part in self._arms()
        ]

    def reset_to(self, model: str, states: NDArray[np.float64]) -> None:
        """Goes to a recorded state ``[1 + nq + nv]``, with controllers and grippers at rest: robomimic's
        way to start a replay.  ``save`` and ``restore`` are exact.

        Raises:
            ValueError: the model can't be built, or the state is of another size.
        """
        self.reset_to_standard_posture(model, states)
        for _, _, part in self._arms():
            # Null spaces prefer an episode's first posture, so a replay from the start needs it.
            part.update_initial_joints(self.mujoco_data.qpos[part.qpos_index])

    def reset_to_standard_posture(self, model: str, states: NDArray[np.float64]) -> None:
        """``reset_to``, but null spaces prefer the robot's standard posture: for episodes that started with
        such a reset themselves, as robosuite's and robomimic's tools record."""
        self._load(model)
        self.place(states)

    def place(self, states: NDArray[np.float64]) -> None:
        """Goes to a recorded state ``[1 + nq + nv]`` of the present scene; ``ValueError``: of another one."""
        if states.shape != self.states.shape:
            raise ValueError(f"a state of {states.shape[0]} numbers; the model has {self.states.shape[0]}")
        self._env.sim.set_state_from_flattened(np.asarray(states, dtype=np.float64))
        self.mujoco_data.qacc_warmstart[:] = 0  # as after a reset
        self._env.sim.forward()
        for _, _, part in self._arms():
            part.update(force=True)
            part.reset_goal()
        self._forget_derived()

    def pursue(self, action: NDArray[np.float64]) -> None:
        """Sets the goals that ``step`` would set, without moving; ``ValueError``: see ``require_…``."""
        self.require_size(action.shape)
        self.require_pose_actions()
        for (_, _, part), arm in zip(self._arms(), action.reshape(-1, 7), strict=True):
            part.update(force=True)
            part.set_goal(arm[:6])

    def deltas_to(self, poses: list[Pose]) -> list[NDArray[np.float64]]:
        """Per arm, the delta ``[6]`` over its scale whose goal is a pose in the world; beyond ±1 where that
        is farther than a step goes."""
        from scipy.spatial.transform import Rotation

        deltas = []
        for (_, _, part), (position, rotation), (at, hand) in zip(
            self._arms(), poses, self.hands(), strict=True
        ):
            _, turn = _frame(part)
            turned = Rotation.from_matrix(turn.T @ rotation @ hand.T @ turn).as_rotvec()
            moved = np.concatenate((turn.T @ (position - at), turned))
            low, high = np.asarray(part.output_min), np.asarray(part.output_max)
            share = (moved - low) / (high - low)
            deltas.append(part.input_min + share * (np.asarray(part.input_max) - part.input_min))
        return deltas

    def require_pose_actions(self) -> None:
        """Raises ``ValueError`` unless an action is, for each arm in turn, 6 numbers for the hand's pose
        and 1 for the gripper."""
        for robot, arm, part in self._arms():
            hand = part.control_dim if part.name == "OSC_POSE" else 0
            gripper = robot.gripper[arm].dof if robot.has_gripper[arm] else 0
            if (hand, gripper) != (6, 1):
                raise ValueError(
                    f"{robot.name}'s {arm} arm isn't moved by poses and one gripper command, but by "
                    f"{part.name}: only OSC_POSE's actions have a meaning in the world"
                )

    def scale_friction(self, factor: float) -> None:
        """Multiplies the sliding friction of every contact of robosuite's scenes by a factor, from now on."""
        self._friction = factor
        self._scale_friction()

    def save(self) -> Snapshot:
        """The whole state, for ``restore``."""
        import mujoco

        size = mujoco.mj_stateSize(self.mujoco_model, mujoco.mjtState.mjSTATE_INTEGRATION)
        physics = np.empty(size)
        mujoco.mj_getState(self.mujoco_model, self.mujoco_data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        arms = [
            tuple(map(np.array, (r.gripper[arm].current_action, p.initial_joint, p.goal_pos, p.goal_ori)))
            for r, arm, p in self._arms()
        ]
        return Snapshot(
            self.name, self.model, physics, arms, int(self._env.timestep), float(self._env.cur_time)
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot: the same actions then give the same numbers, bit by bit.

        Raises:
            ValueError: it is another task's.
        """
        import mujoco

        if snapshot.name != self.name:
            raise ValueError(f"the snapshot is of {snapshot.name}, this is {self.name}")
        if snapshot.model != self.model:
            self._load(snapshot.model)
        state = mujoco.mjtState.mjSTATE_INTEGRATION
        model, data = self.mujoco_model, self.mujoco_data
        mujoco.mj_setState(model, data, snapshot.physics, state)
        mujoco.mj_forward(model, data)  # derived quantities; it changes the solver's warm start
        mujoco.mj_setState(model, data, snapshot.physics, state)
        for (robot, arm, part), values in zip(self._arms(), snapshot.arms, strict=True):
            gripper, joints, position, rotation = (np.array(value) for value in values)
            robot.gripper[arm].current_action, part.initial_joint = gripper, joints
            part.goal_pos, part.goal_ori = position, rotation
        self._forget_derived()
        self._env.timestep, self._env.cur_time = snapshot.step, snapshot.time

    def close(self) -> None:
        self._env.close()

    def _load(self, model: str) -> None:
        """Builds another scene; after a ``ValueError``, ``reset`` builds its own again."""
        env = self._env
        env._observables, env.hard_reset, self._keeps_scene = self._sensors, True, False
        parsed(model)
        try:
            edited = env.edit_model_xml(model)  # finds robosuite's assets here
            require_own_files(edited, Path(import_robosuite().__file__).parent / "models" / "assets")
            env.reset_from_xml_string(edited)
        except (AssertionError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"the model can't be built: {(str(error).splitlines() or [''])[0]}")
        finally:
            env.deterministic_reset = False  # as robosuite leaves it, unless it fails
        self._model = model
        self._take_over()

    def _forget_derived(self) -> None:
        """Makes controllers compute anew: else the next torques use values of another moment."""
        for _, _, part in self._arms():
            part.new_update = True

    def _see_built(self, xml: str) -> str:
        """Notes the generator's state when the scene is built and nothing is placed yet."""
        self._after_building = self._env.rng.bit_generator.state
        return xml

    def _scale_friction(self) -> None:
        """Of all geoms, since a contact has the larger friction of two."""
        model = self.mujoco_model
        if model is not self._scaled:
            self._scaled, self._own_friction = model, model.geom_friction[:, 0].copy()
        model.geom_friction[:, 0] = self._friction * self._own_friction

    def _take_over(self) -> None:
        """Takes over from robosuite, after each of its resets, the control step and the observables, which
        it would read 25 times per step."""
        self._scale_friction()
        self._advance = LeanStep(self._env) if fits(self._env) else self._env.step
        self._sensors = dict(self._env._observables)
        self._env._observables = {}
        self._observed = [name for name, sensor in self._sensors.items() if sensor.is_enabled()]
        self._relative = [name for name in self._observed if _uses_others(self._sensors[name])]
        objects = {
            k for k, sensor in self._sensors.items() if sensor.modality == "object" and sensor.is_active()
        }
        self._objects = [name for name in self._observed if name in objects]

    def _arms(self) -> list[tuple[Any, str, Any]]:
        """Each arm's robot, name and controller."""
        return [(robot, arm, robot.part_controllers[arm]) for robot in self._env.robots for arm in robot.arms]


class _Asked(dict[str, Any]):
    """Notes whether a value has been looked up."""

    asked = False

    def __contains__(self, key: object) -> bool:
        self.asked = True
        return False


def _uses_others(sensor: Any) -> bool:
    """Whether a sensor's value depends on others' values."""
    sensor._sensor(values := _Asked())
    return values.asked


def _frame(part: Any) -> Pose:
    """Origin and axes, in the world, of the frame of a controller's goals."""
    if part.input_ref_frame == "world":
        return np.zeros(3), np.eye(3)
    return np.asarray(part.origin_pos), np.asarray(part.origin_ori)


def import_robosuite() -> Any:
    """Imports robosuite without its warnings.

    Variables that say how to draw are hidden meanwhile: MuJoCo and robosuite refuse to be imported for some
    of their values, also where nothing is drawn, and robosuite chooses ``MUJOCO_GL`` for the whole process.

    Raises:
        MissingRobosuiteError: it isn't installed, or with a MuJoCo that it doesn't work with.
    """
    if find_spec("robosuite") is None or find_spec("mujoco") is None:
        raise MissingRobosuiteError(f"robosuite isn't installed: {SETUP}")
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    logger = logging.getLogger("robosuite_logs")
    logger.disabled = True  # warns of optional parts that aren't installed, and of every config it reads
    try:
        import robosuite
    except ImportError as error:
        raise MissingRobosuiteError(f"robosuite can't be imported ({error}): {SETUP}")
    finally:
        logger.disabled = False
        os.environ.pop("MUJOCO_GL", None)
        os.environ.update(hidden)
    logger.setLevel(logging.ERROR)
    return robosuite
