"""robomimic's tasks on robosuite: Lift, Can, Square, Transport and ToolHang, with Panda arms.

Lengths are in metres, in the world's frame, angles in radians, times in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .camera import SceneCamera, View
from .pushes import Push, PushRange
from .rotation import pose_action, six_d
from .simulation import Simulation, Snapshot, import_robosuite

PHYSICS_HZ = 500
CONTROL_HZ = 20
REACH = 10.0
"""Metres: bound of all observations."""
WORKSPACE = 1.5
"""Metres: absolute actions are kept within this distance of the origin, in each coordinate."""
IMAGE_SIZE = 84
"""Pixels, of observed pictures."""


@dataclass(frozen=True)
class RobosuiteTask:
    """One of robomimic's tasks.

    Attributes:
        name: robosuite's name of it.
        view: of ``picture``: shows what the task is about, from the front.
        n_arms: one Panda each.
        cameras: of robomimic's image observation, beside those in the hands.
        pushed: the joint of the object that can be pushed, if any.
    """

    name: str
    view: str | View
    n_arms: int = 1
    cameras: tuple[str, ...] = ("agentview",)
    pushed: str | None = None


TASKS = {
    "lift": RobosuiteTask(
        "Lift", View((-0.02, 0.0, 0.89), 0.7, azimuth=180, elevation=-10), pushed="cube_joint0"
    ),
    "can": RobosuiteTask("PickPlaceCan", View((0.1, 0.05, 0.88), 1.5, azimuth=180, elevation=-30)),
    "square": RobosuiteTask("NutAssemblySquare", View((0.08, 0.08, 0.88), 1.1, azimuth=215, elevation=-20)),
    "transport": RobosuiteTask("TwoArmTransport", "frontview", 2, ("shouldercamera0", "shouldercamera1")),
    "tool_hang": RobosuiteTask("ToolHang", "agentview", cameras=("sideview",)),
}


def observation_keys(n_arms: int) -> list[str]:
    """robomimic's low-dim observation, in its order."""
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    return ["object", *(f"robot{arm}_{part}" for arm in range(n_arms) for part in parts)]


def env_kwargs(task: RobosuiteTask, action_type: str, control_hz: float) -> dict[str, Any]:
    """The task's arguments of ``robosuite.make``; robomimic's ``env_kwargs``.

    The operational-space controller's goals are in the world's frame, as robomimic's are.
    """
    import_robosuite()
    from robosuite.controllers import load_composite_controller_config

    config = load_composite_controller_config(controller="BASIC")
    arm = config["body_parts"]["right"] | {"input_type": action_type, "input_ref_frame": "world"}
    return {
        "robots": ["Panda"] * task.n_arms,
        "controller_configs": {**config, "body_parts": {"right": arm}},
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "reward_shaping": False,
        "control_freq": int(control_hz),
        "ignore_done": True,
        "hard_reset": True,
    }


