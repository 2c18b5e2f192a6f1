"""Planners beside the loop plan what a planner within it plans, and die without taking the loop along."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.record import Fault
from paradiffpolicy.errors import InputError
from paradiffpolicy.observation import InvalidObservationError
from paradiffpolicy.planning import PLANNERS, planner_beside
from paradiffpolicy.planning.anytime import Anytime
from paradiffpolicy.planning.backoff import BackOff
from paradiffpolicy.planning.blending import RealTimeChunking
from paradiffpolicy.planning.inline import InlinePlanner
from paradiffpolicy.planning.process import Channel, ProcessPlanner, recall, remember
from paradiffpolicy.planning.request import PlanMaker, PlanReply, PlanRequest
from paradiffpolicy.planning.slot import HEAD, Slot
from paradiffpolicy.planning.thread import ThreadPlanner
from paradiffpolicy.policy import InvalidPlanError, Policy
from paradiffpolicy.process import ChildProcess, Connection
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.types import Committed

from .conftest import ROOT, TINY, tiny_checkpoint

REALTIME = {"solver": "ddim", "n_steps": 6, "driver": "rti", "iterations": 2}


def tiny_policy(**sampler):
    return Policy.from_checkpoint(
        tiny_checkpoint(), make_sampler(spec_schedule(TINY), **{"n_steps": 3, **sampler})
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def requests(n=5):
    """Of two sessions, some with something committed, at uneven distances."""
    draw = np.random.default_rng(0)
    ticks = np.cumsum([0, 3, 8, 1, 20, *[4] * n])[:n]
    for k, tick in enumerate(ticks.tolist()):
        window, kept, weight = draw.uniform(0, 512, (2, 20)), draw.uniform(0, 512, (16, 2)), np.zeros(16)
        weight[:4] = 1.0
        yield PlanRequest(tick, tick, int(k > 3), 0.0, window, kept, weight)


def reply_of(planner, request, timeout=60.0):
    """Asks, and waits for the answer without looking at a clock."""
    planner.request(request)
    while (reply := planner.poll()) is None or reply.tick != request.tick:
        assert isinstance(planner, InlinePlanner) or planner.wait(timeout)
    return reply


# ---------------------------------------------------------------------------------------- equality


@pytest.fixture(scope="module", params=[ThreadPlanner, ProcessPlanner])
def beside(request):
    planner = request.param(captured_policy(), seeded(), MonotonicClock())
    planner.start(committed=True)
    yield planner
    planner.stop()


def captured_policy():
    return tiny_policy(**REALTIME).captured("openvino", threads=1)


@pytest.fixture(scope="module")
def inline():
    planner = InlinePlanner(captured_policy(), seeded(), MonotonicClock())
    planner.start(committed=True)
    return planner


def test_a_planner_beside_the_loop_plans_what_one_within_it_plans(beside, inline):
    inline._make.generator.manual_seed(0)
    for request in requests(6):
        expected, actual = reply_of(inline, request), reply_of(beside, request)
        assert actual.actions.tolist() == expected.actions.tolist()  # to the bit
        assert (actual.tick, actual.session, actual.iterations) == (
            expected.tick,
            expected.session,
            expected.iterations,
        )
        assert actual.latency > 0 and actual.arrived >= 0 and actual.fault == ""


def test_a_fault_comes_back_in_words_and_the_planner_lives(beside):
    good = next(requests(1))
    bad = replace(good, window=np.full((2, 20), np.nan))
    reply = reply_of(beside, bad)
    assert "NaN or infinity at step 0" in reply.fault and np.isnan(reply.actions).all()
    assert reply_of(beside, good).fault == "" and beside.alive


def test_only_the_newest_request_is_answered_and_every_plan_is_handed_out_once(beside):
    for tick in range(30):
        beside.request(replace(next(requests(1)), tick=tick))
    assert reply_of(beside, replace(next(requests(1)), tick=99)).tick == 99
    assert beside.poll() is None


# ------------------------------------------------------------------------------- the process's faults


class Driven:
    """A controller on a virtual clock, with a planner in a process that really runs."""

    def __init__(self):
        self.clock, self.pickled = VirtualClock(), 0
        policy = tiny_policy(**REALTIME)

        def counted():
            self.pickled += 1
            return Policy.__getstate__(policy)

        vars(policy)["__getstate__"] = counted
        self.controller = Controller(
            policy,
            10,
            planner=ProcessPlanner,
            blending=RealTimeChunking,
            clock=self.clock,
            replan_every=2,
            planner_timeout=1.0,
        ).start()
        self.planner = self.controller._planner

    def begin(self):
        """Starts a new episode, with a plan."""
        self.controller.reset()
        self.tick_until_planned()

    def tick(self):
        action = self.controller.tick(np.full(20, 256.0))
        self.clock.advance(0.1)
        return action

    def tick_until_planned(self):
        """Ticks until another plan has come; an answer to another episode's request may come before."""
        plans = self.controller.record.n_plans
        for _ in range(9):
            if self.controller._watchdog.waiting:
                assert self.planner.wait(60)
            self.tick()
            if self.controller.record.n_plans > plans:
                return
        pytest.fail("no plan came")

    def kill(self):
        os.kill(self.planner.pid, signal.SIGKILL)
        self.planner._child.join(60)

    def iterations(self):
        return self.controller.record.plans["iterations"].tolist()

    def until_restarted(self):
        self.planner._restarting.join(60)
        assert self.planner.alive


