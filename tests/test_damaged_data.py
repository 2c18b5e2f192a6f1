"""Stores and files that are damaged, lie, or were made to harm: one line each, within bounded memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from functools import partial
from types import SimpleNamespace

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.collection.collecting import Collection, collect_demonstrations, collect_rollouts
from paradiffpolicy.data import arrays
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError
from paradiffpolicy.files import UNFINISHED, write_atomically, write_json
from paradiffpolicy.task import ObservationField

from .conftest import ROOT, load_script, toy_episode
from .toy_env import ToyEnv, ToyExpert


def refused(capsys, *argv) -> str:
    """The one line with which a command refuses its input."""
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if not line.startswith("paradiffpolicy: note")][-1:]
    assert code == 2 and not said.out and line.startswith("paradiffpolicy: ") and "Traceback" not in said.err
    return line


def v2_store(path, fields, ends, **options):
    """A store as diffusion_policy writes it."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    config = {"write_empty_chunks": True}
    for name, values in fields.items():
        data.create_array(name, data=values, chunks=(4, *values.shape[1:]), config=config, **options)
    meta.create_array("episode_ends", data=np.asarray(ends), config=config)
    return path


@pytest.fixture
def old(tmp_path):
    steps = np.arange(24, dtype=np.float32).reshape(12, 2)
    return v2_store(tmp_path / "old.zarr", {"action": steps, "state": steps * 0}, [5, 12])


# ---------------------------------------------------------------------------------------- lost chunks


def test_a_lost_chunk_is_named(capsys, old, toy_store):
    (old / "data" / "action" / "1.0").unlink()
    buffer = ReplayBuffer.open(old)
    line = r"data/action: its chunk 1\.0 \(steps 4 to 7\) is missing: copy the store again"
    with pytest.raises(InputError, match=line):
        buffer.read("action")
    np.testing.assert_array_equal(buffer.read("action", 0, 4), np.arange(8).reshape(4, 2))
    assert "chunk 1.0 (steps 4 to 7) is missing" in refused(capsys, "info", old)
    (toy_store / "data" / "keypoint" / "c" / "0" / "0" / "0").unlink()
    words = [f"dataset={toy_store}", f"checkpoint={toy_store.parent / 'new'}", "device=cpu"]
    assert "data/keypoint: its chunk c/0/0/0 (steps 0 to 95) is missing" in refused(capsys, "train", *words)


def test_a_lost_picture_is_named_though_info_shows_one(capsys, tmp_path):
    pictures = np.zeros((12, 8, 8, 3), dtype=np.uint8)
    path = v2_store(tmp_path / "a.zarr", {"action": np.zeros((12, 2)), "img": pictures}, [12])
    (path / "data" / "img" / "2.0.0.0").unlink()
    assert "data/img: its chunk 2.0.0.0 (steps 8 to 11) is missing" in refused(capsys, "info", path)


def test_nothing_is_appended_beside_a_lost_chunk(toy_store, old):
    for lost in ("data/state/c/0/0", "meta/episode_ends/c/0"):
        path = toy_store.with_name("copy.zarr")
        shutil.copytree(toy_store, path)
        (path / lost).unlink()
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(InputError, match="is missing"):
            ReplayBuffer.open(path, "r+").append(toy_episode(7))
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        shutil.rmtree(path)


def test_own_stores_have_every_chunk(tmp_path):
    with ReplayBuffer.create(tmp_path / "a.zarr") as buffer:
        for _ in range(2):
            buffer.append({"action": np.zeros((3, 2))}, texts={"note": "\0"})
    files = {str(path.relative_to(tmp_path / "a.zarr")) for path in (tmp_path / "a.zarr").rglob("*")}
    assert {"data/action/c/0/0", "meta/episode_ends/c/0", "meta/note/c/0", "meta/note_ends/c/0"} <= files
    assert ReplayBuffer.open(tmp_path / "a.zarr").text("note", 1) == "\0"


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_consolidated_copy_of_metadata_is_dropped_before_it_is_stale(tmp_path, old, toy_store, zarr_format):
    path = old if zarr_format == 2 else toy_store
    zarr.consolidate_metadata(path)
    fields = ReplayBuffer.open(path).episode(0)
    n = ReplayBuffer.open(path).n_episodes
    for _ in range(2):
        with ReplayBuffer.open(path, "r+") as buffer:
            buffer.append(fields)
    assert ReplayBuffer.open(path).n_episodes == n + 2
    assert zarr.open_group(path, mode="r").metadata.consolidated_metadata is None
    assert zarr.open_group(path, mode="r")["meta/episode_ends"].shape == (n + 2,)
    for field, values in ReplayBuffer.open(path).episode(n + 1).items():
        np.testing.assert_array_equal(values, fields[field])


