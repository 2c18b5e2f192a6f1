"""The controller acts on the right step of the right plan, keeps its rate, and holds when something is
wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import resource
import threading
import time
import traceback
import tracemalloc
from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.rate import ticks_per_step
from paradiffpolicy.control.record import Fault, Record, total_faults
from paradiffpolicy.control.scheduling import Scheduling, scheduled
from paradiffpolicy.errors import InputError
from paradiffpolicy.history import History
from paradiffpolicy.planning.blending import Grid, Latest, RealTimeChunking, TemporalEnsemble, decayed
from paradiffpolicy.planning.delayed import DelayedPlanner
from paradiffpolicy.planning.interpolation import per_dimension
from paradiffpolicy.planning.request import PlanMaker, PlanReply
from paradiffpolicy.policy import Policy
from paradiffpolicy.robots.env import EnvRobot
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.task import Contract

from .conftest import FLOW, TINY, tiny_checkpoint

LIMITS = (np.zeros(2), np.full(2, 1e6))


class Bench:
    """A robot on a test bench: gives the observations of a script, notes the actions, and takes as much
    of the virtual clock's time per action as it is told."""

    def __init__(self, clock, script=None, seconds=None):
        self.clock, self.script, self.seconds = clock, script or {}, seconds or {}
        self.applied, self.stops = [], 0

    def observe(self):
        return self.script.get(len(self.applied), np.full(20, 256.0))

    def apply(self, action):
        self.clock.advance(self.seconds.get(len(self.applied), 0.01))
        self.applied.append(np.array(action))

    def stop(self):
        self.stops += 1


def tiny_policy(spec=TINY, **sampler):
    return Policy.from_checkpoint(
        tiny_checkpoint(spec), make_sampler(spec_schedule(spec), **{"n_steps": 3, **sampler})
    )


shared_policy = functools.cache(tiny_policy)


def controller_on(clock, rate_hz=10, sampler=None, **options):
    options = {"planner": "inline", **options}
    return Controller(shared_policy(**(sampler or {})), rate_hz, clock=clock, **options)


def numbered(tick, session=0, value=None):
    """A plan for ``tick`` whose actions say where they are from: ``(tick, step)``."""
    steps = np.arange(16.0)
    actions = np.stack((np.full(16, float(tick)) if value is None else np.full(16, value), steps), axis=1)
    return PlanReply(tick, session, 0.0, 0.0, 1, math.nan, actions)


def scripted(latency, plans=None, made=DelayedPlanner):
    """A planner whose plans say where they are from, and arrive late; ``plans`` notes what was asked."""

    def make(policy, generator, clock):
        def begin(request):
            if plans is not None:
                plans.append(request)
            return lambda: numbered(request.tick, request.session)

        return made(begin, clock, latency if callable(latency) else lambda: latency)

    return make


def run(controller, clock, n, observe=lambda k: np.full(20, 1.0)):
    """``n`` ticks on the grid."""
    actions = []
    with controller:
        controller.reset(clock.now())
        start = clock.now()
        for k in range(n):
            clock.sleep_until(start + k / controller.rate_hz)
            action = controller.tick(observe(k))
            actions.append(None if action is None else action.tolist())
    return actions


# ------------------------------------------------------------------------------------------ the loop


def test_ticks_are_on_the_grid():
    clock = VirtualClock(5.0)
    record = ControlLoop(controller_on(clock), Bench(clock)).run(20)
    np.testing.assert_allclose(record.ticks["started"], 5.0 + 0.1 * np.arange(20))
    np.testing.assert_allclose(record.deadline_errors, 0, atol=1e-12)
    assert record.missed == 0 and record.n_ticks == 20


@pytest.mark.parametrize(("seconds", "missed"), [(0.05, 0), (0.099, 0), (0.15, 1), (0.2001, 2), (0.55, 5)])
def test_a_tick_that_runs_over_misses_deadlines_and_the_grid_stays(seconds, missed):
    clock = VirtualClock()
    robot = Bench(clock, seconds={3: seconds})
    ticks = ControlLoop(controller_on(clock), robot).run(6 + missed).ticks
    assert ticks["missed"].tolist() == [0, 0, 0, 0, missed, 0]
    np.testing.assert_allclose(ticks["started"][4:], 0.1 * (np.array([4, 5]) + missed))


def test_ta_steps_of_every_plan_are_executed():
    clock = VirtualClock()
    robot, controller = Bench(clock), controller_on(clock)
    record = ControlLoop(controller, robot).run(20)
    assert record.ticks["plan_index"].tolist() == ([1, 2, 3, 4, 5, 6, 7, 8] * 3)[:20]
    assert record.plans["tick"].tolist() == [0, 8, 16] and record.plans["iterations"].tolist() == [3] * 3
    # The same plans, made by hand.
    policy = tiny_policy()
    generator, window, plan = torch.Generator().manual_seed(0), np.full((2, 20), 256.0), None
    for k in range(2):
        plan = policy.plan(window, plan, generator=generator)
        np.testing.assert_allclose(robot.applied[8 * k : 8 * k + 8], plan.executed_actions[0], rtol=1e-6)


def test_realtime_plans_continue_in_the_loop():
    clock = VirtualClock()
    sampler = {"solver": "ddim", "n_steps": 6, "driver": "rti", "iterations": 2}
    record = ControlLoop(controller_on(clock, sampler=sampler), Bench(clock)).run(24)
    assert record.plans["iterations"].tolist() == [6, 2, 2]


def test_observers_are_told_after_the_action_was_applied():
    clock = VirtualClock()
    robot, told = Bench(clock), []
    loop = ControlLoop(
        controller_on(clock), robot, observers=[lambda tick: told.append((tick, len(robot.applied)))]
    )
    loop.run(5)
    assert [(tick.index, applied) for tick, applied in told] == [(k, k + 1) for k in range(5)]
    assert told[0][0].plan.tick == 0 and told[0][0].faults == Fault.NONE and not told[0][0].fallback_active


class BrokeError(Exception):
    """A robot, an observer or a fallback did."""


