"""The loop keeps its deadlines, executes the right steps, and holds when something is wrong."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from paradiffpolicy.control.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.history import History
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.robot import EnvRobot, steps_per_tick
from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import Policy, spec_schedule
from paradiffpolicy.sampling.sampler import make_sampler

from .conftest import TINY, tiny_checkpoint


class Bench:
    """A robot on a test bench: gives the observations of a script, notes the actions, and takes
    as much of the virtual clock's time per action as it is told."""

    control_hz = 10.0

    def __init__(self, clock, script=None, seconds=None):
        self.clock, self.script, self.seconds = clock, script or {}, seconds or {}
        self.applied = []

    def observe(self):
        return self.script.get(len(self.applied), np.full(20, 256.0))

    def apply(self, action, n_steps):
        self.clock.advance(self.seconds.get(len(self.applied), 0.01))
        self.applied.append(np.array(action))
        return 0.5, False

    def hold(self):
        return np.array([-7.0, -7.0])


def loop_on(robot, clock, rate_hz=10, observers=(), **sampler):
    policy = Policy(tiny_checkpoint(), make_sampler(spec_schedule(TINY), **{"n_steps": 3, **sampler}))
    generator = torch.Generator().manual_seed(0)
    loop = ControlLoop(policy, robot, rate_hz=rate_hz, clock=clock, generator=generator, observers=observers)
    return policy, loop


def test_ticks_are_on_the_grid():
    clock = VirtualClock(5.0)
    _, loop = loop_on(Bench(clock), clock)
    ticks = loop.run(20)
    np.testing.assert_allclose([t.started for t in ticks], 5.0 + 0.1 * np.arange(20))
    assert [t.deadline for t in ticks] == [t.started for t in ticks]
    assert sum(t.missed for t in ticks) == 0


@pytest.mark.parametrize(("seconds", "missed"), [(0.05, 0), (0.099, 0), (0.15, 1), (0.2001, 2), (0.55, 5)])
def test_a_tick_that_runs_over_misses_deadlines_and_the_grid_stays(seconds, missed):
    clock = VirtualClock()
    robot = Bench(clock, seconds={3: seconds})
    _, loop = loop_on(robot, clock)
    ticks = loop.run(6)
    assert [t.missed for t in ticks] == [0, 0, 0, missed, 0, 0]
    np.testing.assert_allclose(ticks[4].started, 0.1 * (4 + missed))
    np.testing.assert_allclose(ticks[5].started, 0.1 * (5 + missed))


def test_ta_steps_of_every_plan_are_executed():
    clock = VirtualClock()
    robot = Bench(clock)
    policy, loop = loop_on(robot, clock)
    ticks = loop.run(20)
    assert [t.plan_index for t in ticks] == ([1, 2, 3, 4, 5, 6, 7, 8] * 3)[:20]
    assert [t.rounds for t in ticks] == ([3] + [0] * 7) * 2 + [3, 0, 0, 0]
    # The same plans, made by hand.
    generator, window, plan = torch.Generator().manual_seed(0), np.full((2, 20), 256.0), None
    for k in range(2):
        plan = policy.plan(window, plan, generator=generator)
        np.testing.assert_allclose(robot.applied[8 * k : 8 * k + 8], plan.executed_actions[0], rtol=1e-6)


def test_realtime_plans_continue_in_the_loop():
    clock = VirtualClock()
    _, loop = loop_on(Bench(clock), clock, solver="ddim", n_steps=6, driver="realtime", rounds=2)
    assert [t.rounds for t in loop.run(24) if t.rounds] == [6, 2, 2]


def test_the_window_holds_the_last_observations():
    seen = []
    clock = VirtualClock()
    robot = Bench(clock, script={k: np.full(20, float(k)) for k in range(20)})
    policy, loop = loop_on(robot, clock)
    real = policy.plan
    policy.plan = lambda window, *args, **kwargs: (
        seen.append(window[:, 0].tolist()) or real(window, *args, **kwargs)
    )
    loop.run(17)
    assert seen == [[0, 0], [7, 8], [15, 16]]


BAD = {
    "nan": (np.full(20, np.nan), "NaN or infinity in column 0"),
    "shape": (np.zeros(19), r"shape \(19,\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_observation_holds_the_last_safe_action_and_says_so(kind, caplog):
    observation, message = BAD[kind]
    clock = VirtualClock()
    robot = Bench(clock, script={5: observation, 6: observation})
    told = []
    _, loop = loop_on(robot, clock, observers=[told.append])
    ticks = loop.run(12)
    for k in (5, 6):
        np.testing.assert_array_equal(robot.applied[k], robot.applied[4])
        assert ticks[k].plan_index == -1
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(ticks[k].fault)
    assert [t.fault is None for t in ticks] == [True] * 5 + [False] * 2 + [True] * 5
    # A new plan from the next good observation.
    assert ticks[7].plan_index == 1 and ticks[7].rounds == 3
    assert told == ticks
    assert [record.args[0] for record in caplog.records] == [5, 6]


def test_before_any_safe_action_the_robot_holds():
    clock = VirtualClock()
    robot = Bench(clock, script={0: np.full(20, np.inf)})
    _, loop = loop_on(robot, clock)
    loop.run(2)
    np.testing.assert_array_equal(robot.applied[0], [-7, -7])
    assert robot.applied[1][0] >= 0


def test_a_plan_with_nan_is_not_executed():
    clock = VirtualClock()
    robot = Bench(clock)
    policy, loop = loop_on(robot, clock)
    policy.denoiser.network.final_conv[1].bias.data.fill_(float("nan"))
    ticks = loop.run(2)
    assert "plan has NaN" in ticks[0].fault
    np.testing.assert_array_equal(robot.applied, [[-7, -7], [-7, -7]])


@pytest.mark.parametrize(("env_hz", "rate", "steps"), [(10, 10, 1), (10, 5, 2), (20, 2.5, 8), (100, 10, 10)])
def test_rates_that_divide(env_hz, rate, steps):
    assert steps_per_tick(env_hz, rate) == steps


@pytest.mark.parametrize(("env_hz", "rate"), [(10, 3), (10, 20), (10, 0), (10, -5)])
def test_rates_that_do_not_divide_are_named(env_hz, rate):
    with pytest.raises(InputError, match=f"rate_hz={rate}"):
        steps_per_tick(env_hz, rate)


def test_a_slower_loop_repeats_its_action():
    clock = VirtualClock()
    env = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")
    robot = EnvRobot(env, seed=1)
    _, loop = loop_on(robot, clock, rate_hz=5)
    loop.run(3)
    assert env.unwrapped.get_wrapper_attr("_last_action") is not None
    assert env.get_wrapper_attr("_elapsed_steps") == 6


def test_an_episodes_end_ends_the_run():
    clock = VirtualClock()
    env = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints", max_episode_steps=4)
    _, loop = loop_on(EnvRobot(env, seed=1), clock)
    ticks = loop.run(20)
    assert len(ticks) == 4 and 0 <= ticks[-1].reward <= 1


def test_the_real_clock_does_not_go_back_and_wakes_late_at_most():
    clock = MonotonicClock()
    moment = clock.now() + 0.002
    clock.sleep_until(moment)
    assert clock.now() >= moment
    clock.sleep_until(moment - 1)


def test_history_repeats_the_first_observation():
    history = History(3)
    history.push(np.array([1.0]))
    assert history.window().tolist() == [[1], [1], [1]]
    history.push(np.array([2.0]))
    assert history.window().tolist() == [[1], [1], [2]]
    history.clear()
    history.push(np.array([5.0]))
    assert history.window().tolist() == [[5], [5], [5]]