# --------------------------------------------------------------------------------------- what is read


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_field_whose_codec_is_not_installed_hides_no_other(capsys, tmp_path, old, toy_store, zarr_format):
    if zarr_format == 2:
        path, field = old, "state"
        replace_array("data/speed", np.ones((12, 1)))(old)
        edit_json(old / "data" / "state" / ".zarray", compressor={"id": "imagecodecs_jpegxl", "effort": 3})
    else:
        path, field = toy_store, "keypoint"
        codecs = [{"name": "bytes"}, {"name": "imagecodecs_jpegxl", "configuration": {}}]
        edit_json(toy_store / "data" / "keypoint" / "zarr.json", codecs=codecs)
    buffer = ReplayBuffer.open(path)
    assert field not in buffer.fields and len(buffer.read("action")) == buffer.n_steps
    with pytest.raises(InputError, match=f"data/{field}.*imagecodecs_jpegxl"):
        buffer.read(field)
    assert main(["info", str(path)]) == 0
    assert "imagecodecs_jpegxl" in "".join(capsys.readouterr().out.split())
    out = tmp_path / "b.zarr"
    words = [f"source={path}", f"out={out}", "actions=recorded"]
    line = refused(capsys, "convert", *words)
    assert f"data/{field}" in line and "imagecodecs_jpegxl" in line and "obs_keys" in line
    kept = [name for name in buffer.fields if name != "action"][:1]
    assert main(["convert", *words, f"obs_keys={kept}".replace("'", "")]) == 0
    assert ReplayBuffer.open(out).fields == sorted(["action", *kept])
    with pytest.raises(InputError, match="imagecodecs_jpegxl"):
        ReplayBuffer.open(path, "r+").append(buffer.episode(0) | {field: buffer.episode(0)["action"]})


