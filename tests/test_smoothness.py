"""Smoothness against closed forms: a minimum-jerk movement, a sine, published values; scales don't count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paradiffpolicy.control.record import Record
from paradiffpolicy.evaluation.smoothness import (
    STRETCH,
    log_dimensionless_jerk,
    motion,
    pooled,
    smoothness,
    spectral_arc_length,
    stretches,
)
from paradiffpolicy.task import Contract

DIRECTION = np.array([3.0, -4.0])
"""Of movements in a plane, of length 5."""


def reach(n, parts=1):
    """``[n, 2]``: minimum-jerk movements in one direction, one after the other (Flash and Hogan 1985)."""
    t = np.linspace(0, parts, n)
    whole = np.minimum(np.floor(t), parts - 1)
    s = t - whole
    return (whole + 10 * s**3 - 15 * s**4 + 6 * s**5)[:, None] * DIRECTION


@pytest.mark.parametrize(("n", "error"), [(101, 0.09), (401, 0.02), (3201, 0.003)])
def test_a_minimum_jerk_movement_has_its_known_jerk(n, error):
    """Squared jerk integrates to 720 for one length in one second, at a peak speed of 15/8."""
    assert log_dimensionless_jerk(reach(n)) == pytest.approx(-math.log(720 / 1.875**2), abs=error)


def test_a_sine_has_its_known_jerk():
    """k periods of sin: |jerk|^2 averages half of w^6, the peak speed is w, so w^4 / 2 with w = 2 pi k."""
    for k in (1, 3):
        t = np.linspace(0, 1, 4001)
        found = log_dimensionless_jerk(np.sin(2 * np.pi * k * t)[:, None])
        assert found == pytest.approx(-math.log((2 * np.pi * k) ** 4 / 2), abs=0.01)


def test_the_spectral_arc_length_is_the_published_one():
    """Of the authors' example: a Gaussian speed at 100 Hz has -1.41403."""
    speed = np.exp(-5 * np.arange(-1, 1, 0.01) ** 2)
    positions = np.concatenate(([0.0], np.cumsum(speed)))[:, None]
    assert spectral_arc_length(positions, 100.0) == pytest.approx(-1.41403, abs=5e-6)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_neither_amplitude_nor_place_nor_duration_counts(amplitude, place, slower):
    """Sampled equally often per movement; below SPARC's largest frequency, which is in hertz."""
    plain, other = reach(201, 3), amplitude * reach(201, 3) + place
    assert log_dimensionless_jerk(other) == pytest.approx(log_dimensionless_jerk(plain), rel=1e-3)
    one, scaled = (spectral_arc_length(p, r) for p, r in ((plain, 50.0), (other, 50.0 / slower)))
    assert scaled == pytest.approx(one, rel=1e-6)


def test_more_movements_in_the_same_time_are_less_smooth():
    jerks = [log_dimensionless_jerk(reach(401, parts)) for parts in (1, 2, 4)]
    arcs = [spectral_arc_length(reach(401, parts), 100.0) for parts in (1, 2, 4)]
    assert jerks == sorted(jerks, reverse=True) and arcs == sorted(arcs, reverse=True)
    jumpy = reach(401)
    jumpy[200:] += 0.2 * DIRECTION
    assert log_dimensionless_jerk(jumpy) < jerks[0] - 3
    assert spectral_arc_length(jumpy, 100.0) < arcs[0] - 0.4


@given(arrays(np.float64, st.tuples(st.integers(0, 6), st.integers(1, 3)), elements=st.floats(-1e6, 1e6)))
def test_short_and_still_ones_have_none_and_no_nan(positions):
    for found in (log_dimensionless_jerk(positions), spectral_arc_length(positions, 10.0)):
        assert found is None or math.isfinite(found)
    still = np.repeat(positions[:1], 30, axis=0)
    assert log_dimensionless_jerk(still) is None and spectral_arc_length(still, 10.0) is None


def test_a_straight_run_has_no_jerk():
    assert log_dimensionless_jerk(np.arange(40.0)[:, None] * DIRECTION) is None


def record_of(actions, indices=None):
    record = Record(actions.shape[1], len(actions))
    for k, action in enumerate(actions):
        index = k if indices is None else indices[k]
        record.add_tick(index, k / 10, k / 10, k / 10, 0, 0, 0, 0.0, 0, False, action)
    return record


POSE = Contract(
    action_kind="pose", action_names=("x", "y", "r11", "r12", "r13", "r21", "r22", "r23", "gripper")
)


def test_only_positions_count():
    """Of one arm or two; of joints and of numbers without names, all."""
    turning = np.random.default_rng(0).normal(size=(20, 9))
    turning[:, :2] = reach(20)
    (part,) = stretches(record_of(turning), POSE, 10)
    np.testing.assert_array_equal(part, reach(20))
    two = Contract(action_kind="pose", action_names=("x_0", "qw_0", "gripper_0", "x_1", "rx_1", "grip_1"))
    assert two.positions(6).tolist() == [True, False, False] * 2
    joints = Contract(action_kind="position", action_names=("waist", "elbow", "gripper"))
    assert joints.positions(3).tolist() == [True, True, False] and Contract().positions(2).all()


def test_velocities_are_added_up():
    steps = np.diff(reach(21), axis=0)
    for kind in ("velocity", "delta"):
        (part,) = stretches(record_of(steps), Contract(action_kind=kind), 10)
        np.testing.assert_allclose(part - part[0], reach(21)[1:] - reach(21)[1], atol=1e-12)


def test_stretches_are_of_one_length_and_without_gaps():
    """20 ticks each at 10 Hz: the second has one without an action, the third misses one."""
    actions, indices = reach(95), np.arange(95)
    actions[25], indices[50:] = np.nan, indices[50:] + 1
    found = list(stretches(record_of(actions, indices), Contract(), 10))
    assert [len(part) for part in found] == [round(STRETCH * 10)] * 2
    np.testing.assert_array_equal(found[1], actions[60:80])
    assert not list(stretches(record_of(actions[:19]), Contract(), 10))


def test_runs_have_medians_or_nothing():
    motions = [motion(record_of(actions), Contract(), 10) for actions in (reach(45, 2), np.zeros((40, 2)))]
    values = smoothness(motions)
    parts = list(stretches(record_of(reach(45, 2)), Contract(), 10))
    assert values["ldlj"] == {
        "n": 2,
        "median": pytest.approx(np.median([log_dimensionless_jerk(part) for part in parts])),
        "p5": None,
        "p95": None,
    }
    assert values["sparc"]["n"] == 2 and values["sparc"]["median"] < -1
    nothing = {"n": 0, "median": None, "p5": None, "p95": None}
    assert smoothness(motions[1:]) == {"stretch_seconds": 2.0, "ldlj": nothing, "sparc": nothing}
    long = motion(record_of(reach(2000)), Contract(), 10)
    assert pooled([long] * 2, "sparc")["p5"] < pooled([long] * 2, "sparc")["p95"]
    assert pooled([], "jump") == pooled([{}], "jump") == nothing
