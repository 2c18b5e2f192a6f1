"""Kills what writes (SIGKILL) at random moments, and checks what it leaves.

python scripts/kills.py [KILLS] [SEED] [COMMAND ...]      # 100 of each, seed 0, all commands

collect: every episode that was acknowledged is there, as it was, and the next writer goes on behind the last.
convert: the new dataset is whole or isn't there.
train: no acknowledged save is lost, and resumed runs end with the weights of one that was never killed.
run: every acknowledged run is recorded, earlier ones as they were, and reports and records are whole.
All: the next start leaves nothing hidden behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which the first optimizer of every process would import

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.collection.collecting import Collection
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.formats.robomimic import RobomimicFile
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.evaluation.episodes import Episode
from paradiffpolicy.files import UNFINISHED
from paradiffpolicy.task import ObservationField
from paradiffpolicy.training.train import Trainer, TrainSettings
from paradiffpolicy.types import PolicySpec

N_EPISODES = 12
"""More than a writer adds before it is killed."""
Work = Callable[[Callable[[], object]], object]
"""Takes a function that acknowledges that something is done."""


def run(work: Work, seconds: float | None = None) -> int:
    """Runs work in a fork, since threads of what it uses don't survive forks of their own; kills it after
    ``seconds``, if given.  Returns how often it acknowledged."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            work(lambda: os.write(write, b"."))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    done = 0
    while (ready := select.select([read], [], [], seconds)[0]) and os.read(read, 1):
        done += 1
        seconds = None if seconds is None else seconds / 2
    if not ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done += len(os.read(read, N_EPISODES))
    os.close(read)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{work} failed")
    return done


def episode(seed: int) -> Episode:
    """Numbers that follow from the seed."""
    made = Episode(seed, texts={"seed": str(seed)})
    for step in np.random.default_rng(seed).normal(size=(1 + seed % 7, 40_000)).astype(np.float32):
        made.infos.append({"state": step})
        made.actions.append(step[:2])
        made.add([1.0], True)
    return made


def collect(path: Path, acknowledge: Callable[[], object]) -> None:
    """Adds episodes behind the store's last, as 'paradiffpolicy collect' does."""
    made = Collection(path, ["state"])
    first = made.next_seed()
    for seed in range(first, first + N_EPISODES):
        made.add(episode(seed), True)
        acknowledge()


def count(path: Path, known: int, acknowledge: Callable[[], object]) -> None:
    """Acknowledges every episode behind the known ones, which must be those that were collected."""
    if not path.exists():
        return
    buffer = ReplayBuffer.open(path)
    for k in range(max(0, known - N_EPISODES), buffer.n_episodes):
        columns = episode(k).columns(["state", "action"])
        for name, values in buffer.episode(k).items():
            np.testing.assert_array_equal(values, columns[name])
        if k >= known:
            acknowledge()


def kill_collecting(folder: Path, kills: int, draw: np.random.Generator) -> int:
    """Returns how many episodes there are in the end."""
    path, known = folder / "collected.zarr", 0
    folder.mkdir()
    for seconds in draw.uniform(0, 0.3, kills):
        done = run(partial(collect, path), seconds)
        there = run(partial(count, path, known))
        assert there >= done, f"of {done} acknowledged episodes {there} are there"
        known += there
    run(partial(collect, path))
    assert not hidden(folder), hidden(folder)
    return known + run(partial(count, path, known))


def make_source(path: Path, _: object) -> None:
    """A dataset to convert."""
    with ReplayBuffer.create(path, attributes={"env_args": {"env_name": "none", "type": 2}}) as buffer:
        for k in range(N_EPISODES):
            buffer.append(episode(k).columns(["state", "action"]))


def convert(source: Path, out: Path, _: object) -> None:
    """Converts, without showing anything."""
    silently("convert", f"source={source}", f"out={out}")


def silently(*words: str) -> None:
    """Runs a command."""
    for file in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)
    assert main([*words]) == 0


def check_converted(path: Path, _: object) -> None:
    """The new dataset is whole."""
    with RobomimicFile(path) as file:
        for k, demo in enumerate(file.demos):
            state = episode(k).columns(["state"])["state"]
            np.testing.assert_array_equal(file.values(demo, "obs/state"), state)
        assert len(file.demos) == N_EPISODES


def kill_converting(folder: Path, kills: int, draw: np.random.Generator) -> int:
    """Returns how many conversions were done before they were killed."""
    source, out, finished = folder / "source.zarr", folder / "converted.hdf5", -1
    folder.mkdir()
    run(partial(make_source, source))
    begin = time.perf_counter()
    run(partial(convert, source, out))
    usual = time.perf_counter() - begin
    out.unlink()
    for seconds in [*draw.uniform(0, usual, kills), None]:
        run(partial(convert, source, out), seconds)
        if out.exists():
            run(partial(check_converted, out))
            out.unlink()
            finished += 1
    assert not hidden(folder), hidden(folder)
    return finished


TRAINING = TrainSettings(
    n_steps=30, batch_size=8, warmup_steps=3, log_every=2, save_every=3, evaluate_every=3
)