def test_texts_and_single_numbers_are_left_out_with_a_line(capsys, tmp_path, old):
    data = zarr.open_group(old, mode="r+")["data"]
    data.create_array("task", shape=(12,), dtype="U8")[:] = "push"
    data.create_array("rate", data=np.array(10.0))
    assert main(["info", str(old)]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "data/task holds <U8, not numbers" in out and "data/rate is a single number" in out
    assert main(["convert", f"source={old}", f"out={tmp_path / 'b.zarr'}", "actions=recorded"]) == 0
    said = capsys.readouterr().err
    assert "data/task holds <U8, not numbers: left out" in said and "data/rate is a single" in said
    assert ReplayBuffer.open(tmp_path / "b.zarr").fields == ["action", "state"]


def replace_array(name, values):
    def change(path):
        group = zarr.open_group(path, mode="r+")
        group.create_array(name, data=values, overwrite=True)

    return change


def array_in_place_of_data(path):
    shutil.rmtree(path / "data")
    zarr.open_group(path, mode="r+").create_array("data", data=np.zeros(3))


def put_json(name, text):
    return lambda path: (path / name).write_text(text)


def chunk(make):
    """Makes something in place of a chunk of the old store."""

    def change(path):
        place = path / "data" / "action" / "0.0"
        place.unlink()
        make(place)

    return change


def declared(**changes):
    return lambda path: edit_json(path / "data" / "action" / ".zarray", **changes)


DEEP = "[" * 200_000
BAD = {
    "a chunk that is a folder": (chunk(os.mkdir), "0.0 isn't a regular file"),
    "a chunk that is a pipe": (chunk(os.mkfifo), "0.0 isn't a regular file"),
    "a chunk that is a device": (chunk(lambda p: p.symlink_to("/dev/zero")), "0.0 isn't a regular file"),
    "a chunk that links to nothing": (chunk(lambda p: p.symlink_to("nowhere")), "No such file"),
    "a long chunk": (chunk(lambda p: p.write_bytes(bytes(2**21))), "are the most that is read"),
    "metadata that is a pipe": (
        lambda p: (p / "data/action/.zarray").unlink() or os.mkfifo(p / "data/action/.zarray"),
        ".zarray isn't a regular file",
    ),
    "root metadata that is a device": (
        lambda p: (p / ".zgroup").unlink() or (p / ".zgroup").symlink_to("/dev/zero"),
        ".zgroup isn't a regular file",
    ),
    "long metadata": (put_json("data/action/.zattrs", " " * 2**23), "are the most that is read"),
    "deep metadata": (put_json("data/action/.zarray", DEEP), "data/action can't be read"),
    "deep attributes": (put_json(".zattrs", '{"a": ' + DEEP), "old.zarr"),
    "complex actions": (replace_array("data/action", np.zeros((12, 2), complex)), "holds complex128"),
    "actions that are single numbers": (replace_array("data/action", np.array(1.0)), "single number"),
    "flat actions": (replace_array("data/action", np.zeros(12)), "it must be a vector"),
    "actions of no numbers": (declared(shape=[12, 0], chunks=[4, 1]), "it must be a vector"),
    "ends in float": (replace_array("meta/episode_ends", np.array([5.0, 12.0])), "row of whole numbers"),
    "ends in text": (replace_array("meta/episode_ends", np.array(["5", "12"])), "not numbers"),
    "a table of ends": (replace_array("meta/episode_ends", np.array([[5], [12]])), "row of whole numbers"),
    "an episode without steps": (replace_array("meta/episode_ends", np.array([5, 5, 12])), "must rise"),
    "no episodes": (replace_array("meta/episode_ends", np.array([], int)), "no episodes yet"),
    "data that is an array": (array_in_place_of_data, "isn't a diffusion_policy store"),
    "no actions": (lambda path: shutil.rmtree(path / "data/action"), "no data/action"),
    "steps of a terabyte": (declared(shape=[12, 2**38], chunks=[4, 2**38]), "at most 268435456 are read"),
    "chunks of a terabyte": (declared(chunks=[2**38, 2]), "at most 268435456 are read"),
    "chunks of no steps": (declared(chunks=[0, 2]), "data/action can't be read"),
    "ends beyond all steps": (
        replace_array("meta/episode_ends", np.array([5, 2**62])),
        "the store is truncated",
    ),
    "negative sizes": (declared(shape=[12, -2]), "data/action"),
    "pickled": (declared(filters=[{"id": "delta", "dtype": "<f4"}, {"id": "pickle"}]), "data/action"),
    "packed twice": (declared(filters=[{"id": "zlib", "level": 1}]), "zlib + blosc, which isn't read"),
    "masks that are no lists": (put_json(".zattrs", '{"masks": {"train": 3}}'), "must be a list of names"),
    "masks that are a number": (put_json(".zattrs", '{"masks": 3}'), "must be lists of names"),
    "names that are numbers": (put_json(".zattrs", '{"demos": [1, 2]}'), "must be a list of names"),
    "an environment that is none": (put_json(".zattrs", '{"env_args": [3]}'), "env_args aren't robomimic's"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_stores_are_refused(capsys, tmp_path, old, case):
    change, message = BAD[case]
    change(old)
    line = refused(capsys, "convert", f"source={old}", f"out={tmp_path / 'b.zarr'}", "actions=recorded")
    assert message in line and "old.zarr" in line


def test_sizes_that_lie_are_found_before_they_are_used(old):
    replace_array("meta/episode_ends", np.array([5, 2**62]))(old)
    sizes = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8}
    with pytest.raises(InputError, match="data/state has 12 steps but meta/episode_ends needs"):
        WindowDataset.of(ReplayBuffer.open(old), [ObservationField("state")], **sizes)
    replace_array("meta/episode_ends", np.array([5, 12]))(old)
    edit_json(old / "data" / "action" / ".zarray", chunks=[0, 2])
    with pytest.raises(InputError, match="data/action can't be read"):
        ReplayBuffer.open(old).require_whole("action")


@pytest.mark.filterwarnings("error")
def test_a_filter_that_divides_by_zero_says_nothing_of_its_own(old):
    scale = {"id": "fixedscaleoffset", "scale": 0, "offset": 0, "dtype": "<f4"}
    edit_json(old / "data" / "action" / ".zarray", filters=[scale])
    with pytest.raises(InputError, match="data/action has NaN or infinity at step 0"):
        ReplayBuffer.open(old).read("action")


@pytest.mark.parametrize("seen", ["float64", "action"])
def test_numbers_that_single_precision_lacks_are_named(tmp_path, seen):
    steps = np.zeros((12, 2))
    large = steps + 1e300
    fields = {"action": large if seen == "action" else steps, "float64": steps if seen == "action" else large}
    buffer = ReplayBuffer.open(v2_store(tmp_path / "a.zarr", fields, [12]))
    with pytest.raises(InputError, match=f"data/{seen}.*at step 0"):
        WindowDataset.of(buffer, [ObservationField("float64")], n_obs_steps=1, horizon=4, n_action_steps=2)


ZEROS = bytes(2**22)
BOMBS = {
    "blosc": (numcodecs.Blosc(), lambda whole: whole[:4] + (2**31 - 1).to_bytes(4, "little") + whole[8:]),
    "lz4": (numcodecs.LZ4(), lambda whole: (2**31 - 1).to_bytes(4, "little") + whole[4:]),
    "zstd": (numcodecs.Zstd(), lambda whole: numcodecs.Zstd().encode(ZEROS)),
    "gzip": (numcodecs.GZip(), lambda whole: gzip.compress(ZEROS)),
    "gzip in pieces": (numcodecs.GZip(), lambda whole: gzip.compress(ZEROS[: 2**19]) * 8),
    "zlib": (numcodecs.Zlib(), lambda whole: zlib.compress(ZEROS)),
    "bz2": (numcodecs.BZ2(), lambda whole: bz2.compress(ZEROS)),
    "lzma": (numcodecs.LZMA(), lambda whole: numcodecs.LZMA().encode(ZEROS)),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_a_chunk_that_unpacks_to_too_much_is_not_unpacked(monkeypatch, tmp_path, codec):
    compressor, bomb = BOMBS[codec]
    monkeypatch.setattr(arrays, "HARMLESS", 0)
    steps = np.arange(24.0).reshape(12, 2)
    path = v2_store(tmp_path / "a.zarr", {"action": steps}, [12], compressors=compressor)
    np.testing.assert_array_equal(ReplayBuffer.open(path).read("action"), steps)
    place = path / "data" / "action" / "1.0"
    place.write_bytes(bomb(place.read_bytes()))
    buffer = ReplayBuffer.open(path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"chunk 1\.0 .* unpacks to more than its 64 bytes"):
            buffer.read("action")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def zstd_frame(blocks, stated=None):
    """A frame of Zstandard: blocks of one repeated byte, ``stated`` bytes in all."""
    head = b"\x28\xb5\x2f\xfd" + (b"\x00\x58" if stated is None else b"\xa0" + stated.to_bytes(4, "little"))
    made = [
        ((n << 3) | 2 | (k == len(blocks) - 1)).to_bytes(3, "little") + b"\0" for k, n in enumerate(blocks)
    ]
    return head + b"".join(made)


def test_frames_of_zstandard_are_measured():
    for frame, size in (
        (zstd_frame([100, 28]), 128),
        (zstd_frame([2**17] * 40), 40 * 2**17),
        (zstd_frame([4, 4]) + zstd_frame([5], stated=5), 13),
        (zstd_frame([7], stated=7), 7),
        (numcodecs.Zstd(checksum=True).encode(ZEROS), len(ZEROS)),
    ):
        assert arrays._zstd_bytes(frame) == size == len(numcodecs.Zstd().decode(frame))


@pytest.fixture(scope="module")
def small_stores(tmp_path_factory):
    """Files by name of a store of each format."""
    folder = tmp_path_factory.mktemp("small")
    steps = np.arange(24, dtype=np.float32).reshape(12, 2)
    v2_store(folder / "2", {"action": steps, "state": steps}, [5, 12])
    with ReplayBuffer.create(folder / "3", attributes={"masks": {"train": ["demo_0"]}}) as buffer:
        buffer.append({"action": steps, "state": steps}, texts={"model": "<mujoco/>"})
    return folder


MUTANTS = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(
        st.just("bytes"),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1),
    ),
    st.tuples(
        st.just("word"),
        st.tuples(
            st.integers(0, 400),
            st.sampled_from(
                [
                    "null",
                    "-1",
                    "1e999",
                    "{}",
                    "[]",
                    '"<f4"',
                    '"complex64"',
                    "true",
                    "99999999999999",
                    '"|O"',
                    '"|V8"',
                ]
            ),
        ),
    ),
)


def mutated(content, mutant):
    kind, how = mutant
    if kind == "cut":
        return content[: int(how * len(content))]
    if kind == "bytes":
        changed = bytearray(content)
        for where, value in how:
            if changed:
                changed[int(where * len(changed))] = value
        return bytes(changed)
    # One number, text or literal of a JSON file becomes another.
    words = list(re.finditer(rb'(?<=[:\[,\s])(?:"[^"]*"|-?\d+|null|true|false)', content))
    if not words:
        return content
    word = words[how[0] % len(words)]
    return content[: word.start()] + how[1].encode() + content[word.end() :]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(zarr_format=st.sampled_from("23"), pick=st.integers(0, 10**6), mutant=MUTANTS)
def test_a_mutated_store_is_read_or_refused(small_stores, tmp_path_factory, zarr_format, pick, mutant):
    path = tmp_path_factory.mktemp("mutant") / "a.zarr"
    shutil.copytree(small_stores / zarr_format, path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[pick % len(files)]
    file.write_bytes(mutated(file.read_bytes(), mutant))
    try:
        load_script("fuzz").read_store(path)
    except InputError as error:
        assert "\n" not in str(error)


def test_mutated_messages_and_files_end_in_a_value_or_a_line():
    """A short run of the script, in a process of its own, whose audit hook can't be taken back."""
    command = [sys.executable, ROOT / "scripts" / "fuzz.py", "300", "60", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = list(map(int, re.findall(r"^│ [a-z].*?│ +(\d+)", done.stdout, re.M)))
    assert found[0] == 300 and sum(found[1:]) == 60 and min(found[1:]) >= 4 and len(found) == 14


# ------------------------------------------------------------------------------------------- writers


def test_one_writer_at_a_time(capsys, toy_store):
    first = ReplayBuffer.open(toy_store, "r+")
    with pytest.raises(InputError, match="is being written to"):
        ReplayBuffer.open(toy_store, "r+")
    assert ReplayBuffer.open(toy_store).n_episodes == 3, "readers aren't kept out"
    first.append(toy_episode(4))
    first.close()
    with ReplayBuffer.open(toy_store, "r+") as second:
        second.append(toy_episode(5))
    del second
    ReplayBuffer.open(toy_store, "r+").append(toy_episode(6))  # freed with the object
    assert np.diff(ReplayBuffer.open(toy_store).episode_ends)[-3:].tolist() == [4, 5, 6]


def test_threads_write_one_file(tmp_path):
    path = tmp_path / "a.json"
    errors = []

    def write(k):
        try:
            for _ in range(10):
                write_json(path, [k] * 1000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(json.loads(path.read_text()))) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path, toy_store):
    left = tmp_path / f"{UNFINISHED}killed"
    (left / "inner").mkdir(parents=True)

    def write(temporary):
        assert not left.exists()
        temporary.write_text("x")
        write_atomically(tmp_path / "other.txt", lambda other: other.write_text("y"))
        assert temporary.exists(), "another's unfinished file isn't taken for a killed one's"

    write_atomically(tmp_path / "a.txt", write)
    left.mkdir()
    (toy_store / "data" / "action" / "c" / f"0.{'0a' * 16}.partial").touch()
    ReplayBuffer.open(toy_store, "r+")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "other.txt", "toy.zarr"]
    assert not list(toy_store.rglob("*.partial"))


@contextlib.contextmanager
def disk_full_after(n_bytes):
    """Files can't become longer, which raises as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, toy_store):
    large = {
        name: np.random.default_rng(0).normal(size=(20_000, *v.shape[1:])).astype(v.dtype)
        for name, v in toy_episode(1).items()
    }
    with ReplayBuffer.open(toy_store, "r+") as buffer:
        before = buffer.read("action")
        with (
            disk_full_after(100_000),
            pytest.raises(InputError, match=r"toy\.zarr can't be written"),
        ):
            buffer.append(large)
        again = ReplayBuffer.open(toy_store)
        assert again.n_episodes == 3
        np.testing.assert_array_equal(again.read("action"), before)
        buffer.append(toy_episode(5))
    assert ReplayBuffer.open(toy_store).n_steps == len(before) + 5
    file = tmp_path / "a.json"
    write_json(file, 1)
    with disk_full_after(1000), pytest.raises(InputError, match=r"a.json can't be written"):
        write_json(file, [0] * 1000)
    assert file.read_text() == "1\n" and not list(tmp_path.glob(f"{UNFINISHED}*"))


def test_a_full_disk_in_the_middle_of_hdf5_is_named_and_leaves_nothing(capsys, tmp_path, old):
    """Where HDF5 itself finds that, it crashes the process."""
    out = tmp_path / "new" / "a.hdf5"
    for n_bytes in (0, 100, 3000):
        with disk_full_after(n_bytes):
            line = refused(capsys, "convert", f"source={old}", f"out={out}", "task=pusht")
        assert f"{out} can't be written (File too large)" in line and not list(out.parent.iterdir())
    assert main(["convert", f"source={old}", f"out={out}", "task=pusht"]) == 0


def test_collecting_is_refused_before_its_first_episode(toy_store, tmp_path):
    with ReplayBuffer.open(toy_store, "r+"), pytest.raises(InputError, match="is being written to"):
        Collection(toy_store, [])
    with ReplayBuffer.create(tmp_path / "a.zarr") as buffer:
        assert Collection.next_seed(SimpleNamespace(buffer=buffer, path="a")) == 0
        buffer.append(toy_episode(4), texts={"seed": "x"})
        with pytest.raises(InputError, match="seed is 'x': name first_seed"):
            Collection.next_seed(SimpleNamespace(buffer=buffer, path="a"))


# ------------------------------------------------------------------------------------- what is collected


class Told(ToyEnv):
    """Its info and rewards are what a test says."""

    def __init__(self, reward=1.0, **told):
        super().__init__()
        self.told, self.reward = told, reward

    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation, {**info, **self.told}

    def step(self, action):
        observation, _, *over, info = super().step(action)
        return observation, self.reward, *over, {**info, **self.told}


def collected(path, make_env, record=("state",), **options):
    made = (make_env, ToyExpert(), options.pop("n", 1), 30, list(record))
    return collect_demonstrations(path, *made, success_key="terminated", **options)


class BrokenError(Exception):
    pass


def broken():
    raise BrokenError


@pytest.mark.parametrize(
    ("record", "told", "message"),
    [
        (["nothing"], {}, "info has no 'nothing' to record; it has steps, pid, state"),
        (["name"], {"name": "toy"}, "info 'name' is <U3: only numbers"),
        (["ragged"], {"ragged": [[1], [1, 2]]}, "'ragged' is lists of different lengths: only numbers"),
        (["lost"], {"lost": np.nan}, "the episode's lost has NaN or infinity at step 0"),
        (["a/b"], {"a/b": 1.0}, "a field can't be called 'a/b'"),
        ([".."], {"..": 1.0}, "a field can't be called '..'"),
        (["zarr.json"], {"zarr.json": 1.0}, "a field can't be called 'zarr.json'"),
        (["x" * 201], {"x" * 201: 1.0}, "a field can't be called 'xxx"),
        (["state"], {"reward": np.nan}, "the environment's reward is nan: it must be a finite number"),
    ],
)
def test_what_cant_be_stored_is_refused_and_leaves_no_store(tmp_path, record, told, message):
    with pytest.raises(InputError, match=re.escape(message)):
        collected(tmp_path / "a.zarr", partial(Told, **told), record)
    assert not list(tmp_path.iterdir())


def test_a_store_comes_with_its_first_episode(tmp_path, capsys):
    path = tmp_path / "a.zarr"
    with pytest.raises(BrokenError):
        collected(path, broken)
    words = ["collect", "task.env.id=no_module:My-v0", "capture=eager", f"out={path}"]
    assert "no_module:My-v0 can't be made" in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_episodes_that_a_store_wouldnt_take_are_not_run(tmp_path, toy_store):
    path = tmp_path / "a.zarr"
    collected(path, ToyEnv)
    for other, record, message in (
        (toy_store, ["state"], "has fields ['action', 'keypoint', 'n_contacts', 'state']"),
        (path, ["steps"], "the episode has ['action', 'rewards', 'steps']"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            collected(other, partial(ToyEnv, fault="input"), record)
    policy = SimpleNamespace(plan=broken)
    with pytest.raises(InputError, match=re.escape("has fields ['action', 'rewards', 'state']")):
        collect_rollouts(path, policy, ToyEnv, 1, 30, ["state"])
    with pytest.raises(InputError, match=r"seed=4294967296 of an environment"):
        collected(path, partial(ToyEnv, fault="input"), first_seed=2**32 - 1, n=2)
    with ReplayBuffer.create(tmp_path / "b.zarr") as buffer:
        buffer.append(toy_episode(4), texts={"seed": "1" * 5000})
    with pytest.raises(InputError, match="last episode's seed is '11111111111111111111': name first_seed"):
        collected(tmp_path / "b.zarr", ToyEnv)