def resources():
    """What this process holds: pipes and files without a name, children, named memory, threads."""
    links = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(file.readlink()))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        # Semaphores there are of other processes: planners have none.
        "memory": {path.name for path in Path("/dev/shm").iterdir() if path.name[:4] != "sem."},
        "pipes": sum("pipe" in link for link in links),
        "deleted": sorted(link for link in links if "deleted" in link),
        "children": children,
        "threads": sum("planner" in thread.name for thread in threading.enumerate()),
    }


@pytest.fixture(scope="module")
def driven():
    """One process for all tests of how it ends; the last of them stops it."""
    before = resources() if sys.platform == "linux" else None
    driven = Driven()
    driven.before = before
    yield driven
    driven.controller.stop()


def test_a_planner_that_is_killed_is_started_again_and_the_robot_goes_on(driven):
    driven.begin()
    driven.tick_until_planned()  # it is known by now that of the first one something is written down
    record, pid = driven.controller.record, driven.planner.pid
    driven.kill()
    before = [driven.tick() for _ in range(3)]  # a loop that waits for nothing
    faults = [Fault(int(flags)) for flags in record.ticks["faults"]]
    assert all(action is not None for action in before) and Fault.PLANNER_DEAD in faults[-3]
    assert not record.ticks["fallback_active"][-3:].any()  # the old plan goes on
    driven.until_restarted()
    assert driven.planner.pid != pid
    driven.tick_until_planned()
    assert driven.iterations()[0] == 6 and set(driven.iterations()[1:]) == {2}  # also after the restart
    assert driven.pickled == 1  # not again within the loop's process
    assert record.faults()["planner_dead"] >= 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_planner_that_hangs_is_killed_and_started_again(driven):
    driven.begin()
    record, pid = driven.controller.record, driven.planner.pid
    os.kill(pid, signal.SIGSTOP)
    for _ in range(25):
        driven.tick()
        if "planner_hung" in record.faults():
            break
    assert record.faults()["planner_hung"] == 1
    driven.until_restarted()
    assert driven.planner.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    driven.tick_until_planned()
    assert not record.ticks["fallback_active"][-1]


def test_stopping_while_it_starts_again_leaves_nothing_behind(driven):
    driven.controller.reset()
    driven.kill()
    driven.tick()
    driven.controller.stop()
    assert not driven.planner.alive and driven.planner.pid is None
    if driven.before is not None:  # also of the processes that ended in the tests above
        assert resources() == driven.before


def test_the_process_ends_with_its_parent_however_that_ends():
    """It waits as a planner does, which needs no policy."""
    script = (
        "import os, pickle\n"
        "from paradiffpolicy.process import ChildProcess, woken\n"
        "child = ChildProcess(woken, pickle.dumps(None), name='planner')\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    pid = int(done.stdout)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        handle = os.pidfd_open(pid)
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        assert ended.poll(30_000)
        os.close(handle)


def test_a_process_is_reached_beyond_1024_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1030):
            held.enter_context(Path(os.devnull).open())
        child = ChildProcess(Connection.send_bytes, pickle.dumps(b"ready"), name="planner")
        assert child.connection.fileno() > 1024
        child.await_ready(60)
        child.end()