@pytest.mark.parametrize("error", [BrokeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "part", ["observe", "request", "apply", "first observer", "second observer", "until", "fallback"]
)
def test_the_robot_is_stopped_however_a_run_ends_and_the_record_is_whole(part, error, tmp_path):
    """Whatever breaks in tick 3.  Each observer is told of every tick that was applied."""
    clock, told = VirtualClock(), ([], [])

    def broken(here):
        if here == part and controller.record.n_ticks >= 3 + (here not in ("observe", "request", "fallback")):
            raise error

    class Planner(DelayedPlanner):
        def request(self, request):
            broken("request")
            super().request(request)

    def fallback(last, faults):
        broken("fallback")
        return last

    class Robot(Bench):
        def observe(self):
            broken("observe")
            return None if part == "fallback" and self.applied else super().observe()

        def apply(self, action):
            broken("apply")
            super().apply(action)

    robot = Robot(clock)
    options = {"max_observation_age": 0.25} if part == "fallback" else {}
    planner = scripted(0.0, made=Planner)
    controller = controller_on(clock, planner=planner, fallback=fallback, replan_every=1, **options)
    observers = [
        lambda tick: (told[0].append(tick.index), broken("first observer")),
        lambda tick: (told[1].append(tick.index), broken("second observer")),
    ]
    loop = ControlLoop(controller, robot, observers=observers)
    with pytest.raises(error):
        loop.run(10, until=lambda: broken("until"))
    assert robot.stops == 1 and not controller.started
    ticks = controller.record.ticks
    assert ticks["index"].tolist() == ([0, 1, 2] if part == "observe" else [0, 1, 2, 3])
    applied = 4 if part in ("until", "first observer", "second observer") else 3
    assert told == (list(range(applied)),) * 2 and len(robot.applied) == applied
    assert ticks["action"][:applied].tolist() == [list(action) for action in robot.applied]
    assert ticks["fallback_active"].tolist() == [
        part in ("request", "fallback") and k == 3 for k in range(len(ticks))
    ]
    controller.record.save(tmp_path / "record.npz")


def test_a_robot_that_can_not_be_stopped_ends_the_planner_still():
    class Robot(Bench):
        def stop(self):
            raise BrokeError

    clock = VirtualClock()
    controller = controller_on(clock)
    with pytest.raises(BrokeError):
        ControlLoop(controller, Robot(clock)).run(3)
    assert not controller.started and controller.record.n_ticks == 3


def test_until_ends_a_run():
    clock = VirtualClock()
    robot = Bench(clock)
    record = ControlLoop(controller_on(clock), robot).run(50, until=lambda: len(robot.applied) == 7)
    assert record.n_ticks == 7 and robot.stops == 1


def test_the_wall_clock_may_jump(monkeypatch):
    """Nothing in the loop asks it."""
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() - 86400.0 * next(jumps))
    clock = MonotonicClock()
    record = ControlLoop(controller_on(clock, rate_hz=200, policy_hz=100), Bench(VirtualClock())).run(10)
    assert record.n_ticks >= 1 and (np.abs(record.deadline_errors) < 3600).all()
    assert (np.diff(record.ticks["index"]) > 0).all()


# --------------------------------------------------------------------------- which action, and when


@pytest.mark.parametrize(("rate", "latency"), [(10, 0.0), (10, 0.012), (10, 0.25), (50, 0.05), (100, 0.033)])
def test_a_late_plans_first_actions_are_skipped(rate, latency):
    """Plans are made for ticks 0, 8 s, …; each acts from when it arrives, at the step that is due then: the
    first one's first, since the robot stood still until it came."""
    clock, stride = VirtualClock(), rate // 10
    n = 20 * stride
    actions = run(controller_on(clock, rate, planner=scripted(latency)), clock, n)
    late = math.ceil(latency * rate - 1e-9)
    for tick, action in enumerate(actions):
        made_for = (tick - late) // (8 * stride) * 8 * stride  # of the last plan that is here
        executed = tick - made_for if made_for else tick - late
        expected = None if tick < late else [made_for, executed // stride + 1]
        assert action == expected, tick


@given(
    st.lists(st.integers(0, 1200).map(lambda ms: ms / 1e3), min_size=1, max_size=6),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_latency_an_action_is_the_newest_plans_for_now(latencies, stride, replan_every):
    clock, k = VirtualClock(), iter(range(10**9))
    rate = 10 * stride
    controller = controller_on(
        clock,
        rate,
        planner=scripted(lambda: latencies[next(k) % len(latencies)]),
        replan_every=replan_every,
    )
    actions = run(controller, clock, 30 * stride)
    ticks, plans = controller.record.ticks, controller.record.plans
    acted = np.concatenate([[0], np.cumsum(~ticks["fallback_active"])])  # before each tick
    newest = begun = -1
    for tick, action in enumerate(actions):
        for plan in plans[plans["arrived"] <= tick / rate + 1e-9]:
            if plan["tick"] > newest:  # of its steps those are left out that were executed meanwhile
                newest, begun = plan["tick"], tick - (acted[tick] - acted[plan["tick"]])
        step = (tick - begun) // stride + 1
        if newest < 0:
            assert action is None
        elif step < 16:
            assert action == [newest, step] and ticks["plan"][tick] == newest
        else:
            assert ticks["fallback_active"][tick] and action == actions[tick - 1]
    assert (ticks["plan_index"] < 16).all()


def test_slower_requests_than_the_planner_can_answer_ask_for_the_newest():
    clock, asked = VirtualClock(), []
    controller = controller_on(clock, planner=scripted(0.25, asked), replan_every=0)
    run(controller, clock, 12)
    # While the planner is at one, the newest of the others waits: begun as soon as it is free.
    assert [request.tick for request in asked] == [0, 2, 4, 7, 9]


def test_a_request_that_waits_for_a_slow_planner_is_renewed():
    """A plan takes longer than the steps between requests: the next is made from the newest observation
    when it is begun, not from the one that was due."""
    clock, asked = VirtualClock(), []
    controller = controller_on(clock, planner=scripted(1.25, asked))
    run(controller, clock, 40)
    assert [request.tick for request in asked] == [0, 12, 24, 37]
    assert controller.record.plans["delay"].tolist() == [13, 13, 14]


def test_the_window_is_spaced_as_in_the_demonstrations():
    clock, asked = VirtualClock(), []
    controller = controller_on(clock, 50, planner=scripted(0.0, asked), replan_every=0)
    run(controller, clock, 12, observe=lambda k: np.full(20, float(k)))
    assert [request.window[:, 0].tolist() for request in asked][:8] == [
        *[[0, k] for k in range(6)],
        [1, 6],
        [2, 7],
    ]
    assert [request.step for request in asked][:11] == [0] * 5 + [1] * 5 + [2]


def test_a_late_call_gets_the_action_for_now():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0))
    with controller:
        seen = []
        for moment in (0.0, 0.1, 0.34, 0.36, 0.71):  # ticks 0, 1, 3, 4, 7
            clock.sleep_until(moment)
            seen.append(controller.tick(np.zeros(20)).tolist())
    assert seen == [[0, 1], [0, 2], [0, 4], [0, 5], [0, 8]]
    assert controller.record.ticks["missed"].tolist() == [0, 0, 1, 0, 2]
    assert controller.record.missed == 3


@pytest.mark.parametrize("stride", [1, 5])
def test_from_standstill_a_plan_begins_with_its_first_action_and_what_follows_continues_it(stride):
    """Also after the old plan has ended while the next was made: only what was executed is left out."""
    clock, asked, latency = VirtualClock(), [], iter([0.5, 1.4, 9.0])
    controller = controller_on(clock, 10 * stride, planner=scripted(lambda: next(latency), asked))
    actions = run(controller, clock, 24 * stride)[::stride]
    assert actions[:5] == [None] * 5 and actions[5:20] == [[0, 1 + k] for k in range(15)]
    # Asked for after 3 steps; 12 more were executed until the plan came, and for 2 the robot stood still.
    assert actions[20:24] == [[0, 15]] * 2 + [[8 * stride, 13 + k] for k in range(2)]
    assert [request.step for request in asked] == [0, 3, 15]


def test_planning_within_a_tick_gives_the_action_for_when_it_is_done():
    """Inline planning that takes 0.24 s of the clock: two actions have been executed when it is done, but for
    the first plan, before which the robot stood still."""
    clock = VirtualClock()
    policy = tiny_policy()
    real = policy.plan
    vars(policy)["plan"] = lambda *a, **k: (clock.advance(0.24), real(*a, **k))[1]
    controller = Controller(policy, 10, planner="inline", clock=clock)
    vars(policy)["warm_up"] = lambda *a, **k: policy
    record = ControlLoop(controller, Bench(clock, seconds=dict.fromkeys(range(99), 0.0))).run(12)
    assert record.ticks["plan_index"].tolist() == [1, 2, 3, 4, 5, 6, 3, 4]
    assert record.ticks["index"].tolist() == [0, 3, 4, 5, 6, 7, 8, 11]


# -------------------------------------------------------------------------------------------- blending


