"""Demonstrations: reading, appending (interrupted anywhere), windows, normalisers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore, WrapperStore

from paradiffpolicy.data.dataset import (
    WindowDataset,
    batch_windows,
    observation_matrix,
    recorded_fields,
    window_steps,
)
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.data.replay_buffer import ReplayBuffer, augmented
from paradiffpolicy.errors import InputError
from paradiffpolicy.task import ObservationField

from .conftest import ROOT, toy_episode


def test_the_human_demonstrations_open(human_data):
    buffer = ReplayBuffer.open(human_data)
    assert buffer.n_episodes == 206 and buffer.n_steps == 25_650
    assert buffer.fields == ["action", "img", "keypoint", "n_contacts", "state"]
    assert buffer.read("img", 0, 2).shape == (2, 96, 96, 3)
    assert len(buffer.episode(205)["action"]) == buffer.episode_ends[205] - buffer.episode_ends[204]


def test_appended_episodes_are_read_back(tmp_path):
    path = tmp_path / "store.zarr"
    episodes = [toy_episode(length, seed) for seed, length in enumerate((5, 1, 12))]
    buffer = ReplayBuffer.create(path)
    for episode in episodes:
        buffer.append(episode)
    assert zarr.open_group(path, mode="r").metadata.zarr_format == 3
    again = ReplayBuffer.open(path)
    assert again.episode_ends.tolist() == [5, 6, 18]
    for index, episode in enumerate(episodes):
        for field, values in again.episode(index).items():
            np.testing.assert_array_equal(values, episode[field])


def test_zarr_v2_stores_can_be_appended_to(tmp_path):
    path = tmp_path / "v2.zarr"
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.create_group("data").create_array("action", data=np.arange(8.0, dtype=np.float32).reshape(4, 2))
    root.create_group("meta").create_array("episode_ends", data=np.array([4]))
    ReplayBuffer.open(path, "r+").append({"action": np.full((3, 2), 9.0, dtype=np.float32)})
    again = ReplayBuffer.open(path)
    assert again.episode_ends.tolist() == [4, 7]
    np.testing.assert_array_equal(again.episode(0)["action"], np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(again.episode(1)["action"], np.full((3, 2), 9.0))


class InterruptedWriteError(Exception):
    pass


class BreakingStore(WrapperStore):
    """A store that stops working after so many writes, as a killed process does: zarr replaces
    every file as a whole, so a write has happened or hasn't."""

    writes_left: int

    def __init__(self, store, writes_left=10**9):
        super().__init__(store)
        self.writes_left = writes_left

    async def set(self, key, value):
        if self.writes_left == 0:
            raise InterruptedWriteError(key)
        self.writes_left -= 1
        await super().set(key, value)


def test_an_append_interrupted_anywhere_leaves_earlier_episodes():
    first, second, third = (toy_episode(n, seed) for seed, n in enumerate((6, 4, 5)))
    points = 0
    while True:
        memory = MemoryStore()
        store = BreakingStore(memory)
        buffer = ReplayBuffer.create(store, "toy")
        buffer.append(first)
        store.writes_left = points
        try:
            buffer.append(second)
            finished = True
        except InterruptedWriteError:
            finished = False
        again = ReplayBuffer(zarr.open_group(memory, mode="r+"), "toy")
        assert again.episode_ends.tolist() == ([6, 10] if finished else [6])
        for field, values in again.episode(0).items():
            np.testing.assert_array_equal(values, first[field])
        # The next append leaves no trace of it.
        again.append(third)
        last = ReplayBuffer(zarr.open_group(memory, mode="r"), "toy")
        assert last.episode_ends.tolist() == ([6, 10, 15] if finished else [6, 11])
        for field, values in last.episode(last.n_episodes - 1).items():
            np.testing.assert_array_equal(values, third[field])
        if finished:
            break
        points += 1
    assert points >= 2 * len(first) + 2, "every field's and the ends' metadata and values are separate writes"


