"""Environments in other processes give what they give in this one, to the bit, and fail as clearly."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.evaluation.workers import EpisodeSettings, InlineWorkers, ProcessWorkers, make_workers

from .conftest import ROOT
from .test_evaluation import tiny_policy
from .toy_env import ToyEnv, disturbed_toy, picture

SEEDS = [3, 4, 6, 7, 10]  # the second is truncated after 9 steps, two others terminate after 11 and 8
RECORDED = {
    "max_steps": 20,
    "keep_infos": True,
    "picture": picture,
    "n_pictured": 3,
    "success_key": "terminated",
}
OF_A_PROCESS = ("pid", "open", "torch")


def content(episode):
    """All of an episode, except for the values that depend on its process."""
    infos = [{k: v for k, v in info.items() if k not in OF_A_PROCESS} for info in episode.infos]
    return asdict(episode) | {"infos": infos}


@contextlib.contextmanager
def processes(count):
    with contextlib.closing(ProcessWorkers(count)) as workers:
        yield workers


@pytest.fixture(scope="module")
def two():
    with processes(2) as workers:
        yield workers


def pids(episodes):
    return {info["pid"] for episode in episodes for info in episode.infos}


# ------------------------------------------------------------------------------------ what they give


@pytest.mark.parametrize(("count", "seeds"), [(2, SEEDS), (3, SEEDS[:2])])
def test_processes_give_what_this_one_gives(count, seeds):
    """Uneven parts; more processes than episodes."""
    policy = tiny_policy(solver="ddim", n_steps=4, driver="rti", iterations=1)
    here = rollout(policy, ToyEnv, seeds, **RECORDED)
    steps = []
    with processes(count) as workers:
        there = rollout(policy, ToyEnv, seeds, workers=workers, on_steps=steps.append, **RECORDED)
        assert len(workers.pids) == len(pids(there)) == min(count, len(seeds))
        assert pids(there) == set(workers.pids) and os.getpid() not in pids(there)
    for mine, theirs in zip(here, there, strict=True):
        np.testing.assert_equal(content(theirs), content(mine))
    assert [e.n_steps for e in here] == [20, 9, 11, 20, 8][: len(seeds)]
    assert [e.success for e in here] == [False, False, True, False, True][: len(seeds)]
    assert [len(e.frames) for e in there] == [21, 10, 12, 0, 0][: len(seeds)]  # one after the last action
    assert sum(steps) == 20 * len(seeds)


def test_results_are_copies():
    """The environment goes on with its arrays and its info."""
    (episode,) = rollout(tiny_policy(), ToyEnv, [3], **RECORDED)
    assert [info["steps"] for info in episode.infos] == list(range(20))
    assert len({info["state"].tobytes() for info in episode.infos}) == 20
    assert len({frame.tobytes() for frame in episode.frames}) == 21
    assert all(action.any() for action in episode.actions)
    assert not any((old == new).any() for old, new in episode.windows[1:])


def test_processes_stay_from_rollout_to_rollout(two):
    """Also for fewer episodes; each rollout is what it would be alone."""
    policy = tiny_policy()
    for seeds in (SEEDS, [8], SEEDS[:3]):
        there = rollout(policy, ToyEnv, seeds, workers=two, **RECORDED)
        first = two.pids
        for mine, theirs in zip(rollout(policy, ToyEnv, seeds, **RECORDED), there, strict=True):
            np.testing.assert_equal(content(theirs), content(mine))
    assert two.pids == first and len(first) == 2


def test_side_by_side_bounds_the_open_environments(two):
    policy = tiny_policy()
    together = rollout(policy, ToyEnv, SEEDS, **RECORDED)
    for workers, most in ((None, 2), (two, 1)):
        episodes = rollout(policy, ToyEnv, SEEDS, workers=workers, side_by_side=2, **RECORDED)
        assert max(info["open"] for e in episodes for info in e.infos) == most
        for one, other in zip(episodes, together, strict=True):  # batches of other sizes round otherwise
            assert one.n_steps == other.n_steps and len(one.frames) == len(other.frames)
            np.testing.assert_allclose(one.actions, other.actions, atol=0.01)


def test_disturbances_are_the_same_in_any_process_and_any_batch(two):
    policy = tiny_policy(solver="ddim", n_steps=4, driver="rti", iterations=1)
    run = partial(rollout, policy, disturbed_toy, SEEDS[:2], max_steps=20)
    together = run()
    for one, there, alone in zip(together, run(workers=two), run(side_by_side=1), strict=True):
        np.testing.assert_equal(content(there), content(one))
        np.testing.assert_allclose(alone.actions, one.actions, atol=0.01)
    plain = rollout(policy, ToyEnv, SEEDS[:1], max_steps=20)[0]
    assert not np.allclose(plain.windows, together[0].windows, atol=0.01)


def test_an_environment_is_closed_when_its_episode_ends():
    episodes = rollout(tiny_policy(), ToyEnv, SEEDS, **RECORDED)
    # In the first plan's 8 steps seed 10 ends, after this one's turn; in the next two more do.
    assert [info["open"] for info in episodes[0].infos][1::8] == [5, 4, 2] and ToyEnv.n_open == 0


def test_begin_closes_environments_that_are_left():
    with contextlib.closing(InlineWorkers()) as workers:
        for seeds in ({0: 3, 1: 5}, {0: 3, 1: 5, 2: 7}):
            observations = workers.begin(EpisodeSettings(ToyEnv, 20), seeds)
            assert ToyEnv.n_open == len(observations) == len(seeds)
    assert ToyEnv.n_open == 0


def test_a_process_does_without_torch(two):
    episodes = rollout(tiny_policy(), ToyEnv, [3], workers=two, **RECORDED)
    assert not any(info["torch"] for info in episodes[0].infos)


def test_processes_of_environments_and_demonstrations_import_little():
    modules = "paradiffpolicy.evaluation.workers", "paradiffpolicy.collection.demonstrators"
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*modules} <= {*loaded.stdout.split()}
    assert not {"torch", "scipy", "matplotlib", "rich"} & {*loaded.stdout.split()}


def test_no_episodes_need_no_process():
    with processes(2) as workers:
        assert rollout(tiny_policy(), ToyEnv, [], 20, workers=workers) == [] and workers.pids == []


# -------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("input", InputError, "^the toy is broken: repair it$"),
        ("value", ValueError, "^no such value$"),
        ("awkward", RuntimeError, "^AwkwardError: awkward: toy$"),
        ("kill", InputError, "^the process environments-1 ended by SIGKILL: .*; workers=1 needs no process$"),
        ("exit", InputError, "^the process environments-1 ended with exit code 3: "),
    ],
)
def test_an_exception_there_is_raised_here(two, fault, error, words):
    with pytest.raises(error) as raised:
        rollout(tiny_policy(), partial(ToyEnv, fault), [3, 5], 20, workers=two)
    assert re.match(words, str(raised.value)) and type(raised.value) is error
    if fault in ("input", "value", "awkward"):
        assert "toy_env.py" in raised.value.__notes__[0]
    assert two.pids == []
    assert rollout(tiny_policy(), ToyEnv, [3], 8, workers=two)[0].n_steps == 8


def test_an_environment_that_cannot_be_made(two):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nosuch'"):
        rollout(tiny_policy(), partial(ToyEnv, nosuch=1), [3], 20, workers=two)
    assert ToyEnv.n_open == 0


def test_a_process_killed_between_plans_is_named(two):
    two.begin(EpisodeSettings(ToyEnv, 20), {0: 3, 1: 5})
    os.kill(two.pids[1], signal.SIGKILL)
    two._remotes[1]._child.join(60)
    with pytest.raises(InputError, match="environments-2 ended by SIGKILL"):
        two.execute({0: np.zeros((8, 2)), 1: np.zeros((8, 2))})


def test_an_environment_that_cannot_be_sent_is_refused():
    with processes(2) as workers, pytest.raises(InputError, match=r"functions of a module.*or workers=1"):
        rollout(tiny_policy(), lambda: ToyEnv(), [3], 20, workers=workers)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "two"])
def test_a_count_is_a_count(count):
    with pytest.raises(InputError, match=f"workers={count} must be a whole number above 0"):
        make_workers(count)
    for name in ("max_steps", "side_by_side"):
        with pytest.raises(InputError, match=f"{name}={count} must be a whole number above 0"):
            rollout(tiny_policy(), ToyEnv, [3], **{"max_steps": 8, name: count})


def test_one_is_this_process():
    assert isinstance(make_workers(1), InlineWorkers) and isinstance(make_workers(2), ProcessWorkers)


def test_environments_are_closed_whatever_happens():
    with pytest.raises(ValueError, match="no such value"):
        rollout(tiny_policy(), partial(ToyEnv, "value"), [3, 5], 20)
    assert ToyEnv.n_open == 0


# --------------------------------------------------------------------------------------- how they end


def test_close_leaves_no_process():
    with processes(2) as workers:
        workers.begin(EpisodeSettings(ToyEnv, 20), {0: 3, 1: 5})
        started = workers.pids
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    workers.close()


SCRIPT = """
import contextlib
from paradiffpolicy.evaluation.workers import EpisodeSettings, ProcessWorkers
from tests.toy_env import ToyEnv