def test_a_policy_that_cannot_go_to_another_process_is_named():
    policy = tiny_policy()
    policy = replace(policy, info={"callback": lambda: None})
    planner = ProcessPlanner(policy, seeded(), MonotonicClock())
    with pytest.raises(InputError, match=r"can't go to another process .*: plan in a thread"):
        planner.start()
    assert not planner.alive
    planner.stop()


class Unready:
    """Ends the process that unpickles it."""

    spec = TINY

    def __reduce__(self):
        return sys.exit, (3,)


def test_a_process_that_does_not_get_ready_says_so(caplog):
    caplog.set_level("INFO")
    planner = ProcessPlanner(Unready(), seeded(), MonotonicClock())
    with pytest.raises(InputError, match="planner's process ended with exit code 3 before it was ready"):
        planner.start()
    assert caplog.messages[0].startswith("starting the planner's process")
    assert not planner.alive


# ------------------------------------------------------------------------------------------ the slot


@given(st.lists(st.binary(min_size=24, max_size=24), max_size=5), st.data())
def test_a_slot_is_read_whole_or_not_at_all(contents, data):
    """The reader sees any mixture of before and after; it takes what was written, or nothing."""
    memory = bytearray(Slot.taken(24))
    writer, reader = Slot(memoryview(memory), 0, 24), Slot(memoryview(memory), 0, 24)
    assert reader.read() is None
    for content in contents:
        before = bytes(memory)
        writer.write(content)
        after = bytes(memory)
        torn = data.draw(st.lists(st.booleans(), min_size=len(memory), max_size=len(memory)))
        # Any bytes of the head and the content may be old while others are new.
        parts = zip(before, after, torn, strict=True)
        memory[:] = bytes(new if is_new else old for old, new, is_new in parts)
        seen = reader.read()
        assert seen is None or seen in (content, before[HEAD.size : HEAD.size + 24])
        memory[:] = after
        latest = reader.read()
        assert latest == content or (latest is None and seen == content)
        assert reader.read() is None


def test_a_writer_that_died_at_work_does_not_stop_the_next():
    memory = bytearray(Slot.taken(8))
    writer, reader = Slot(memoryview(memory), 0, 8), Slot(memoryview(memory), 0, 8)
    writer.write(b"12345678")
    memory[0] += 1  # as in the middle of a write
    assert reader.read() is None
    Slot(memoryview(memory), 0, 8).write(b"abcdefgh")
    assert reader.read() == b"abcdefgh"


@given(
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=400),
)
@settings(max_examples=40)
def test_requests_and_replies_come_through_as_they_were(tick, number, commits, words):
    with tempfile.TemporaryFile() as file:
        here, there = Channel(file.fileno(), TINY), Channel(file.fileno(), TINY)
        draw = np.random.default_rng(abs(tick))
        kept = (draw.normal(size=(16, 2)), draw.uniform(size=16)) if commits else (None, None)
        request = PlanRequest(tick, tick + 1, 3, number, draw.normal(size=(2, 20)), *kept)
        here.send_request(request)
        got = there.receive_request()
        assert (got.tick, got.step, got.session, got.asked) == (tick, tick + 1, 3, number)
        assert np.array_equal(got.window, request.window)
        assert (got.committed is None) == (not commits)
        if commits:
            assert np.array_equal(got.committed, kept[0]) and np.array_equal(got.commitment, kept[1])
        assert there.receive_request() is None
        words = words.replace("\0", "")
        actions = draw.normal(size=(16, 2))
        reply = PlanReply(tick, 3, number, 0.5, 7, math.nan, actions, words)
        there.send_reply(reply)
        got = here.receive_reply(VirtualClock(7.0))
        assert (got.tick, got.session, got.asked, got.latency) == (tick, 3, number, 0.5)
        assert (got.iterations, got.arrived) == (7, 7.0) and np.array_equal(got.actions, actions)
        assert words.startswith(got.fault[:-1]) and len(got.fault.encode()) <= 243