def test_the_step_for_the_newest_observation_may_be_another():
    plan = PlanReply(5, 0, 0.0, 0.0, 1, 0.0, np.arange(2.0 * TINY.horizon).reshape(-1, 2))
    late = replace(TINY, first_executed=TINY.n_obs_steps)
    for spec, first in ((TINY, TINY.n_obs_steps - 1), (late, TINY.n_obs_steps)):
        grid = Grid(spec, 1)
        for tick in (5, 6):
            step, command = grid.command(plan, tick)
            assert step == first + tick - 5 and command.tolist() == plan.actions[step].tolist()


GRID = Grid(TINY, 1)


def test_latest_acts_on_the_old_plan_until_it_ends():
    blender, out = Latest(GRID), np.zeros(2)
    assert blender.act(0, out) == -1
    blender.add(numbered(0))
    assert blender.act(14, out) == 15 and out.tolist() == [0, 15]
    assert blender.act(15, out) == -1
    blender.add(numbered(10))
    assert blender.act(11, out) == 2 and out.tolist() == [10, 2]
    blender.add(numbered(4))  # an older one, too late
    assert blender.act(12, out) == 3 and out.tolist() == [10, 3]
    blender.clear()
    assert blender.act(12, out) == -1


def test_temporal_ensemble_is_acts_weighted_mean():
    blender, out = TemporalEnsemble(GRID, decay=0.3), np.zeros(2)
    for tick, value in ((0, 1.0), (2, 5.0), (3, 11.0)):
        blender.add(numbered(tick, value=value))
    weights = np.exp(-0.3 * np.arange(3))
    assert blender.act(4, out) == 2
    np.testing.assert_allclose(out[0], (weights * [1, 5, 11]).sum() / weights.sum())
    assert blender.act(16, out) == 14  # the oldest is over: the next counts as such
    np.testing.assert_allclose(out[0], (weights[:2] * [5, 11]).sum() / weights[:2].sum())


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("delay", [0, 1, 3, 7])
def test_rtc_keeps_actions_that_will_have_run_and_less_of_later_ones(stride, delay):
    blender = RealTimeChunking(Grid(TINY, stride), overlap=3)
    kept, weight = blender.commit(8 * stride, delay)
    assert not weight.any()
    blender.add(numbered(0))
    kept, weight = blender.commit(8 * stride, delay)
    for j in range(16):
        ahead = (j - 1) * stride
        old = j + 8
        if old > 15:
            assert weight[j] == 0
            continue
        assert kept[j].tolist() == [0, old]
        if ahead < delay or j == 0:  # begins before the new plan is here, or has been executed
            assert weight[j] == 1
        else:
            assert weight[j] == decayed(math.ceil((ahead - delay + 1) / stride), 3) < 1
    assert (np.diff(weight) <= 0).all()


def test_weights_decay_to_nothing():
    assert [decayed(k, 0) for k in (-1, 0, 1, 2)] == [1, 1, 0, 0]
    values = [decayed(k, 3) for k in range(6)]
    assert values[0] == 1 and values[4] == values[5] == 0 and (np.diff(values) <= 0).all()
    assert values[1] == pytest.approx(0.75 * (math.exp(0.75) - 1) / (math.e - 1))


@pytest.mark.parametrize(
    ("spec", "blending"),
    [(TINY, "rtc"), (FLOW, "rtc"), (replace(TINY, prefix_steps=8), "prefix")],
    ids=["diffusion", "flow", "prefix"],
)
def test_committed_actions_are_what_runs(spec, blending):
    """With a planner that is three ticks late, joins are seamless: the plan keeps what ran meanwhile."""
    clock = VirtualClock()
    policy = tiny_policy(spec, solver="ddim", n_steps=5)

    def late(policy, generator, clock):
        maker = PlanMaker(policy, generator, clock)
        return DelayedPlanner(lambda r: lambda: maker(r), clock, lambda: 0.3)

    seen = []
    controller = Controller(
        policy,
        10,
        generator=torch.Generator().manual_seed(0),
        clock=clock,
        planner=late,
        blending=blending,
    )
    real = controller._blender.add
    controller._blender.add = lambda plan: (seen.append(plan), real(plan))
    run(controller, clock, 30, observe=lambda k: np.full(20, 200.0 + 7 * k))
    first, second, third = seen[:3]
    # The delay is known from the first plan on.
    for old, new, executed in ((first, second, 5), (second, third, 8)):
        kept = slice(0, 4)  # the action before, and three while it was made
        np.testing.assert_allclose(new.actions[kept], old.actions[executed : executed + 4], atol=1e-3)


# --------------------------------------------------------------------------------------- the watchdog


BAD = {
    "nan": (np.full(20, np.nan), Fault.OBSERVATION_NOT_FINITE, "NaN or infinity"),
    "shape": (np.zeros(19), Fault.OBSERVATION_SHAPE, "wrong shape: got (19,), expected (20,)"),
    "infinite": (np.array([np.inf, -np.inf] + [0.0] * 18), Fault.OBSERVATION_NOT_FINITE, "NaN or infinity"),
    "text": (["a"] * 20, Fault.OBSERVATION_SHAPE, "wrong shape: got a list without numbers"),
    "ragged": ([[1.0], [2.0, 3.0]], Fault.OBSERVATION_SHAPE, "wrong shape: got a list without numbers"),
    "missing": (None, Fault.OBSERVATION_MISSING, "no new observation"),
}


@pytest.mark.parametrize("kind", BAD)
def test_without_a_good_observation_the_plan_goes_on_and_then_the_fallback_acts(kind, caplog):
    bad, fault, words = BAD[kind]
    clock, asked = VirtualClock(), []
    controller = controller_on(clock, planner=scripted(0.0, asked), max_observation_age=0.35)
    actions = run(controller, clock, 20, observe=lambda k: bad if 4 <= k < 11 else np.zeros(20))
    ticks = controller.record.ticks
    # The last good one is tick 3's: ticks 4 to 6 are within 0.35 s of it.
    assert actions[4:7] == [[0, 5], [0, 6], [0, 7]]
    assert actions[7:11] == [[0, 7]] * 4 and ticks["fallback_active"].tolist() == [
        7 <= k < 11 for k in range(20)
    ]
    for k in range(20):
        faults = Fault(int(ticks["faults"][k]))
        assert (fault in faults) == (4 <= k < 11)
        assert (Fault.OBSERVATION_STALE in faults) == (7 <= k < 11)
    # Tick 8's request was due, and is made at the next good observation.
    assert [request.tick for request in asked] == [0, 11, 19]
    assert controller.record.faults()[fault.name.lower()] == 7
    assert [record.args[0] for record in caplog.records] == [4, 7] and words in caplog.messages[0]


@pytest.mark.parametrize(
    ("first", "got"), [(np.zeros(7), r"\(7,\)"), (np.zeros((1, 20)), r"\(1, 20\)"), ("no", "a str")]
)
def test_a_first_observation_that_does_not_fit_is_an_error(first, got):
    """It never will fit; later ones are a fault of the tick."""
    with (
        controller_on(VirtualClock()) as controller,
        pytest.raises(InputError, match=f"first observation has the wrong shape: got {got}.*, expected "),
    ):
        controller.tick(first)


