"""Minari's datasets: real ones and ones by hand are read, and every fault is named in one line."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.train import opened_buffer
from paradiffpolicy.data.formats.reading import format_of, open_source
from paradiffpolicy.data.replay_buffer import ReplayBuffer

from .foreign import box, minari
from .test_damaged_data import MUTANTS, mutated, refused
from .test_dataset_formats import fuzz, read_all


def episodes(lengths=(6, 5), flat=False):
    """Observations of a Dict with a Dict in it, or of a Box; numbers that differ in each place."""
    for seed, length in enumerate(lengths):
        draw = np.random.default_rng(seed)
        state = draw.normal(size=(length, 3)).astype(np.float32)
        seen = {"state": state, "goal": {"position": draw.normal(size=(length, 2))}}
        yield state if flat else seen, draw.normal(size=(length, 2)), draw.normal(size=length)


# ------------------------------------------------------------------------------------------------ reading


def test_nested_observations_have_a_key_each_and_the_last_is_left_out(tmp_path, capsys):
    path = minari(tmp_path / "in", episodes(), env={"id": "Mine-v0", "kwargs": {"control_freq": 10}})
    assert format_of(path) == "minari"
    with open_source(path) as source:
        assert sorted(source.keys) == ["goal.position", "state"] and not source.skipped
        assert source.seeds == {"demo_0": 7, "demo_1": 8} and source.control_hz == 10
        assert source.env_args.env_name == "Mine-v0"
        for demo, (seen, actions, rewards) in zip(source.demos, episodes(), strict=True):
            found = source.read(demo)
            assert source.length(demo) == len(actions) == len(found)
            np.testing.assert_array_equal(found.actions, actions)
            np.testing.assert_array_equal(found.rewards, rewards)
            np.testing.assert_array_equal(found.observations["state"], seen["state"])
            np.testing.assert_array_equal(found.observations["goal.position"], seen["goal"]["position"])
            assert found.dones.tolist() == [False] * (len(actions) - 1) + [True]
    assert main(["info", str(path), "out=null"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "goal.position" in said and "Mine-v0" in said and "2 of 2" in said


def test_a_box_is_called_observations_and_ten_episodes_are_in_order(tmp_path):
    with open_source(minari(tmp_path / "in", episodes(range(1, 13), flat=True))) as source:
        assert source.keys == ["observations"] and source.env_args is None and source.control_hz is None
        assert [source.length(demo) for demo in source.demos] == list(range(1, 13))
        assert source.demos[10] == "demo_10"


def test_spaces_that_arent_told_are_those_of_the_first_episode(tmp_path):
    path = minari(tmp_path / "in", episodes(), observation_space=None, action_space=None)
    with open_source(path) as source:
        assert sorted(source.keys) == ["goal.position", "state"]


def test_an_episode_ends_where_it_was_terminated_or_truncated(tmp_path):
    def truncate(file):
        file["episode_0/terminations"][:] = False
        file["episode_0/truncations"][-1] = True

    with open_source(minari(tmp_path / "in", episodes(), truncate)) as source:
        assert source.read("demo_0").dones.tolist() == [False] * 5 + [True]


def test_what_isnt_a_box_is_named_and_left_out(tmp_path, capsys):
    def more(file):
        for group in file.values():
            steps = len(group["actions"]) + 1
            group["observations/mode"] = np.zeros(steps, np.int64)
            group["observations/pair/_index_0"] = np.zeros((steps, 2))
            jpeg = h5py.vlen_dtype(np.uint8)
            group.create_dataset("observations/camera", (steps,), jpeg)

    spaces = {"state": box(3), "mode": {"type": "Discrete"}, "camera": box(8, 8, 3)}
    spaces["pair"] = {"type": "Tuple", "subspaces": [box(2)]}
    space = json.dumps({"type": "Dict", "subspaces": spaces})
    path = minari(tmp_path / "in", episodes(), more, observation_space=space)
    with open_source(path) as source:
        assert source.keys == ["state"]
        said = [line.split("/")[-1] for line in source.skipped]
    assert said == [
        "mode is of a Discrete space, which isn't read",
        "camera holds JPEG pictures, which aren't read: make it with jpeg_encoding=False",
        "pair is of a Tuple space, which isn't read",
    ]
    assert main(["convert", f"source={path}", f"out={tmp_path / 'out.zarr'}"]) == 0
    assert "mode is of a Discrete space" in capsys.readouterr().err
    assert ReplayBuffer.open(tmp_path / "out.zarr").fields == ["action", "dones", "rewards", "state"]


def test_training_reads_it(tmp_path):
    path = minari(tmp_path / "in", episodes())
    with opened_buffer(path, ["goal.position"]) as buffer:
        assert buffer.episode_ends.tolist() == [6, 11]
        seen = np.concatenate([seen["goal"]["position"] for seen, _, _ in episodes()])
        np.testing.assert_array_equal(buffer.read("goal.position"), seen)


@pytest.mark.skipif(find_spec("minari") is None, reason="minari isn't installed: pip install minari")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("flat", [True, False])
def test_what_minari_writes_is_read(flat, tmp_path, monkeypatch):
    import minari as theirs
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def longer(values):
        return np.concatenate((values, values[-1:]))

    def space(size, dtype):
        return spaces.Box(-9, 9, (size,), dtype)

    inner = spaces.Dict({"position": space(2, np.float64)})
    seen_space = spaces.Dict({"state": space(3, np.float32), "goal": inner})
    buffers = []
    for seed, (seen, actions, rewards) in enumerate(episodes(flat=flat)):
        observed = (
            longer(seen)
            if flat
            else {"state": longer(seen["state"]), "goal": {"position": longer(seen["goal"]["position"])}}
        )
        never = [False] * len(actions)
        buffers.append(
            EpisodeBuffer(
                seed=seed,
                observations=observed,
                actions=actions,
                rewards=list(rewards),
                terminations=[*never[1:], True],
                truncations=never,
                infos={"time": list(range(len(actions) + 1))},
            )
        )
    theirs.create_dataset_from_buffers(
        "arm/mine-v0",
        buffers,
        observation_space=space(3, np.float32) if flat else seen_space,
        action_space=space(2, np.float64),
        data_format="hdf5",
    )
    with open_source(tmp_path / "arm/mine-v0") as source:
        assert source.seeds == {"demo_0": 0, "demo_1": 1} and not source.skipped
        for demo, (seen, actions, rewards) in zip(source.demos, episodes(flat=flat), strict=True):
            found = source.read(demo)
            np.testing.assert_array_equal(found.actions, actions)
            np.testing.assert_array_equal(found.rewards, rewards)
            state = found.observations["observations" if flat else "state"]
            np.testing.assert_array_equal(state, seen if flat else seen["state"])


# ------------------------------------------------------------------------------------------------- faults


def replaced(name, values):
    def change(file):
        del file[name]
        if values is not None:
            file[name] = values

    return change


def grouped(file):
    del file["episode_1/actions"]
    file.create_group("episode_1/actions")


def elsewhere(file):
    del file["episode_1/observations/state"]
    file["episode_1/observations/state"] = h5py.ExternalLink("/etc/passwd", "/x")


def unwritten(file):
    del file["episode_1/actions"]
    file["episode_1"].create_dataset("actions", (5, 2), "f8", chunks=(1, 2))


def wrong(name, value):
    return lambda file: file["episode_1"].attrs.update({name: value})


FAULTS = {
    "no actions": ({"change": replaced("episode_1/actions", None)}, "has no actions"),
    "flat actions": ({"change": replaced("episode_1/actions", np.ones(5))}, "steps x numbers"),
    "actions in a group": ({"change": grouped}, "has no actions"),
    "text": ({"change": replaced("episode_1/actions", [b"a"] * 5)}, "not numbers"),
    "unwritten": ({"change": unwritten}, "of its 5 chunks"),
    "nan": ({"change": replaced("episode_1/actions", np.full((5, 2), np.nan))}, "NaN"),
    "no last observation": ({"last": False}, "has 6 steps, 7 belong to its actions"),
    "short": ({"change": replaced("episode_1/observations/state", np.ones((3, 3)))}, "3 steps, 6 belong"),
    "no observation": (
        {"change": replaced("episode_1/observations/state", None)},
        "has no observations/state",
    ),
    "rewards": ({"change": replaced("episode_1/rewards", np.ones(4))}, "4 steps, 5 belong"),
    "ends": ({"change": replaced("episode_1/truncations", np.ones((5, 3, 2)) > 0)}, "terminations and"),
    "elsewhere": ({"change": elsewhere}, "has no observations/state"),
    "steps": ({"change": wrong("total_steps", 9)}, "5 actions but total_steps 9"),
    "steps in words": ({"change": wrong("total_steps", "many")}, "can't be read"),
    "lost episode": ({"change": replaced("episode_1", None)}, "says 2 episodes, data/main_data.hdf5 has 1"),
    "no group": ({"change": replaced("episode_1", np.ones(3))}, "isn't a group"),
    "no episodes": ({"change": lambda file: file.clear(), "total_episodes": 0}, "has no episodes"),
    "discrete actions": ({"action_space": json.dumps({"type": "Discrete", "n": 3})}, "of a Discrete space"),
    "arrow": ({"data_format": "arrow"}, "'arrow', hdf5 is read"),
    "no space": ({"observation_space": "{}"}, "data/metadata.json can't be read"),
    "space": ({"observation_space": "[" * 100_000}, "data/metadata.json can't be read"),
    "unknown space": (
        {"observation_space": json.dumps({"type": "Dict", "subspaces": {"x": box(3)}})},
        "has no",
    ),
    "environment": ({"env_spec": "[]"}, "data/metadata.json can't be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_dataset_is_refused_in_one_line(fault, tmp_path, capsys):
    changes, words = FAULTS[fault]
    path = minari(tmp_path / "in", episodes(), **changes)
    line = refused(capsys, "convert", f"source={path}", f"out={tmp_path / 'out.npz'}")
    assert words in line and str(path) in line, line
    assert not (tmp_path / "out.npz").exists()


def test_two_observations_of_one_name_are_refused(tmp_path, capsys):
    def more(file):
        for group in file.values():
            group["observations/goal.position"] = np.zeros((len(group["actions"]) + 1, 3))

    path = minari(tmp_path / "in", episodes(), more, observation_space=None)
    assert "two observations that are called 'goal.position'" in refused(capsys, "info", path)


FILES = {
    "no metadata": (lambda folder: (folder / "metadata.json").unlink(), "which Minari writes since 0.5"),
    "no data": (lambda folder: (folder / "main_data.hdf5").unlink(), "can't be read"),
    "metadata": (lambda folder: (folder / "metadata.json").write_text("{"), "can't be read"),
    "a list": (lambda folder: (folder / "metadata.json").write_text("[1]"), "can't be read"),
    "cut": (
        lambda folder: (folder / "main_data.hdf5").write_bytes(
            (folder / "main_data.hdf5").read_bytes()[:999]
        ),
        "cut short",
    ),
    "links": (
        lambda folder: (
            (folder / "main_data.hdf5").rename(folder.parent.parent / "x"),
            (folder / "main_data.hdf5").symlink_to("../../x"),
        ),
        "leads out",
    ),
    "a folder": (
        lambda folder: ((folder / "main_data.hdf5").unlink(), (folder / "main_data.hdf5").mkdir()),
        "regular file",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_dataset_with_faulty_files_is_refused_in_one_line(fault, tmp_path, capsys):
    change, words = FILES[fault]
    path = minari(tmp_path / "in", episodes())
    change(path / "data")
    assert words in refused(capsys, "info", path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return minari(
        tmp_path_factory.mktemp("small") / "in", episodes((3, 2)), env={"id": "Mine-v0", "kwargs": {}}
    )


@fuzz
@given(mutant=MUTANTS, name=st.sampled_from(["metadata.json", "main_data.hdf5"]))
def test_a_mutated_dataset_is_read_or_refused(mutant, name, small, tmp_path_factory):
    path = tmp_path_factory.mktemp("mutant") / "in"
    shutil.copytree(small, path)
    file = path / "data" / name
    file.write_bytes(mutated(file.read_bytes(), mutant))
    read_all(path)
