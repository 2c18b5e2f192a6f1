"""Datasets with cameras: frames are those of their steps, nobody pays who doesn't ask for them, and what is
wrong with a video or a picture is one line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.train import opened_buffer
from paradiffpolicy.data.formats import video
from paradiffpolicy.data.formats.cameras import picture_size
from paradiffpolicy.data.formats.demonstration import About, Demonstration
from paradiffpolicy.data.formats.reading import open_source, write
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError

from .test_damaged_data import MUTANTS, mutated, refused
from .test_dataset_formats import fuzz, read_all

av = pytest.importorskip("av", reason="cameras need PyAV: pip install 'paradiffpolicy[video]'")

from .camera_lerobot import (  # noqa: E402
    FPS,
    LENGTHS,
    SIZE,
    TOP,
    VIDEO_PATHS,
    WRIST,
    camera_dataset,
    encode,
    frames_of,
    png,
)

CLOSE = 4
"""Levels by which a lossy frame may differ; frames of one episode are 7 apart."""


def last_video(folder):
    return sorted(folder.rglob("*.mp4"))[-1]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Not to be changed, by version."""
    folder = tmp_path_factory.mktemp("cameras")
    return {version: camera_dataset(folder / str(version), version) for version in (2, 3)}


def assert_close(found, expected):
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= CLOSE


# ------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("version", [2, 3])
def test_every_step_has_its_own_frame(datasets, version):
    source = open_source(datasets[version])
    assert source.keys == ["observation.state", TOP, WRIST] and source.cameras == {
        TOP: (*SIZE, 3),
        WRIST: (*SIZE, 3),
    }
    for episode in (2, 0, 1):
        demo = source.read(f"demo_{episode}")
        np.testing.assert_array_equal(demo.observations[WRIST], frames_of(episode))
        assert_close(demo.observations[TOP], frames_of(episode))


OPEN = "open-gop=1:scenecut=0:b-adapt=0"
"""Frames before a key frame need it, and may be decoded after it."""


@pytest.mark.parametrize(
    ("g", "b_frames", "x264"),
    [(1, 0, "bframes=0"), (2, 1, OPEN), (12, 0, "bframes=0"), (250, 3, "b-adapt=0"), (10, 16, OPEN)],
)
def test_episodes_begin_anywhere_between_key_frames(g, b_frames, x264, tmp_path):
    source = open_source(camera_dataset(tmp_path / "in", 3, g=g, b_frames=b_frames, x264=x264))
    for episode in range(len(LENGTHS)):
        assert_close(source.read(f"demo_{episode}", [TOP]).observations[TOP], frames_of(episode))


def test_times_that_were_rounded_find_their_frames(tmp_path):
    source = open_source(camera_dataset(tmp_path / "in", 3, starts=(0.0, 1.23, 2.07)))
    for episode in range(len(LENGTHS)):
        assert_close(source.read(f"demo_{episode}", [TOP]).observations[TOP], frames_of(episode))