def test_the_action_for_now_counts_from_when_the_observation_was_measured():
    """An observation of 0.24 s ago is of two ticks ago, and so is its plan; what was seen before tick 0 is
    tick 0's, since the robot stood still."""
    clock, asked = VirtualClock(), []
    with controller_on(clock, planner=scripted(0.1, asked), replan_every=4) as controller:
        controller.reset(0.0)
        actions = []
        for k in range(12):
            clock.sleep_until(k / 10)
            actions.append(controller.tick(np.full(20, float(k)), time=k / 10 - 0.24))
    made_for = [request.tick for request in asked]
    assert made_for == [0, 2, 6] and [request.step for request in asked] == [0, 1, 5]  # executed before
    assert asked[1].window[:, 0].tolist() == [3, 4]  # seen at ticks 1 and 2
    # A plan asked for at tick 4 is here at tick 5; its step 1 was due at tick 2.
    expected = [None, *([0, k] for k in range(1, 5)), *([2, k - 1] for k in range(5, 9))]
    assert [a if a is None else a.tolist() for a in actions[:9]] == expected
    assert controller.record.plans["delay"].tolist() == [1, 3, 3]


def test_the_age_of_an_observation_counts_in_how_long_it_is_acted_on():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0), max_observation_age=0.35)
    with controller:
        controller.reset(0.0)
        for k in range(9):  # each a little older than the last
            clock.sleep_until(k / 10)
            controller.tick(np.zeros(20), time=k / 20)
    stale = controller.record.ticks["faults"] & Fault.OBSERVATION_STALE != 0
    assert stale.tolist() == [k > 7 for k in range(9)]
    assert controller.record.ticks["fallback_active"].tolist() == stale.tolist()


def test_a_robot_may_say_when_it_was_observed():
    class Robot(Bench):
        @property
        def observed_at(self):
            return self.clock.now() - 0.1 if len(self.applied) > 3 else None

    clock, asked = VirtualClock(), []
    ControlLoop(controller_on(clock, planner=scripted(0.0, asked)), Robot(clock)).run(12)
    assert [request.tick for request in asked] == [0, 7]


def test_an_observation_that_repeats_itself_is_a_fault_and_not_a_good_one(caplog):
    clock, asked = VirtualClock(), []
    controller = controller_on(clock, planner=scripted(0.0, asked), max_observation_age=0.35)
    with controller:
        controller.reset(0.0)
        for k in range(16):
            clock.sleep_until(k / 10)
            stuck = 3 <= k < 12
            controller.tick(np.full(20, 3.0 if stuck else k), time=0.3 if stuck else k / 10)
    ticks = controller.record.ticks
    frozen = ticks["faults"] & Fault.OBSERVATION_FROZEN != 0
    assert frozen.tolist() == [4 <= k < 12 for k in range(16)]
    # The one of tick 3 is acted on for 0.35 s.
    assert ticks["fallback_active"].tolist() == [7 <= k < 12 for k in range(16)]
    assert [request.tick for request in asked] == [0, 12]
    assert "an observation that repeats an old one: of 0.300 s" in caplog.messages[0]


def test_numbers_that_do_not_change_are_believed_for_as_long_as_is_said():
    for frozen_after, found in ((None, []), (0.45, [7, 8, 9])):
        clock = VirtualClock()
        controller = controller_on(clock, planner=scripted(0.0), frozen_after=frozen_after)
        run(controller, clock, 14, observe=lambda k: np.full(20, 2.0 if 2 <= k < 10 else k))
        frozen = controller.record.ticks["faults"] & Fault.OBSERVATION_FROZEN
        assert frozen.nonzero()[0].tolist() == found


@pytest.mark.parametrize("time", [1.7e9, 0.25, math.nan, math.inf, -math.inf, 10**400, "now", 1j, [0.1]])
def test_an_observation_of_a_moment_that_can_not_be_is_refused(time):
    """A clock's that isn't the controller's, above all.  One a little ahead is of now."""
    clock, asked = VirtualClock(), []
    with controller_on(clock, planner=scripted(0.0, asked)) as controller:
        controller.reset(0.0)
        assert controller.tick(np.zeros(20), time=0.05).tolist() == [0, 1]
        clock.sleep_until(0.1)
        assert controller.tick(np.zeros(20), time=time).tolist() == [0, 2]
        assert controller.tick(np.zeros(20), time=0.1).tolist() == [0, 2]
    assert controller.record.faults() == {"observation_time": 1}
    assert "the clock says 0.100 s" in controller._watchdog.in_words(Fault.OBSERVATION_TIME)


def test_a_source_that_is_silent_for_two_seconds():
    clock = VirtualClock()
    robot = Bench(clock, script=dict.fromkeys(range(10, 30), None))
    robot.observe = lambda: None if 10 <= len(robot.applied) < 30 else np.full(20, 256.0)
    controller = controller_on(clock)
    record = ControlLoop(controller, robot).run(60)
    ticks = record.ticks
    assert record.n_ticks == 60 and record.missed == 0  # the loop keeps its rate
    assert (
        ticks["fallback_active"][10:17].sum() == 0
    )  # 0.8 s, as long as the policy itself acts without looking
    assert ticks["fallback_active"][18:30].all() and not ticks["fallback_active"][31:].any()


def test_before_any_plan_there_is_nothing_safe():
    clock = VirtualClock()
    robot = Bench(clock)
    robot.observe = lambda: np.full(20, np.nan)
    record = ControlLoop(controller_on(clock), robot).run(3)
    assert robot.applied == [] and robot.stops == 4  # once a tick, and at the end
    assert record.ticks["fallback_active"].all() and np.isnan(record.ticks["action"]).all()


def test_the_fallback_is_the_users():
    clock, told = VirtualClock(), []

    def brake(last, faults):
        told.append((None if last is None else last.tolist(), faults))
        return np.array([-1.0, -1.0])

    controller = controller_on(clock, planner=scripted(0.0), max_observation_age=0.15, fallback=brake)
    actions = run(controller, clock, 6, observe=lambda k: np.zeros(20) if k < 2 else None)
    assert actions == [[0, 1], [0, 2], [0, 3], [-1, -1], [-1, -1], [-1, -1]]
    assert told[0][0] == [0, 3] and Fault.OBSERVATION_STALE in told[0][1]


@pytest.mark.parametrize(
    ("kind", "held"),
    [("position", [0, 3]), ("pose", [0, 3]), ("delta", None), ("velocity", None), ("other", None)],
)
def test_the_fallback_of_the_contract_holds_where_actions_are_absolute_and_else_stops(kind, held):
    class Planned:
        spec = dataclasses.replace(TINY, contract=Contract(action_kind=kind))

    clock = VirtualClock()
    controller = Controller(Planned(), 10, clock=clock, planner=scripted(0.0), max_observation_age=0.15)
    actions = run(controller, clock, 5, observe=lambda k: np.zeros(20) if k < 2 else None)
    assert actions == [[0, 1], [0, 2], [0, 3], held, held]
    assert controller.record.ticks["fallback_active"].tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("options", [{}, {"fallback": lambda last, faults: np.zeros(2)}])
def test_a_fallback_that_lasts_too_long_stops_the_robot_until_a_plan_acts(options):
    clock = VirtualClock()
    controller = controller_on(
        clock, planner=scripted(0.0), max_observation_age=0.15, fallback_timeout=0.5, **options
    )
    seen = {0, 1, *range(14, 16)}
    actions = run(controller, clock, 20, observe=lambda k: np.zeros(20) if k in seen else None)
    # It is active from tick 3 on.  The plan of tick 14 acts for as long as that observation is good.
    held = [0, 3] if not options else [0, 0]
    assert actions[3:9] == [held] * 6 and actions[9:14] == [None] * 5
    assert actions[14:17] == [[14, 1], [14, 2], [14, 3]] and actions[17] is not None
    assert controller.record.faults()["fallback_timeout"] == 5
    # The time that is stated where none is given.
    controller = controller_on(clock, planner=scripted(0.0), max_observation_age=0.15, **options)
    actions = run(controller, clock, 26, observe=lambda k: np.zeros(20) if k < 2 else None)
    assert actions[3:23] == [held] * 20 and actions[24:] == [None] * 2


