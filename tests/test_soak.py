"""The long run among faults: what is done to it happens, and what goes wrong is said."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from paradiffpolicy.benchmarks.control import bare_run
from paradiffpolicy.benchmarks.soak import Attacks, FaultyRobot, PlannerAttacks, outcome, soak, soak_tables
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.record import Fault, Record
from paradiffpolicy.control.scheduling import Scheduling
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler

from .conftest import TINY, tiny_checkpoint

OBSERVATIONS = np.full((3, 20), 256.0)


def attacks(**settings):
    usual = {"kills": 0, "stops": 0, "dropped": 0.1, "not_finite": 0.1}
    return Attacks(**{**usual, **settings}, generator=np.random.default_rng(3))


@pytest.mark.slow
def test_a_short_run_loses_nothing_of_what_happened():
    policy = Policy.from_checkpoint(tiny_checkpoint(), spec_sampler(TINY, n_steps=3))
    values = soak(
        policy,
        OBSERVATIONS,
        attacks(kills=1),
        rate_hz=50,
        seconds=2,
        planner_timeout=1.0,
        scheduling=Scheduling(),
        seed=0,
    )
    assert values["faults"]["planner killed or stopped"] == [1, 1]
    assert all(happened == recorded for happened, recorded in values["faults"].values())
    assert values["faults"]["observation_missing"][0] > 0 < values["faults"]["observation_not_finite"][0]
    assert [view.row_count for view in soak_tables(values, "t")] == [2, 9]


def record_of(faults, missed=0):
    record = Record(2, len(faults))
    for k, fault in enumerate(faults):
        record.add_tick(k, k, k, k, missed * (k == 2), -1, -1, np.nan, int(fault), False, np.zeros(2))
    return record


def test_what_went_wrong_is_said():
    n, clock = 40, VirtualClock()
    bare = bare_run(n, 10, clock, Scheduling())
    robot, assaults = FaultyRobot(OBSERVATIONS, attacks(), n), PlannerAttacks(attacks(), lambda: 1, n)
    memory = [100.0] * 10
    faults = [Fault(int(fault)) for fault in robot.faults]
    assert outcome(record_of(faults), bare, robot, assaults, memory)["broken"] == []
    lost = next(k for k, fault in enumerate(faults) if fault)
    unrecorded = [Fault.NONE if k == lost else fault for k, fault in enumerate(faults)]
    swapped = [Fault.NONE, *faults[:-1]] if not faults[-1] else [faults[-1], *faults[:-1]]
    dead = [fault | Fault.PLANNER_DEAD * (k == 9) for k, fault in enumerate(faults)]
    for record, used, words in (
        (record_of(faults, missed=1), memory, "1 ticks missed, 0 by the clock alone"),
        (record_of(unrecorded), memory, "observations' faults aren't recorded"),
        (record_of(swapped), memory, "observations' faults aren't recorded"),
        (record_of(dead), memory, "the planner's faults aren't recorded"),
        (record_of(faults), [*memory, 120.0], "memory grew by 20 MB"),
    ):
        (*_, last) = outcome(record, bare, robot, assaults, used)["broken"]
        assert words in outcome(record, bare, robot, assaults, used)["broken"][0] or words in last


def test_the_robots_observations_are_as_drawn():
    robot = FaultyRobot(OBSERVATIONS, attacks(), 200)
    for fault in robot.faults.tolist():
        given = robot.observe()
        kind = Fault.OBSERVATION_MISSING if given is None else Fault.OBSERVATION_NOT_FINITE
        assert fault == (kind if given is None or np.isnan(given).any() else Fault.NONE)
    assert set(robot.faults.tolist()) == {0, Fault.OBSERVATION_MISSING, Fault.OBSERVATION_NOT_FINITE}
    assert np.isfinite(OBSERVATIONS).all()


def test_a_planner_is_attacked_again_only_when_it_plans_again(monkeypatch):
    sent = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    assaults = PlannerAttacks(attacks(kills=1, stops=1), lambda: 7, 100)

    def tick(index, plan_tick):
        plan = None if plan_tick is None else type("Reply", (), {"tick": plan_tick, "waited": 0})()
        assaults(type("Tick", (), {"index": index, "plan": plan})())

    for index, plan_tick in ((99, None), (99, 90), (100, 90), (101, 99), (102, 100), (103, 102)):
        tick(index, plan_tick)
    assert sorted(number for _, number in sent) == [signal.SIGKILL, signal.SIGSTOP]
    assert [index for index, _ in assaults.sent] == [99, 102]


def test_the_clock_alone_misses_what_it_sleeps_through():
    class Sleepy(VirtualClock):
        def sleep_until(self, moment):
            super().sleep_until(moment + (0.25 if abs(moment - 0.3) < 1e-9 else 0.0))

    record = bare_run(10, 10, Sleepy(), Scheduling())
    assert record.missed == 2 and record.ticks["index"].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
