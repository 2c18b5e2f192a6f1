"""Validation: whole episodes are held out, their errors are comparable, and training stays as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.data.dataset import WindowDataset, window_steps
from paradiffpolicy.data.splitting import held_out_episodes, split
from paradiffpolicy.errors import InputError
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.training.validation import Validation

from .conftest import UNMEASURED, make_toy_store, tiny_checkpoint
from .test_training import SETTINGS, SMALL, assert_same_run, toy_data

SHORT = replace(SETTINGS, validate_every=4)


def numbered(lengths: list[int], horizon: int = 16) -> WindowDataset:
    """Steps whose observation is their episode, and whose action is their number in all."""
    ends = np.cumsum(lengths)
    return WindowDataset(
        torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[:, None].astype(float)),
        torch.arange(float(ends[-1]))[:, None],
        torch.from_numpy(window_steps(ends, horizon, 1, 7)),
        2,
        torch.from_numpy(ends),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(9, 40), min_size=2, max_size=8), st.sampled_from([1, 2]), st.data())
def test_every_window_is_in_one_part_and_reads_what_it_read(lengths, twins, draw):
    data = numbered(sorted(lengths * twins))
    chosen = draw.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1, max_size=len(lengths) - 1))
    parts = split(data, sorted(chosen), twins)
    before = [tuple(row) for row in data.batch(torch.arange(len(data)))[1][..., 0].tolist()]
    after = []
    for part, held_out in zip(parts, (False, True), strict=True):
        observations, actions = part.batch(torch.arange(len(part)))
        after += [tuple(row) for row in actions[..., 0].tolist()]
        episodes = set((observations[..., 0].long() // twins).unique().tolist())
        assert all((episode in chosen) == held_out for episode in episodes)
        assert len(part.observations) == len(part.actions) == int(part.episode_ends[-1])
        assert part.steps.max() < len(part.actions)
    assert sorted(after) == sorted(before)


@given(st.integers(2, 500), st.floats(0.001, 0.5), st.integers(0, 2**32 - 1))
def test_a_share_of_the_episodes_is_drawn_by_the_seed(n, share, seed):
    chosen = held_out_episodes(n, share, seed)
    assert chosen == held_out_episodes(n, share, seed) == sorted(set(chosen))
    assert len(chosen) == max(1, round(share * n)) < n
    assert set(chosen) <= set(range(n)) and held_out_episodes(n, 0, seed) == []


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(InputError, match=r"validation=0\.5 of 1 episodes leaves none to train on"):
        held_out_episodes(1, 0.5, 0)
    with pytest.raises(InputError, match="no windows are left to validate with"):
        split(numbered([20, 5, 20]), [1])
    with pytest.raises(InputError, match="ends of their episodes"):
        split(replace(numbered([20, 20]), episode_ends=None), [1])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    store = make_toy_store(tmp_path_factory.mktemp("validation") / "toy.zarr")
    return split(toy_data(store), [1])


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """The folder of a run that validated, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(parts, folder).run(progress=False)
    return folder


def trainer(parts, folder: Path, **changes) -> Trainer:
    return Trainer(parts[0], SMALL, SHORT, folder, **{"validate": Validation(parts[1]), **changes})


def validations(folder: Path):
    return Checkpoint.load(folder / "checkpoint").info["training"]["validations"]


def test_errors_are_in_the_checkpoint_and_the_scalars(whole):
    found = validations(whole)
    assert [each["step"] for each in found] == [4, 8, 12]
    assert all(0 < each[name] < 10 for each in found for name in ("loss", "action_error"))
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    for name in ("loss", "action_error"):
        scalars = events.Scalars(f"validation/{name}")
        np.testing.assert_allclose([s.value for s in scalars], [each[name] for each in found], rtol=1e-6)


@pytest.mark.parametrize("stops", [[1], [4], [3, 5, 8]])
def test_resumed_is_uninterrupted(parts, whole, tmp_path, stops):
    for stop in [*stops, 12]:
        trainer(parts, tmp_path).run(until=stop, progress=False)
    assert_same_run(whole, tmp_path)
    assert validations(tmp_path) == validations(whole)