@pytest.mark.parametrize(
    "given",
    [[math.nan, 0], [0, 17], [-1, 0], [math.inf, 0], [0], [0, 0, 0], [[0, 0]], 0.0, "stop", [[0], [0, 0]]],
)
def test_a_fallbacks_action_is_checked_as_a_plans(given):
    clock, limits = VirtualClock(), (np.zeros(2), np.full(2, 16.0))
    controller = controller_on(
        clock, planner=scripted(0.0), limits=limits, fallback=lambda last, faults: given, max_plan_age=0.15
    )
    actions = run(controller, clock, 4)
    assert actions == [[0, 1], [0, 2], None, None]
    assert controller.record.faults() == {"plan_late": 2, "fallback_refused": 2}
    assert "it gave" in controller._watchdog.in_words(Fault.FALLBACK_REFUSED)


def test_limits_may_be_any_two_vectors_and_are_the_controllers_own():
    for limits in (np.array([[0.0, 0.0], [9.0, 1.0]]), [[0, 0], [9, 1]], ((0, 0), np.array([9, 1]))):
        watchdog = controller_on(VirtualClock(), limits=limits)._watchdog
        limits[1][1] = 5
        assert watchdog.is_within([9, 1]) and not watchdog.is_within([0, 2])


def test_infinite_limits_bar_infinity():
    limits = np.full(2, -math.inf), np.full(2, math.inf)
    options = {"planner": scripted(0.0), "max_plan_age": 0.05}
    for fallback, second in (([math.inf, 0.0], None), ([1e300, 0.0], [1e300, 0.0])):
        clock = VirtualClock()
        controller = controller_on(
            clock, limits=limits, fallback=lambda last, faults, a=fallback: np.array(a), **options
        )
        assert run(controller, clock, 2) == [[0, 1], second]


def test_a_fallback_can_not_change_what_the_record_and_the_next_call_see():
    def halve(last, faults):
        last /= 2
        return last

    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0), max_plan_age=0.15, fallback=halve)
    assert run(controller, clock, 4) == [[0, 1], [0, 2], [0, 1], [0, 1]]


def test_a_late_planner_is_waited_for_on_the_old_plan_until_that_ends():
    clock, latency = VirtualClock(), iter([0.0, *[9.0] * 99])
    controller = controller_on(clock, planner=scripted(lambda: next(latency)))
    actions = run(controller, clock, 20)
    assert actions[:15] == [[0, k + 1] for k in range(15)]
    assert actions[15:] == [[0, 15]] * 5
    assert controller.record.faults() == {"plan_late": 5}


def test_a_plan_may_be_declared_too_old():
    clock, latency = VirtualClock(), iter([0.0, *[9.0] * 99])
    controller = controller_on(clock, planner=scripted(lambda: next(latency)), max_plan_age=0.45)
    actions = run(controller, clock, 8)
    assert actions == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 5], [0, 5], [0, 5]]
    assert controller.record.faults() == {"plan_late": 3}


def test_a_plan_with_nan_is_refused_and_asked_for_again():
    clock = VirtualClock()
    policy = tiny_policy()
    policy.denoiser.network.final_conv[1].bias.data.fill_(float("nan"))
    controller = Controller(policy, 10, planner="inline", clock=clock)
    vars(policy)["warm_up"] = lambda *a, **k: policy
    robot = Bench(clock)
    record = ControlLoop(controller, robot).run(3)
    assert record.faults() == {"plan_refused": 3, "plan_missing": 3} and robot.applied == []
    assert record.plans["refused"].all() and record.n_plans == 3


@pytest.mark.parametrize("beyond", [[np.nan, 0.0], [np.inf, 0.0], [0.0, 17.0], [-1.0, 0.0]])
def test_a_plan_or_action_beyond_the_limits_is_refused(beyond):
    clock, limits = VirtualClock(), (np.zeros(2), np.full(2, 16.0))

    def planner(policy, generator, clock):
        def begin(request):
            plan = numbered(request.tick, request.session)
            plan.actions[:, 0] = 1.0
            if request.tick:
                plan.actions[3] = beyond
            return lambda: plan

        return DelayedPlanner(begin, clock, lambda: 0.0)

    controller = controller_on(clock, planner=planner, limits=limits)
    actions = run(controller, clock, 12)
    assert actions == [[1, k + 1] for k in range(12)]  # the first plan goes on
    assert controller.record.faults() == {"plan_refused": 4}  # asked for again at every tick


@pytest.mark.parametrize(
    ("blending", "replan_every", "runs"), [(Latest, 8, 8), (Latest, 4, 4), (RealTimeChunking, 8, 8)]
)
def test_limits_bind_the_steps_of_a_plan_that_run(blending, replan_every, runs):
    """A plan's step beyond its limits is refused if it will run; if it turns out to, since the next plan is
    late, the action is.  NaN anywhere means that the plan isn't one."""
    clock, limits = VirtualClock(), (np.zeros(2), np.full(2, 16.0))
    for step in range(16):
        for beyond, refused in ((17.0, 1 <= step <= runs), (np.nan, step >= 1)):

            def planner(policy, generator, clock, step=step, beyond=beyond):
                def begin(request):
                    plan = numbered(request.tick, request.session, value=1.0)
                    plan.actions[step, 0] = beyond
                    return lambda: plan

                return DelayedPlanner(begin, clock, lambda: 0.0)

            controller = controller_on(
                clock, planner=planner, limits=limits, blending=blending, replan_every=replan_every
            )
            assert (run(controller, clock, 1) == [None]) == refused, (step, beyond)


def test_a_step_beyond_the_limits_that_runs_after_all_is_an_action_that_is_refused():
    clock, limits = VirtualClock(), (np.zeros(2), np.full(2, 10.0))
    latency = iter([0.0, *[9.0] * 99])
    controller = controller_on(clock, planner=scripted(lambda: next(latency)), limits=limits)
    assert run(controller, clock, 12) == [*([0, k + 1] for k in range(10)), [0, 10], [0, 10]]
    assert controller.record.faults() == {"action_refused": 2}


def test_a_late_plans_limits_bind_the_steps_that_run_while_the_next_is_made():
    """A plan for tick 0 that arrives at tick 3 acts until tick 11, on its steps 1 to 8: the robot stood still
    before.  One for tick 8 acts from tick 11 to tick 19, on its steps 4 to 11."""
    clock = VirtualClock()
    cases = [(0, 0, False), (0, 1, True), (0, 8, True), (0, 9, False)]
    for tick, step, refused in (*cases, (8, 3, False), (8, 4, True), (8, 11, True), (8, 12, False)):

        def planner(policy, generator, clock, tick=tick, step=step):
            def begin(request):
                plan = numbered(request.tick, request.session, value=1.0)
                if request.tick == tick:
                    plan.actions[step, 0] = -1.0
                return lambda: plan

            return DelayedPlanner(begin, clock, lambda: 0.3)

        controller = controller_on(clock, planner=planner, limits=LIMITS)
        run(controller, clock, tick + 4)
        assert controller.record.plans["refused"].tolist() == [False] * (tick > 0) + [refused], (tick, step)