@pytest.mark.parametrize("version", [2, 3])
def test_who_asks_for_no_camera_needs_no_video_and_no_pyav(datasets, version, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("paradiffpolicy.data.formats.lerobot.read_pictures", None)
    assert main(["info", str(datasets[version]), "out=null"]) == 0
    assert "uint8, a camera" in capsys.readouterr().out
    words = [f"source={datasets[version]}", f"out={tmp_path / 'out.zarr'}", "actions=recorded"]
    assert main(["convert", *words, "obs_keys=[observation.state]"]) == 0
    with opened_buffer(datasets[version], ["observation.state"]) as buffer:
        assert buffer.fields == ["action", "observation.state"]
    capsys.readouterr()
    line = refused(capsys, "convert", words[0], f"out={tmp_path / 'other.zarr'}")
    assert "pip install 'paradiffpolicy[video]'" in line and "obs_keys" in line


@pytest.mark.parametrize("version", [2, 3])
def test_a_camera_becomes_a_field_of_a_store_and_is_trained_from(datasets, version, tmp_path):
    out = tmp_path / "out.zarr"
    assert main(["convert", f"source={datasets[version]}", f"out={out}"]) == 0
    buffer = ReplayBuffer.open(out)
    expected = np.concatenate([frames_of(episode) for episode in range(len(LENGTHS))])
    assert_close(buffer.read(TOP), expected)
    np.testing.assert_array_equal(buffer.read(WRIST), expected)
    with opened_buffer(datasets[version], [WRIST]) as buffer:
        np.testing.assert_array_equal(buffer.read(WRIST, 3, 5), expected[3:5])
        assert buffer.fields == ["action", WRIST]


def test_a_store_has_few_pictures_in_a_chunk_and_compresses_them(tmp_path):
    demos = [Demonstration("demo_0", np.ones((40, 2)), {"img": np.zeros((40, 96, 96, 3), np.uint8)})]
    write(tmp_path / "a.zarr", demos, About())
    array = zarr.open_group(tmp_path / "a.zarr")["data/img"]
    assert array.chunks == (4, 96, 96, 3) and array.nbytes_stored() < 2**16


def test_jpegs_and_grey_pictures_are_read(tmp_path):
    def change(pictures):
        frame = frames_of(2)[3]
        pictures[3]["bytes"] = png(frame, "JPEG", quality=100, subsampling=0)
        pictures[4]["bytes"] = png(frame[..., 0])

    seen = open_source(camera_dataset(tmp_path / "in", 2, pictures=change)).read("demo_2").observations[WRIST]
    assert_close(seen[3], frames_of(2)[3])
    np.testing.assert_array_equal(seen[4], np.repeat(frames_of(2)[3][..., :1], 3, axis=2))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz", ".zarr"])
def test_pictures_of_other_formats_pass_through(suffix, tmp_path):
    demos = [
        Demonstration(f"demo_{k}", np.ones((n, 2)), {"agentview_image": frames_of(k), "state": np.ones(n)})
        for k, n in enumerate(LENGTHS)
    ]
    write(tmp_path / "in.zarr", demos, About(actions="recorded"))
    places = [tmp_path / name for name in ("in.zarr", "a.hdf5", f"b{suffix}", "out.zarr")]
    for source, out in itertools.pairwise(places):
        described = ["task=pusht"] if source.suffix in (".npz", ".zarr") else []
        words = [f"source={source}", f"out={out}", "actions=recorded", *described]
        assert main(["convert", *words]) == 0
    out = places[-1]
    found = ReplayBuffer.open(out).read("agentview_image")
    np.testing.assert_array_equal(found, np.concatenate([frames_of(k) for k in range(len(LENGTHS))]))
    assert found.dtype == np.uint8


def test_cameras_are_written_as_lerobot_documents_and_read_back(tmp_path, capsys):
    demos = [
        Demonstration(f"demo_{k}", np.ones((n, 2)), {"top": frames_of(k), "state": np.ones((n, 3))})
        for k, n in enumerate(LENGTHS)
    ]
    write(tmp_path / "in.zarr", demos, About(actions="recorded"))
    words = [f"source={tmp_path / 'in.zarr'}", f"out={tmp_path / 'out.lerobot'}", f"control_hz={FPS}"]
    assert main(["convert", *words]) == 0
    source = open_source(tmp_path / "out.lerobot")
    assert source.cameras == {TOP: (*SIZE, 3)} and not source.skipped
    for episode, demo in enumerate(demos):
        found = source.read(demo.name).observations[TOP]
        apart = found.astype(int) - frames_of(episode)
        brightness = apart[:, :, : SIZE[1] // 2].mean(axis=(1, 2))
        assert np.abs(brightness).max() < 3.5  # half of what frames are apart
    info = json.loads((tmp_path / "out.lerobot/meta/info.json").read_text())
    told = info["features"][TOP]["info"]
    assert (told["video.codec"], told["video.fps"], told["video.height"]) == ("h264", FPS, SIZE[0])
    assert info["video_path"] == VIDEO_PATHS[3]
    stats = json.loads((tmp_path / "out.lerobot/meta/stats.json").read_text())[TOP]
    every = np.concatenate([frames_of(k) for k in range(len(LENGTHS))]).reshape(-1, 3) / 255
    np.testing.assert_allclose(np.array(stats["std"]), every.std(0)[:, None, None], atol=1e-9)
    row = pq.read_table(tmp_path / "out.lerobot/meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert (row[f"videos/{TOP}/file_index"], row[f"videos/{TOP}/to_timestamp"]) == (1, LENGTHS[1] / FPS)


@pytest.mark.parametrize("encoder", video.ENCODERS)
def test_each_encoder_writes_what_is_read_back(encoder, tmp_path, monkeypatch):
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    monkeypatch.setattr(video, "ENCODERS", {encoder: video.ENCODERS[encoder]})
    size = (64, 96)
    video.write_video(tmp_path / "a.mp4", frames_of(0, size), FPS, "here")
    found = video.read_video(tmp_path / "a.mp4", np.arange(12) / FPS, FPS, size, is_whole=True)
    apart = found.astype(int) - frames_of(0, size)
    assert np.abs(apart[:, :, :48].mean(axis=(1, 2))).max() < 3.5


def test_without_pyav_no_camera_is_written_for_lerobot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    demo = Demonstration("demo_0", np.ones((3, 2)), {"top": np.zeros((3, 4, 4, 3), np.uint8)})
    with pytest.raises(InputError, match=r"observation\.images\.top needs PyAV: pip install"):
        write(tmp_path / "out.lerobot", [demo], About(control_hz=10.0))
    assert not list(tmp_path.iterdir())


def test_pusht_pictures_are_read_as_they_are(human_data):
    source = open_source(human_data)
    demo = source.read("demo_0", ["img"])
    pictures = demo.observations["img"]
    assert pictures.dtype == np.float32 and pictures.shape == (len(demo), 96, 96, 3)
    assert pictures.min() >= 0 and 200 < pictures.max() <= 255


# ---------------------------------------------------------------------------------------- what is refused


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def damaged(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (len(content) - start) // 3
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)


def piped(path):
    path.unlink()
    os.mkfifo(path)


def moved(path):
    path.rename(path.parents[4] / "elsewhere.mp4")
    path.symlink_to(path.parents[4] / "elsewhere.mp4")


def rewritten(**changes):
    """Encodes the last video anew, with other frames of all or of the last episode."""

    def change(path):
        alone = "episode" in path.name
        given = {"size": SIZE, "fps": FPS, "steps": slice(None), **changes}
        episodes = [2] if alone else range(len(LENGTHS))
        frames = np.concatenate([frames_of(episode, given["size"]) for episode in episodes])
        encode(path, frames[given["steps"]], given["fps"])

    return change


VIDEO_FAULTS = {
    "missing": (lambda path: path.unlink(), "is missing: copy it too, or choose obs_keys"),
    "fifo": (piped, "regular file"),
    "elsewhere": (moved, "leads out"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read"),
    "text": (lambda path: path.write_text("#EXTM3U\nhttp://localhost/a.ts\n"), "can't be read"),
    "cut": (cut, "can't be read"),
    "damaged": (damaged, ".mp4"),
    "another size": (rewritten(size=(64, 48)), "has frames of 64 x 48, meta/info.json says 32 x 48"),
    "faster": (rewritten(fps=20), "must have 10 frames a second"),
    "slower": (rewritten(fps=7), "must have 10 frames a second"),
    "shorter": (rewritten(steps=slice(-3)), ""),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("fault", VIDEO_FAULTS)
def test_a_faulty_video_is_refused_in_one_line(fault, version, datasets, tmp_path, capsys):
    change, words = VIDEO_FAULTS[fault]
    path = last_video(shutil.copytree(datasets[version], tmp_path / "in"))
    change(path)
    line = refused(capsys, "convert", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out.zarr'}")
    shorter = {2: "has 10 frames, its episode 13 steps", 3: "ends after 10 of its episode's 13 steps"}
    assert (words or shorter[version]) in line and str(path) in line, line
    assert not (tmp_path / "out.zarr").exists()


def test_a_video_that_has_more_frames_than_its_table_is_refused(tmp_path, capsys):
    path = last_video(camera_dataset(tmp_path / "in", 2))
    encode(path, frames_of(2, length=20))
    line = refused(capsys, "convert", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out.zarr'}")
    assert "has 20 frames, its episode 13 steps" in line


def test_a_video_in_which_a_frame_is_missing_is_refused(tmp_path):
    path = last_video(camera_dataset(tmp_path / "in", 3))
    encode(path, np.concatenate([frames_of(episode) for episode in range(len(LENGTHS))]), lost=[25])
    source = open_source(tmp_path / "in")
    assert_close(source.read("demo_0", [TOP]).observations[TOP], frames_of(0))
    with pytest.raises(InputError, match=r"the frame of step 4 is at 2\.6 s, not 2\.5"):
        source.read("demo_2", [TOP])


def test_frames_that_a_decoder_had_to_guess_are_refused(tmp_path):
    """Decoders conceal damage.  What they can't see, no reader does: MP4 has no checksums."""
    path = tmp_path / "a.mp4"
    encode(path, np.random.default_rng(0).integers(0, 256, (13, *SIZE, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    middle = (content.index(b"mdat") + content.index(b"moov")) // 2
    content[middle : middle + 20] = bytes(byte ^ 0x55 for byte in content[middle : middle + 20])
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mp4: the frame of step \d+ is damaged: copy it again"):
        video.read_video(path, np.arange(13) / FPS, FPS, SIZE, is_whole=True)


def change_picture(**changes):
    return lambda pictures: pictures[4].update(changes)


PICTURE_FAULTS = {
    "no bytes": (change_picture(bytes=None), "has no picture in row"),
    "no picture": (change_picture(bytes=b"none"), "picture of step 4 can't be read"),
    "cut": (lambda pictures: pictures[4].update(bytes=pictures[4]["bytes"][:-30]), "step 4 can't be read"),
    "another size": (
        change_picture(bytes=png(np.zeros((64, 48, 3), np.uint8))),
        "step 4 is 64 x 48, meta/info.json says 32 x 48",
    ),
    "another format": (change_picture(bytes=png(frames_of(0)[0], "GIF")), "can't be read"),
    "depth": (change_picture(bytes=png(np.zeros(SIZE, np.uint16))), "not 8 bits of each colour"),
    "long": (change_picture(bytes=bytes(2**17)), "too many for 32 x 48"),
}


@pytest.mark.parametrize("fault", PICTURE_FAULTS)
def test_a_faulty_picture_is_refused_in_one_line(fault, tmp_path, capsys):
    pictures, words = PICTURE_FAULTS[fault]
    camera_dataset(tmp_path / "in", 2, pictures=pictures)
    line = refused(capsys, "convert", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out.zarr'}")
    assert words in line and "episode_000002.parquet" in line and WRIST in line, line
    assert not (tmp_path / "out.zarr").exists()


def test_frames_that_no_memory_holds_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    large = {TOP: {"dtype": "video", "shape": [9000, 9000, 3]}}
    path = camera_dataset(tmp_path / "in", 2, features=large)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**14)
    monkeypatch.setattr(video, "_opened", None)
    with pytest.raises(InputError, match="more than this machine's memory"):
        open_source(path).read("demo_0", [TOP])


def test_the_size_that_a_codec_has_counts_not_what_the_file_says_of_it(tmp_path):
    path = last_video(camera_dataset(tmp_path / "in", 2))
    encode(path, frames_of(2, size=(1024, 1024)))
    content = path.read_bytes()
    assert content.count(b"\x04\x00\x04\x00") == 1
    path.write_bytes(content.replace(b"\x04\x00\x04\x00", bytes([0, SIZE[1], 0, SIZE[0]])))
    with pytest.raises(InputError, match="has frames of 1024 x 1024"):
        open_source(tmp_path / "in").read("demo_2", [TOP])


def test_decoders_are_told_not_to_allocate_more(datasets, monkeypatch):
    monkeypatch.setattr(video, "PADDING", -30)
    with pytest.raises(InputError, match="can't be read"):
        open_source(datasets[2]).read("demo_2", [TOP])


@pytest.mark.parametrize(
    ("about", "size"),
    [
        ({"shape": [3, 32, 48]}, (32, 48)),
        ({"shape": [32, 48, 3]}, (32, 48)),
        ({"shape": [3, 32, 48], "names": ["height", "width", "channels"]}, (32, 48)),
        ({"shape": [3, 8, 3], "names": ["channels", "height", "width"]}, (8, 3)),
        ({"shape": [3, 8, 3], "names": ["height", "width", "channels"]}, (3, 8)),
        ({"shape": [32, 48, 1]}, None),
        ({"shape": [32, 48]}, None),
        ({"shape": [32.5, 48, 3]}, None),
        ({"shape": [0, 48, 3]}, None),
        ({"shape": [2**20, 2**20, 3]}, None),
        ({"shape": 5}, None),
        ({"shape": [32, 48, 3], "info": {"video.is_depth_map": True}}, None),
        ({"shape": [32, 48, 3], "info": {"is_depth_map": True}}, None),
    ],
)
def test_the_size_of_a_picture_is_found_in_either_order(about, size):
    assert picture_size(about) == size


def test_what_is_no_picture_of_three_colours_is_named(tmp_path):
    depth = {"observation.depth": {"dtype": "video", "shape": [32, 48, 1]}}
    source = open_source(camera_dataset(tmp_path / "in", 2, features=depth))
    assert "observation.depth is a video of the shape [32, 48, 1]" in source.skipped[0]
    assert list(source.cameras) == [TOP, WRIST]


@fuzz
@given(mutant=MUTANTS, version=st.sampled_from([2, 3]), pick=st.integers(0, 10**6))
def test_a_mutated_dataset_with_cameras_is_read_or_refused(mutant, version, pick, datasets):
    files = sorted(file for file in datasets[version].rglob("*") if file.is_file())
    file = files[pick % len(files)]
    content = file.read_bytes()
    try:
        file.write_bytes(mutated(content, mutant))
        read_all(datasets[version])
    finally:
        file.write_bytes(content)
