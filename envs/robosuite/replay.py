"""Recorded actions converted between deltas and poses, and played again.

An operational-space controller adds a delta to the hand's present pose, not to its previous goal.  So the
goal of a recorded delta follows exactly from the state recorded beside it, without physics, and a delta
from a goal.  ``follow`` finds out whether a whole episode can be played again.

Poses are in the world's frame: per arm, position ``[3]`` in metres, rotation vector ``[3]`` in radians,
gripper.  States are robomimic's: time, positions, velocities.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .mjcf import modern_model
from .simulation import Simulation, import_robosuite

ROUNDING = 1e-6
"""Rounding error by which a computed delta may exceed ±1."""
EXACT = 1e-5
"""A replay that stays this near (m, rad) has started from the recording's state."""


@dataclass(frozen=True)
class Followed:
    """The result of playing actions again.

    Attributes:
        error: ``[N - 1]``, the largest difference of a position (m, or rad) to the recorded state, after
            each action but the last.
        success: whether the task was done at any time.
    """

    error: NDArray[np.float64]
    success: bool

    @property
    def largest(self) -> float:
        return float(self.error.max(initial=0.0))


def supported(name: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Splits ``kwargs`` into those that the installed robosuite's environment takes and the others' names.

    Raises:
        MissingRobosuiteError: robosuite can't be imported.
        ValueError: it doesn't know the environment.
    """
    known = import_robosuite().environments.base.REGISTERED_ENVS
    if name not in known:
        raise ValueError(f"robosuite knows no environment {name!r}; it has {', '.join(sorted(known))}")
    names: set[str] = set()
    for base in known[name].__mro__:
        parameters = inspect.signature(base.__init__).parameters
        names |= set(parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    rest = sorted(set(kwargs) - names)
    return {key: value for key, value in kwargs.items() if key in names}, rest


def _visited(simulation: Simulation, model: str, states: NDArray[np.float64]) -> Iterator[int]:
    """Places the simulation in one recorded state after the other, and yields its index.

    Raises:
        ValueError: the model can't be built, or a state is of another size.
    """
    simulation.reset_to(modern_model(model), states[0])
    for step, state in enumerate(states):
        simulation.place(state)
        yield step


def to_poses(
    simulation: Simulation, model: str, states: NDArray[np.float64], actions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Converts actions ``[N, 7 n]``, of the simulation's kind, to the poses ``[N, 7 n]`` of their goals.

    Raises:
        ValueError: a state isn't one of the model, or actions aren't poses and gripper commands.
    """
    poses = np.array(actions, dtype=np.float64)
    for step in _visited(simulation, model, states):
        simulation.pursue(np.asarray(actions[step], dtype=np.float64))
        for arm, (position, rotation) in zip(poses[step].reshape(-1, 7), simulation.goals(), strict=True):
            arm[:3], arm[3:6] = position, Rotation.from_matrix(rotation).as_rotvec()
    return poses


def to_deltas(
    simulation: Simulation, model: str, states: NDArray[np.float64], poses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], int]:
    """Converts poses ``[N, 7 n]`` to deltas ``[N, 7 n]`` over their scale, clipped to ±1.

    Also returns the number of steps that clipping changed: these have nearer goals.

    Raises:
        ValueError: as ``to_poses``.
    """
    deltas = np.array(poses, dtype=np.float64)
    for step in _visited(simulation, model, states):
        simulation.require_pose_actions()
        simulation.require_size(deltas[step].shape)
        arms = deltas[step].reshape(-1, 7)
        goals = [(arm[:3], Rotation.from_rotvec(arm[3:6]).as_matrix()) for arm in arms.copy()]
        for arm, delta in zip(arms, simulation.deltas_to(goals), strict=True):
            arm[:6] = delta
    moves = deltas.reshape(len(deltas), -1, 7)[..., :6]
    clipped = (np.abs(moves) > 1 + ROUNDING).any(axis=(1, 2))
    np.clip(moves, -1, 1, out=moves)
    return deltas, int(clipped.sum())


def hands_at(
    simulation: Simulation, model: str, states: NDArray[np.float64]
) -> list[list[NDArray[np.float64]]]:
    """The hand's position ``[3]``, per state and arm.  Raises ``ValueError`` as ``to_poses``."""
    visited = _visited(simulation, model, states)
    return [[position for position, _ in simulation.hands()] for _ in visited]


def observations_at(
    simulation: Simulation, model: str, states: NDArray[np.float64], keys: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Observations ``[N, ...]`` by key in recorded states.

    Raises:
        ValueError: as ``to_poses``; a key isn't observed.
    """
    rows: dict[str, list[NDArray[np.float64]]] = {key: [] for key in keys}
    for _ in _visited(simulation, model, states):
        seen = simulation.observations()
        for key in keys:
            if key not in seen:
                known = ", ".join(sorted(seen))
                raise ValueError(f"the environment has no observation {key!r}; it has {known}")
            rows[key].append(seen[key])
    return {key: np.stack(values) for key, values in rows.items()}


def follow(
    simulation: Simulation, model: str, states: NDArray[np.float64], actions: NDArray[np.float64]
) -> Followed:
    """Plays actions ``[N, A]``, of the simulation's kind, from the first state on.

    Raises:
        ValueError: the model can't be built, or a state or action is of another size.
    """
    model = modern_model(model)
    simulation.reset_to(model, states[0])
    first = _follow(simulation, states, actions)
    if first.largest < EXACT:
        return first
    # The posture that the null space preferred isn't recorded: of the two possible ones, take the better.
    simulation.reset_to_standard_posture(model, states[0])
    second = _follow(simulation, states, actions)
    return min(first, second, key=lambda followed: followed.largest)


def _follow(simulation: Simulation, states: NDArray[np.float64], actions: NDArray[np.float64]) -> Followed:
    positions = slice(1, 1 + simulation.mujoco_model.nq)
    error, success = [], False
    for step, action in enumerate(actions):
        simulation.step(np.asarray(action, dtype=np.float64))
        success = success or simulation.success
        if step + 1 < len(states):
            error.append(np.abs(simulation.states[positions] - states[step + 1][positions]).max())
    return Followed(np.array(error), success)