# ----------------------------------------------------------------------------------------- threads


def test_a_thread_that_hangs_within_a_captured_plan_is_replaced_and_threads_do_not_pile_up():
    """It holds its program's lock; the copy's is another.  Of copies that hang too, none is replaced."""
    hangs, go_on = [threading.Semaphore(0), threading.Semaphore(0)], threading.Event()
    policy = tiny_policy(**REALTIME).captured("emulated")
    planner = ThreadPlanner(policy, seeded(), MonotonicClock())
    planner.start()
    before = threading.active_count()
    request = next(requests(1))
    expected = reply_of(planner, request)

    def hang(number):
        executor = planner._make.policy.executor
        real = executor._program

        def hanging(inputs):
            hangs[number].release()
            go_on.wait(60)
            return real(inputs)

        executor._program = hanging
        planner.request(replace(request, tick=99))
        assert hangs[number].acquire(timeout=60)
        return planner._thread

    first = hang(0)
    planner.restart()
    assert not planner.alive  # it captures its own program first
    reply = reply_of(planner, replace(request, tick=1, step=4))
    assert reply.fault == "" and planner.alive and threading.active_count() == before + 1
    assert reply.iterations == 2 < expected.iterations  # it continues the last plan
    second = hang(1)
    for _ in range(5):
        planner.restart()
    assert planner._thread is second and threading.active_count() == before + 1
    go_on.set()
    first.join(60)
    assert reply_of(planner, replace(request, tick=100)).fault == ""
    planner.stop()
    assert threading.active_count() == before - 1


def test_a_thread_that_hangs_is_left_alone():
    stuck, go_on = threading.Event(), threading.Event()
    policy = tiny_policy()
    real = policy.plan

    def plan(*args, **kwargs):
        if not stuck.is_set():
            stuck.set()
            go_on.wait(60)
        return real(*args, **kwargs)

    planner = ThreadPlanner(policy, seeded(), MonotonicClock())
    planner.start()
    vars(policy)["plan"] = plan
    first = next(requests(1))
    planner.request(first)
    assert stuck.wait(60)
    hung = planner._thread
    planner.restart()
    assert reply_of(planner, replace(first, tick=7)).tick == 7
    go_on.set()
    hung.join(60)
    assert planner.poll() is None  # what it said in the end isn't a plan any more
    planner.stop()
    assert not planner.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_seen():
    policy = tiny_policy()
    planner = ThreadPlanner(policy, seeded(), MonotonicClock())
    planner.start()

    def broken(*args, **kwargs):
        raise SystemExit

    vars(policy)["plan"] = broken
    planner.request(next(requests(1)))
    planner._thread.join(60)
    assert not planner.alive
    del vars(policy)["plan"]
    planner.restart()
    assert planner.alive and reply_of(planner, next(requests(1))).fault == ""
    planner.stop()


# ------------------------------------------------------------------------------------------ anytime