def test_killed_writers_lose_nothing():
    """A short run of the script, in a process of its own: it forks.  Of training: ``test_training``."""
    command = [sys.executable, ROOT / "scripts" / "kills.py", "4", "0", "collect", "convert"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 kills") == 2 and "none lost" in done.stdout


def test_fingerprints_tell_data_apart(tmp_path, toy_store):
    same = ReplayBuffer.open(toy_store)
    copy = tmp_path / "copy.zarr"
    shutil.copytree(toy_store, copy)
    changed = zarr.open_group(copy, mode="r+")
    assert same.fingerprint(["action"]) == ReplayBuffer.open(copy).fingerprint(["action"])
    changed["data/action"][17, 0] += 1
    assert same.fingerprint(["action"]) != ReplayBuffer.open(copy).fingerprint(["action"])


def test_augmented_episodes_follow_their_originals(toy_store):
    buffer = ReplayBuffer.open(toy_store)
    both = augmented(buffer, lambda episode: {k: v + 1 for k, v in episode.items()}, ["action", "state"])
    assert both.episode_ends.tolist() == [30, 60, 85, 110, 151, 192] and both.fields == ["action", "state"]
    np.testing.assert_array_equal(both.episode(2)["action"], buffer.episode(1)["action"])
    np.testing.assert_array_equal(both.episode(3)["action"], buffer.episode(1)["action"] + 1)
    assert ReplayBuffer.open(toy_store).n_episodes == 3


# ------------------------------------------------------------------------------------- bad stores


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no demonstrations at .*nothing\.zarr"):
        ReplayBuffer.open(tmp_path / "nothing.zarr")


def test_a_foreign_folder_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="not a zarr group"):
        ReplayBuffer.open(tmp_path)
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_array("x", shape=(3,), dtype="f4")
    with pytest.raises(InputError, match="isn't a diffusion_policy store"):
        ReplayBuffer.open(tmp_path / "other.zarr")


def test_a_truncated_array_is_named(toy_store):
    group = zarr.open_group(toy_store, mode="r+")
    group["data/action"].resize((50, 2))
    with pytest.raises(InputError, match=r"data/action has 50 steps but meta/episode_ends needs 96"):
        ReplayBuffer.open(toy_store).read("action")


def test_a_truncated_file_is_named(toy_store):
    chunk = next(file for file in (toy_store / "data" / "state" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(InputError, match="data/state can't be read"):
        ReplayBuffer.open(toy_store).read("state")


def test_broken_metadata_is_named(toy_store):
    (toy_store / "meta" / "episode_ends" / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"toy\.zarr"):
        ReplayBuffer.open(toy_store)


def test_ends_that_do_not_rise_are_named(toy_store):
    zarr.open_group(toy_store, mode="r+")["meta/episode_ends"][1] = 12
    with pytest.raises(InputError, match="must rise, but entry 1 is 12"):
        ReplayBuffer.open(toy_store)


def test_nan_is_named(toy_store):
    zarr.open_group(toy_store, mode="r+")["data/state"][33, 1] = np.nan
    with pytest.raises(InputError, match="data/state has NaN or infinity at step 33"):
        ReplayBuffer.open(toy_store).read("state")


def test_a_missing_field_is_named_with_the_nearest(toy_store):
    with pytest.raises(InputError, match="did you mean 'keypoint'"):
        ReplayBuffer.open(toy_store).read("keypoints")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e | {"action": e["action"][:-1]}, "one length above 0"),
        (lambda e: {k: v[:0] for k, v in e.items()}, "one length above 0"),
        (lambda e: {k: v for k, v in e.items() if k != "state"}, "has fields"),
        (lambda e: e | {"state": e["state"][:, :4]}, r"\(4,\)"),
        (lambda e: e | {"state": e["state"].astype(np.float64)}, "float64"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_whole(toy_store, change, message):
    buffer = ReplayBuffer.open(toy_store, "r+")
    with pytest.raises(InputError, match=message):
        buffer.append(change(toy_episode(9)))
    assert ReplayBuffer.open(toy_store).n_steps == 96


def test_creating_over_something_is_refused(toy_store):
    with pytest.raises(InputError, match="exists"):
        ReplayBuffer.create(toy_store)
    assert ReplayBuffer.open(toy_store).n_episodes == 3


# ---------------------------------------------------------------------------------------- windows


def reference_windows(ends, horizon, pad_before, pad_after):
    """diffusion_policy's rule, step by step: every start from -pad_before to length - horizon +
    pad_after, steps outside the episode replaced by its first or last."""
    windows, first = [], 0
    for end in ends:
        length = end - first
        for start in range(-pad_before, length - horizon + pad_after + 1):
            windows.append([first + min(max(start + k, 0), length - 1) for k in range(horizon)])
        first = end
    return windows


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    n_obs_steps=st.integers(1, 4),
    n_action_steps=st.integers(1, 8),
)
def test_windows_are_diffusion_policys(lengths, n_obs_steps, n_action_steps):
    horizon = 16
    ends = np.cumsum(lengths)
    steps = window_steps(ends, horizon, n_obs_steps - 1, n_action_steps - 1)
    assert steps.tolist() == reference_windows(ends, horizon, n_obs_steps - 1, n_action_steps - 1)


def test_a_batch_reads_its_windows(toy_store):
    buffer = ReplayBuffer.open(toy_store)
    fields = [ObservationField("keypoint"), ObservationField("state", 0, 2)]
    data = WindowDataset.of(buffer, fields, n_obs_steps=2, horizon=16, n_action_steps=8)
    observations, actions = data.batch(torch.tensor([0, len(data) - 1]))
    assert observations.shape == (2, 2, 20) and actions.shape == (2, 16, 2)
    matrix, recorded = observation_matrix(buffer, fields), buffer.read("action")
    # The first window hangs over the start by one step, the last over the end by seven.
    np.testing.assert_array_equal(observations[0], matrix[[0, 0]])
    np.testing.assert_array_equal(actions[0], recorded[[0, *range(15)]])
    np.testing.assert_array_equal(actions[1], recorded[[*range(87, 96), *[95] * 7]])
    np.testing.assert_array_equal(matrix[5, 18:], buffer.read("state")[5, :2])


def test_sizes_and_shapes_are_the_stores(toy_store):
    buffer = ReplayBuffer.open(toy_store)
    fields = [ObservationField("keypoint"), ObservationField("state", stop=2)]
    keypoint, state = recorded_fields(buffer, fields)
    assert (keypoint.shape, state.shape, state.size) == ((9, 2), (5,), 2)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (ObservationField("state", stop=6), "observation 'state': stop=6 is beyond its 5 numbers"),
        (ObservationField("state", start=-6), "observation 'state': start=-6 is beyond its 5 numbers"),
        (ObservationField("state", start=5), r"5:None of shape=\(5,\) takes none of its numbers"),
        (ObservationField("state", stop=-5), "takes none of its numbers"),
        (ObservationField("keypoint", shape=(18,)), r"data/keypoint is \(9, 2\) per step, but the task's"),
    ],
)
def test_a_part_of_a_field_that_isnt_there_is_refused(toy_store, field, message):
    with pytest.raises(InputError, match=message):
        recorded_fields(ReplayBuffer.open(toy_store), [field])
    with pytest.raises(InputError, match="3:3 of shape=None takes none"):
        ObservationField("state", 3, 3)
    assert ObservationField("state", -2).size is None and ObservationField("state", -2, shape=(5,)).size == 2


