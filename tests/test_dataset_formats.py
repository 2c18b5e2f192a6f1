"""Datasets of every format: what is written is read back, converted and trained on with one episode in
memory, and every fault is named in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tracemalloc
import weakref
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.train import opened_buffer
from paradiffpolicy.data.formats.demonstration import About, Demonstration
from paradiffpolicy.data.formats.env_args import GYM_TYPE, EnvArgs
from paradiffpolicy.data.formats.reading import FORMATS, format_of, open_source, write
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError

from .conftest import UNMEASURED
from .foreign import minari
from .test_damaged_data import MUTANTS, mutated, refused, v2_store

STEPS = (30, 25, 41)
ARGS = EnvArgs("Mine-v0", {"control_freq": 10}, None, GYM_TYPE, "here")
ABOUT = About(actions="recorded", control_hz=10.0)


def demonstrations(lengths=STEPS, width=5):
    """Actions follow the observed state."""
    for seed, length in enumerate(lengths):
        draw = np.random.default_rng(seed)
        state = np.cumsum(draw.normal(size=(length, width)), axis=0).astype(np.float32)
        seen = {"observation.state": state, "observation.goal": draw.normal(size=(length, 3))}
        rewards = np.linspace(0, 1, length).astype(np.float32)
        yield Demonstration(f"demo_{seed}", state[:, :2] + 1, seen, rewards=rewards)


def assert_same(source, expected):
    assert source.demos == [demo.name for demo in expected]
    assert sorted(source.keys) == ["observation.goal", "observation.state"]
    for demo in expected:
        assert source.length(demo.name) == len(demo)
        found = source.read(demo.name)
        for key, values in {"": demo.actions, "rewards": demo.rewards, **demo.observations}.items():
            stored = found.observations.get(key, found.rewards if key == "rewards" else found.actions)
            np.testing.assert_array_equal(stored, values)
            assert stored.dtype == values.dtype
    some = source.read("demo_1", ["observation.goal"])
    assert list(some.observations) == ["observation.goal"]


WRITTEN = {name: module.SUFFIXES[0] for name, module in FORMATS.items() if module.SUFFIXES}
"""Endings of the formats that are written, too."""


@pytest.fixture(params=sorted(FORMATS))
def dataset(request, tmp_path):
    """A dataset of a format."""
    if request.param == "minari":
        episodes = ((demo.observations, demo.actions, demo.rewards) for demo in demonstrations())
        return minari(
            tmp_path / "in.minari", episodes, env={"id": ARGS.env_name, "kwargs": dict(ARGS.env_kwargs)}
        )
    path = tmp_path / f"in{WRITTEN[request.param]}"
    write(path, demonstrations(), About(ARGS, "recorded", control_hz=10.0))
    assert format_of(path) == request.param
    return path


# ------------------------------------------------------------------------------------------ every format


def test_what_is_written_is_read_back(dataset):
    source = open_source(dataset)
    assert_same(source, list(demonstrations()))
    source.close()


@pytest.mark.parametrize("suffix", WRITTEN.values())
def test_any_format_becomes_any_other(dataset, suffix, tmp_path, capsys):
    out = tmp_path / f"out{suffix}"
    described = [] if dataset.suffix in (".zarr", ".hdf5", ".minari") or suffix != ".hdf5" else ["task=pusht"]
    words = [f"source={dataset}", f"out={out}", "actions=recorded", *described, *rated(dataset, suffix)]
    assert main(["convert", *words]) == 0, capsys.readouterr().err
    source = open_source(out)
    assert_same(source, list(demonstrations()))
    source.close()


def rated(source, suffix):
    """The rate, where the source knows none and the target must."""
    return ["control_hz=10"] if source.suffix == ".npz" and suffix == ".lerobot" else []


def test_info_describes_any(dataset, capsys, tmp_path):
    assert main(["info", str(dataset), "out=null"]) == 0
    said = capsys.readouterr().out
    assert "observation.state" in said and str(sum(STEPS)) in said and "unusual" in said


TASK = """
name: mine
control_hz: 10
observation: [{key: observation.state}]
action: {kind: position}
"""


def test_training_reads_any(dataset):
    with opened_buffer(dataset, ["observation.state"]) as buffer:
        state, action = buffer.read("observation.state"), buffer.read("action")
    demos = list(demonstrations())
    np.testing.assert_array_equal(buffer.episode_ends, np.cumsum(STEPS))
    np.testing.assert_array_equal(action, np.concatenate([demo.actions for demo in demos]))
    np.testing.assert_array_equal(
        state, np.concatenate([demo.observations["observation.state"] for demo in demos])
    )


def test_a_folder_of_npz_files_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset = tmp_path / "mine.npz"
    write(dataset, demonstrations(), ABOUT)
    (tmp_path / "mine.yaml").write_text(TASK)
    small = ["policy.down_dims=[8,16]", "training.n_steps=2", "training.batch_size=8", "evaluation.seeds=0"]
    small += UNMEASURED
    code = main(
        ["train", "task=mine.yaml", f"dataset={dataset}", "run=run", "capture=eager", *small, *UNMEASURED]
    )
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "run/checkpoint/policy.json").exists()


def test_a_field_that_is_missing_is_named_with_those_there(dataset, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(TASK.replace("observation.state", "observation.sate"))
    line = refused(capsys, "train", f"task={tmp_path / 'mine.yaml'}", f"dataset={dataset}")
    assert "has no 'observation.sate'" in line and "observation.goal" in line


@pytest.mark.parametrize("suffix", [".npz", ".lerobot"])
def test_converting_holds_one_episode_at_a_time(suffix, tmp_path):
    width, steps = 200, 2500
    episode = steps * (width * 4 + 2 * 4 + 3 * 8)
    path, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write(path, demonstrations([steps] * 2, width), ABOUT)  # what is imported and cached once
    write(out, (open_source(path).read(name) for name in ("demo_0", "demo_1")), ABOUT)
    path, out = tmp_path / f"large{suffix}", tmp_path / f"copy{suffix}"
    write(path, demonstrations([steps] * 10, width), ABOUT)
    source = open_source(path)
    tracemalloc.start()
    write(out, map(source.read, source.demos), ABOUT)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 * episode, most / episode


@pytest.mark.parametrize("name", ["npz", "lerobot"])
def test_describing_and_inspecting_hold_one_episode_at_a_time(name, tmp_path, monkeypatch):
    path = tmp_path / f"in.{name}"
    write(path, demonstrations([20] * 10), ABOUT)
    kind, made, most = type(open_source(path)), [], []
    read = kind.read

    def counted(self, demo, keys=None):
        demonstration = read(self, demo, keys)
        made.append(weakref.ref(demonstration))
        most.append(sum(each() is not None for each in made))
        return demonstration

    monkeypatch.setattr(kind, "read", counted)
    assert main(["info", str(path), "out=null"]) == 0
    assert len(most) >= 20 and max(most) <= 2


# ------------------------------------------------------------------------------------------------- npz


def npz(folder, **changes):
    """Two episodes of which the second has other arrays."""
    folder.mkdir()
    whole = {"action": np.ones((6, 2)), "state": np.ones((6, 3), np.float32)}
    np.savez(folder / "a.npz", **whole)
    np.savez(folder / "b.npz", **{k: v for k, v in {**whole, **changes}.items() if v is not None})
    return folder


def entry(path, name, content, **options):
    """A zip file with an action and one more entry."""
    with zipfile.ZipFile(path, "w", **options) as file:
        with file.open("action.npy", "w") as array:
            np.lib.format.write_array(array, np.ones((6, 2)))
        file.writestr(name, content)


def header(shape, dtype="<f8"):
    """Of an array file that declares what isn't there."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def bomb(folder):
    zeros = header((2**24,)) + bytes(2**27)
    entry(folder / "b.npz", "state.npy", zeros, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def cut(folder):
    path = folder / "b.npz"
    path.write_bytes(path.read_bytes()[:-40])


def flipped(folder):
    path = folder / "b.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 140] ^= 255
    path.write_bytes(content)


def fifo(folder):
    (folder / "b.npz").unlink()
    os.mkfifo(folder / "b.npz")


def elsewhere(folder):
    (folder / "b.npz").rename(folder.parent / "elsewhere.npz")
    (folder / "b.npz").symlink_to("../elsewhere.npz")


def loop(folder):
    (folder / "b.npz").unlink()
    (folder / "b.npz").symlink_to("b.npz")


FAULTS = {
    "no action": (lambda f: np.savez(f / "b.npz", state=np.ones((6, 3))), "has no action"),
    "no state": (lambda f: np.savez(f / "b.npz", action=np.ones((6, 2))), "has no state"),
    "ragged": (lambda f: np.savez(f / "b.npz", action=np.ones((6, 2)), state=np.ones((5, 3))), "has 5 steps"),
    "empty": (lambda f: np.savez(f / "b.npz", action=np.ones((0, 2)), state=np.ones((0, 3))), "above 0"),
    "flat": (lambda f: np.savez(f / "b.npz", action=np.ones(6), state=np.ones((6, 3))), "above 0"),
    "nan": (lambda f: np.savez(f / "b.npz", action=np.full((6, 2), np.nan), state=np.ones((6, 3))), "NaN"),
    "other width": (
        lambda f: np.savez(f / "b.npz", action=np.ones((6, 2)), state=np.ones((6, 4), np.float32)),
        "isn't like those before",
    ),
    "objects": (
        lambda f: np.savez(f / "b.npz", action=np.array([{}] * 6), state=np.ones((6, 3))),
        "aren't unpickled",
    ),
    "text": (lambda f: np.savez(f / "b.npz", action=np.array(["a"] * 6), state=np.ones(6)), "not numbers"),
    "one number": (lambda f: np.savez(f / "b.npz", action=np.ones((6, 2)), state=1.0), "single number"),
    "declared": (lambda f: entry(f / "b.npz", "state.npy", header((2**40, 2))), "copy it again"),
    "wide": (lambda f: entry(f / "b.npz", "state.npy", header((6, 2**70))), "copy it again"),
    "negative": (lambda f: entry(f / "b.npz", "state.npy", header((-1, 2))), "copy it again"),
    "dtype": (lambda f: entry(f / "b.npz", "state.npy", header((6,), "<c16")), "not numbers"),
    "no header": (lambda f: entry(f / "b.npz", "state.npy", b"nothing"), "copy it again"),
    "lzma": (
        lambda f: entry(f / "b.npz", "state.npy", header((6,)), compression=zipfile.ZIP_LZMA),
        "isn't read",
    ),
    "bomb": (bomb, "as no recording does"),
    "cut": (cut, "no whole zip file"),
    "flipped": (flipped, "can't be read"),
    "no zip": (lambda f: (f / "b.npz").write_bytes(b"PK"), "no whole zip file"),
    "fifo": (fifo, "regular file"),
    "elsewhere": (elsewhere, "leads out"),
    "loop": (loop, "b.npz"),
    "folder": (lambda f: ((f / "b.npz").unlink(), (f / "b.npz").mkdir()), "regular file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_npz_file_is_refused_in_one_line(fault, tmp_path, capsys):
    folder, (make, words) = npz(tmp_path / "in"), FAULTS[fault]
    make(folder)
    line = refused(capsys, "convert", f"source={folder}", f"out={tmp_path / 'out.zarr'}")
    assert words in line and ("b.npz" in line or "demo_1" in line), line
    assert not (tmp_path / "out.zarr").exists()


def read_all(path):
    """Reads every episode of a dataset, or refuses it in one line."""
    try:
        source = open_source(path)
        for demo in source.demos:
            assert len(source.read(demo)) == source.length(demo)
    except InputError as error:
        assert "\n" not in str(error)


fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(mutant=MUTANTS)
def test_a_mutated_npz_file_is_read_or_refused(mutant, tmp_path_factory):
    folder = npz(tmp_path_factory.mktemp("mutant") / "in")
    path = folder / "b.npz"
    path.write_bytes(mutated(path.read_bytes(), mutant))
    read_all(folder)


def test_arrays_in_columns_and_of_the_other_byte_order_are_read(tmp_path):
    columns = np.asfortranarray(np.arange(12.0).reshape(6, 2))
    source = open_source(npz(tmp_path / "in", action=columns, state=np.ones((6, 3), ">f4")))
    demo = source.read("demo_1")
    np.testing.assert_array_equal(demo.actions, columns)
    assert demo.observations["state"].dtype == np.dtype("<f4")


# ------------------------------------------------------------------------------------------ zip stores


def zip_store(path, change=None, compression=zipfile.ZIP_STORED):
    """A store as diffusion_policy publishes them, zarr v2; ``change`` makes another content of a name's."""
    demos = list(demonstrations((6, 5)))
    fields = {key: np.concatenate([d.observations[key] for d in demos]) for key in demos[0].observations}
    fields["action"] = np.concatenate([demo.actions for demo in demos])
    folder = v2_store(path.with_name("folder.zarr"), fields, [6, 11])
    with zipfile.ZipFile(path, "w", compression) as file:
        for each in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = str(each.relative_to(folder))
            content = each.read_bytes()
            content = change(name, content) if change else content
            if content is not None:
                file.writestr(name, content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_store_is_read_as_its_folder(compression, tmp_path, capsys):
    path = zip_store(tmp_path / "in.zarr.zip", compression=compression)
    mine, theirs = open_source(path), open_source(tmp_path / "folder.zarr")
    assert mine.keys == theirs.keys == ["observation.goal", "observation.state"]
    for name in mine.demos:
        one, other = mine.read(name), theirs.read(name)
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(*(d.observations["observation.state"] for d in (one, other)))
    assert main(["info", str(path), "out=null"]) == 0
    assert main(["convert", f"source={path}", f"out={tmp_path / 'o.npz'}", "actions=recorded"]) == 0
    with pytest.raises(InputError, match="can't be appended to"):
        ReplayBuffer.open(path, "r+")


def only(wanted, new):
    return lambda name, content: new if name == wanted else content


ZIP_FAULTS = {
    "lost chunk": (only("data/action/0.0", None), "is missing"),
    "long chunk": (only("data/action/0.0", bytes(2**25)), "are the most that is read"),
    "bomb": (only("data/action/0.0", bytes(2**27)), "are the most that is read"),
    "long metadata": (only("data/action/.zarray", bytes(2**23)), "are the most that is read"),
    "no metadata": (only("data/action/.zarray", None), "can't be read"),
    "no ends": (only("meta/episode_ends/0", None), "is missing"),
    "damaged chunk": (
        only("data/action/0.0", b"\x02\x01\x21\x04\xff\xff\xff\x7f" + bytes(30)),
        "unpacks to more",
    ),
    "no group": (lambda name, content: None, "is not a zarr group"),
}


@pytest.mark.parametrize("fault", ZIP_FAULTS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_faulty_zip_store_is_refused_in_one_line(fault, compression, tmp_path, capsys):
    change, words = ZIP_FAULTS[fault]
    path = zip_store(tmp_path / "in.zarr.zip", change, compression)
    line = refused(capsys, "convert", f"source={path}", f"out={tmp_path / 'o.npz'}", "actions=recorded")
    assert words in line and "in.zarr.zip" in line, line


def test_an_entry_that_unpacks_to_more_than_it_declares_is_refused(tmp_path, capsys):
    path = zip_store(tmp_path / "in.zarr.zip", only("data/action/0.0", bytes(2**20)), zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content.replace((2**20).to_bytes(4, "little"), (64).to_bytes(4, "little")))
    line = refused(capsys, "convert", f"source={path}", f"out={tmp_path / 'o.npz'}", "actions=recorded")
    assert "unpacks to more or less than it declares" in line


def test_a_table_of_contents_that_declares_too_much_is_refused(tmp_path, capsys):
    path = zip_store(tmp_path / "in.zarr.zip")
    content = bytearray(path.read_bytes())
    content[-10:-6] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    assert "bytes of file names" in refused(capsys, "info", path)


@fuzz
@given(mutant=MUTANTS)
def test_a_mutated_zip_store_is_read_or_refused(mutant, small_zip, tmp_path_factory):
    path = tmp_path_factory.mktemp("mutant") / "a.zarr.zip"
    path.write_bytes(mutated(small_zip, mutant))
    read_all(path)


@pytest.fixture(scope="module")
def small_zip(tmp_path_factory):
    return zip_store(tmp_path_factory.mktemp("zip") / "a.zarr.zip").read_bytes()


# --------------------------------------------------------------------------------------------- LeRobot


def table(demo, episode, first):
    """The rows of an episode as LeRobot stores them; its lists have no fixed length there."""
    columns = {"action": demo.actions, **demo.observations}
    lists = {name: pa.array(list(map(list, values.tolist()))) for name, values in columns.items()}
    frames = np.arange(len(demo))
    return {
        **lists,
        "next.reward": pa.array(demo.rewards),
        "next.done": pa.array(frames == len(demo) - 1),
        "note": pa.array(["text"] * len(demo)),
        "episode_index": pa.array(np.full(len(demo), episode)),
        "index": pa.array(first + frames),
    }


FEATURES = {
    "action": {"dtype": "float32", "shape": [2]},
    "observation.state": {"dtype": "float32", "shape": [5]},
    "observation.goal": {"dtype": "float32", "shape": [3]},
    "observation.images.top": {"dtype": "video", "shape": [96, 96, 3]},
    "note": {"dtype": "string", "shape": [1]},
    **{name: {"dtype": "int64", "shape": [1]} for name in ("episode_index", "index")},
    "next.reward": {"dtype": "float32", "shape": [1]},
    "next.done": {"dtype": "bool", "shape": [1]},
}


def lerobot(folder, version, *, info=(), rows=None, episodes=None, features=()):
    """A dataset of two episodes, laid out by hand as LeRobot documents it.

    Args:
        info: other values in ``meta/info.json``.
        rows: changes the columns of the second episode.
        episodes: changes the second row of the table of episodes.
        features: other features.
    """
    demos, first, tables, listed = list(demonstrations((6, 5))), 0, [], []
    for index, demo in enumerate(demos):
        changed = table(demo, index, first)
        if index and rows:
            rows(changed)
        tables.append(pa.table(changed))
        about = {"episode_index": index, "tasks": ["a"], "length": len(demo)}
        if version == 3:
            about |= {"data/chunk_index": 0, "data/file_index": 0}
            about |= {"dataset_from_index": first, "dataset_to_index": first + len(demo)}
        listed.append(about | (episodes or {} if index else {}))
        first += len(demo)
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    if version == 2:
        for index, each in enumerate(tables):
            pq.write_table(each, folder / f"data/chunk-000/episode_{index:06d}.parquet")
        (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, listed)))
    else:
        with pq.ParquetWriter(folder / "data/chunk-000/file-000.parquet", tables[0].schema) as writer:
            writer.write_table(pa.concat_tables(tables), row_group_size=4)
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(listed), folder / "meta/episodes/chunk-000/file-000.parquet")
    paths = {2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    template = paths.get(version, "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    about = {"codebase_version": {2: "v2.1", 3: "v3.0"}[version], "fps": 10}
    about |= {"chunks_size": 1000, "data_path": template, "features": {**FEATURES, **dict(features)}}
    (folder / "meta/info.json").write_text(json.dumps({**about, **dict(info)}))
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_lerobots_layouts_are_read(version, tmp_path, capsys):
    """Row groups end within episodes; what isn't numbers is named."""
    path = lerobot(tmp_path / "in", version)
    source = open_source(path)
    assert source.control_hz == 10
    for demo in demonstrations((6, 5)):
        found = source.read(demo.name)
        np.testing.assert_array_equal(found.actions, demo.actions)
        np.testing.assert_allclose(
            found.observations["observation.goal"], demo.observations["observation.goal"]
        )
        np.testing.assert_array_equal(found.rewards, demo.rewards)
        assert found.dones.tolist() == [False] * (len(demo) - 1) + [True]
    assert [line.split(": ")[1] for line in source.skipped] == [
        "observation.images.top is a video, but meta/info.json has no video_path or no fps",
        "note is text, which isn't read",
    ]
    assert main(["info", str(path), "out=null"]) == 0
    assert "is a video" in " ".join(capsys.readouterr().out.split())


def test_what_is_written_for_lerobot_is_as_it_documents(tmp_path):
    demos = list(demonstrations())
    write(tmp_path / "out.lerobot", demos, ABOUT)
    info = json.loads((tmp_path / "out.lerobot/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 10, sum(STEPS))
    stats = json.loads((tmp_path / "out.lerobot/meta/stats.json").read_text())
    state = np.concatenate([demo.observations["observation.state"] for demo in demos]).astype(np.float64)
    for name, value in {"mean": state.mean(0), "std": state.std(0), "min": state.min(0)}.items():
        np.testing.assert_allclose(stats["observation.state"][name], value, rtol=1e-9, atol=1e-9)
    data = pq.read_table(tmp_path / "out.lerobot/data/chunk-000/file-000.parquet")
    assert set(data.column_names) == set(info["features"])
    assert data["index"].to_pylist() == list(range(sum(STEPS)))
    np.testing.assert_allclose(data["timestamp"].to_numpy()[:3], [0, 0.1, 0.2], rtol=1e-6)
    episodes = pq.read_table(tmp_path / "out.lerobot/meta/episodes/chunk-000/file-000.parquet").to_pydict()
    assert episodes["dataset_to_index"] == np.cumsum(STEPS).tolist() and episodes["length"] == list(STEPS)


def test_a_mean_is_exact_beside_a_large_offset(tmp_path):
    values = 1e9 + np.linspace(0, 1, 300)[:, None]
    write(tmp_path / "out.lerobot", [Demonstration("demo_0", values, {})], ABOUT)
    stats = json.loads((tmp_path / "out.lerobot/meta/stats.json").read_text())["action"]
    np.testing.assert_allclose(stats["std"], np.linspace(0, 1, 300).std(), rtol=1e-6)


def test_what_is_no_camera_and_unknown_rates_arent_written_for_lerobot(tmp_path):
    for pictures in (np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 5, 3), np.uint8), np.zeros((3, 4, 4), np.uint8)):
        demo = Demonstration("demo_0", np.ones((3, 2)), {"image": pictures})
        with pytest.raises(InputError, match=r"image is .* per step: vectors are written"):
            write(tmp_path / "out.lerobot", [demo], ABOUT)
    with pytest.raises(InputError, match="how many steps a second"):
        write(tmp_path / "out.lerobot", demonstrations(), About())
    assert not list(tmp_path.iterdir())


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    path = lerobot(tmp_path / "in", 3)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'paradiffpolicy[lerobot]'" in refused(
        capsys, "convert", f"source={path}", "out=a.zarr"
    )


def without(name):
    return lambda columns: columns.pop(name)


def column(name, values):
    return lambda columns: columns.__setitem__(name, pa.array(values))


def after(change):
    """Makes a dataset and then changes its files."""

    def make(folder, version):
        lerobot(folder, version)
        data = sorted((folder / "data").rglob("*.parquet"))[-1]
        change(folder, data)

    return make


def with_(**changes):
    return lambda folder, version: lerobot(folder, version, **changes)


def moved(folder, data):
    data.rename(folder.parent / "elsewhere.parquet")
    data.symlink_to(folder.parent / "elsewhere.parquet")


def piped(path):
    path.unlink()
    os.mkfifo(path)


LEROBOT_FAULTS = {
    "another version": (with_(info={"codebase_version": "v1.6"}), "v1.6"),
    "no version": (with_(info={"codebase_version": None}), "LeRobot's None"),
    "no action feature": (with_(info={"features": {"a": {"dtype": "float32", "shape": [1]}}}), "no action"),
    "features aren't": (with_(info={"features": 5}), "can't be read"),
    "no chunks_size": (with_(info={"chunks_size": 0, "data_path": 3}), "table of episodes"),
    "path of objects": (with_(info={"data_path": "{0.__class__}"}), "can't be read"),
    "path out": (with_(info={"data_path": "../../etc/passwd"}), "leads out"),
    "absolute path": (with_(info={"data_path": "/etc/passwd"}), "leads out"),
    "shape": (with_(features={"action": {"dtype": "float32", "shape": [3]}}), "aren't (3,)"),
    "shape of text": (with_(features={"action": {"dtype": "float32", "shape": ["a"]}}), "can't be read"),
    "huge shape": (with_(features={"action": {"dtype": "float32", "shape": [2**60]}}), "more than"),
    "two rewards": (
        with_(features={"next.reward": {"dtype": "float32", "shape": [5]}, "observation.state": {}}),
        "rows",
    ),
    "missing column": (with_(features={"more": {"dtype": "float32", "shape": [1]}}), "no column more"),
    "length": (with_(episodes={"length": 4}), "the table of episodes says"),
    "long": (with_(episodes={"length": 2**39}), "table of episodes says"),
    "no length": (with_(episodes={"length": 0}), "table of episodes"),
    "nan": (with_(rows=column("action", [[1.0, np.nan]] * 5)), "NaN"),
    "cut": (after(lambda folder, data: data.write_bytes(data.read_bytes()[:-9])), "whole parquet"),
    "no parquet": (after(lambda folder, data: data.write_bytes(b"PAR1")), "can't be read"),
    "footer": (
        after(lambda folder, data: data.write_bytes(b"PAR1" + bytes([255] * 4) + b"PAR1")),
        "whole parquet",
    ),
    "lost": (after(lambda folder, data: data.unlink()), "can't be read"),
    "fifo": (after(lambda folder, data: piped(data)), "regular file"),
    "info fifo": (after(lambda folder, data: piped(folder / "meta/info.json")), "regular file"),
    "elsewhere": (after(moved), "leads out"),
    "info isn't json": (after(lambda folder, data: (folder / "meta/info.json").write_text("{")), "can't be"),
}
V2_FAULTS = {
    "no actions": (with_(rows=without("action")), "no column action"),
    "text": (with_(rows=column("action", [["a", "b"]] * 5)), "not numbers"),
    "ragged": (with_(rows=column("action", [[1.0]] * 4 + [[1.0] * 6])), "aren't (2,)"),
    "narrow": (with_(rows=column("action", [[1.0]] * 5)), "aren't (2,)"),
    "gaps": (with_(rows=column("action", [None, None, None, None, [1.0] * 2])), "without a value"),
    "dates": (with_(rows=column("observation.state", [[[1.0] * 5]] * 5)), "aren't (5,)"),
    "another episode": (with_(rows=column("episode_index", [7] * 5)), "another episode"),
    "no episodes": (after(lambda folder, data: (folder / "meta/episodes.jsonl").write_text("")), "is empty"),
    "lost table": (after(lambda folder, data: (folder / "meta/episodes.jsonl").unlink()), "can't be read"),
    "table": (after(lambda folder, data: (folder / "meta/episodes.jsonl").write_text("[]")), "table of"),
}


@pytest.mark.parametrize(
    ("version", "fault"),
    [*((v, fault) for v in (2, 3) for fault in LEROBOT_FAULTS), *((2, fault) for fault in V2_FAULTS)],
)
def test_a_faulty_lerobot_dataset_is_refused_in_one_line(version, fault, tmp_path, capsys):
    make, words = (LEROBOT_FAULTS | V2_FAULTS)[fault]
    make(tmp_path / "in", version)
    line = refused(capsys, "convert", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out.zarr'}")
    assert words in line, line
    assert not (tmp_path / "out.zarr").exists()


def test_rows_that_unpack_to_too_much_are_refused_before(tmp_path, monkeypatch, capsys):
    """A repeated value takes no space in the file."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**22 * 10)), 10)
    path = lerobot(tmp_path / "in", 2, episodes={"length": 2**22})
    features = json.loads((path / "meta/info.json").read_text())
    features["features"] = {"action": {"dtype": "float64", "shape": [10]}}
    (path / "meta/info.json").write_text(json.dumps(features))
    episode = pa.array(np.ones(2**22, np.int64))
    file = path / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pa.table({"action": zeros, "episode_index": episode}), file, row_group_size=2**23)
    assert file.stat().st_size < 2**20
    source = open_source(path)
    with pytest.raises(InputError, match="in a row group, at most"):
        source.read("demo_1")


@fuzz
@given(mutant=MUTANTS, version=st.sampled_from([2, 3]), pick=st.integers(0, 10**6))
def test_a_mutated_lerobot_dataset_is_read_or_refused(
    mutant, version, pick, small_lerobots, tmp_path_factory
):
    path = tmp_path_factory.mktemp("mutant") / "in"
    shutil.copytree(small_lerobots / str(version), path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[pick % len(files)]
    file.write_bytes(mutated(file.read_bytes(), mutant))
    read_all(path)


@pytest.fixture(scope="module")
def small_lerobots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobots")
    for version in (2, 3):
        lerobot(folder / str(version), version)
    return folder