@pytest.mark.parametrize(
    "actions",
    [np.zeros((8, 2)), np.zeros((16, 3)), np.zeros(16), np.zeros((1, 16, 2)), np.full((16, 2), "a"), None],
)
def test_a_plan_of_a_wrong_shape_is_refused(actions):
    clock = VirtualClock()

    def planner(policy, generator, clock):
        def begin(request):
            plan = numbered(request.tick, request.session)
            return lambda: plan if request.tick == 0 else dataclasses.replace(plan, actions=actions)

        return DelayedPlanner(begin, clock, lambda: 0.0)

    controller = controller_on(clock, planner=planner)
    assert run(controller, clock, 10) == [[0, k + 1] for k in range(10)]
    assert controller.record.faults() == {"plan_refused": 2}
    assert "its shape" in controller._watchdog.in_words(Fault.PLAN_REFUSED)


def test_two_ticks_in_one_period_miss_none():
    clock = VirtualClock()
    with controller_on(clock, planner=scripted(0.0)) as controller:
        for moment in (0.0, 0.01, 0.3, 0.31, 0.32):
            clock.sleep_until(moment)
            controller.tick(np.zeros(20))
    assert controller.record.ticks["missed"].tolist() == [0, 0, 2, 0, 0]
    assert controller.record.missed == 2 and controller.record.faults() == {}


def test_a_second_thread_that_ticks_the_controller_is_found():
    clock = VirtualClock()
    with controller_on(clock, planner=scripted(0.0)) as controller:

        def tick(name, moment):
            clock.sleep_until(moment)
            thread = threading.Thread(target=controller.tick, args=(np.zeros(20),), name=name)
            thread.start()
            thread.join()

        for k, name in enumerate("ABCDE"):  # a timer's threads, one after the other
            tick(name, k / 10)
        assert controller.record.faults() == {}
        tick("F", 0.42)
        assert controller.record.faults() == {"two_threads": 1}
        assert "ticked twice in one period: by E and F" in controller._watchdog.in_words(Fault.TWO_THREADS)


def test_a_thread_that_ticks_while_another_does_is_found():
    clock, within, go_on = VirtualClock(), threading.Event(), threading.Event()

    def slow(last, faults):
        within.set()
        assert go_on.wait(10)

    class Lock:
        """Lets the first thread go on when the second is about to wait for it."""

        def __enter__(self):
            if within.is_set():
                go_on.set()
            lock.acquire()

        def __exit__(self, *exception):
            lock.release()

    with controller_on(clock, planner=scripted(9.0), fallback=slow) as controller:
        lock, controller._lock = controller._lock, Lock()
        first = threading.Thread(target=controller.tick, args=(np.zeros(20), 0))
        first.start()
        assert within.wait(10)
        second = threading.Thread(target=controller.tick, args=(np.zeros(20), 1))
        second.start()
        first.join()
        second.join()
    faults = controller.record.ticks["faults"] & Fault.TWO_THREADS
    assert faults.tolist() == [0, Fault.TWO_THREADS]


@pytest.mark.parametrize("beyond", [[np.nan, 0.0], [0.0, 1e7]])
def test_an_action_is_checked_whatever_blending_gave_it(beyond):
    class Broken(Latest):
        def act(self, tick, out):
            step = super().act(tick, out)
            if tick == 3:
                out[:] = beyond
            return step

    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0), limits=LIMITS, blending=Broken)
    actions = run(controller, clock, 5)
    assert actions == [[0, 1], [0, 2], [0, 3], [0, 3], [0, 5]]
    assert controller.record.faults() == {"action_refused": 1}


def test_plans_of_before_a_reset_are_not_acted_on():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.25))
    with controller:
        controller.tick(np.zeros(20))
        controller.reset()
        for moment in (0.1, 0.2, 0.3):
            clock.sleep_until(moment)
            assert controller.tick(np.zeros(20)) is None
        clock.sleep_until(0.5)
        assert controller.tick(np.zeros(20)).tolist() == [0, 1]


@pytest.mark.parametrize(
    "answer",
    [
        lambda reply: 42,
        lambda reply: reply.actions,
        lambda reply: replace(reply, tick=reply.tick + 100),
        lambda reply: replace(reply, tick=-1),
        lambda reply: replace(reply, tick=float(reply.tick)),
        lambda reply: replace(reply, tick=None),
        lambda reply: replace(reply, iterations=-1),
        lambda reply: replace(reply, latency=math.nan),
        lambda reply: replace(reply, asked=None),
        lambda reply: replace(reply, residual="small"),
    ],
)
def test_what_is_no_reply_is_refused_and_the_old_plan_goes_on(answer):
    clock, begun = VirtualClock(), []

    class Planner(DelayedPlanner):
        def poll(self):
            reply = super().poll()
            begun.append(reply)
            return answer(reply) if reply is not None and len(begun) > 1 else reply

    controller = controller_on(clock, planner=scripted(0.0, made=Planner), replan_every=1)
    assert run(controller, clock, 6) == [[0.0, k + 1.0] for k in range(6)]
    assert controller.record.faults() == {"plan_refused": 5} and controller.record.n_plans == 1


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (np.ones(20) * 1j, "observation_shape"),
        ([str(k) for k in range(20)], "observation_shape"),
        (torch.ones(20, requires_grad=True), "observation_shape"),
        (np.ma.masked_equal(np.arange(20.0), 7), "observation_not_finite"),
        (np.ma.masked_equal(np.arange(20.0) * 1j, 0), "observation_shape"),
    ],
)
def test_what_is_no_real_number_is_no_observation(given, fault):
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0))
    run(controller, clock, 2, observe=lambda k: given if k else np.zeros(20))
    assert controller.record.faults() == {fault: 1}


def test_settings_are_checked():
    clock = VirtualClock()
    for options, message in (
        ({"rate_hz": 5}, "rate_hz=5 must be the policy's 10 Hz or more"),
        ({"interpolation": "liner"}, "unknown interpolation 'liner'; did you mean 'linear'"),
        (
            {"interpolation": partial(per_dimension, parts=["hold"])},
            "for 1 numbers of an action, action_dim=2",
        ),
        ({"rate_hz": 0}, "rate_hz=0"),
        ({"rate_hz": math.inf}, "rate_hz=inf must be a number above 0"),
        ({"rate_hz": 1e300}, r"rate_hz=1e\+300 must be"),
        ({"policy_hz": math.inf}, "policy_hz=inf must be a number above 0"),
        ({"replan_every": -1}, "replan_every=-1"),
        ({"replan_every": 1.5}, "replan_every=1.5"),
        ({"max_plan_age": 0.0}, "max_plan_age=0.0"),
        ({"max_observation_age": -1}, "max_observation_age=-1"),
        ({"max_observation_age": 0}, "max_observation_age=0"),
        ({"frozen_after": 0}, "frozen_after=0"),
        ({"planner_timeout": 0}, "planner_timeout=0"),
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 10**10}, "capacity=10000000000: the memory for so many ticks isn't there"),
        ({"limits": (np.zeros(3), np.zeros(3))}, r"limits must be two arrays \[action_dim=2\]"),
        *(
            ({"limits": limits}, "limits must be two arrays")
            for limits in (
                *((np.ones(2), np.zeros(2)), ([0, math.nan], [1, 1]), ([0, 0], [1, math.nan])),
                *(
                    (np.zeros(2) * 1j, np.ones(2)),
                    "ab",
                    ([0, "a"], [1, 1]),
                    np.zeros(2),
                    (0, 1),
                    ([0, 0], [1, 1], [2, 2]),
                    3,
                ),
            )
        ),
        ({"planner": "procces"}, "unknown planner 'procces'; did you mean 'process'"),
        ({"planner": 3}, "planner=3 must be one of inline, thread, process, or a callable"),
        ({"blending": "commit"}, "unknown blending 'commit'.*known: latest, prefix, rtc, temporal_ensemble"),
        ({"blending": partial(TemporalEnsemble, decay=-1)}, "decay=-1"),
        ({"blending": partial(RealTimeChunking, overlap=1.5)}, "overlap=1.5"),
        ({"generator": "zero"}, "generator='zero' must be a whole number or a torch.Generator"),
        ({"generator": True}, "generator=True must be a whole number or a torch.Generator"),
        ({"fallback": "hold"}, "fallback='hold' must be a function"),
        ({"fallback_timeout": 0}, "fallback_timeout=0"),
        ({"fallback_timeout": math.nan}, "fallback_timeout=nan"),
    ):
        with pytest.raises(InputError, match=message):
            controller_on(clock, **options)
    with pytest.raises(InputError, match="isn't started"):
        controller_on(clock).tick(np.zeros(20))
    with controller_on(clock) as controller:
        with pytest.raises(InputError, match="origin=nan must be a moment"):
            controller.reset(math.nan)
        with pytest.raises(InputError, match=r"index=2\.5 must be a tick's number"):
            controller.tick(np.zeros(20), 2.5)
    assert ticks_per_step(50, 10) == 5 and ticks_per_step(10, 2.5) == 4