def trainer(folder: Path, evaluate: Callable[[Checkpoint], dict[str, float]]) -> Trainer:
    """Trains a small network on numbers that mean nothing."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    store = folder.parent / "training.zarr"
    if not store.exists():
        with ReplayBuffer.create(store) as buffer:
            buffer.append(
                {name: draw.normal(size=(40, 2)).astype(np.float32) for name in ("state", "action")}
            )
    windows = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8}
    data = WindowDataset.of(ReplayBuffer.open(store), [ObservationField("state")], **windows)
    spec = PolicySpec("none", 2, 2, down_dims=(16,), diffusion_step_embed_dim=16)
    return Trainer(data, spec, TRAINING, folder, evaluate=evaluate)


def train(folder: Path, acknowledge: Callable[[], object]) -> None:
    """Goes on from the last save, none of which is before a checkpoint that was evaluated."""

    def evaluate(checkpoint: Checkpoint) -> dict[str, float]:
        with (folder / "evaluated").open("ab", buffering=0) as file:
            file.write(b"%d\n" % checkpoint.info["training"]["step"])
        return {"score": 0.0}

    made, evaluated = trainer(folder, evaluate), folder / "evaluated"
    last = int(evaluated.read_text().split()[-1]) if evaluated.exists() else 0
    assert made.step >= last, f"step {made.step} after step {last} was evaluated"
    made.run(progress=False)
    acknowledge()


def compare_runs(one: Path, other: Path, _: object) -> None:
    """Two runs' weights, moments and curves are the same, to the bit."""
    a, b = (torch.load(folder / "resume.pt", weights_only=True) for folder in (one, other))
    for state in (a, b):
        del state["seconds"]
    assert str(a.pop("optimizer")) == str(b.pop("optimizer"))
    for part in ("network", "ema"):
        for name, weight in a.pop(part).items():
            assert torch.equal(weight, b[part][name])
        del b[part]
    assert a == b
    one_checkpoint, other_checkpoint = (Checkpoint.load(folder / "checkpoint") for folder in (one, other))
    for name, weight in one_checkpoint.weights.items():
        assert torch.equal(weight, other_checkpoint.weights[name])


def kill_training(folder: Path, kills: int, draw: np.random.Generator) -> int:
    """Returns how many runs came to their end."""
    folder.mkdir()
    whole, ended = folder / "whole", 0
    run(partial(train, whole))
    begin = time.perf_counter()
    run(partial(train, folder / "timed"))
    usual = time.perf_counter() - begin
    for seconds in [*draw.uniform(0, usual, kills), None]:
        path = folder / f"run-{ended}"
        if run(partial(train, path), seconds):
            run(partial(compare_runs, whole, path))
            assert not hidden(path), hidden(path)
            ended += 1
    return ended


def record(folder: Path, acknowledge: Callable[[], object]) -> None:
    """Records a short run, as 'paradiffpolicy run' does."""
    torch.set_num_threads(1)
    places = f"record={folder / 'runs.zarr'}", f"out={folder / 'run'}"
    silently("run", "seconds=0.5", "capture=eager", "planner=inline", *places)
    acknowledge()


def check_recorded(folder: Path, acknowledge: Callable[[], object]) -> None:
    """Acknowledges every recorded run; what is beside them is whole."""
    path, beside = folder / "runs.zarr", folder / "run"
    if path.exists():
        buffer = ReplayBuffer.open(path)
        for k in range(buffer.n_episodes):
            rows = buffer.episode(k)
            assert len(rows["action"]) == 5 and all(np.isfinite(values).all() for values in rows.values())
            acknowledge()
    for report in beside.glob("*.json"):
        json.loads(report.read_text())
    for ticks in beside.glob("*.npz"):
        assert len(np.load(ticks)["ticks"]) == 5


def kill_recording(folder: Path, kills: int, draw: np.random.Generator) -> int:
    """Returns how many runs are recorded in the end."""
    folder.mkdir()
    begin = time.perf_counter()
    known = run(partial(record, folder))
    usual = time.perf_counter() - begin
    for seconds in [*draw.uniform(usual / 2, 1.2 * usual, kills), None]:  # it writes at its end
        known += run(partial(record, folder), seconds)
        there = run(partial(check_recorded, folder))
        assert there >= known, f"of {known} acknowledged runs {there} are there"
        known = there
    assert not hidden(folder), hidden(folder)
    return known


def hidden(folder: Path) -> list[Path]:
    """Files and folders that no user should see."""
    return [*folder.rglob(f"{UNFINISHED}*"), *folder.rglob("*.partial")]


COMMANDS = {
    "collect": (kill_collecting, "episodes are there, none lost"),
    "convert": (kill_converting, "had finished, the others left nothing"),
    "train": (kill_training, "resumed runs ended, each with the weights of one that was never killed"),
    "run": (kill_recording, "runs are recorded, none lost"),
}

if __name__ == "__main__":
    kills, seed = (int(word) for word in [*sys.argv[1:3], *["100", "0"][len(sys.argv[1:3]) :]])
    draw = np.random.default_rng(seed)
    for name in sys.argv[3:] or COMMANDS:
        kill, left = COMMANDS[name]
        with tempfile.TemporaryDirectory() as place:
            print(f"{name}: {kills} kills, {kill(Path(place) / name, kills, draw)} {left}", flush=True)
