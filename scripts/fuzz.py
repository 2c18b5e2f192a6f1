"""Puts mutated messages and files through everything that reads them, and checks what comes out.

python scripts/fuzz.py [MESSAGES] [FILES] [SEED] [KIND]     # 100000, 10000, 0, all

KIND is a part of the names of the kinds that are mutated, as the table has them: "lerobot v3".

What comes out is a value, or ``InputError`` in one line, within two seconds.  The process's memory grows by
``MEMORY`` megabytes at most.  Nothing is executed, imported, unpickled or connected to, and no file is opened
but the mutated ones and Python's own.  Otherwise it says which input it was, or where it hangs, and ends with
code 1.
"""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from rich.console import Console

from paradiffpolicy.benchmarks.hostile import mutated
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.main import main
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.formats.reading import open_source
from paradiffpolicy.data.formats.robomimic import RobomimicFile
from paradiffpolicy.data.formats.store import StoreFile
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError
from paradiffpolicy.interchange.reading import read_checkpoint
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.capture.openvino import kept_plan
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_schedule
from paradiffpolicy.serving.messages import pack, read
from paradiffpolicy.serving.protocol import PlanFormat, job_of, request_map, state_of
from paradiffpolicy.serving.session import ClientSession
from paradiffpolicy.tables import table
from paradiffpolicy.task import ObservationField
from paradiffpolicy.types import PolicySpec

ROOT, DEFAULTS = Path(__file__).resolve().parent.parent, ["100000", "10000", "0", ""]
SECONDS, MEMORY = 2, 200
WORD = re.compile(rb'(?<=[:\[,\s{])(?:"[^"]*"|-?\d+|null|true|false|[a-z]\w+)')
WORDS = ("null", "-1", "1e999", "NaN", "{}", "[]", "true", '"<f4"', '"complex64"', '"|O"', '"../x"', "9" * 20)
"""What a number, text or literal of a text file becomes."""

SPEC = PolicySpec("none", 4, 2, down_dims=(8, 16), diffusion_step_embed_dim=8)

Read = Callable[[bytes], object]
Good = tuple[str, bytes, Read]
"""What it is, a good input, and what reads a mutated one."""


def checkpoint() -> Checkpoint:
    """A small policy with random weights."""
    torch.manual_seed(0)
    normalizers = (
        Normalizer.fit(torch.tensor([[0.0], [9.0]]).expand(2, n)) for n in (SPEC.obs_dim, SPEC.action_dim)
    )
    return Checkpoint(SPEC, dict(build_network(SPEC).state_dict()), *normalizers, {"note": "random"})


def policy_of(made: Checkpoint) -> Policy:
    return Policy.from_checkpoint(made, make_sampler(spec_schedule(made.spec), solver="ddim", n_steps=3))


def messages() -> Iterator[Good]:
    """Requests to a policy server."""
    policy = policy_of(checkpoint())
    window = np.ones((1, SPEC.n_obs_steps, SPEC.obs_dim), np.float32)
    plan = PlanFormat.of(policy).plan_map(policy.plan(window, generator=0))
    state = [state_of(torch.Generator().manual_seed(0))]

    def answer(message: bytes) -> None:
        request, _ = read(message)
        if isinstance(request, dict) and "plan" in request:
            job_of(request, policy, max_batch=8)
        else:
            ClientSession(policy, 0).job(request)

    yield "message", pack({"observation": window[0], "reset": True, "executed_steps": 4, "seed": 3}), answer
    yield "message", pack({"observation": window[0, 0].tolist(), "prompt": "push"}), answer
    yield "message", pack(request_map(window, plan, state, executed_steps=4)), answer


def maker(name: str) -> ModuleType:
    """A module of the tests' that writes files in other projects' layouts."""
    spec = spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder: Path) -> Iterator[Good]:
    """Checkpoints, datasets, tasks and kept programs: each of their files."""
    yield from checkpoints(folder)
    yield from datasets(folder)
    task = folder / "task.yaml"
    shutil.copy(ROOT / "configs" / "task" / "pusht.yaml", task)
    yield from each_file("task", task, lambda: compose("evaluate", [f"task={task}"]))
    (cache := folder / "cache").mkdir(mode=0o700)
    policy = policy_of(checkpoint()).captured("openvino", cache=cache)
    policy.plan(np.ones((1, SPEC.n_obs_steps, SPEC.obs_dim), np.float32), generator=0)
    for thread in threading.enumerate():
        if thread.name == "capture-cache":
            thread.join()
    (program,) = cache.glob("*.blob")
    yield from each_file("kept program", program, lambda: read_program(program))


