"""Commands between a plan's steps: exact at the steps, continuous, by the contract; and today's arithmetic
where rates divide."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation, Slerp

from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.rate import ticks_per_step, whole_ticks_per_step
from paradiffpolicy.envs.robosuite.rotation import six_d
from paradiffpolicy.errors import InputError
from paradiffpolicy.history import History
from paradiffpolicy.planning.blending import Grid, Latest, RealTimeChunking, TemporalEnsemble, decayed
from paradiffpolicy.planning.interpolants import INTERPOLANTS, Interpolant
from paradiffpolicy.planning.interpolation import (
    INTERPOLATIONS,
    Interpolator,
    automatic,
    cubic,
    held,
    linear,
    per_dimension,
)
from paradiffpolicy.planning.request import PlanReply
from paradiffpolicy.task import Contract, ObservationField

from .conftest import TINY
from .test_control import run, scripted, shared_policy

POSE = Contract(
    action_kind="pose",
    action_names=("x", "y", "z", "r11", "r12", "r13", "r21", "r22", "r23", "gripper"),
)
RATES = [(500, 10), (30, 20), (333, 50), (25, 10), (33.3, 10), (10, 10), (1000, 30)]
"""Of loops and policies."""

ROTATIONS = {"slerp": Rotation.as_quat, "slerp_rotation_vector": Rotation.as_rotvec, "slerp_6d": six_d}
BACK = {
    "slerp": Rotation.from_quat,
    "slerp_rotation_vector": Rotation.from_rotvec,
    "slerp_6d": lambda rows: Rotation.from_matrix(
        np.stack((rows[..., :3], rows[..., 3:], np.cross(rows[..., :3], rows[..., 3:])), axis=-2)
    ),
}
"""Numbers of rotations, by interpolant, and back."""

finite = st.floats(-1e6, 1e6)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def spec_of(control_hz=10.0, contract=TINY.contract, **others):
    return dataclasses.replace(TINY, control_hz=control_hz, contract=contract, **others)


def plan_of(actions, tick=0):
    return PlanReply(tick, 0, 0.0, 0.0, 1, math.nan, np.asarray(actions, dtype=float))


def grid_of(rate_hz, policy_hz, interpolation, **others):
    spec = spec_of(float(policy_hz), **others)
    stride = ticks_per_step(rate_hz, policy_hz)
    return Grid(spec, stride, interpolation(spec, stride))


def between(name, start, end, fraction, before=None, after=None):
    rows = (start if before is None else before, start, end, end if after is None else after)
    interpolant = INTERPOLANTS[name]
    if interpolant.size == 1:
        return np.array([interpolant.between(*each, fraction) for each in zip(*rows, strict=True)])
    return np.array(interpolant.between(*(np.asarray(row, dtype=float).tolist() for row in rows), fraction))


# ----------------------------------------------------------------------------------- single interpolants


@given(*[finite] * 4, fractions)
@example(0.21342377371578936, -0.9042740660429183, 0.0008165845667670443, -0.5102723058238035, 1 - 2.0**-40)
def test_lines_and_curves_stay_between_their_ends(before, start, end, after, fraction):
    """Also by a rounding: an action on its limit is within it."""
    for name in ("hold", "linear", "cubic"):
        value = between(name, [start], [end], fraction, [before], [after])[0]
        assert min(start, end) <= value <= max(start, end), name
    line = between("linear", [start], [end], fraction)[0]
    np.testing.assert_allclose(line, start + fraction * (end - start), atol=1e-9 * (abs(start) + abs(end)))


@given(st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=6, max_size=12), fractions)
def test_cubic_is_pchip(values, fraction):
    """scipy's, away from the ends, where scipy's slopes are others."""
    curve = PchipInterpolator(np.arange(len(values)), values)
    interpolate, actions = Interpolator(["cubic"], 1), np.array(values)[:, None]
    for step in range(1, len(values) - 2):
        np.testing.assert_allclose(
            interpolate(actions, step, fraction), curve(step + fraction), rtol=1e-9, atol=1e-9
        )


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=8))
def test_the_cubics_slope_is_continuous_at_every_step_also_the_last(values):
    interpolate, actions, near = Interpolator(["cubic"], 1), np.array(values)[:, None], 1e-5
    for step in range(1, len(values)):
        arriving = (actions[step] - interpolate(actions, step - 1, 1 - near)) / near
        leaving = (interpolate(actions, step, near) - actions[step]) / near
        np.testing.assert_allclose(arriving, leaving, atol=2e4 * near)


@pytest.mark.parametrize("name", ROTATIONS)
@given(st.integers(0, 2**32 - 1), fractions, st.floats(0, 3.1))
def test_rotations_go_the_short_way_at_a_constant_rate(name, seed, fraction, angle):
    draw = np.random.default_rng(seed)
    axis = draw.normal(size=3)
    axis /= np.linalg.norm(axis)
    one = Rotation.random(random_state=seed)
    other = one * Rotation.from_rotvec(angle * axis)
    numbers = [ROTATIONS[name](each) for each in (one, other)]
    if name == "slerp":
        numbers[1] = numbers[1] * draw.choice([-1, 1])
    found = between(name, *numbers, fraction)
    wanted = Slerp([0, 1], Rotation.concatenate([one, other]))(fraction)
    assert (BACK[name](found) * wanted.inv()).magnitude() < 1e-6
    if name == "slerp":
        assert abs(np.linalg.norm(found) - 1) < 1e-12
    if name == "slerp_6d":
        np.testing.assert_allclose(found.reshape(2, 3) @ found.reshape(2, 3).T, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("name", ROTATIONS)
@given(st.data())
def test_a_networks_numbers_dont_jump_at_a_step(name, data):
    """They are near rotations, none exactly: lengths, and rows that aren't orthogonal, change linearly."""
    size = INTERPOLANTS[name].size
    numbers = st.lists(st.floats(-2, 2), min_size=size, max_size=size)
    start, end = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    if name == "slerp_rotation_vector":  # of one rotation's vectors it is the one nearest to the start
        start[0] += 2.5
        end = start + end / 4
    assert np.isfinite(between(name, start, end, 0.5)).all()
    if name == "slerp":
        assume(start @ end >= 0)
    if name == "slerp_6d":
        for rows in (start, end):
            lengths = np.linalg.norm(rows[:3]), np.linalg.norm(np.cross(rows[:3], rows[3:]))
            assume(min(lengths) > 0.1)
    np.testing.assert_allclose(between(name, start, end, 1e-9), start, atol=1e-6)
    np.testing.assert_allclose(between(name, start, end, 1 - 1e-9), end, atol=1e-6)