class Timed:
    """Policies that take a virtual clock's time: so much for a plan."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def slow(self, policy):
        real, clock = policy.plan, self.clock

        def plan(*args, **kwargs):
            self.calls += 1
            clock.advance(self.seconds)
            return real(*args, **kwargs)

        vars(policy)["plan"] = plan
        return policy


def anytime(budget, seconds=(0.1, 0.03, 0.01), **options):
    clock = VirtualClock()
    policies = [tiny_policy(n_steps=4), tiny_policy(**{**REALTIME, "iterations": 3})]
    made = Anytime(policies, budget, clock, repeats=2, **options)
    for policy, taken in zip([*policies, made.one_iteration], seconds, strict=True):
        Timed(clock, taken).slow(policy)
    return made.warm_up(), clock


WINDOW = np.full((2, 20), 256.0)


@pytest.mark.parametrize(("budget", "first"), [(0.2, 0), (0.101, 0), (0.09, 1), (0.031, 1)])
def test_the_best_sampler_that_fits_plans(budget, first):
    made, _ = anytime(budget)
    np.testing.assert_allclose(made.latencies, [0.1, 0.03, 0.01])
    assert made.chosen() is made.policies[first]
    plan = made.plan(WINDOW, generator=seeded())
    expected = made.policies[first].plan(WINDOW, generator=seeded())
    assert torch.equal(plan.actions, expected.actions) and plan.residual is None


@pytest.mark.parametrize(("budget", "iterations"), [(0.029, 2), (0.0201, 2), (0.012, 1), (0.001, 1)])
def test_when_none_fits_iterations_fill_the_budget(budget, iterations):
    made, clock = anytime(budget)
    assert made.chosen() is None
    first = made.plan(WINDOW, generator=seeded())
    begun = clock.now()
    plan = made.plan(WINDOW + 3, first, generator=seeded(1), executed_steps=4)
    assert plan.solution.iterations.tolist() == [iterations]
    assert clock.now() - begun <= max(budget, 0.01) + 1e-9
    # A whole plan: that of rti with as many iterations.
    same = tiny_policy(**{**REALTIME, "iterations": iterations})
    expected = same.plan(WINDOW + 3, first, generator=seeded(1), executed_steps=4)
    np.testing.assert_allclose(plan.actions, expected.actions, atol=1e-3)
    # And the change by its last iteration.
    if iterations == 2:
        fewer = tiny_policy(**{**REALTIME, "iterations": 1})
        before = fewer.plan(WINDOW + 3, first, generator=seeded(1), executed_steps=4)
        change = (plan.executed_actions - before.executed_actions).abs().max()
        np.testing.assert_allclose(plan.residual[0], change, atol=1e-3)


def test_iterations_that_change_nothing_any_more_are_saved():
    made, _ = anytime(0.029, settled=1e9)
    first = made.plan(WINDOW, generator=seeded())
    assert made.plan(WINDOW, first, generator=seeded(1)).solution.iterations.tolist() == [1]


def test_another_tableaus_plan_is_not_continued():
    made, _ = anytime(0.05)
    other = made.policies[0].plan(WINDOW, generator=seeded())
    plan = made.plan(WINDOW, other, generator=seeded(1))
    assert plan.solution.iterations.tolist() == [6]  # as a first plan


def test_anytime_plans_in_a_controller_say_their_residual():
    made, clock = anytime(0.015)
    controller = Controller(made, 10, generator=seeded(), planner="inline", clock=clock)
    with controller:
        for k in range(20):
            clock.sleep_until(max(clock.now(), k / 10))
            controller.tick(np.full(20, 200.0 + k))
    plans = controller.record.plans
    assert np.isnan(plans["residual"][0]) and (plans["residual"][1:] >= 0).all()


def test_anytime_settings_are_checked():
    with pytest.raises(InputError, match="names none"):
        Anytime([], 0.1, VirtualClock())
    with pytest.raises(InputError, match="budget=0"):
        Anytime([tiny_policy()], 0, VirtualClock())


# ----------------------------------------------------------------------------------- committed plans

STOCHASTIC = ("ddpm", "sde_dpm_solver_pp_2m")
SOLVER_DRIVERS = [
    ({"solver": solver, "n_steps": 12}, driver)
    for solver in (
        "ddpm",
        "ddim",
        "dpm_solver_pp_2m",
        "dpm_solver_3",
        "unipc",
        "heun",
        "sde_dpm_solver_pp_2m",
    )
    for driver in (
        {"driver": "sequential"},
        {"driver": "picard", "window": 5, "tolerance": 1e-3},
        {"driver": "picard_published", "window": 5, "tolerance": 1e-3},
        {"driver": "anderson", "window": 5, "tolerance": 1e-3},
        {"driver": "rti", "iterations": 2},
        {"driver": "speculative", "window": 5},
    )
    if driver["driver"] != "speculative" or solver in STOCHASTIC
]


@pytest.mark.parametrize(("solver", "driver"), SOLVER_DRIVERS, ids=str)
def test_committed_actions_are_kept_by_every_solver_and_driver(solver, driver):
    policy = tiny_policy(**solver, **driver)
    draw = np.random.default_rng(0)
    actions = torch.from_numpy(draw.uniform(50, 450, (1, 16, 2))).float()
    weight = torch.zeros(1, 16)
    weight[0, :5], weight[0, 5:8] = 1.0, torch.tensor([0.7, 0.4, 0.1])
    kept = Committed(actions, weight)
    first = policy.plan(WINDOW, generator=seeded(), committed=kept)
    again = policy.plan(WINDOW, first, generator=seeded(1), executed_steps=0, committed=kept)
    free = policy.plan(WINDOW, generator=seeded())
    for plan in (first, again):
        np.testing.assert_allclose(plan.actions[0, :5], actions[0, :5], atol=2e-3)
    # What isn't committed is near where it was free to be, the nearer the less it is held.
    pull = (first.actions - actions).abs().mean(-1)[0], (free.actions - actions).abs().mean(-1)[0]
    assert (pull[0][5:7] < pull[1][5:7] + 30).all()
    assert first.actions.isfinite().all()


def test_nothing_committed_is_the_policy_itself():
    policy = tiny_policy()
    nothing = Committed(torch.full((1, 16, 2), 100.0), torch.zeros(1, 16))
    assert torch.equal(
        policy.plan(WINDOW, generator=seeded(), committed=nothing).actions,
        policy.plan(WINDOW, generator=seeded()).actions,
    )


def test_captured_plans_commit_too():
    policy = tiny_policy(**REALTIME)
    captured = policy.captured("emulated").warm_up(committed=True)
    actions, weight = torch.full((1, 16, 2), 300.0), torch.linspace(1, 0, 16)[None]
    kept = Committed(actions, weight)
    expected = policy.plan(WINDOW, generator=seeded(), committed=kept).actions
    actual = captured.plan(WINDOW, generator=seeded(), committed=kept).actions
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("actions", "weight", "message"),
    [
        (torch.zeros(1, 15, 2), torch.zeros(1, 16), r"must be \[batch, horizon, action_dim\] = \(1, 16, 2\)"),
        (torch.zeros(1, 16, 2), torch.zeros(16), r"\[batch, horizon\] = \(1, 16\)"),
        (torch.full((1, 16, 2), torch.nan), torch.zeros(1, 16), "must be finite"),
        (torch.zeros(1, 16, 2), torch.full((1, 16), 1.5), "weight from 0 to 1"),
    ],
)
def test_actions_that_cannot_be_committed_are_named(actions, weight, message):
    with pytest.raises(InputError, match=message):
        tiny_policy().plan(WINDOW, generator=seeded(), committed=Committed(actions, weight))


def test_whatever_a_policy_raises_becomes_the_replys_fault(caplog):
    policy = tiny_policy(**REALTIME)
    make, base = PlanMaker(policy, seeded(), VirtualClock()), PlanRequest(0, 0, 0, 0.0, WINDOW)
    real, errors = policy.plan, iter([OSError("no route"), OSError("no route"), KeyError(3), ValueError()])

    def plan(*args, **kwargs):
        error = next(errors, None)
        if error is not None:
            raise error
        return real(*args, **kwargs)

    vars(policy)["plan"] = plan
    replies = [make(base) for _ in range(5)]
    assert [reply.fault for reply in replies] == [
        *["OSError: no route"] * 2,
        "KeyError: 3",
        "ValueError: ",
        "",
    ]
    assert all(np.isnan(reply.actions).all() for reply in replies[:4])
    assert len(caplog.records) == 3  # each with its traceback, but not again and again
    vars(policy)["plan"] = lambda *a, **k: replace(real(*a, **k), actions=torch.zeros(1, 16, 3))
    assert make(base).fault == "the plan has the shape (16, 3), expected (16, 2)"
    vars(policy)["plan"] = lambda *a, **k: None
    assert make(base).fault.startswith("TypeError") or make(base).fault.startswith("AttributeError")


def test_a_tick_beside_a_policy_that_blocks_does_not_wait():
    """As one that asks a server which doesn't answer, and then raises."""
    begun, answer = threading.Event(), threading.Event()
    policy = tiny_policy()

    def plan(*args, **kwargs):
        begun.set()
        answer.wait(60)
        raise ConnectionError("no answer from ws://robot within 10 s")

    vars(policy)["plan"] = plan
    vars(policy)["warm_up"] = lambda *args, **kwargs: policy
    clock = VirtualClock()
    with Controller(policy, 10, clock=clock) as controller:  # planner: the default
        for _ in range(3):
            assert controller.tick(WINDOW[0]) is None
            clock.advance(0.1)
        assert begun.wait(60)
        answer.set()
        assert controller._planner.wait(60)
        assert controller.tick(WINDOW[0]) is None
        assert Fault.PLAN_REFUSED in controller.latest.faults
        assert "no answer from" in controller._watchdog.details[Fault.PLAN_REFUSED]


