"""Every environment of the package: seeds, spaces, holding, bad actions, rates."""

from __future__ import annotations

import importlib.util
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from paradiffpolicy.environment import succeeded

IDS = sorted(name for name in gymnasium.registry if name.startswith("paradiffpolicy/"))
N_STEPS = 8


def make(name):
    if "PushT" not in name and importlib.util.find_spec("robosuite") is None:
        pytest.skip("robosuite isn't installed")
    return gymnasium.make(name)


@pytest.fixture(scope="module", params=IDS)
def env(request):
    """One of each: robosuite's take a second to make."""
    env = make(request.param)
    yield env
    env.close()


def actions(env, seed=0):
    """Small random motions around the present pose."""
    draw = np.random.default_rng(seed)
    scale = (env.action_space.high - env.action_space.low).min() / 40
    return [env.unwrapped.hold_action + draw.normal(0, scale, env.action_space.shape) for _ in range(N_STEPS)]


def run(env, seed, chosen):
    """All results of an episode's steps."""
    out = [env.reset(seed=seed)]
    return out + [env.step(action) for action in chosen]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:-1] == b[1:-1]
        assert a[-1].keys() == b[-1].keys()
        for key in a[-1]:
            np.testing.assert_array_equal(a[-1][key], b[-1][key])


def copied(outs):
    """Results whose observations and infos are copies."""
    return [
        (np.array(out[0]), *out[1:-1], {key: np.array(value) for key, value in out[-1].items()})
        for out in outs
    ]


def test_all_are_registered():
    tasks = ("PushT", "PushTDynamic", "Lift", "Can", "Square", "Transport", "ToolHang")
    assert sorted(f"paradiffpolicy/{task}-v0" for task in tasks) == IDS


@pytest.mark.parametrize("name", ["paradiffpolicy/PushT-v0", "paradiffpolicy/Can-v0"])
def test_gymnasiums_checker_passes(name):
    """robosuite's tasks are one class."""
    with make(name) as env, warnings.catch_warnings():
        warnings.simplefilter("error")
        # Not wanted here: actions are in metres and pixels.
        warnings.filterwarnings("ignore", message=".*we recommend using a symmetric.*")
        check_env(env.unwrapped, skip_close_check=True, skip_render_check=True)


def test_a_seed_is_an_episode(env):
    """Bit by bit, after another episode, whose seed gives another; in another instance: ``test_stepping``.

    What was returned never changes, since it isn't the environment's own memory; observations are within the
    space and of its type.
    """
    env.reset(seed=3)
    chosen = actions(env)
    outs = run(env, 3, chosen)
    first = copied(outs)
    assert not np.array_equal(env.reset(seed=4)[0], first[0][0])
    env.step(chosen[0])
    assert_same(first, run(env, 3, chosen))
    assert_same(first, outs)
    for observation, *_ in outs:
        assert observation in env.observation_space
        assert observation.dtype == env.observation_space.dtype


def test_without_a_seed_starts_differ_but_follow_from_the_first(env):
    def starts():
        return [env.reset(seed=5)[0], env.reset()[0]]

    first, again = starts(), starts()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(*first)


def test_holding_holds(env):
    """``hold_action`` is an action, and keeps the controlled point where it is."""
    env.reset(seed=0)
    for action in actions(env):
        env.step(action)
    for _ in range(10):  # it may still be moving
        env.step(env.unwrapped.hold_action)
    before = env.unwrapped.hold_action
    assert before in env.action_space
    env.step(before)
    step = np.abs(env.unwrapped.hold_action - before) / (env.action_space.high - env.action_space.low)
    assert step.max() < 0.01
    # other actions are refused
    for bad in (np.nan, np.inf):
        action = np.array(before)
        action[0] = bad
        with pytest.raises(ValueError, match="finite"):
            env.unwrapped.step(action)


def test_its_rate_and_its_infos_are_known(env):
    _, info = env.reset(seed=0)
    assert env.unwrapped.control_hz == env.unwrapped.metadata["render_fps"] > 0
    assert all(isinstance(value, np.ndarray | float | bool) for value in info.values())
    assert succeeded(False, info) is False  # it says so, rather than nothing