def checkpoints(folder: Path) -> Iterator[Good]:
    """Ours, diffusion_policy's and LeRobot's."""
    (kept := folder / "checkpoint").mkdir()
    checkpoint().save(kept)
    yield from each_file("checkpoint", kept, lambda: policy_of(Checkpoint.load(kept)), fitting_checksum)
    foreign = maker("foreign")
    theirs = foreign.ckpt(folder / "their.ckpt")
    yield from each_file("diffusion_policy checkpoint", theirs, lambda: policy_of(read_checkpoint(theirs)))
    for name, old in (("0.3", True), ("0.4", False)):
        place = foreign.lerobot(folder / f"policy-{name}", old)
        read_it = partial(lambda place: policy_of(read_checkpoint(place)), place)
        yield from each_file(f"lerobot {name} checkpoint", place, read_it)


def datasets(folder: Path) -> Iterator[Good]:
    """One of every format, with pictures where it has a place for them."""
    store, zipped = folder / "store.zarr", folder / "zipped.zarr.zip"
    steps = np.arange(48, dtype=np.float32).reshape(12, 4)
    with ReplayBuffer.create(store, attributes={"env_args": {"env_name": "none", "type": 2}}) as buffer:
        for length in (5, 7):
            pictures = np.full((length, 8, 8, 3), length, np.uint8)
            episode = {"action": steps[:length, :2], "state": steps[:length], "image": pictures}
            buffer.append(episode, texts={"model": "<mujoco/>"})
    shutil.make_archive(str(zipped.with_suffix("")), "zip", store)
    yield from each_file("zarr store", store, lambda: read_store(store))
    yield from each_file("zarr zip store", zipped, lambda: read_store(zipped))
    others = {"robomimic HDF5": ".hdf5", "npz folder": ".npz", "lerobot v3 of numbers": ".lerobot"}
    for kind, suffix in others.items():
        out, keys = folder / f"out{suffix}", "[state]" if suffix == ".lerobot" else "null"
        words = [f"source={store}", f"out={out}", "control_hz=10", f"obs_keys={keys}"]
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            assert main(["convert", *words]) == 0
        use = read_robomimic if suffix == ".hdf5" else read_dataset
        yield from each_file(kind, out, partial(use, out))
    cameras = maker("camera_lerobot")
    for version in (2, 3):
        place = cameras.camera_dataset(folder / f"lerobot-{version}", version)
        yield from each_file(f"lerobot v{version}", place, partial(read_dataset, place))


def each_file(
    kind: str, path: Path, use: Callable[[], object], mend: Callable[[Path], None] = lambda path: None
) -> Iterator[Good]:
    """Every file there, read together with the others, which are good; ``mend`` follows the change."""
    content = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    for file in content or [path]:

        def overwritten(changed: bytes, file: Path = file) -> None:
            before = file.read_bytes()
            file.write_bytes(changed)
            try:
                mend(file)
                use()
            finally:
                for other in content:
                    other.write_bytes(content[other])
                file.write_bytes(before)

        yield kind, file.read_bytes(), overwritten


def fitting_checksum(changed: Path) -> None:
    """Writes the weights' checksum anew, or they would be refused before they are read."""
    if changed.suffix == ".safetensors":
        description = changed.parent / "policy.json"
        about = json.loads(description.read_bytes())
        about["weights"]["sha256"] = hashlib.sha256(changed.read_bytes()).hexdigest()
        description.write_text(json.dumps(about))


def read_store(path: Path) -> None:
    """Reads all there is, as info, train and convert do."""
    source = StoreFile(path)
    for demo in source.demos:
        source.read(demo)
    fields = [ObservationField("state")]
    WindowDataset.of(ReplayBuffer.open(path), fields, n_obs_steps=1, horizon=4, n_action_steps=2)


def read_dataset(path: Path) -> None:
    """Reads all there is, as info and convert do."""
    with contextlib.closing(open_source(path)) as source:
        for demo in source.demos:
            source.read(demo)


def read_robomimic(path: Path) -> None:
    """Reads all there is, as info and convert do."""
    with RobomimicFile(path) as file:
        for demo in file.demos:
            file.read(demo)
            for field, why in file.fields(demo).items():
                if why is None:
                    file.values(demo, field)


