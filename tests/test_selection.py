"""Demonstrations that are weighted or cut: which windows are drawn, how often, and what is refused."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.train import training_data
from paradiffpolicy.data.dataset import batch_windows
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.data.selection import episode_weights, trimmed
from paradiffpolicy.data.splitting import split
from paradiffpolicy.envs.pusht import GOAL_POSE, PushTEnv
from paradiffpolicy.envs.pusht_episodes import coverages, final_coverage, until_best_coverage
from paradiffpolicy.errors import InputError
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer

from .conftest import toy_episode


def epoch(n_windows: int, seed: int, weights: torch.Tensor | None, index: int = 0) -> torch.Tensor:
    return batch_windows(n_windows, n_windows, index, seed, weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 3.0, 1e9]), min_size=1, max_size=40), st.data())
def test_an_epoch_has_windows_as_often_as_they_weigh(values, data):
    if not any(values):
        values[data.draw(st.integers(0, len(values) - 1))] = 1.0
    weights, seed = torch.tensor(values, dtype=torch.float64), data.draw(st.integers(0, 99))
    drawn = epoch(len(values), seed, weights)
    counts = torch.bincount(drawn, minlength=len(values)).double()
    wanted = len(values) * weights / weights.sum()
    assert ((counts - wanted).abs() < 1 + 1e-6).all() and not counts[weights == 0].any()
    assert torch.equal(drawn, epoch(len(values), seed, weights.clone()))


def test_windows_that_weigh_alike_are_drawn_as_without_weights():
    alike = torch.full((37,), 2.0, dtype=torch.float64)
    for index in range(3):
        assert torch.equal(epoch(37, 5, alike, index), epoch(37, 5, None, index))
    assert not torch.equal(epoch(37, 5, alike, 0), epoch(37, 5, alike, 1))


def configured(store: Path, *words: str):
    small = ["policy.down_dims=[16]", "policy.diffusion_step_embed_dim=16", "evaluation.seeds=0"]
    return training_data(compose("train", [f"dataset={store}", *small, *words]))


@pytest.fixture
def pusht_store(tmp_path) -> Path:
    """Three episodes; the block of the second is at the target in its 16th step, of the third at its end."""
    with ReplayBuffer.create(tmp_path / "pusht.zarr") as buffer:
        for seed, length in enumerate((30, 25, 41)):
            episode = toy_episode(length, seed)
            episode["state"][:, 2:] = (100, 100, 1)
            if seed:
                episode["state"][15 if seed == 1 else -1, 2:] = GOAL_POSE
            buffer.append(episode)
    return tmp_path / "pusht.zarr"


def test_a_tasks_weights_leave_episodes_out_with_their_twins(pusht_store):
    weighted = ["weights=pusht_final_coverage", "weights_options={threshold: 0.9}"]
    plain, about, _ = configured(pusht_store)
    assert plain.weights is None and not {"weights", "trim"} & set(about)
    data, about, _ = configured(pusht_store, *weighted)
    assert about["weights"] == "pusht_final_coverage" and about["weights_options"] == {"threshold": 0.9}
    assert torch.equal(data.steps, plain.steps)
    ends = data.episode_ends.tolist()
    drawn = data.steps[data.drawn(len(data), 0, 0), 0]
    assert set(torch.searchsorted(data.episode_ends, drawn, right=True).tolist()) == {4, 5} and len(ends) == 6
    kept, held_out = split(data, [2], twins=2)
    assert not kept.weights.any() and held_out.weights.all() and len(held_out.weights) == len(held_out)
    halves, *_ = configured(pusht_store, weighted[0], "weights_options={below: 0.5}", "augmentation=null")
    assert set(halves.weights.tolist()) == {0.5, 1.0}


def test_a_trimmed_episode_ends_with_its_best_step(pusht_store):
    data, about, _ = configured(pusht_store, "trim=pusht_best_coverage")
    assert np.diff(data.episode_ends, prepend=0).tolist() == [1, 1, 16, 16, 41, 41] and about["trim"]
    # What is weighed is what is trained on.
    both = ["trim=pusht_best_coverage", "weights=pusht_final_coverage", "augmentation=null"]
    assert configured(pusht_store, *both)[0].weights.unique().tolist() == [1.0]


def test_coverage_of_recorded_states_is_the_environments():
    env = PushTEnv()
    states = []
    for seed in range(4):
        env.reset(seed=seed)
        states.append((env.state, env.coverage()))
    at_goal = np.array([0, 0, *GOAL_POSE])
    found = coverages(np.array([state for state, _ in states] + [at_goal]))
    np.testing.assert_allclose(found, [covered for _, covered in states] + [1], atol=1e-12)
    away = np.array([0, 0, 100, 100, 0])
    assert until_best_coverage({"state": np.array([away, at_goal, at_goal, away])}) == 2
    assert final_coverage({"state": np.array([at_goal, away])}, below=0.25) == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights_options={treshold: 1}"], "unexpected keyword argument 'treshold'"),
        (["weights_options={threshold: high}"], "episode 0 can't be weighed (TypeError"),
        (["weights_options={threshold: 1.5}"], "all 3 episodes have weight 0"),
        (["weights_options={below: -1}"], "the weight of episode 0 is -1.0: it must be 0 or more"),
    ],
)
def test_weights_that_cant_be_are_refused(pusht_store, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        configured(pusht_store, "weights=pusht_final_coverage", *words)


def test_steps_that_cant_be_kept_are_refused(toy_store):
    with ReplayBuffer.open(toy_store) as buffer:
        for kept in (0, 31, None):
            with pytest.raises(InputError, match=f"{kept} steps of episode 0 can't be kept, of 30 it has"):
                trimmed(buffer, lambda episode, kept=kept: kept, ["action"])
        with pytest.raises(InputError, match=r"episode 0 can't be weighed \(KeyError"):
            episode_weights(buffer, lambda episode: episode["nothing"])


def test_a_resumed_weighted_run_is_the_uninterrupted_one(pusht_store, tmp_path):
    data, about, spec = configured(pusht_store, "weights=pusht_final_coverage", "augmentation=null")
    chosen = TrainSettings(2, batch_size=8, precision="float32")
    make = partial(Trainer, spec=spec, settings=chosen, info={"dataset": about})
    whole = make(data, folder=tmp_path / "whole").run(progress=False)
    make(data, folder=tmp_path / "cut").run(until=1, progress=False)
    resumed = make(
        configured(pusht_store, "weights=pusht_final_coverage", "augmentation=null")[0],
        folder=tmp_path / "cut",
    )
    assert resumed.step == 1
    weights = resumed.run(progress=False).weights
    assert all(torch.equal(weights[name], whole.weights[name]) for name in weights)
    with pytest.raises(InputError, match="holds a run with another dataset"):
        make(data, folder=tmp_path / "cut", info={"dataset": {**about, "weights": None}})