class RobosuiteEnv(gymnasium.Env[Any, NDArray[np.float64]]):
    """One of robomimic's tasks.

    Action, by ``action_type``, for each arm in turn:
        ``absolute``: ``[10]``, the hand's goal: position in the world, the first two rows of its rotation,
        gripper (-1 opens, 1 closes).  Positions are clipped to the workspace.
        ``delta``: ``[7]``, the hand's motion: position over 0.05 m, rotation vector over 0.5 rad, gripper;
        clipped to ±1.

    Observation, read at the end of the control step, by ``obs_type``:
        ``lowdim``: ``object`` as robosuite describes the task's objects, then for each arm the hand's
        position ``[3]``, its quaternion ``[4]`` (x, y, z, w) and the fingers' positions ``[2]``:
        robomimic's low-dim observation.
        ``image``: dict of robomimic's cameras, ``agentview_image``, ``robot0_eye_in_hand_image``, …, each
        ``[84, 84, 3]`` uint8 RGB, and of the arms' parts of the above, ``robot0_eef_pos``, ….

    Reward: 1 when the task is done, else 0; then the episode terminates.

    ``reset(seed=s)`` draws a start that depends on the seed alone;
    ``reset(options={"snapshot": Snapshot})`` goes back to ``save()``'s, exactly;
    ``reset(options={"model": MJCF, "states": [...]})`` to a state that robomimic recorded.
    ``info`` has what demonstrations record, the observation's parts by name and ``states``; and ``success``.

    ``push``: of Lift, arguments of a ``PushRange``, from which a push is drawn at the reset: the cube gets it
    when the hand first comes near; None: none is given.

    Raises:
        MissingRobosuiteError: robosuite isn't installed.
        MissingGLError: a picture can't be drawn: neither EGL nor OSMesa can be used.
        ValueError: an argument is out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        task: str,
        action_type: str = "absolute",
        control_hz: float = CONTROL_HZ,
        render_mode: str | None = None,
        render_size: int = 256,
        obs_type: str = "lowdim",
        push: Mapping[str, Any] | None = None,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"{task=} must be one of {sorted(TASKS)}")
        if action_type not in ("absolute", "delta"):
            raise ValueError(f"{action_type=} must be absolute or delta")
        if control_hz <= 0 or (PHYSICS_HZ / control_hz) % 1 or control_hz % 1:
            raise ValueError(
                f"{control_hz=} must be a whole number that divides the physics' {PHYSICS_HZ} Hz"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"{render_mode=} must be one of {self.metadata['render_modes']} or None")
        if push is not None and TASKS[task].pushed is None:
            raise ValueError(f"{push=}: nothing of {task} can be pushed, only lift's cube")
        self._pushes = None if push is None else PushRange(**push)
        self._push: Push | None = None
        self.task, self.action_type, self.control_hz = task, action_type, float(control_hz)
        self.metadata = {**self.metadata, "render_fps": control_hz}
        self.render_mode, self.render_size = render_mode, render_size
        self._camera, self._n_arms = SceneCamera(), TASKS[task].n_arms
        self._keys = observation_keys(self._n_arms)
        self.simulation = Simulation(TASKS[task].name, env_kwargs(TASKS[task], action_type, control_hz))
        self._observe, self.observation_space = self._observation(obs_type)
        arm = [WORKSPACE] * 3 + [1.0] * 7 if action_type == "absolute" else [1.0] * 7
        self._bound = np.array(arm * self._n_arms)
        self.action_space = spaces.Box(-self._bound, self._bound, dtype=np.float64)
        self._grippers = np.full(self._n_arms, -1.0)

    @property
    def env_args(self) -> dict[str, Any]:
        """robomimic's description of this environment."""
        return {
            "env_name": self.simulation.name,
            "env_version": str(import_robosuite().__version__),
            "type": 1,  # robosuite's number in robomimic
            "env_kwargs": self.simulation.kwargs,
        }

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._grippers = np.full(self._n_arms, -1.0)
        if options and "snapshot" in options:
            self.simulation.restore(options["snapshot"])
        elif options and "states" in options:
            self.simulation.reset_to(options["model"], np.asarray(options["states"]))
        else:
            self.simulation.reset(seed if seed is not None else int(self.np_random.integers(2**31)))
        if self._pushes is not None:
            self._push = self._pushes.draw(self.np_random)
        info = self._info()
        return self._observe(info), info

    def step(self, action: NDArray[np.float64]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self._bound.shape or not np.isfinite(action).all():
            raise ValueError(f"action must be {len(self._bound)} finite numbers, got {action}")
        self._grippers = action.reshape(self._n_arms, -1)[:, -1].clip(-1, 1)
        self._push_object()
        self.simulation.step(self.command(action))
        info = self._info()
        return self._observe(info), float(info["success"]), info["success"], False, info

    def save(self) -> Snapshot:
        """The whole state, for ``reset(options={"snapshot": ...})``."""
        return self.simulation.save()

    def change_friction(self, change: float) -> None:
        """Multiplies the sliding friction of all contacts by ``1 + change``: -0.5 halves it.

        Raises:
            ValueError: it is below -1.
        """
        if not -1 <= change < np.inf:
            raise ValueError("of its friction a contact can lose all, -1, but not more")
        self.simulation.scale_friction(1 + change)

    @property
    def hold_action(self) -> NDArray[np.float64]:
        """The action that keeps the hands where they are, ``[A]``."""
        if self.action_type == "delta":
            return np.concatenate([[*np.zeros(6), gripper] for gripper in self._grippers])
        hands = zip(self.simulation.hands(), self._grippers, strict=True)
        return np.concatenate([[*p, *six_d(Rotation.from_matrix(r)), gripper] for (p, r), gripper in hands])

    def render(self) -> NDArray[np.uint8]:
        """``[render_size, render_size, 3]``."""
        return self.picture(self.render_size)

    def picture(self, size: int) -> NDArray[np.uint8]:
        """The scene as RGB, ``[size, size, 3]`` uint8."""
        return self._draw(TASKS[self.task].view, size)

    def close(self) -> None:
        self._camera.close()
        self.simulation.close()

    def command(self, action: NDArray[np.float64]) -> NDArray[np.float64]:
        """The action in the form of robosuite's controllers."""
        if self.action_type == "delta":
            return action
        arms = action.clip(-self._bound, self._bound).reshape(-1, 10)
        arms[:, 3:9] = action.reshape(-1, 10)[:, 3:9]  # only their directions count
        return pose_action(arms.reshape(-1))

    def _push_object(self) -> None:
        """Gives the push, if the hand is near enough."""
        joint = TASKS[self.task].pushed
        if self._push is None or joint is None:
            return
        (hand, _), *_ = self.simulation.hands()
        if np.linalg.norm(hand - self.simulation.position(joint)) < self._push.distance:
            self.simulation.push(joint, self._push.velocity)
            self._push = None

    def _info(self) -> dict[str, Any]:
        seen, simulation = self.simulation.observations(), self.simulation
        parts = {key: seen[key] for key in self._keys}
        return {**parts, "states": simulation.states, "success": simulation.success}

    def _draw(self, view: str | View, size: int) -> NDArray[np.uint8]:
        simulation = self.simulation
        return self._camera.picture(simulation.mujoco_model, simulation.mujoco_data, view, size)

    def _observation(self, obs_type: str) -> tuple[Callable[[Mapping[str, Any]], Any], spaces.Space[Any]]:
        """The function that observes, given the parts, and the space of its observations."""

        def box(*keys: str) -> spaces.Box:
            return spaces.Box(-REACH, REACH, (sum(len(seen[key]) for key in keys),), np.float64)

        seen, arms = self.simulation.observations(), self._keys[1:]
        in_hands = (f"robot{arm}_eye_in_hand" for arm in range(self._n_arms))
        views = {f"{view}_image": view for view in (*TASKS[self.task].cameras, *in_hands)}
        picture = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        kinds: dict[str, tuple[Callable[[Mapping[str, Any]], Any], spaces.Space[Any]]] = {
            "lowdim": (lambda info: np.concatenate([info[key] for key in self._keys]), box(*self._keys)),
            "image": (
                lambda info: (
                    {name: self._draw(view, IMAGE_SIZE) for name, view in views.items()}
                    | {key: np.array(info[key]) for key in arms}
                ),
                spaces.Dict(dict.fromkeys(views, picture) | {key: box(key) for key in arms}),
            ),
        }
        if obs_type not in kinds:
            raise ValueError(f"{obs_type=} must be one of {sorted(kinds)}")
        return kinds[obs_type]
