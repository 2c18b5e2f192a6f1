"""Blocks of episodes that run elsewhere give what they give here, also if what runs them dies."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
from functools import partial
from pathlib import Path

import pytest

from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.collection.collecting import collect_demonstrations, collect_rollouts
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.blocks import Blocks
from paradiffpolicy.evaluation.cases import Case, compare_realtime
from paradiffpolicy.evaluation.compare import Comparison, report_is_due
from paradiffpolicy.evaluation.executors import EXECUTORS, BlockTask, LocalExecutor, RayExecutor, Resources
from paradiffpolicy.evaluation.rollout import rollout

from .test_evaluation import make_env, tiny_policy
from .toy_env import ToyEnv, ToyExpert, picture

OPTIONS = {"picture": picture, "success_key": "terminated"}


class Elsewhere:
    """Runs blocks at once, the last first, as another process would: all that they need is pickled."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, tasks):
        self.sizes.append(len(tasks))
        sent = [pickle.dumps((task.run, task.arguments)) for task in tasks]
        made = [run(**arguments) for run, arguments in map(pickle.loads, reversed(sent))]
        return iter(made[::-1])


class Shown(contextlib.nullcontext):
    """Counts the steps of a progress bar."""

    def __init__(self, label, total, unit) -> None:
        super().__init__(self)
        self.total, self.n = total, 0
        SHOWN.append(self)

    def update(self, n):
        self.n += n

    def set_postfix_str(self, text):
        pass

    def set_postfix(self, **values):
        pass


SHOWN: list[Shown] = []


def compared(executor, make=ToyEnv, folder=None, **changes):
    """Two samplers, five seeds in blocks of two, pictures of three; the rows as plain values."""
    policies = {"ddpm": tiny_policy(), "ddim": tiny_policy(solver="ddim")}
    run = {"seeds": [3, 4, 6, 7, 10], "max_steps": 20, "side_by_side": 2, "n_pictured": 3, "options": OPTIONS}
    where = {"executor": executor, "blocks": Blocks(folder, {}), "progress": Shown, "clock": VirtualClock()}
    results = Comparison(policies=policies, make_env=make, reference="ddpm", **run, **where, **changes).run()
    frames = [len(episode.frames) for result in results for episode in result.episodes]
    return [result.to_dict() for result in results], frames


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({}, [3, 3]), ({"stop_early": True, "margins": {"score": 1e-9, "success": 1e-9}}, [2, 2, 2])],
)
def test_blocks_made_elsewhere_are_the_local_ones(tmp_path, changes, sizes):
    """All of a round at a time; kept blocks aren't asked for again, and progress is complete."""
    elsewhere = Elsewhere()
    local = compared(LocalExecutor(), **changes)
    assert compared(elsewhere, folder=tmp_path, **changes) == local and elsewhere.sizes == sizes
    next((tmp_path / "unfinished").glob("0001-ddim-*.npz")).unlink()
    assert compared(elsewhere, folder=tmp_path, **changes)[0] == local[0]
    assert sum(elsewhere.sizes[len(sizes) :]) == 1
    assert {shown.n for shown in SHOWN[-3:]} == {2 * 5 * 20}


def test_virtual_time_elsewhere_is_the_local_one():
    def run(executor):
        cases = [Case(name="late", policy=tiny_policy(), rate_hz=10, latencies=[0.2])]
        progress = {"progress": Shown, "executor": executor}
        (result,) = compare_realtime(cases, rated, [1, 2, 3], 1.0, side_by_side=2, **progress)
        return result.to_dict()

    elsewhere = Elsewhere()
    assert run(elsewhere) == run(None) and elsewhere.sizes == [2]
    assert {shown.n for shown in SHOWN[-2:]} == {3 * 10}