def test_a_loop_that_waits_for_the_first_plan_acts_from_then_on():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.24))
    with controller:
        with pytest.raises(InputError, match="call tick with a good observation first"):
            controller.wait_ready()
        assert controller.tick(np.zeros(20)) is None
        with pytest.raises(InputError, match=r"not ready: no plan came within 0\.1 s"):
            controller.wait_ready(0.1)
        controller.wait_ready()
        assert clock.now() == 0.24
        actions = []
        for _ in range(5):
            actions.append(controller.tick(np.zeros(20)).tolist())
            clock.advance(0.1)
    assert actions == [[0, 1 + k] for k in range(5)] and controller.record.faults() == {"plan_missing": 1}
    controller.wait_ready()  # at once


def test_a_tick_does_not_wait_for_a_thread_that_waits_for_the_first_plan():
    clock, waits, go_on = VirtualClock(), threading.Event(), threading.Event()

    class Planner(DelayedPlanner):
        def wait(self, timeout):
            waits.set()
            assert go_on.wait(10)
            return super().wait(timeout)

    def make(policy, generator, clock):
        return Planner(lambda r: lambda: numbered(r.tick, r.session), clock, lambda: 0.2)

    with controller_on(clock, planner=make) as controller:
        controller.tick(np.zeros(20))
        waiting = threading.Thread(target=controller.wait_ready)
        waiting.start()
        assert waits.wait(10)
        clock.advance(0.1)
        assert controller.tick(np.zeros(20)) is None
        go_on.set()
        waiting.join()
        assert controller.tick(np.zeros(20)).tolist() == [0, 1]


def test_a_first_plan_that_is_rejected_is_not_ready():
    def planner(policy, generator, clock):
        plan = numbered(0, 2, value=np.nan)
        return DelayedPlanner(lambda request: lambda: plan, clock, lambda: 0.1)

    with controller_on(VirtualClock(), planner=planner) as controller:
        controller.tick(np.zeros(20))
        with pytest.raises(InputError, match=r"not ready: a plan with NaN.*: made for tick 0"):
            controller.wait_ready()


def test_a_policy_of_ones_own_needs_a_spec_and_plans():
    class Own:
        spec = TINY

        def plan(self, window, previous=None, *, generator, executed_steps=None, committed=None):
            return policy.plan(window, previous, generator=generator, executed_steps=executed_steps)

    policy, clock = tiny_policy(), VirtualClock()
    record = ControlLoop(Controller(Own(), 10, planner="inline", clock=clock), Bench(clock)).run(3)
    expected = ControlLoop(controller_on(VirtualClock()), Bench(VirtualClock())).run(3)
    np.testing.assert_array_equal(record.ticks["action"], expected.ticks["action"])


def test_a_controller_and_a_record_say_what_they_are():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.0), blending="rtc")
    text = f"<Controller of {TINY.task!r} at 10 Hz: DelayedPlanner, RealTimeChunking; "
    assert repr(controller) == text + "not started>"
    with controller:
        controller.tick(np.zeros(20))
        clock.advance(0.3)
        controller.tick(None)
        assert repr(controller).endswith("; started, 2 ticks>")
    assert repr(controller.record) == "<Record: 2 ticks, 2 missed, 1 plans, observation_missing 1>"


def test_ticks_leave_nothing_behind(monkeypatch):
    """In a steady state memory doesn't grow, plans and faults included."""
    monkeypatch.setattr("paradiffpolicy.control.controller.log.disabled", True)  # pytest keeps what is logged
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.13), capacity=64, limits=LIMITS)
    good, bad = np.zeros(20), np.full(20, np.nan)

    def ticks(n):
        for _ in range(n):
            clock.advance(0.1)
            controller.tick(bad if controller.record.n_ticks % 7 == 0 else good)

    with controller:
        ticks(300)
        tracemalloc.start()
        ticks(200)
        before = tracemalloc.get_traced_memory()[0]
        ticks(2000)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 10_000


# -------------------------------------------------------------------------------------- environments


def make_env(**options):
    return gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints", **options)


def test_an_environments_world_goes_on_by_the_clock():
    clock = VirtualClock(3.0)
    robot = EnvRobot(make_env(control_hz=50), 1, clock)
    before = robot.observe()
    assert robot.n_steps == 0
    robot.apply(np.array([100.0, 100.0]))
    clock.advance(0.1)
    moved = robot.observe()
    assert robot.n_steps == 5 and not np.array_equal(moved, before)
    clock.advance(1.0)
    robot.apply(np.array([400.0, 400.0]))  # the second that is over was under the old action
    np.testing.assert_allclose(robot.observe()[-2:], [100, 100], atol=2)
    robot.stop()
    clock.advance(1.0)
    np.testing.assert_allclose(robot.observe()[-2:], [100, 100], atol=2)
    robot.env.close()


def test_physics_do_not_depend_on_the_control_rate():
    ends = []
    for rate in (10, 50, 100):
        clock = VirtualClock()
        robot = EnvRobot(make_env(control_hz=rate, max_episode_steps=-1), 3, clock)
        for target in ([250.0, 300.0], [300.0, 200.0], [200.0, 256.0]):
            robot.apply(np.array(target))
            clock.advance(1.0)
        ends.append(robot.observe())
        robot.env.close()
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-9)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-9)


def test_any_environment_is_a_robot():
    """Its rate is what it renders at unless given; it holds by its last action unless told how."""
    env, clock = gymnasium.make("Pendulum-v1"), VirtualClock()
    robot = EnvRobot(env, 0, clock)
    assert robot.control_hz == 30 and math.isnan(robot.score)
    robot = EnvRobot(env, 0, clock, control_hz=20)
    taken, step = [], env.step
    env.step = lambda action: (taken.append(action.tolist()), step(action))[1]
    clock.advance(0.1)
    robot.apply(np.ones(1))
    clock.advance(0.9)
    assert robot.observe().shape == (3,) and robot.n_steps == 20
    robot.stop()
    clock.advance(0.05)
    assert robot.observe().shape == (3,) and taken == [[0]] * 2 + [[1]] * 19
    assert -20 < robot.score < 0 and not robot.success  # rewards of a pendulum are negative
    robot = EnvRobot(env, 0, clock, hold=lambda: np.full(1, -1.0))
    clock.advance(0.034)
    robot.observe()
    assert taken[-1] == [-1]