def test_the_last_solution_outlives_refusals():
    """The plan after one takes as many iterations as any other; after a second refusal in a row it starts
    anew, as what it continues may be the cause."""
    policy = tiny_policy(**REALTIME)
    make, base = PlanMaker(policy, seeded(), VirtualClock()), PlanRequest(0, 0, 0, 0.0, WINDOW)
    real, bad = policy.plan, replace(base, window=WINDOW * np.nan)

    def refused(*args, **kwargs):
        raise InvalidPlanError("the plan has NaN")

    def iterations(*given):
        return [make(request).iterations for request in given]

    assert iterations(base, bad, bad, replace(base, step=4), bad) == [6, 0, 0, 2, 0]
    vars(policy)["plan"] = refused
    assert iterations(base) == [0]
    vars(policy)["plan"] = real
    assert iterations(replace(base, step=8)) == [2]
    vars(policy)["plan"] = refused
    assert iterations(base, base) == [0, 0]
    vars(policy)["plan"] = real
    assert iterations(replace(base, step=8)) == [6]


def test_a_process_continues_the_plan_of_the_one_before_it():
    first = PlanMaker(tiny_policy(**REALTIME), seeded(), VirtualClock())
    base = PlanRequest(0, 0, 0, 0.0, WINDOW)
    with tempfile.TemporaryFile() as file:
        second = PlanMaker(tiny_policy(**REALTIME), seeded(1), VirtualClock())
        recall(file.fileno(), second)
        assert second.last is None
        first(base)
        remember(file.fileno(), first)
        recall(file.fileno(), second)
        request = replace(base, step=4)
        again, expected = second(request), first(request)
        assert again.iterations == 2 and again.actions.tolist() == expected.actions.tolist()
        os.pwrite(file.fileno(), b"torn", 400)
        third = PlanMaker(tiny_policy(**REALTIME), seeded(1), VirtualClock())
        recall(file.fileno(), third)
        assert third.last is None