def test_fields_of_another_task_are_named_with_the_stores(toy_store):
    buffer = ReplayBuffer.open(toy_store)
    line = (
        r"toy.zarr has no 'object': it has action, keypoint, n_contacts, state; name its fields in the "
        "task's observation:, since these belong to task lift"
    )
    with pytest.raises(InputError, match=line):
        recorded_fields(buffer, [ObservationField("object")], "lift")
    with pytest.raises(InputError, match="has no 'object'"):
        WindowDataset.of(buffer, [ObservationField("object")], n_obs_steps=1, horizon=16, n_action_steps=1)


def test_actions_that_are_not_vectors_are_named(tmp_path):
    buffer = ReplayBuffer.create(tmp_path / "flat.zarr")
    buffer.append({"action": np.zeros(20)})
    with pytest.raises(InputError, match=r"data/action is \(\) per step"):
        WindowDataset.of(buffer, [ObservationField("action")], n_obs_steps=1, horizon=2, n_action_steps=1)


def test_too_short_or_no_episodes_are_named(tmp_path):
    buffer = ReplayBuffer.create(tmp_path / "short.zarr")
    fields = [ObservationField("state")]
    with pytest.raises(InputError, match="no episodes yet"):
        WindowDataset.of(buffer, fields, n_obs_steps=1, horizon=16, n_action_steps=1)
    buffer.append(toy_episode(4))
    with pytest.raises(InputError, match="shorter than 16"):
        WindowDataset.of(buffer, fields, n_obs_steps=1, horizon=16, n_action_steps=1)


def test_an_epoch_sees_every_window_once():
    seen = torch.cat([batch_windows(100, 10, step, seed=4) for step in range(10)])
    assert sorted(seen.tolist()) == list(range(100))
    assert batch_windows(100, 10, 3, seed=4).tolist() == batch_windows(100, 10, 3, seed=4).tolist()
    assert batch_windows(100, 10, 13, seed=4).tolist() != batch_windows(100, 10, 3, seed=4).tolist()
    assert len(batch_windows(7, 64, 5, seed=0)) == 7


# -------------------------------------------------------------------------------------- normaliser


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=20),
    st.floats(-1000, 1000, width=32),
)
def test_normalising_spans_the_range_and_goes_back(column, constant):
    data = torch.tensor([[value, constant] for value in column])
    normalizer = Normalizer.fit(data)
    normalized = normalizer.normalize(data)
    if float(data[:, 0].max() - data[:, 0].min()) > 1.0:
        assert float(normalized[:, 0].min()) == pytest.approx(-1, abs=1e-3)
        assert float(normalized[:, 0].max()) == pytest.approx(1, abs=1e-3)
    assert normalized[:, 1].abs().max() < 1e-3
    np.testing.assert_allclose(normalizer.unnormalize(normalized), data, atol=0.01, rtol=1e-4)
    restored = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())), 2)
    assert restored == normalizer


