"""Kills writers of demonstrations (SIGKILL) at random moments, and checks what they leave.

python scripts/kills.py [KILLS] [SEED]      # 100 of each, seed 0

collect: every episode that was acknowledged is there, as it was, and the next writer goes on behind the last.
convert: the new dataset is whole or isn't there.  Both: the next start leaves nothing hidden behind.
"""

from __future__ import annotations

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

from paradiffpolicy.cli.main import main
from paradiffpolicy.collection.collecting import Collection
from paradiffpolicy.data.formats.robomimic import RobomimicFile
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.evaluation.episodes import Episode
from paradiffpolicy.files import UNFINISHED

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
        made.add_rewards([1.0])
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
    for file in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)
    assert main(["convert", f"source={source}", f"out={out}"]) == 0


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


def hidden(folder: Path) -> list[Path]:
    """Files and folders that no user should see."""
    return [*folder.rglob(f"{UNFINISHED}*"), *folder.rglob("*.partial")]


if __name__ == "__main__":
    kills, seed = (int(word) for word in [*sys.argv[1:], *["100", "0"][len(sys.argv) - 1 :]])
    draw = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        n_episodes = kill_collecting(Path(place), kills, draw)
        print(f"collect: {kills} kills, {n_episodes} episodes, none lost")
        n_finished = kill_converting(Path(place), kills, draw)
        print(f"convert: {kills} kills, {n_finished} had finished, the others left nothing")
