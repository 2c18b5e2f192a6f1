"""Our control step is robosuite's to the last bit, and resets forget earlier episodes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="robosuite isn't installed")

from paradiffpolicy.envs.robosuite.env import TASKS, env_kwargs
from paradiffpolicy.envs.robosuite.simulation import Simulation
from paradiffpolicy.envs.robosuite.stepping import LeanStep, fits

from .robosuite_envs import shared_env


def make(task, action_type="delta", **changes):
    return Simulation(TASKS[task].name, env_kwargs(TASKS[task], action_type, 20) | changes)


def downwards(env, n, seed):
    """Random actions ``[n, A]`` of the controllers, the first ones pushing onto the table."""
    draw, size = np.random.default_rng(seed), env.action_space.shape[0]
    if env.action_type == "delta":
        actions = draw.uniform(-1, 1, (n, size // 7, 7))
        actions[: n // 2, :, 2] -= 1
        return actions.clip(-1, 1).reshape(n, size)
    goals = np.tile(env.hold_action.reshape(-1, 10), (n, 1, 1))
    goals += draw.normal(0, 0.05, goals.shape)
    goals[:, :, 2] -= 0.012 * np.minimum(np.arange(n), n // 2)[:, None]
    goals[:, :, 9] = draw.choice([-1.0, 1.0], goals.shape[:2])
    return np.stack([env.command(goal) for goal in goals.reshape(n, size)])


def touched(simulation):
    """Whether a gripper touches something now."""
    model, data = simulation.mujoco_model, simulation.mujoco_data
    bodies = model.geom_bodyid[data.contact.geom].reshape(-1, 2)
    grippers = ["gripper" in model.body(int(body)).name for body in bodies.reshape(-1)]
    return any(np.array(grippers).reshape(-1, 2).sum(1) == 1)


def assert_same(one, other):
    """Snapshots."""
    np.testing.assert_array_equal(one.physics, other.physics)
    assert (one.model, one.step, one.time) == (other.model, other.step, other.time)
    for a, b in zip(one.arms, other.arms, strict=True):
        assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


@pytest.mark.parametrize(("action_type", "n", "seed"), [("delta", 40, 1), ("absolute", 30, 2)])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_robosuites_own(task, action_type, n, seed):
    """Bit by bit, from the same start, with the same actions."""
    env = shared_env(task, action_type)
    simulation = env.simulation
    assert isinstance(simulation._advance, LeanStep)
    env.reset(seed=seed)
    start, actions = simulation.save(), downwards(env, n, seed)
    runs, contacts = [], 0
    for step in (simulation._env.step, simulation._advance):
        simulation.restore(start)
        states = []
        for action in actions:
            step(action)
            states.append(simulation.states)
            contacts += touched(simulation)
        runs.append((states, simulation.save()))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])
    assert contacts > 5


def _arm(**changes):
    kwargs = env_kwargs(TASKS["lift"], "delta", 20)
    kwargs["controller_configs"]["body_parts"]["right"] |= changes
    return kwargs


@pytest.mark.parametrize(
    "change",
    {
        "coupled, in the base's frame, interpolated": lambda: _arm(
            uncouple_pos_ori=False, input_ref_frame="base", interpolation="linear"
        ),
        "joint torques": lambda: _arm(type="JOINT_TORQUE", output_max=1, output_min=-1),
        "wheels": lambda: _arm() | {"robots": ["PandaOmron"], "controller_configs": None},
    }.values(),
)
def test_other_configurations_are_left_to_robosuite(change):
    simulation = Simulation("Lift", change())
    assert simulation._advance == simulation._env.step
    before = simulation.states
    simulation.step(np.zeros(simulation.action_dim))
    assert simulation.states[0] == pytest.approx(before[0] + 0.05)


@pytest.mark.parametrize(
    ("whose", "name", "value"),
    [
        ("env", "lite_physics", False),
        ("env", "ignore_done", False),
        ("env", "has_renderer", True),
        ("arm", "uncoupling", False),
        ("arm", "input_ref_frame", "base"),
        ("arm", "interpolator_pos", object()),
        ("arm", "interpolator_ori", object()),
    ],
)
def test_each_setting_by_itself_is_left_to_robosuite(monkeypatch, whose, name, value):
    env = shared_env("lift", "delta").simulation._env
    assert fits(env)
    monkeypatch.setattr(env if whose == "env" else env.robots[0].part_controllers["right"], name, value)
    assert not fits(env)


def test_other_rates_take_other_numbers_of_substeps():
    simulation = make("lift", control_freq=100)
    before = simulation.states[0]
    simulation.step(np.zeros(7))
    assert simulation.states[0] == pytest.approx(before + 0.01)


def test_an_action_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the controllers take 7 numbers"):
        shared_env("lift", "delta").simulation.step(np.zeros(8))


@pytest.mark.parametrize(("task", "kept"), {"can": True, "lift": False}.items())
def test_a_reset_forgets_everything(task, kept):
    """A scene that no seed changes is kept; a new one would give the same numbers."""
    simulation, other = make(task), shared_env(task, "delta").simulation
    action = np.random.default_rng(0).uniform(-1, 1, 7)

    def episode(simulation):
        simulation.reset(seed=5)
        at_first = simulation.save(), simulation.observations()
        rewards = [simulation.step(action) for _ in range(4)]
        return *at_first, simulation.save(), rewards

    first = episode(simulation)
    assert simulation._keeps_scene == kept
    again = episode(simulation)
    other.reset(seed=3)  # its scene is of another seed
    other.step(action)
    elsewhere = episode(other)
    other.reset_to(first[0].model, first[0].physics[: len(other.states)])
    loaded = episode(other)
    for run in (again, elsewhere, loaded):
        assert_same(run[0], first[0])
        assert_same(run[2], first[2])
        assert run[3] == first[3]
        for name, value in first[1].items():
            np.testing.assert_array_equal(run[1][name], value, err_msg=name)


def test_the_solver_forgets_earlier_episodes(monkeypatch):
    simulation = shared_env("can", "delta").simulation
    starts, reset = [], simulation._env.reset
    for rubbish in (0.0, 1e3):

        def reset_and_leave(rubbish=rubbish):
            reset()
            simulation.mujoco_data.qacc_warmstart[:] += rubbish

        monkeypatch.setattr(simulation._env, "reset", reset_and_leave)
        simulation.reset(seed=0)
        starts.append(simulation.save())
    assert_same(*starts)


@pytest.mark.parametrize("ignore_done", [True, False], ids=["lean", "robosuite's"])
def test_a_snapshot_of_the_start_is_exact(ignore_done):
    """Controllers looked at the arm before the fingers were placed; nothing of that stays."""
    simulation = (
        shared_env("square", "delta").simulation if ignore_done else make("square", ignore_done=False)
    )
    simulation.reset(seed=2)
    snapshot = simulation.save()
    simulation.step(np.ones(7))
    want = simulation.save()
    simulation.restore(snapshot)
    simulation.step(np.ones(7))
    assert_same(simulation.save(), want)


@pytest.mark.parametrize("task", ["can", "transport"])
def test_relative_observations_are_of_now(task):
    """However often they are asked again."""
    simulation = shared_env(task, "delta").simulation
    simulation.reset(seed=0)
    simulation.step(np.ones(simulation.action_dim))
    seen = simulation.observations()
    sensors = {name: s for name, s in simulation._sensors.items() if s.is_enabled()}
    values = {}
    for _ in range(4):
        for name, sensor in sensors.items():
            values[name] = np.array(sensor._sensor(values), dtype=np.float64)
    for name in sensors:
        np.testing.assert_array_equal(seen[name], values[name], err_msg=name)
    assert len(simulation._relative) < len(sensors)
