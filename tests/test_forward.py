"""A plan is made for the state in which it will begin to act: the window that the policy gets holds the
commands that are committed until then, and all that counts a plan's steps counts from there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.realtime import realtime_rollout
from paradiffpolicy.planning.blending import TemporalEnsemble
from paradiffpolicy.planning.delayed import DelayedPlanner
from paradiffpolicy.planning.forward import Forward
from paradiffpolicy.planning.request import PlanMaker
from paradiffpolicy.task import Contract, ObservationField

from .conftest import TINY
from .test_control import numbered, run, tiny_policy
from .test_realtime import REALTIME, make_env

FIELDS = (ObservationField("keypoint", shape=(9, 2)), ObservationField("state", 0, 2, (5,)))
SPEC = replace(TINY, contract=Contract(FIELDS, "position", ("x", "y")))
STATE = {"x": "state.0", "y": "state.1"}
"""The last two numbers of the observation."""


def observed(tick):
    """An observation that says of which tick it is: ``tick`` in the block, ``-tick`` in the state."""
    return np.r_[np.full(18, 100.0 + tick), np.full(2, -1.0 - tick)]


def ran(latency, n=30, *, rate_hz=10, spec=SPEC, ticks=None, **options):
    """The requests, and the actions, of a planner whose plans are ``numbered`` by the tick that they were
    asked for at, and take ``latency`` seconds: a number, or one a plan."""
    clock, asked = VirtualClock(), []
    latencies = iter(latency) if isinstance(latency, list) else None

    def planner(policy, generator, clock):
        def begin(request):
            asked.append(request)
            return lambda: numbered(request.tick, request.session)

        return DelayedPlanner(begin, clock, lambda: next(latencies) if latencies else latency)

    policy = tiny_policy(spec)
    controller = Controller(policy, rate_hz, clock=clock, planner=planner, **options)
    actions = run(controller, clock, n, observe=observed)
    return asked, actions, controller


def test_without_a_delay_nothing_is_moved():
    options = {"rate_hz": 20, "replan_every": 3}
    plain, moved = (
        realtime_rollout(tiny_policy(SPEC, **REALTIME), make_env, [5, 6], 1.5, forward=forward, **options)
        for forward in ({}, STATE)
    )
    for one, other in zip(plain, moved, strict=True):
        assert one.record.ticks.tobytes() == other.record.ticks.tobytes()
        assert one.record.plans.tobytes() == other.record.plans.tobytes()


def test_the_window_holds_the_commands_until_the_plan_begins():
    asked, actions, controller = ran(0.3, forward=STATE)
    first, second, third = asked[:3]
    # The first plan's delay isn't known, and the robot stands still until it is here.
    assert first.tick == 0 and first.window[:, 18:].tolist() == [[-1, -1]] * 2
    assert [request.tick for request in asked] == [0, 8, 16, 24]
    # The second is asked for at tick 8, and begins at 11: the states of ticks 10 and 11 are the commands of
    # 9 and 10.  The first, put off by three ticks, has steps 1 + (9 - 3) and 1 + (10 - 3) then.
    assert second.window[:, 18:].tolist() == [[0, 7], [0, 8]] == actions[9:11]
    assert second.window[:, 0].tolist() == [107, 108]  # what isn't the robot stays as it was seen
    # It acts from its first step on, and so does the third, from tick 19.
    assert actions[10:13] == [[0, 8], [8, 1], [8, 2]] and actions[18:20] == [[8, 8], [16, 1]]
    assert third.window[:, 18:].tolist() == actions[17:19]
    # Eight steps of each are executed.
    assert [request.step for request in asked] == [0, 8, 16, 24]
    plans = controller.record.plans
    assert plans["tick"].tolist() == [0, 11, 19] + [27] * (len(plans) - 3)
    assert (plans["delay"] == 3).all() and controller.record.ticks["plan"][[10, 11]].tolist() == [0, 11]


def test_a_state_between_observed_and_expected_ones_comes_from_the_tick_it_is_of():
    """50 Hz of a policy at 10 Hz, 40 ms late: the window's older state lies two ticks before, and is seen."""
    asked, actions, _ = ran(0.04, 60, rate_hz=50, forward=STATE, interpolation="linear")
    assert [request.tick for request in asked] == [0, 40] and asked[1].step == 8
    newest, older = asked[1].window[1, 18:], asked[1].window[0, 18:]
    assert newest.tolist() == actions[41] and older.tolist() == [-1 - 37] * 2  # 40 + 2 - 5
    assert actions[42] == [40, 1]


def test_an_early_plan_waits_and_of_a_late_one_steps_are_skipped():
    _, actions, controller = ran([0.3, 0.1, 0.5, 0.3, 0.3], 40, forward=STATE)
    assert controller.record.plans["delay"].tolist()[:3] == [3, 1, 5]
    assert actions[10:12] == [[0, 8], [8, 1]]  # expected at 11, here at 9
    assert actions[20:22] == [[8, 10], [16, 3]]  # expected at 19, here at 21
    # From then on five ticks are expected.
    assert actions[28:30] == [[16, 10], [24, 1]]


def test_plans_back_to_back_are_asked_for_when_the_one_before_begins():
    asked, actions, _ = ran(0.2, 20, forward=STATE, replan_every=0)
    assert [request.tick for request in asked[:4]] == [0, 2, 4, 6]
    for k, request in enumerate(asked[1:4], 1):
        assert request.window[:, 18:].tolist() == actions[2 * k : 2 * k + 2]
        assert request.step == 2 * k
    assert actions[2:8] == [[0, 1], [0, 2], [2, 1], [2, 2], [4, 1], [4, 2]]


