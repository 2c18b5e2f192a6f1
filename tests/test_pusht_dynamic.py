"""PushT whose block, or target, drifts: by the seed alone, and stopped by walls."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.envs.pusht import GOAL_POSE, PushTEnv
from paradiffpolicy.envs.pusht_dynamic import DriftSchedule, PushTDynamicEnv

ALWAYS = {"rate": 100, "duration": (1e3, 1e3)}
FAR = (60.0, 60.0)
"""Where the pusher is out of the way."""


def dynamic(x=256.0, y=256.0, seed=0, angle=0.0, **options):
    """An environment with the block at rest somewhere, and the pusher far from it."""
    env = PushTDynamicEnv(**options)
    env.reset(seed=seed, options={"state": [*FAR, x, y, angle]})
    return env


def drifts_of(env, seed, chosen, every=1):
    """``drift`` after every so many steps."""
    env.reset(seed=seed)
    return np.array([env.step(action)[-1]["drift"] for action in chosen])[every - 1 :: every]


def test_the_drifts_depend_on_the_seed_alone():
    """Not on actions, nor on the rate of control; each seed has its own."""
    draw = np.random.default_rng(0)
    still, busy = np.full((100, 2), 60.0), draw.uniform(0, 512, (100, 2))
    env = PushTDynamicEnv(rate=1.0)
    first = drifts_of(env, 3, still)
    assert 5 < np.any(first, axis=1).sum() < 95 and len(np.unique(first, axis=0)) > 3
    np.testing.assert_array_equal(first, drifts_of(env, 3, busy))
    fast = drifts_of(PushTDynamicEnv(rate=1.0, control_hz=20), 3, np.repeat(busy, 2, axis=0), every=2)
    np.testing.assert_array_equal(first, fast)
    assert not np.array_equal(first, drifts_of(env, 4, still))
    env.reset(seed=3, options={"state": [*FAR, 256, 256, 0]})
    np.testing.assert_array_equal(first[:50], [env.step(a)[-1]["drift"] for a in still[:50]])


def test_resets_without_a_seed_dont_depend_on_how_long_the_last_episode_was():
    def second(n):
        env = PushTDynamicEnv(rate=5.0)
        env.reset(seed=1)
        for _ in range(n):
            env.step(np.full(2, 60.0))
        return env.reset()[0]

    np.testing.assert_array_equal(second(0), second(40))


def test_a_drifting_block_has_the_schedules_velocity():
    env = dynamic(speed=(40, 40), spin=0.5, **ALWAYS)
    before, after = (env.step(np.array(FAR))[-1] for _ in range(2))
    speed, spin = np.linalg.norm(after["drift"][:2]), after["drift"][2]
    assert speed == pytest.approx(40) and 0 < abs(spin) <= 0.5
    moved = (after["state"] - before["state"])[2:] * 10
    assert (moved[2] + np.pi) % (2 * np.pi) - np.pi == pytest.approx(spin, rel=1e-6)
    # Its own position isn't its center of gravity, around which it turns.
    centre = env._block.center_of_gravity
    assert np.linalg.norm(moved[:2] - after["drift"][:2]) <= abs(spin) * centre.length + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_walls_stop_what_drifts(seed):
    """In whatever direction; the block by contact, to within a fraction of a pixel."""
    block = dynamic(seed=seed, speed=(150, 150), spin=0, **ALWAYS)
    goal = dynamic(seed=seed, speed=(150, 150), spin=0, moved="goal", **ALWAYS)
    for _ in range(60):
        block.step(np.array(FAR))
        goal.step(np.array(FAR))
    corners = block.corners()
    assert 4 < corners.min() < corners.max() < 507
    reached = [*goal._goal.bounds]
    assert min(reached) > 5 and max(reached) < 506
    assert min(abs(corners.min() - 7), abs(corners.max() - 504)) < 5  # it came as far as a wall
    assert min(min(reached) - 5, 506 - max(reached)) < 3


def test_the_goal_drifts_in_the_blocks_place():
    """The block stays; the reward follows the target, and pictures show it; a reset puts it back."""
    env = dynamic(*GOAL_POSE[:2], angle=GOAL_POSE[2], moved="goal", speed=(30, 30), spin=0.1, **ALWAYS)
    seen = env.camera()
    results = [env.step(np.array(FAR)) for _ in range(30)]
    np.testing.assert_allclose(results[-1][-1]["state"][2:], [*GOAL_POSE], atol=1e-6)
    assert results[0][1] > 0.9 and results[-1][1] < 0.6
    assert (env.camera() != seen).any()
    env.reset(options={"state": [*FAR, *GOAL_POSE]})
    assert env.coverage() == pytest.approx(1) and np.array_equal(env.camera(), seen)


def test_without_drifts_it_is_pusht_to_the_bit():
    still, plain = PushTDynamicEnv(rate=0, terminates=True), PushTEnv()
    for env in (still, plain):
        env.reset(seed=5)
    for action in np.random.default_rng(0).uniform(100, 400, (60, 2)):
        one, other = still.step(action), plain.step(action)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:4] == other[1:4]


def test_success_ends_an_episode_only_where_it_should():
    state = {"state": [*FAR, *GOAL_POSE]}
    for env, ends in ((PushTEnv(), True), (PushTEnv(terminates=False), False), (PushTDynamicEnv(), False)):
        env.reset(seed=0, options=state)
        *_, terminated, truncated, info = env.step(np.array(FAR))
        assert (terminated, truncated, info["success"]) == (ends, False, True)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.01, 50),
    st.floats(0, 5),
    st.floats(0, 5),
    st.floats(0, 100),
    st.floats(0, 100),
    st.floats(0, 3),
)
def test_schedules_are_in_order_and_within_their_ranges(rate, short, longer, slow, faster, spin):
    schedule = DriftSchedule(rate, (short, short + longer), (slow, slow + faster), spin)
    drifts = list(itertools.islice(schedule.drifts(np.random.default_rng(0)), 20))
    ends = [0.0, *itertools.chain.from_iterable((each.start, each.stop) for each in drifts)]
    assert ends == sorted(ends)
    for each in drifts:
        assert short - 1e-9 <= each.stop - each.start <= short + longer + 1e-6
        assert slow - 1e-6 <= np.linalg.norm(each.velocity[:2]) <= slow + faster + 1e-6
        assert abs(each.velocity[2]) <= spin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moved": "pusher"}, "moved='pusher' must be one of"),
        ({"rate": -1}, "rate=-1 must be a number from 0 to 100"),
        ({"rate": 101}, "rate=101 must be"),
        ({"spin": float("nan")}, "spin=nan must be"),
        ({"speed": (3, 2)}, r"speed=\(3, 2\) must be two numbers"),
        ({"duration": (1,)}, "duration="),
        ({"duration": (0, float("inf"))}, "duration="),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PushTDynamicEnv(**options)


def test_it_is_registered_with_pushts_options():
    with gymnasium.make("paradiffpolicy/PushTDynamic-v0", obs_type="keypoints", speed=[5, 6]) as env:
        assert env.observation_space.shape == (20,)
        assert env.unwrapped.schedule.speed == [5, 6]