@pytest.mark.parametrize(
    ("kind", "after"), [("delta", 0), ("velocity", 0), ("position", 1), ("pose", 1), ("other", 1)]
)
def test_an_environment_that_does_not_say_how_it_holds_is_stopped_as_its_actions_are(kind, after):
    env, clock = gymnasium.make("Pendulum-v1"), VirtualClock()
    robot = EnvRobot(env, 0, clock, control_hz=20, contract=Contract(action_kind=kind))
    taken, step = [], env.step
    env.step = lambda action: (taken.append(action.tolist()), step(action))[1]
    robot.apply(np.ones(1))
    clock.advance(0.05)
    robot.stop()
    clock.advance(0.1)
    robot.observe()
    assert taken == [[1], [after], [after]]


def test_an_environment_without_a_rate_or_with_other_actions_is_named():
    clock = VirtualClock()
    with pytest.raises(InputError, match="actions are Discrete"):
        EnvRobot(gymnasium.make("CartPole-v1"), 0, clock)
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.metadata = {}
    with pytest.raises(InputError, match=r"says neither control_hz nor metadata.*: set control_hz"):
        EnvRobot(env, 0, clock)


def test_success_is_what_the_task_calls_so():
    """A key of the environment's info, at any step."""

    class Done(gymnasium.Wrapper):
        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            return observation, reward, terminated, truncated, info | {"lifted": clock.now() < 0.25}

    clock = VirtualClock()
    robots = [EnvRobot(Done(make_env()), 1, clock, success_key=key) for key in (None, "lifted")]
    for robot in robots:
        clock.advance(0.1)
        robot.observe()
    assert [robot.success for robot in robots] == [False, True]


def test_a_rate_that_the_physics_cannot_have_is_named():
    with pytest.raises(ValueError, match="control_hz=30 must divide"):
        make_env(control_hz=30)


def test_an_episodes_end_ends_the_run():
    clock = VirtualClock()
    robot = EnvRobot(make_env(max_episode_steps=4), 1, clock)
    record = ControlLoop(controller_on(clock), robot).run(20, until=lambda: robot.finished)
    assert record.n_ticks == 5 and robot.n_steps == 4 and 0 <= robot.score <= 1


# ------------------------------------------------------------------------- clocks, history, scheduling


def test_the_real_clock_does_not_go_back_and_wakes_late_at_most():
    clock = MonotonicClock()
    moment = clock.now() + 0.002
    clock.sleep_until(moment)
    assert clock.now() >= moment
    clock.sleep_until(moment - 1)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
)
@settings(max_examples=40)
def test_history_is_what_a_list_of_all_observations_says(n, stride, steps):
    """Against the plain form: every tick's observation, gaps filled with the one before."""
    history, seen, tick, value = History(n, stride), {}, 5, 0.0
    for jump in steps:
        value += 1
        if not seen:
            history.push(np.array([value]), tick)
        else:
            for gap in range(tick + 1, tick + jump):
                seen[gap] = seen[tick]
            tick += jump
            history.push(np.array([value]), tick)
        seen[tick] = value
        first = min(seen)
        wanted = [seen.get(max(tick - back * stride, first)) for back in range(n - 1, -1, -1)]
        assert history.window()[:, 0].tolist() == wanted


def test_history_repeats_the_first_observation():
    history = History(3)
    assert history.empty
    history.push(np.array([1.0]))
    assert history.window().tolist() == [[1], [1], [1]]
    history.push(np.array([2.0]))
    assert history.window().tolist() == [[1], [1], [2]]
    history.clear()
    history.push(np.array([5.0, 6.0]))
    assert history.window().tolist() == [[5, 6]] * 3


def test_refused_scheduling_is_logged_and_the_loop_runs_without():
    with scheduled(Scheduling(priority=1000, cores=[10_000], freeze_gc=True)) as refused:
        assert [line.split(":")[0] for line in refused] == ["cores [10000]", "real-time priority 1000"]
        import gc

        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "SCHED_FIFO") or os.geteuid() != 0, reason="only root can become a user")
def test_an_ordinary_user_leaves_real_time_and_keeps_the_record():
    """In a child that has real-time priority and no privileges, by a limit where the system lets root set it;
    elsewhere it loses them while it has the priority.  It may not clear "reset on fork"."""

    def become_nobody():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    def child():
        try:
            resource.setrlimit(resource.RLIMIT_RTPRIO, (50, 50))
            become_nobody()
        except ValueError:
            pass
        clock = VirtualClock()
        robot, controller = Bench(clock), controller_on(clock, planner=scripted(0.0))
        policies = []

        def observer(tick):
            if os.geteuid() == 0:
                become_nobody()
            policies.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)

        requests = Scheduling(priority=10, cores=[min(os.sched_getaffinity(0))])
        loop = ControlLoop(controller, robot, observers=[observer], scheduling=requests)
        record = loop.run(3)
        if policies != [os.SCHED_FIFO] * 3:
            return NO_REAL_TIME
        left = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
        return 0 if (left, record.n_ticks, robot.stops) == (os.SCHED_OTHER, 3, 1) else 1

    assert in_child(child) in (0, NO_REAL_TIME)


NO_REAL_TIME = 77


def in_child(function):
    """What it returns in a child of this process, or 70: it raised."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_can_not_be_restored_is_logged(monkeypatch, caplog):
    calls = []

    def once(*values):
        calls.append(values)
        if len(calls) > 1:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", once)
    with scheduled(Scheduling(cores=[0])) as refused:
        assert refused == []
    assert caplog.messages == ["scheduling: once isn't restored: Invalid argument"]


def test_the_record_keeps_the_last_ticks_and_can_be_saved(tmp_path):
    record = Record(2, 4)
    for k in range(6):
        record.add_tick(k, k / 10, k / 10 + 0.001, 0.0, 0, 0, 1, 0.1, int(Fault.PLAN_LATE), False, [k, k])
    record.add_plan(0, 0.0, 0.1, 0.1, 3, math.nan, 1, False)
    assert record.ticks["index"].tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(record.deadline_errors, 0.001)
    assert record.faults() == {"plan_late": 4}
    assert total_faults([record, record, Record(2, 4)]) == {"plan_late": 8}
    record.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz") as saved:
        assert saved["ticks"]["action"][:, 0].tolist() == [2, 3, 4, 5]
        assert saved["plans"]["iterations"].tolist() == [3]


def test_a_ticks_cost_is_all_of_it():
    """From the observation to the decision, the blender's and the fallback's time included."""
    clock = VirtualClock()

    class Slow(Latest):
        def act(self, tick, out):
            clock.advance(0.003)
            return super().act(tick, out)

    controller = controller_on(clock, planner=scripted(0.0), blending=Slow)
    run(controller, clock, 3)
    ticks = controller.record.ticks
    np.testing.assert_allclose(ticks["ended"] - ticks["started"], 0.003, atol=1e-9)


def test_joins_are_where_another_plan_acts():
    clock = VirtualClock()
    controller = controller_on(clock, planner=scripted(0.1))
    run(controller, clock, 20)
    assert np.flatnonzero(controller.record.joins()).tolist() == [9, 17]


def test_a_temporal_ensemble_in_the_loop():
    clock = VirtualClock()
    controller = controller_on(
        clock, planner=scripted(0.0), blending=partial(TemporalEnsemble, decay=0.0), replan_every=1
    )
    actions = run(controller, clock, 4)
    assert actions == [[0, 1], [0.5, 1.5], [1, 2], [1.5, 2.5]]