def test_where_the_old_plan_ends_the_robot_waits_there():
    """The plan is for the state in which it stands still, and begins with its first action."""
    asked, actions, _ = ran([2.0, 2.0, 2.0], 50, forward=STATE)
    # The first acts from 20 to 34; the next is asked for at 20, since its delay was longer than a period.
    assert asked[1].tick == 20 and actions[34] == [0, 15]
    assert asked[1].window[:, 18:].tolist() == [[0, 14], [0, 15]] and asked[1].step == 15
    assert actions[35:40] == [[0, 15]] * 5 and actions[40] == [20, 1]


def test_rtc_keeps_what_runs_before_the_plan_begins():
    asked, actions, _ = ran(0.3, 20, forward=STATE, blending="rtc")
    kept, weight = asked[1].committed, asked[1].commitment
    assert weight[0] == 1 > weight[1] > 0 and kept[0].tolist() == actions[10]


def test_what_rtc_keeps_is_executed_however_long_plans_take():
    """Also where they take longer than the time between two: one is asked for when the last has arrived."""
    asked, actions, controller = ran(0.5, 40, blending="rtc", replan_every=2)
    assert [request.tick for request in asked] == [0, 5, 10, 15, 20, 25, 30, 35]
    for request in asked[1:-1]:
        executed = slice(request.tick, request.tick + 5)
        assert request.commitment[1:6].tolist() == [1] * 5
        assert request.committed[1:6].tolist() == actions[executed]
    assert (controller.record.plans["delay"] == 5).all()


def test_an_ensemble_has_a_plan_from_its_tick_on():
    blending = partial(TemporalEnsemble, decay=0.0)
    _, actions, _ = ran(0.2, 20, forward=STATE, blending=blending, replan_every=4)
    assert actions[5] == [0, 4] and actions[6] == [2, 3]  # step 5 of the first and 1 of the next


def test_the_next_plan_continues_the_last_one_from_where_it_begins():
    clock, policy, seen = VirtualClock(), tiny_policy(SPEC, **REALTIME), []
    real = policy.plan

    def watched(window, previous=None, **given):
        plan = real(window, previous, **given)
        seen.append((window, given["executed_steps"], previous, plan))
        return plan

    vars(policy)["plan"] = watched

    def planner(policy, generator, clock):
        maker = PlanMaker(policy, generator, clock)
        return DelayedPlanner(lambda request: lambda: maker(request), clock, lambda: 0.3)

    controller = Controller(policy, 10, clock=clock, planner=planner, forward=STATE, replan_every=4)
    actions = run(controller, clock, 24, observe=lambda tick: np.abs(observed(tick)))
    begins = controller.record.plans["tick"].tolist()
    assert begins[:4] == [0, 7, 11, 15]
    # The first, put off by the three ticks in which the robot stood still, began at 3.
    assert [shift for _, shift, _, _ in seen[:4]] == [0, 4, 4, 4]
    for (window, _, previous, plan), begin in zip(seen[1:4], begins[1:], strict=False):
        np.testing.assert_allclose(window[:, 18:], actions[begin - 2 : begin], rtol=1e-6)
        np.testing.assert_allclose(actions[begin - 1], previous.actions[0, 4], rtol=1e-6)
        np.testing.assert_allclose(actions[begin], plan.actions[0, 1], rtol=1e-6)


def test_a_planner_beside_the_loop_acts_as_one_within_it():
    """However early a plan is here, it begins at the same tick."""
    actions = {}
    for chosen in ("inline", "thread"):
        clock, policy = VirtualClock(), tiny_policy(SPEC, **REALTIME)
        with Controller(policy, 10, clock=clock, planner=chosen, forward=STATE) as controller:
            controller._forward.delays.append(3)
            actions[chosen] = []
            for tick in range(14):
                controller.sense(np.abs(observed(tick)), tick)
                if controller._watchdog.waiting:
                    assert controller._planner.wait(60)
                actions[chosen].append(controller.act().tolist())
                clock.advance(0.1)
            assert controller.record.plans["tick"].tolist() == [0, 11]
    assert actions["thread"] == actions["inline"]


@pytest.mark.parametrize(
    ("spec", "forward", "words"),
    [
        (replace(SPEC, contract=replace(SPEC.contract, action_kind="velocity")), STATE, "kind velocity"),
        (replace(SPEC, contract=replace(SPEC.contract, action_kind="other")), STATE, "kind other"),
        (TINY, STATE, "doesn't name the observation's fields"),
        (SPEC, {"z": "state.0"}, "forward: no number of an action is 'z': they are x, y"),
        (SPEC, {"x": "state.2"}, "forward: 'state.2' isn't observed"),
        (SPEC, {"x": "state.0", "y": "state.0"}, "twice"),
        (SPEC, "state", "must name numbers"),
    ],
)
def test_a_state_that_the_actions_do_not_move_is_refused(spec, forward, words):
    with pytest.raises(InputError, match=words) as raised:
        Forward(spec, forward)
    assert "\n" not in str(raised.value)


def test_commands_take_it_and_refuse_what_is_not_observed(capsys):
    for command in (
        ["run", "forward={x: nothing.0}", "seconds=1"],
        ["evaluate", "mode=realtime", "realtime.forward={x: nothing.0}", "seeds=1"],
    ):
        assert main(command) == 2
        assert "forward: 'nothing.0' isn't observed" in capsys.readouterr().err