def test_a_run_that_was_cut_off_in_a_validation_validates_again(parts, whole, tmp_path):
    def cut_off(checkpoint):
        raise KeyboardInterrupt

    trainer(parts, tmp_path).run(until=7, progress=False)
    with pytest.raises(KeyboardInterrupt):
        trainer(parts, tmp_path, validate=cut_off).run(progress=False)
    trainer(parts, tmp_path).run(progress=False)
    assert_same_run(whole, tmp_path)
    assert validations(tmp_path) == validations(whole)


def test_validating_changes_no_weight(parts, whole, tmp_path):
    trainer(parts, tmp_path, validate=None).run(progress=False)
    assert_same_run(whole, tmp_path)
    assert "validations" not in Checkpoint.load(tmp_path / "checkpoint").info["training"]


def test_it_is_the_averaged_weights_that_are_validated(parts, whole):
    checkpoint = Checkpoint.load(whole / "checkpoint")
    again = Validation(parts[1])(checkpoint)
    for name, value in again.items():  # stored in half precision
        assert value == pytest.approx(validations(whole)[-1][name], rel=1e-2)


class Perfect(torch.nn.Module):
    """Predicts epsilon of actions that are all the same."""

    def __init__(self, schedule, action: float) -> None:
        super().__init__()
        self.schedule, self.action = schedule, action

    def forward(self, x, t, condition):
        alpha, sigma = (
            f(t.double()).float()[:, None, None] for f in (self.schedule.alpha, self.schedule.sigma)
        )
        return (x - alpha * self.action) / sigma


def test_a_perfect_network_has_no_error(parts, monkeypatch):
    """And one that is off by a tenth has its square."""
    data = replace(parts[1], actions=torch.full_like(parts[1].actions, 256.0))  # 0, normalised
    from paradiffpolicy.policy import Policy

    real = Policy.from_checkpoint
    for action, error in ((0.0, 0.0), (0.1, 0.01)):

        def perfect(checkpoint, sampler, device, action=action):
            policy = real(checkpoint, sampler, device)
            return policy.with_network(Perfect(policy.schedule, action))

        monkeypatch.setattr(Policy, "from_checkpoint", perfect)
        found = Validation(data)(tiny_checkpoint(SMALL))
        assert found["action_error"] == pytest.approx(error, abs=1e-6)
        assert (found["loss"] < 1e-9) == (action == 0.0)


def test_many_windows_are_thinned(parts):
    steps = parts[1].steps
    data = replace(parts[1], steps=steps.repeat(20, 1))
    found = Validation(data)(tiny_checkpoint(SMALL))
    assert all(math.isfinite(value) for value in found.values())


def test_train_holds_episodes_out(capsys, toy_store, tmp_path):
    small = [
        "policy.down_dims=[16]",
        "policy.diffusion_step_embed_dim=16",
        "training.batch_size=8",
        *UNMEASURED,
    ]
    run = [
        *("train", f"dataset={toy_store}", f"run={tmp_path / 'run'}", *small, "training.n_steps=2"),
        *("evaluation.seeds=0", "task.control_hz=10"),
    ]
    assert main([*run, "validation=0.3"]) == 0
    assert "held-out episodes at step 2: loss" in capsys.readouterr().out
    info = Checkpoint.load(tmp_path / "run" / "checkpoint").info
    assert info["dataset"]["held_out"] == held_out_episodes(3, 0.3, 0)
    assert [each["step"] for each in info["training"]["validations"]] == [2]
    for other in (["validation=0"], ["validation=0.5"]):
        assert main([*run, *other]) == 2
        assert "holds a run with another dataset (held_out=" in capsys.readouterr().err
    assert main([*run, "validation=0.7"]) == 2


def test_without_validation_a_run_of_before_goes_on(parts, tmp_path):
    """It was saved before there were validations."""
    run = trainer(parts, tmp_path, validate=None)
    run.run(until=3, progress=False)
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    del saved["validations"]
    torch.save(saved, tmp_path / "resume.pt")
    assert trainer(parts, tmp_path, validate=None).step == 3