def test_what_never_varied_comes_back_exactly():
    """Whatever the network says; what hardly varied stays within its range."""
    data = torch.tensor([[3.5, 0.1, 7.0, -2.0], [3.5, 0.1, 7.00005, 2.0]], dtype=torch.float64)
    normalizer = Normalizer.from_dict(Normalizer.fit(data).to_dict(), 4)
    actions = normalizer.unnormalize(torch.randn(100, 16, 4))
    assert (actions[..., 0] == 3.5).all() and (actions[..., 1] == 0.1).all()
    assert (actions[..., 2] >= 6.99999).all() and (actions[..., 2] <= 7.00006).all()
    assert actions[..., 3].std() > 1
    assert normalizer.reach.tolist()[3] == math.inf


def test_numbers_far_from_zero_keep_their_differences():
    """In float32 neighbours of 4,000,000 are 0.25 apart."""
    data = torch.tensor([[4_000_000.0], [4_000_000.01]], dtype=torch.float64)
    middle = torch.tensor([4_000_000.0025], dtype=torch.float64)
    assert float(Normalizer.fit(data).normalize(middle)) == pytest.approx(-0.5, abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-2e9, 2e9),
    st.floats(1e-2, 1e3),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.floats(-1e12, 1e12),
)
def test_what_lies_far_from_zero_comes_back(offset, extent, shares, constant):
    """Within what float32 tells apart of the range, and what float64 does of the value; constants exactly."""
    column = offset + extent * torch.tensor([0.0, 1.0, *shares], dtype=torch.float64)
    data = torch.stack((column, torch.full_like(column, constant)), dim=1)
    normalizer = Normalizer.from_dict(json.loads(json.dumps(Normalizer.fit(data).to_dict())), 2)
    normalized = normalizer.normalize(data)
    ulps = 8 * np.spacing(abs(offset) + extent)
    assert normalized.abs().max() <= 1 + 1e-6 + 2 * ulps / extent
    back = normalizer.unnormalize(normalized)
    coarse = 0 if back.dtype == torch.float64 else 2**-24 * (abs(offset) + extent)
    assert (back[:, 0] - column).abs().max() <= 2**-23 * extent + ulps + coarse
    assert coarse <= 2**-17 * extent
    assert (back[:, 1] == constant).all()
    assert (normalizer.unnormalize(normalized + 5)[:, 1] == constant).all()


def test_the_middle_is_subtracted_first():
    """Then what differs by float64's last digit of a timestamp differs by that, normalised, and no other."""
    seconds, scale = 1.7e9, 200.0
    normalizer = Normalizer(torch.tensor([scale]), torch.tensor([-scale * seconds], dtype=torch.float64))
    later = torch.arange(-50, 50, dtype=torch.float64)[:, None] * 2**-22
    assert torch.equal(normalizer.normalize(seconds + later), (later * scale).float())


def test_only_what_needs_it_is_in_double_precision():
    assert Normalizer.fit(torch.tensor([[0.0, 7.0], [512.0, 7.0]])).raw_dtype == torch.float32
    assert Normalizer.fit(torch.tensor([[1e6], [1e6 + 512.0]])).raw_dtype == torch.float64


NAN, ONES = math.nan, torch.ones(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalizer(ONES, torch.zeros(1)), r"scale \(2,\), offset \(1,\)"),
        (lambda: Normalizer(ONES, torch.zeros(3)), r"offset \(3,\)"),
        (lambda: Normalizer(ONES, ONES, torch.ones(3)), r"reach \(3,\)"),
        (lambda: Normalizer(torch.ones(2, 2), torch.ones(2, 2)), "as many numbers each"),
        (lambda: Normalizer([1.0], [0.0]), "scale must be a tensor, not list"),
        (lambda: Normalizer(torch.tensor([1.0, 0.0]), ONES), "dimension 1 .* scale is 0"),
        (lambda: Normalizer(ONES, torch.tensor([NAN, 0.0])), "dimension 0"),
        (lambda: Normalizer(ONES, ONES, -ONES), "dimension 0"),
        (lambda: Normalizer.fit(torch.tensor([[0.0, 1.0], [1.0, NAN]])), "dimension 1"),
        (lambda: Normalizer.fit(torch.tensor([[0.0], [math.inf]])), "dimension 0"),
        (lambda: Normalizer.fit(torch.tensor([[-1e308], [1e308]]).double() * 1.5), "dimension 0"),
        (lambda: Normalizer.fit(torch.zeros(0, 2)), r"\(0, 2\) have no values"),
        (lambda: Normalizer.fit(torch.ones(3, 2) * 1j), "real numbers"),
    ],
)
def test_what_cant_normalize_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