class Mine(ToyEnv):
    pass

{guard}
    with contextlib.closing(ProcessWorkers(1)) as workers:
        (observation,) = workers.begin(EpisodeSettings({make}, 100), {{0: 3}}).values()
        print(len(observation))
"""


@pytest.mark.parametrize(
    ("guard", "make", "out"),
    [
        ("if __name__ == '__main__':", "Mine", "20"),
        ("if True:", "ToyEnv", "20"),
        ("if True:", "Mine", "processes are started below `if __name__ == '__main__':`"),
    ],
)
def test_a_scripts_own_environment_is_found_in_another_process(tmp_path, guard, make, out):
    """The script is imported there, which needs the guard; without classes of the script it doesn't."""
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard, make=make))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out in (done.stdout if out == "20" else done.stderr), done.stderr
    assert (done.returncode == 0) == (out == "20")


HANGING = """
import contextlib, functools, signal, numpy as np
from paradiffpolicy import process
from paradiffpolicy.evaluation.workers import EpisodeSettings, ProcessWorkers
from tests.toy_env import ToyEnv
process.PATIENCE = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with contextlib.closing(ProcessWorkers(2)) as workers:
    workers.begin(EpisodeSettings(functools.partial(ToyEnv, {fault!r}), 100), {{0: 3, 1: 5}})
    actions = np.zeros((50, 2))
    workers.execute({{0: actions, 1: actions}})
    print("hanging", flush=True)
    input()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("fault", "whom"), [("", "process"), ("hang", "terminal")])
def test_a_signal_leaves_no_orphan(fault, number, whom):
    """Idle, or in a step that never ends; to the parent, or as Ctrl-C in a terminal to all of them."""
    parent = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(fault=fault)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(2 if fault else 1):
        assert parent.stdout.readline() == "hanging\n"
    (os.kill if whom == "process" else os.killpg)(parent.pid, number)
    try:
        _, errors = parent.communicate(timeout=30)  # which ends when the last process that holds it does
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0), errors