def test_starts_that_fail_are_ever_further_apart():
    back_off = BackOff()
    assert [back_off.next() for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    back_off.succeeded()
    assert back_off.next() == 0


@pytest.mark.parametrize("steps", [-1, 17, 20, 1.5, float("nan"), True, "8", 8.0])
def test_executed_steps_are_a_number_of_a_plans_steps(steps):
    policy = tiny_policy(**REALTIME)
    plan = policy.plan(WINDOW, generator=seeded())
    with pytest.raises(InputError, match=f"executed_steps={steps!r} must be a whole number from 0 to 16"):
        policy.plan(WINDOW, plan, generator=seeded(), executed_steps=steps)
    assert policy.plan(WINDOW, plan, generator=seeded(), executed_steps=np.int64(16)).actions.shape[1] == 16


def test_a_plan_maker_continues_only_its_sessions_recent_plan():
    policy = tiny_policy(**REALTIME)
    make = PlanMaker(policy, seeded(), VirtualClock())
    base = PlanRequest(0, 0, 0, 0.0, WINDOW)
    iterations = [
        make(replace(base, step=step, session=session)).iterations
        for step, session in ((0, 0), (8, 0), (8, 0), (24, 0), (39, 0), (40, 1), (39, 1))
    ]
    #                      first, on, again, too far, on, other session, back in time
    assert iterations == [6, 2, 2, 6, 2, 6, 6]
    with pytest.raises(InvalidObservationError):
        policy.plan(np.full((2, 20), np.nan), generator=seeded())


def test_a_planners_process_leaves_the_loops_cores_alone():
    cores = sorted(os.sched_getaffinity(0))
    assert planner_beside("process", None) is planner_beside("process", cores) is ProcessPlanner
    assert planner_beside("thread", cores[:1]) is PLANNERS.named("thread")
    if len(cores) > 1:
        assert planner_beside("process", cores[:1]).keywords == {"cores": cores[1:]}
