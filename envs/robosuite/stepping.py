"""robosuite's control step, without its overhead.

A control step is 25 physics substeps, and before each the arms' torques are computed afresh:

    tau = J' [lambda_p f; lambda_r m] + N' M (k (q_rest - q) - 2 sqrt(k) dq) + bias
    f, m = kp * error + kd * (0 - velocity)

with the hand's Jacobian J, the mass matrix M, the task-space inertias lambda and the null space N.
robosuite looks up each of these by name several times per substep, which takes longer than the physics.
Here they are looked up once per model.  Numbers stay the same to the last bit: the operations are the same
in the same order, on arrays of the same memory layout, since another layout takes another path through
BLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def fits(env: Any) -> bool:
    """Whether ``LeanStep`` does all that ``env.step`` does: fixed arms with one operational-space
    controller each, goals in the world's frame, position uncoupled from rotation, simple grippers, no
    episode end, no window."""
    from robosuite.environments.base import MujocoEnv
    from robosuite.environments.robot_env import RobotEnv

    cls = type(env)
    return (
        isinstance(env, RobotEnv)
        and cls.step is MujocoEnv.step
        and cls._pre_action is RobotEnv._pre_action
        and cls._post_action is MujocoEnv._post_action
        and env.lite_physics
        and env.ignore_done
        and not env.has_renderer
        and all(_is_simple(robot) for robot in env.robots)
    )


def _is_simple(robot: Any) -> bool:
    from robosuite.controllers.composite.composite_controller import CompositeController
    from robosuite.controllers.parts.arm.osc import OperationalSpaceController
    from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
    from robosuite.robots.fixed_base_robot import FixedBaseRobot

    def is_simple(name: str, part: Any) -> bool:
        if name not in robot.arms:
            return type(part) is SimpleGripController and part.interpolator is None
        return (
            type(part) is OperationalSpaceController
            and part.input_ref_frame == "world"
            and part.uncoupling
            and part.interpolator_pos is None
            and part.interpolator_ori is None
            and _is_run(part.qpos_index)
            and _is_run(part.qvel_index)
            and _is_run(robot._ref_actuators_indexes_dict[name])
            and _is_fixed(part)
        )

    parts = robot.part_controllers
    return (
        type(robot) is FixedBaseRobot
        and type(robot.composite_controller) is CompositeController
        and set(parts) == {*robot.arms, *(robot.get_gripper_name(arm) for arm in robot.arms)}
        and all(robot.enabled(name) and is_simple(name, part) for name, part in parts.items())
    )


def _is_run(indices: Sequence[int]) -> bool:
    """Whether indices are consecutive."""
    return list(indices) == list(range(indices[0], indices[0] + len(indices)))


def _is_fixed(part: Any) -> bool:
    """Whether the arm's base can't move: velocities are relative to it."""
    model = part.sim.model
    base = model.site_name2id(f"{part.naming_prefix}{part.part_name}_center")
    return bool(model.body_weldid[model.site_bodyid[base]] == 0)


class LeanStep:
    """Takes control steps of robosuite's ``env``, that ``fits``; keeps only places in MuJoCo's arrays, so
    another model needs a new one."""

    def __init__(self, env: Any) -> None:
        import mujoco

        self._env = env
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._step1, self._step2 = mujoco.mj_step1, mujoco.mj_step2
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._arms = [_Arm(robot, arm) for robot in env.robots for arm in robot.arms]
        self._grippers = [_Gripper(robot, arm) for robot in env.robots for arm in robot.arms]

    def __call__(self, action: NDArray[np.float64]) -> None:
        model, data = self._model, self._data
        for substep in range(self._substeps):
            self._step1(model, data)
            if substep == 0:
                self._set_goals(action)
            for arm in self._arms:
                arm.actuate()
            self._step2(model, data)
        for arm in self._arms:
            arm.part.new_update = True  # robosuite's controller knows the control step's start
        self._env.timestep += 1
        self._env.cur_time += self._env.control_timestep

    def _set_goals(self, action: NDArray[np.float64]) -> None:
        """By robosuite itself, since this happens once per control step."""
        start = 0
        for robot in self._env.robots:
            stop = start + robot.action_dim
            robot.composite_controller.set_goal(action[start:stop])
            start = stop
        for gripper in self._grippers:
            gripper.actuate()


class _Gripper:
    """A gripper; its actuators keep their command until the next control step."""

    def __init__(self, robot: Any, arm: str) -> None:
        name = robot.get_gripper_name(arm)
        self._part = robot.part_controllers[name]
        self._actuators = robot._ref_actuators_indexes_dict[name]
        self._low, self._high = np.array(robot.sim.model.actuator_ctrlrange[self._actuators]).T
        self._ctrl = robot.sim.data.ctrl

    def actuate(self) -> None:
        self._ctrl[self._actuators] = np.clip(self._part.run_controller(), self._low, self._high)


class _Arm:
    """Computes an arm's torques; MuJoCo's own arrays are views, always up to date."""

    def __init__(self, robot: Any, arm: str) -> None:
        import mujoco
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        self._jacobian_of, self._mass_of = mujoco.mj_jacSite, mujoco.mj_fullM
        self._opspace, self._rest_torques = opspace_matrices, nullspace_torques
        self._rotation_error = orientation_error
        self.part = part = robot.part_controllers[arm]
        sim = robot.sim
        model, data = sim.model._model, sim.data._data
        self._model, self._data = model, data
        self._site = site = sim.model.site_name2id(part.ref_name)
        self._position, self._rotation = data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
        self._dofs = dofs = _run(part.qvel_index)
        self._q, self._dq = data.qpos[_run(part.qpos_index)], data.qvel[dofs]
        self._all_dq, self._inertia, self._bias = data.qvel, data.qM, data.qfrc_bias[dofs]
        actuators = _run(robot._ref_actuators_indexes_dict[arm])
        self._ctrl = data.ctrl[actuators]
        self._low, self._high = np.array(model.actuator_ctrlrange[actuators]).T
        # Of the whole model, filled by MuJoCo, and of the arm's joints only.
        nv, n = model.nv, len(self._dq)
        self._all_jp, self._all_jr = np.zeros((3, nv)), np.zeros((3, nv))
        self._all_mass = np.zeros((nv, nv))
        self._jp, self._jr, self._j = np.zeros((3, n)), np.zeros((3, n)), np.zeros((6, n))
        self._mass = np.zeros((n, n), order="F")  # as robosuite's indexing leaves it
        self._velocity, self._error, self._wrench = np.zeros(6), np.zeros(6), np.zeros(6)

    def actuate(self) -> None:
        """Sets the torques towards the controller's goal, after ``mj_step1``."""
        part, dofs = self.part, self._dofs
        self._jacobian_of(self._model, self._data, self._all_jp, self._all_jr, self._site)
        self._mass_of(self._model, self._all_mass, self._inertia)
        self._jp[:] = self._j[:3] = self._all_jp[:, dofs]
        self._jr[:] = self._j[3:] = self._all_jr[:, dofs]
        self._mass[:] = self._all_mass[dofs, dofs]

        np.dot(self._all_jp, self._all_dq, out=self._velocity[:3])
        np.dot(self._all_jr, self._all_dq, out=self._velocity[3:])
        np.subtract(part.goal_pos, self._position, out=self._error[:3])
        self._error[3:] = self._rotation_error(part.goal_ori, self._rotation)
        desired = self._error * part.kp + -self._velocity * part.kd

        _, inertia_p, inertia_r, null_space = self._opspace(self._mass, self._j, self._jp, self._jr)
        np.dot(inertia_p, desired[:3], out=self._wrench[:3])
        np.dot(inertia_r, desired[3:], out=self._wrench[3:])
        torques = np.dot(self._j.T, self._wrench) + self._bias
        torques += self._rest_torques(self._mass, null_space, part.initial_joint, self._q, self._dq)
        torques.clip(self._low, self._high, out=self._ctrl)


def _run(indices: Sequence[int]) -> slice:
    """Consecutive indices as a slice, which gives views."""
    return slice(int(indices[0]), int(indices[0]) + len(indices))