def test_a_rotation_vectors_angle_may_go_past_half_a_turn():
    """A gripper that points down: the vector of the same rotation would jump to the other side."""
    vectors = [[3.0, 0, 0], [3.4, 0, 0]]
    np.testing.assert_allclose(between("slerp_rotation_vector", *vectors, 0.75), [3.3, 0, 0])
    np.testing.assert_allclose(between("slerp_rotation_vector", [7.0, 0, 0], [7.2, 0, 0], 0.5), [7.1, 0, 0])
    np.testing.assert_allclose(between("slerp_rotation_vector", [0, 0, 0], [0, 0.2, 0], 0.5), [0, 0.1, 0])
    np.testing.assert_allclose(between("slerp_rotation_vector", [0, 0, 0], [0, 0, 0], 0.5), [0, 0, 0])


# --------------------------------------------------------------------------------------- by the contract


def test_a_poses_numbers_are_told_apart_by_their_names():
    two_arms = tuple(f"{name}_{arm}" for arm in (0, 1) for name in POSE.action_names)
    spec = spec_of(contract=dataclasses.replace(POSE, action_names=two_arms), action_dim=20)
    draw = np.random.default_rng(0)
    arms = [Rotation.random(16, random_state=arm) for arm in (0, 1)]
    actions = draw.normal(size=(16, 20))
    for arm, rotations in enumerate(arms):
        actions[:, 10 * arm + 3 : 10 * arm + 9] = six_d(rotations)
    command = linear(spec, 1.5)(actions, 4, 0.25)
    for arm, rotations in enumerate(arms):
        start = 10 * arm
        np.testing.assert_allclose(
            command[start : start + 3],
            0.75 * actions[4, start : start + 3] + 0.25 * actions[5, start : start + 3],
        )
        wanted = Slerp([0, 1], rotations[4:6])(0.25)
        np.testing.assert_allclose(command[start + 3 : start + 9], six_d(wanted), atol=1e-9)
        assert command[start + 9] == actions[4, start + 9]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("x", "y", "z", "qx", "qy", "qz", "qw"), ["linear"] * 3 + ["slerp"]),
        (
            ("eef.x", "eef.y", "eef.z", "rx", "ry", "rz", "gripper.pos"),
            ["linear"] * 3 + ["slerp_rotation_vector", "hold"],
        ),
    ],
)
def test_other_forms_of_rotations_are_known_too(names, parts):
    spec = spec_of(contract=Contract(action_kind="pose", action_names=names), action_dim=len(names))
    actions = np.random.default_rng(1).normal(size=(16, len(names)))
    np.testing.assert_array_equal(
        automatic(spec, 1.5)(actions, 2, 0.5), Interpolator(parts, len(names))(actions, 2, 0.5)
    )