def test_reports_of_very_many_blocks_are_few():
    due = [k for k in range(40_000) if report_is_due(k, 40_001)]
    assert due[:199] == [*range(199)] and len(due) < 1000 and report_is_due(40_000, 40_001)
    assert all(later <= 1.03 * (earlier + 1) for earlier, later in itertools.pairwise(due[100:]))


def rated(rate_hz):
    return make_env()


def sent_one_by_one(tasks):
    """An executor of any number of tasks, each pickled, and given back without what stays here."""
    for task in tasks:
        run, arguments = pickle.loads(pickle.dumps((task.run, task.arguments)))
        yield run(**arguments)


def collected(path, executor=None, make=ToyEnv, n_episodes=5):
    """What a store holds after a policy's next rollouts, three at a time, and their scores."""
    made = collect_rollouts(
        path, tiny_policy(), make, n_episodes, 12, ["state"], batch=3, executor=executor, progress=Shown
    )
    made.buffer.close()
    return stored(path), made.scores


def demonstrated(path, executor=None, make=ToyEnv):
    """What a store holds after an expert's next four successes."""
    made = (make, ToyExpert(), 4, 30, ["state"])
    collect_demonstrations(path, *made, success_key="terminated", executor=executor).buffer.close()
    return stored(path)


def stored(path):
    with ReplayBuffer.open(path) as buffer:
        values = {field: buffer.read(field).tobytes() for field in buffer.fields}
        texts = {name: [buffer.text(name, k) for k in range(buffer.n_episodes)] for name in buffer.texts}
        return buffer.episode_ends.tolist(), values, texts


def test_episodes_collected_elsewhere_are_the_local_ones(tmp_path):
    """In the same order; also those of a store that is continued, by another executor."""
    local, elsewhere = tmp_path / "local.zarr", tmp_path / "elsewhere.zarr"
    first = collected(local)
    assert collected(elsewhere, sent_one_by_one) == first
    assert collected(elsewhere) == collected(local) and len(stored(local)[0]) == 10
    assert {shown.n for shown in SHOWN[-4:]} == {5 * 12}
    assert demonstrated(tmp_path / "a.zarr", sent_one_by_one) == demonstrated(tmp_path / "b.zarr")


def test_a_collection_that_is_cut_off_goes_on_where_it_was(tmp_path):
    """Blocks that came back before are stored, in order, and no others."""

    def dying(tasks):
        yield from itertools.islice(sent_one_by_one(tasks), 1)
        raise InputError("the cluster is gone")

    path = tmp_path / "cut.zarr"
    with pytest.raises(InputError, match="the cluster is gone"):
        collected(path, dying)
    assert len(stored(path)[0]) == 3
    collected(path, sent_one_by_one, n_episodes=2)
    assert stored(path) == collected(tmp_path / "whole.zarr")[0]


class Killing(ToyEnv):
    """Kills its process in its third step, the first time that any does."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def step(self, action):
        if self.info["steps"] == 2 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


@pytest.mark.slow
def test_ray_gives_the_local_episodes_though_a_worker_is_killed(tmp_path):
    pytest.importorskip("ray", reason="pip install 'paradiffpolicy[ray]'")
    mark = tmp_path / "killed"
    with contextlib.closing(EXECUTORS.named("ray")(Resources(workers=2))) as executor:
        assert compared(executor, partial(Killing, mark)) == compared(LocalExecutor()) and mark.exists()
        run = partial(rollout, tiny_policy(), partial(ToyEnv, "input"), max_steps=20)
        with pytest.raises(InputError, match=r"^the toy is broken: repair it$"):
            next(executor([BlockTask(run, {"seeds": [3]})]))
        assert isinstance(executor, RayExecutor)
        mark.unlink()
        made = collected(tmp_path / "ray.zarr", executor, partial(Killing, mark))
        assert mark.exists() and made == collected(tmp_path / "local.zarr")
        assert demonstrated(tmp_path / "ray_expert.zarr", executor) == demonstrated(tmp_path / "expert.zarr")