def read_program(path: Path) -> None:
    """Reads a compiled program that is kept; a damaged one is compiled anew."""
    if kept_plan(path, {}) is None:
        raise InputError("it isn't what was written")


def changed(content: bytes, draw: np.random.Generator) -> bytes:
    """Cuts, changes bytes, or replaces a word of text."""
    kind = draw.random()
    if kind < 0.1:
        return content[: int(draw.integers(len(content) + 1))]
    words = list(WORD.finditer(content)) if kind < 0.5 and content[:1] in b"{#" else []
    if words:
        word = words[int(draw.integers(len(words)))]
        return content[: word.start()] + draw.choice(WORDS).encode() + content[word.end() :]
    return mutated(content, draw)


FORBIDDEN = (
    *("exec", "import", "os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.", "marshal."),
    *("ctypes.dlopen", "pickle.find_class", "shutil.rmtree", "socket."),
)
"""How events of Python's audit begin that no reader causes."""


def watched(folder: Path) -> list[str]:
    """Notes, from now on, what no reader should do."""
    seen: list[str] = []
    places = (str(folder), str(ROOT), sys.prefix, sys.base_prefix, "/usr", "/proc", "/sys", "/dev/null")
    allowed = tuple(str(Path(place).resolve()) for place in places)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN):
            seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = str(Path(os.fsdecode(arguments[0])).resolve())  # no '..' and no link leads out
            if not path.startswith(allowed):
                seen.append(f"open {path}")

    sys.addaudithook(note)
    return seen


def of_kinds(good: Sequence[Good]) -> Iterator[Good]:
    """Endlessly, a kind in turn, and of each kind a file in turn."""
    kinds = {kind: itertools.cycle([each for each in good if each[0] == kind]) for kind, _, _ in good}
    while True:
        yield from map(next, kinds.values())


def fuzz(
    good: Sequence[Good], count: int, draw: np.random.Generator, seen: list[str]
) -> list[dict[str, object]]:
    """Reads ``count`` mutated inputs; a row per kind."""
    rows = {kind: {"": kind, "inputs": 0, "refused": 0, "slowest, ms": 0.0} for kind, _, _ in good}
    for k, (kind, content, use) in enumerate(itertools.islice(of_kinds(good), count)):
        row, given = rows[kind], changed(content, draw)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        begin = time.perf_counter()
        try:
            use(given)
        except InputError as error:
            row["refused"] += 1
            if "\n" in str(error):
                raise SystemExit(f"input {k}, {kind}: more than a line: {error}")
        except BaseException:
            print(f"input {k}, {kind}: {given!r:.2000}", file=sys.stderr)
            raise
        faulthandler.cancel_dump_traceback_later()
        row["inputs"] += 1
        row["slowest, ms"] = max(row["slowest, ms"], (time.perf_counter() - begin) * 1e3)
        if seen:
            raise SystemExit(f"input {k}, {kind}: {seen[0]}")
    return list(rows.values())


def memory(name: str) -> int:
    """Kilobytes that this process has (VmRSS), or had at most since ``clear_refs`` (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    *numbers, only = [*sys.argv[1:5], *DEFAULTS[len(sys.argv[1:5]) :]]
    n_messages, n_files, seed = map(int, numbers)
    draw = np.random.default_rng(seed)
    logging.disable()
    codecs.lookup("cp437")  # zip files' names may be in it
    with tempfile.TemporaryDirectory() as place:
        parts = [(list(messages()), n_messages), (list(files(Path(place))), n_files)]
        parts = [([each for each in good if only in each[0]], count) for good, count in parts]
        parts = [(good, count) for good, count in parts if good]
        for good, _ in parts:  # what is imported and allocated once
            for _, content, use in good:
                use(content)
        Path("/proc/self/clear_refs").write_text("5")
        before, seen = memory("VmRSS"), watched(Path(place))
        rows = [row for good, count in parts for row in fuzz(good, count, draw, seen)]
        grown = (memory("VmHWM") - before) / 2**10
    for row in rows:
        row["slowest, ms"] = f"{row['slowest, ms']:.0f}"
    Console().print(table(f"seed {seed}; memory grew by {grown:.0f} MB at most", rows))
    if grown > MEMORY:
        raise SystemExit(f"memory grew by more than {MEMORY} MB")