@pytest.mark.parametrize(
    ("contract", "stride", "choice", "message"),
    [
        (Contract(action_kind="delta"), 1.5, "auto", "actions are deltas.*more than once"),
        (Contract(action_kind="delta"), 5, "auto", "actions are deltas.*more than once"),
        (Contract(action_kind="delta"), 5, "linear", "a mix of two"),
        (Contract(), 1.5, "auto", "contract doesn't say: say interpolation="),
        (Contract(action_kind="pose"), 1.5, "auto", "a number without a name isn't known"),
        (Contract(action_kind="pose", action_names=("x", "roll")), 1.5, "cubic", "'roll' isn't known"),
    ],
)
def test_what_cant_be_done_honestly_is_refused(contract, stride, choice, message):
    with pytest.raises(InputError, match=message) as raised:
        INTERPOLATIONS[choice](spec_of(contract=contract), stride)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("contract", "stride", "reach"),
    [
        (Contract(action_kind="delta"), 1, 0),
        (Contract(action_kind="velocity"), 1.5, 0),
        (Contract(action_kind="position"), 50, 0),
        (Contract(action_kind="position"), 1.5, 1),
        (Contract(), 5, 0),
    ],
)
def test_commands_are_interpolated_where_rates_dont_divide(contract, stride, reach):
    assert automatic(spec_of(contract=contract), stride).reach == reach


def test_grippers_are_held_in_positions_too_and_every_number_can_be_chosen():
    spec = spec_of(contract=Contract(action_kind="position", action_names=("shoulder.pos", "gripper.pos")))
    actions = np.arange(32.0).reshape(16, 2)
    assert linear(spec, 1.5)(actions, 3, 0.5).tolist() == [7, 7]
    chosen = per_dimension(spec, 1.5, parts=["hold", Interpolant(lambda a, b, c, d, f: d)])
    assert chosen(actions, 3, 0.5).tolist() == [6, 11]


# ------------------------------------------------------------------------------------------- on the grid


@given(st.integers(-(10**6), 10**7), st.integers(1, 1000))
def test_whole_rates_have_the_arithmetic_of_integers(ticks, stride):
    assert Grid(TINY, stride).steps(ticks) == (ticks // stride, ticks % stride / stride)


@given(st.sampled_from(RATES), st.integers(-2000, 2000), st.integers(0, 10**6))
def test_a_step_is_due_at_its_tick_whatever_floats_make_of_the_rates(rates, step, start):
    rate_hz, policy_hz = rates
    grid = Grid(TINY, ticks_per_step(rate_hz, policy_hz))
    tick = step * rate_hz / policy_hz
    assume(tick == round(tick))
    assert grid.steps(round(tick)) == (step, 0.0)


@pytest.mark.parametrize("way", [held, linear, cubic])
@pytest.mark.parametrize(("rate_hz", "policy_hz"), RATES)
def test_at_its_steps_a_command_is_the_plans_action_and_between_them_within(rate_hz, policy_hz, way):
    grid = grid_of(rate_hz, policy_hz, way)
    actions = np.random.default_rng(3).normal(size=(16, 2))
    blender = Latest(grid)
    blender.add(plan_of(actions, tick=7))
    out, exact, last = np.zeros(2), 0, None
    for tick in range(7, 7 + math.floor(16 * grid.stride)):
        at = (tick - 7) * policy_hz / rate_hz + 1
        step = blender.act(tick, out)
        if at >= 16 - 1e-9:
            assert step == -1
            break
        assert step == math.floor(at + 1e-9)
        if abs(at - round(at)) < 1e-9:
            assert (out == actions[round(at)]).all()
            exact += 1
        after = actions[min(step + 1, 15)]
        assert (np.minimum(actions[step], after) <= out).all()
        assert (np.maximum(actions[step], after) >= out).all()
        if way is not held and last is not None:
            # PCHIP's slope is at most three times the larger difference.
            steepest = np.abs(np.diff(actions, axis=0)).max() * (1 if way is linear else 3)
            assert np.abs(out - last).max() <= steepest / grid.stride + 1e-9
        last = out.copy()
    every = Fraction(str(rate_hz)) / policy_hz
    assert exact == sum((step * every).denominator == 1 for step in range(15))


def test_an_ensemble_averages_interpolated_commands():
    blender = TemporalEnsemble(grid_of(25, 10, linear), decay=0.0)
    ramp = np.stack((np.arange(16.0), np.zeros(16)), axis=1)
    blender.add(plan_of(ramp))
    blender.add(plan_of(ramp + 1, tick=1))
    out = np.zeros(2)
    assert blender.act(3, out) == 1
    np.testing.assert_allclose(out[0], ((1 + 3 / 2.5) + (1 + 2 / 2.5 + 1)) / 2)


@given(st.integers(1, 12), st.integers(0, 300), st.integers(0, 60), st.integers(0, 3))
def test_whole_rates_that_are_held_commit_as_integers_do(stride, tick, delay, overlap):
    """The weights and actions, in integers' arithmetic."""
    blender = RealTimeChunking(Grid(TINY, stride), overlap=overlap)
    actions = np.random.default_rng(tick).normal(size=(16, 2))
    blender.plan = plan_of(actions, tick=40)
    ahead = (np.arange(16) - 1) * stride
    steps = (tick + ahead - 40) // stride + 1
    beyond = -((delay - 1 - ahead) // stride)
    weight = [decayed(int(b), overlap) * (0 <= s < 16) for b, s in zip(beyond, steps, strict=True)]
    kept, weights = blender.commit(tick, delay)
    np.testing.assert_array_equal(weights, weight)
    np.testing.assert_array_equal(kept, actions[np.clip(steps, 0, 15)])


@given(st.integers(0, 12), st.integers(0, 8))
def test_what_is_kept_is_the_old_plans_command_at_the_new_plans_steps(tick, delay):
    """Which lie between the old plan's, where plans are asked for between steps."""
    grid = grid_of(25, 10, linear)
    blender = RealTimeChunking(grid)
    blender.plan = plan_of(np.random.default_rng(tick).normal(size=(16, 2)))
    kept, weight = blender.commit(tick, delay)
    at = tick / 2.5 + np.arange(16)
    for k in np.flatnonzero(weight):
        wanted = [np.interp(at[k], np.arange(16), column) for column in blender.plan.actions.T]
        np.testing.assert_allclose(kept[k], wanted)
    # Certain are the steps until the plan arrives, and the one that the last command is on the way to.
    assert (weight == 1).sum() == (1 + math.floor((delay - 1) / 2.5 + 1e-9) + 1 + (delay > 0))


# -------------------------------------------------------------------------------------- in the controller


def keeping(latency, steepness=1.0):
    """A planner of random walks that keep what they are asked to."""

    def plan(request):
        draw = np.random.default_rng(request.tick)
        walk = np.cumsum(draw.uniform(-steepness, steepness, (16, 2)), axis=0)
        if request.commitment is not None and (kept := request.commitment == 1).any():
            last = int(np.flatnonzero(kept)[-1])
            walk += request.committed[last] - walk[last]
            walk[kept] = request.committed[kept]
        return PlanReply(request.tick, request.session, 0.0, 0.0, 1, math.nan, walk)

    from paradiffpolicy.planning.delayed import DelayedPlanner

    return lambda policy, generator, clock: DelayedPlanner(
        lambda request: lambda: plan(request), clock, lambda: latency
    )


@pytest.mark.parametrize("way", ["linear", "cubic"])
@pytest.mark.parametrize(("rate_hz", "policy_hz"), RATES)
def test_real_time_chunks_join_no_faster_than_a_plan_moves_at_any_rate(rate_hz, policy_hz, way):
    clock = VirtualClock()
    controller = Controller(
        shared_policy(),
        rate_hz,
        policy_hz=policy_hz,
        planner=keeping(2.3 / policy_hz),
        blending="rtc",
        interpolation=way,
        clock=clock,
    )
    n = round(40 * rate_hz / policy_hz)
    actions = run(controller, clock, n)
    record = controller.record
    first = next(k for k, action in enumerate(actions) if action is not None)
    # The first two plans keep nothing, or too little: no delay was known.
    settled = 1 + int(np.flatnonzero(record.joins())[1])
    assert first < settled < n - 5 * rate_hz / policy_hz and record.joins()[settled:].sum() >= 2
    moved = np.abs(np.diff(np.array(actions[settled:], dtype=float), axis=0)).max()
    assert moved <= (1 if way == "linear" else 3) * policy_hz / rate_hz + 1e-9


@pytest.mark.parametrize(("rate_hz", "policy_hz"), RATES)
def test_the_action_that_is_due_is_the_clocks_also_late_and_after_a_fallback(rate_hz, policy_hz):
    """Plans say for which tick, and for which step, each of their actions is."""
    clock, stride = VirtualClock(), ticks_per_step(rate_hz, policy_hz)
    controller = Controller(
        shared_policy(),
        rate_hz,
        policy_hz=policy_hz,
        planner=scripted(0.5 / policy_hz),
        interpolation="linear",
        replan_every=4,
        clock=clock,
    )
    n = round(12 * stride)
    run(controller, clock, n)
    ticks, plans = controller.record.ticks, controller.record.plans
    waited = next(int(row["index"]) for row in ticks if not row["fallback_active"])
    for row in ticks[waited:]:
        # The first plan begins when it arrives: until then the robot stood still.
        begun = waited if row["plan"] == 0 else int(row["plan"])
        np.testing.assert_allclose(
            row["action"], [row["plan"], 1 + (int(row["index"]) - begun) / stride], atol=1e-9
        )
    assert np.diff(plans["tick"]).tolist() == [math.ceil(4 * stride - 1e-9)] * (len(plans) - 1)


def test_the_fallback_goes_on_from_the_interpolated_command():
    clock = VirtualClock()
    controller = Controller(
        shared_policy(), 25, planner=scripted(0.0), clock=clock, max_observation_age=0.1, replan_every=0
    )
    actions = run(controller, clock, 12, observe=lambda k: np.ones(20) if k < 4 else None)
    assert actions[5][1] == pytest.approx(1 + 2 / 2.5) and actions[6:] == [actions[5]] * 6


def test_limits_bind_the_step_that_a_command_is_on_the_way_to():
    """It is refused as a plan, before the robot is on its way."""
    clock = VirtualClock()
    for last, refused in ((2, 0), (1, 1)):
        # Ticks 0 … 2 of 2.5 per step, replanning every step: steps 1 and 2 run.
        limits = np.zeros(2), np.array([100.0, last])
        controller = Controller(
            shared_policy(), 25, planner=scripted(0.0), clock=clock, replan_every=1, limits=limits
        )
        run(controller, clock, 1)
        assert controller.record.plans["refused"].sum() == refused


@given(st.sampled_from(RATES), st.integers(1, 5), st.integers(5, 40))
def test_the_windows_observations_are_one_step_apart_at_any_rate(rates, n_obs_steps, n):
    """Of a robot at a constant velocity the policy sees that velocity, whatever the loop's rate."""
    stride = ticks_per_step(*rates)
    history = History(n_obs_steps, stride)
    for tick in range(n):
        history.push(np.array([float(tick), -2.0 * tick]), tick)
    at = np.maximum(n - 1 - stride * np.arange(n_obs_steps)[::-1], 0)
    np.testing.assert_allclose(history.window(), np.stack((at, -2 * at), axis=1), atol=1e-6)


def test_quaternions_of_a_window_are_a_ticks_own():
    fields = (ObservationField("pos", shape=(1,)), ObservationField("robot0_eef_quat", shape=(4,)))
    mixed = Contract(fields).mixed(5)
    assert mixed.tolist() == [True, False, False, False, False]
    history = History(2, 1.5, mixed=mixed)
    for tick, sign in enumerate((1, 1, -1, -1)):
        history.push(np.array([tick, 0, 0, 0, sign]), tick)
    assert history.window().tolist() == [[1.5, 0, 0, 0, -1], [3, 0, 0, 0, -1]]


# ------------------------------------------------------------------------------------------------ rates


def test_rates():
    assert ticks_per_step(30, 10) == 3 and isinstance(ticks_per_step(30.0, 10.0), int)
    assert ticks_per_step(30, 20) == 1.5
    with pytest.raises(InputError, match="rate_hz=9 must be the policy's 10 Hz or more"):
        ticks_per_step(9, 10)
    with pytest.raises(InputError, match=r"record=a.zarr: rate_hz=25 must be a multiple.*10 Hz, as 20 or 30"):
        whole_ticks_per_step(25, 10, "record=a.zarr")


def test_a_gap_of_ticks_leaves_the_plan_on_the_clock():
    clock = VirtualClock()
    controller = Controller(
        shared_policy(), 25, planner=scripted(0.0), clock=clock, interpolation=partial(linear)
    )
    with controller:
        controller.reset(clock.now())
        controller.tick(np.ones(20), 0)
        clock.sleep_until(7 / 25)
        np.testing.assert_allclose(controller.tick(np.ones(20), 7), [0, 1 + 7 / 2.5])
        assert controller.record.missed == 6
