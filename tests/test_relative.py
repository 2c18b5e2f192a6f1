"""Relative actions: the network knows differences to what was observed, everything else absolute actions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.train import training_data
from paradiffpolicy.data import dataset
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.data.splitting import split
from paradiffpolicy.errors import InputError
from paradiffpolicy.export.plan import plan_program
from paradiffpolicy.planning import interpolation
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.sampling.warm_start import STARTS, moved_along
from paradiffpolicy.serving.remote import RemotePolicy
from paradiffpolicy.task import ROTATION_WORDS, Contract, ObservationField
from paradiffpolicy.training.distillation import Distillation, student_spec, teacher_sampler
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.training.validation import Validation
from paradiffpolicy.types import Committed, Plan, PolicySpec

from .conftest import TINY, assert_close, tiny_checkpoint
from .test_serving import running
from .test_training import SETTINGS, assert_same_run, toy_data

RELATIVE = replace(TINY, down_dims=(16,), relative=((0, 18), (1, 19)))
ONE = replace(RELATIVE, relative=((0, 18),))
"""Only x is relative."""

EXACT = 2.0**22
"""An offset that float32 would round actions at, and that is exact in float64."""


class Blind(nn.Module):
    """A network that doesn't see."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.3 * x.cumsum(dim=1)) + 0 * condition[:, :1, None]


def policy_of(spec: PolicySpec = RELATIVE, **sampler) -> Policy:
    sampler = sampler or {"solver": "ddim", "n_steps": 4}
    checkpoint = tiny_checkpoint(spec)
    near = Normalizer.fit(torch.tensor([[-100.0], [60.0]]).expand(2, 2))
    return Policy.from_checkpoint(replace(checkpoint, action_normalizer=near), spec_sampler(spec, **sampler))


def blind(spec: PolicySpec = RELATIVE, **sampler) -> Policy:
    policy = policy_of(spec, **sampler)
    normalizers = policy.observation_normalizer, policy.action_normalizer
    return Policy.from_network(replace(spec, prediction="sample"), Blind(), *normalizers, **sampler)


def windows(batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (batch, 2, 20), generator=generator).double()


# ------------------------------------------------------------------------------------------------ windows


def looped(data: WindowDataset, relative) -> torch.Tensor:
    """Actions of all windows, one at a time."""
    rows = []
    for steps in data.steps.tolist():
        actions = data.actions[steps].clone()
        for dimension, column in relative:
            for k in range(len(steps)):
                actions[k, dimension] -= data.observations[steps[data.n_obs_steps - 1], column]
        rows.append(actions)
    return torch.stack(rows)


@pytest.mark.parametrize("spec", [RELATIVE, ONE], ids=["both", "one"])
def test_windows_are_relative_to_their_newest_observation(toy_store, spec, monkeypatch):
    data = toy_data(toy_store)
    expected, moved = looped(data, spec.relative), data.relative_to(spec.relative)
    assert torch.equal(moved.batch(torch.arange(len(data)))[1], expected)
    for at_once in (1, 100, 2**20):
        monkeypatch.setattr(dataset, "RANGE_AT_ONCE", at_once)
        low, high = moved.action_range()
        assert torch.equal(low, expected.flatten(0, 1).amin(0))
        assert torch.equal(high, expected.flatten(0, 1).amax(0))
    assert moved.action_normalizer() == Normalizer.fit(expected)
    assert data.relative_to(()) is data and data.action_normalizer() == Normalizer.fit(data.actions)
    held_out, where = split(moved, [1])[1], torch.arange(5)
    assert torch.equal(
        held_out.batch(where)[1], split(data, [1])[1].relative_to(spec.relative).batch(where)[1]
    )


def test_normalised_windows_are_relative_also_far_from_zero(toy_store):
    near = toy_data(toy_store)
    near = replace(near, observations=near.observations / 2**20, actions=near.actions / 2**20)
    every, batches = torch.arange(len(near)), []
    for offset in (0.0, EXACT):
        data = replace(near, observations=near.observations + offset, actions=near.actions + offset)
        data = data.relative_to(ONE.relative)
        normalizer = data.action_normalizer()
        normal = data.normalized(Normalizer.fit(data.observations), normalizer)
        batches.append(normal.batch(every)[1])
        assert batches[-1].dtype == torch.float32
        assert_close(batches[-1], normalizer.normalize(data.batch(every)[1]), atol=1e-6)
        assert torch.equal(batches[-1][..., 1], normalizer.normalize(data.actions)[data.steps][..., 1])
    assert_close(*batches, atol=1e-6)
    assert batches[0].abs().max() <= 1


def test_a_run_is_resumed_exactly_and_its_checkpoint_says_what_is_relative(toy_store, tmp_path):
    def run(folder: str, until: int | None = None, spec: PolicySpec = ONE) -> Checkpoint:
        data = toy_data(toy_store)
        validate = Validation(replace(data, steps=data.steps[:8]))
        settings = replace(SETTINGS, n_steps=4, save_every=2)
        trainer = Trainer(data, spec, settings, tmp_path / folder, validate=validate)
        return trainer.run(until=until, progress=False)

    trained = run("whole")
    run("parts", until=2)
    run("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    saved = Checkpoint.load(tmp_path / "whole/checkpoint")
    assert saved.spec == trained.spec == ONE
    assert saved.action_normalizer == toy_data(toy_store).relative_to(ONE.relative).action_normalizer()
    assert PolicySpec.from_dict(json.loads(json.dumps(asdict(ONE)))) == ONE
    (errors,) = trained.info["training"]["validations"]
    assert 0 < errors["loss"] < 10 and 0 < errors["action_error"] < 10
    with pytest.raises(InputError, match="another spec"):
        run("parts", spec=replace(ONE, relative=()))


class Knowing(nn.Module):
    """Predicts one sequence."""

    def __init__(self, sample: torch.Tensor) -> None:
        super().__init__()
        self.sample = sample

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.sample.expand_as(x) + 0 * condition[:, :1, None]


def test_validation_compares_relative_with_relative(toy_store):
    """A policy that knows a window's relative actions has no error on it, wherever the window is."""
    data = toy_data(toy_store)
    one = replace(data, steps=data.steps[20:21])
    spec = replace(ONE, prediction="sample")
    normalizer = data.relative_to(ONE.relative).action_normalizer()
    sample = normalizer.normalize(looped(one, ONE.relative))
    policy = Policy.from_network(
        spec, Knowing(sample), Normalizer.fit(data.observations), normalizer, solver="ddim", n_steps=2
    )
    loss, error = Validation(one)._errors(policy, torch.tensor([0]), 0)
    assert loss < 1e-12 and error < 1e-12


# -------------------------------------------------------------------------------------------------- plans


def test_a_plan_moves_with_what_it_is_relative_to():
    policy, seen = blind(ONE), windows()
    here = policy.plan(seen, generator=0)
    assert here.actions.dtype == torch.float64
    for moved in (EXACT, -17.0):
        there = policy.plan(seen + moved * torch.eye(20)[18], generator=0)
        assert torch.equal(there.solution.sample, here.solution.sample)
        assert torch.equal(there.actions[..., 0], here.actions[..., 0] + moved)
        assert torch.equal(there.actions[..., 1], here.actions[..., 1])
    older = seen.clone()
    older[:, 0, 18] += 5  # the newest observation alone counts
    assert torch.equal(policy.plan(older, generator=0).actions, here.actions)
    absolute = policy.action_normalizer.unnormalize(here.solution.sample).double()
    absolute[..., 0] += seen[:, 1, None, 18]
    assert torch.equal(here.actions, absolute)


def test_plans_without_anything_relative_are_as_before():
    plan = policy_of(replace(RELATIVE, relative=())).plan(windows(), generator=0)
    assert plan.reference is None and plan.actions.dtype == torch.float32


def expressed(plan: Plan, reference: torch.Tensor, normalizer: Normalizer) -> Plan:
    """A plan with the same absolute actions, of another reference, number by number."""

    def changed(values: torch.Tensor) -> torch.Tensor:
        absolute = values.double() / normalizer.scale + normalizer.middle + plan.reference[:, None]
        return ((absolute - reference[:, None] - normalizer.middle) * normalizer.scale).float()

    solution = plan.solution
    solution = replace(solution, sample=changed(solution.sample), x0_hats=changed(solution.x0_hats))
    return replace(plan, solution=solution, reference=None)


@pytest.mark.parametrize("start", ["warm", "warm_same_noise", "renoised"])
def test_a_warm_start_goes_on_with_the_same_absolute_actions(start):
    """As an absolute policy does whose actions are counted from where the robot is now."""
    settings = {"solver": "dpm_solver_pp_2m", "n_steps": 5, "driver": "rti", "iterations": 1, "start": start}
    policy, before, now = blind(**settings), windows(), windows(seed=1) / 64
    last = policy.plan(before, generator=0)
    guesses = []

    def spy(*arguments):
        noise, guess = STARTS[start](*arguments)
        guesses.append(guess)
        return noise, guess

    spied = policy.with_sampler(replace(policy.sampler, start=spy))
    plan = spied.plan(now, last, generator=1, executed_steps=3)
    assert torch.equal(plan.reference, now[:, 1, 18:])
    frame = policy.action_frame(policy.checked(now))
    if start == "renoised":  # every guess is the last plan itself
        kept = frame.unnormalize(guesses[0][2])
        assert_close(kept, moved_along(last.actions, 3), atol=1e-3, rtol=0)
    normalizer = policy.action_normalizer
    absolute = Policy.from_network(
        replace(policy.spec, relative=()), Blind(), policy.observation_normalizer, normalizer, **settings
    )
    expected = absolute.plan(now, expressed(last, plan.reference, normalizer), generator=1, executed_steps=3)
    assert_close(plan.solution.sample, expected.solution.sample, atol=1e-5)
    assert_close(plan.actions, expected.actions.double() + plan.reference[:, None], atol=1e-3, rtol=0)
    unmoved = policy.plan(now, replace(last, reference=plan.reference), generator=1, executed_steps=3)
    assert (unmoved.actions - plan.actions).abs().max() > 1  # the change of reference matters


def test_a_warm_start_in_an_unchanged_world_is_the_plan_again():
    settings = {"solver": "ddim", "n_steps": 6, "driver": "picard", "window": 6, "tolerance": 1e-4}
    policy, seen = policy_of(**settings, start="warm_same_noise"), windows()
    cold = policy.plan(seen, generator=0)
    warm = policy.plan(seen, cold, generator=1, executed_steps=0)
    assert_close(warm.actions, cold.actions, atol=1e-2, rtol=0)
    assert (warm.solution.iterations < cold.solution.iterations).all()


def test_committed_actions_are_absolute():
    spec, seen = ONE, windows()
    policy = policy_of(spec)
    free = policy.plan(seen, generator=0)
    inputs = policy._inputs(policy.checked(seen), Committed(free.actions, torch.ones(2, 16)))
    assert_close(inputs["committed"], free.solution.sample, atol=1e-6)
    wanted = policy.plan(seen, generator=1).actions
    weight = torch.zeros(2, 16)
    weight[:, :4] = 1
    kept = policy.plan(seen, generator=2, committed=Committed(wanted, weight))
    assert_close(kept.actions[:, :4], wanted[:, :4], atol=1e-3, rtol=0)
    policy.warm_up(2, committed=True)


def test_captured_plans_are_eager_ones():
    policy = policy_of(solver="ddim", n_steps=3, driver="rti", iterations=2)
    plans = []
    for each in (policy, policy.captured("emulated")):
        first = each.plan(windows(), generator=0)
        plans.append((first, each.plan(windows(seed=1), first, generator=1)))
    assert plans[0] == plans[1]


def test_a_remote_plan_is_the_local_one():
    policy = policy_of(solver="ddim", n_steps=3, driver="rti", iterations=1, start="warm")
    first = policy.plan(windows(), generator=0)
    with running(policy) as uri, RemotePolicy(uri) as remote:
        assert remote.plan(windows(), generator=0) == first
        there = remote.plan(windows(seed=1), first, generator=1)
    assert there == policy.plan(windows(seed=1), first, generator=1)


def test_a_students_teacher_goes_on_with_the_same_absolute_actions(toy_store):
    spec = replace(RELATIVE, down_dims=(16,))
    data = toy_data(toy_store).relative_to(spec.relative)
    observed, acted = Normalizer.fit(data.observations), data.action_normalizer()
    checkpoint = replace(tiny_checkpoint(spec), observation_normalizer=observed, action_normalizer=acted)
    plans = Policy.from_checkpoint(checkpoint, teacher_sampler(spec, 4))
    asked = []

    class Spy(Distillation):
        def _solved(self, windows, noise, guess):
            solved = super()._solved(windows, noise, guess)
            asked.append((windows, guess, solved))
            return solved

    settings = replace(SETTINGS, batch_size=32)
    normal = data.normalized(observed, acted)
    Spy(normal, student_spec(spec, 4), settings, teacher=plans).solved(0)
    (before, _, cold), (after, guess, _) = asked
    follows = before != after

    def absolute(sample: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return acted.unnormalize(sample).double() + data.reference(of)[:, None]

    assert 0 < int(follows.sum()) < len(follows)
    last = absolute(cold.plan, before)
    expected = torch.where(follows[:, None, None], moved_along(last, spec.n_action_steps), last)
    assert_close(absolute(guess[0], after), expected, atol=1e-3, rtol=0)


# ----------------------------------------------------------------------------------------------- refusals

POSE = Contract(
    (
        ObservationField("pos", shape=(3,)),
        ObservationField("quat", shape=(4,)),
        ObservationField("pos", 1, 2, (3,)),
    ),
    "pose",
    ("x", "y", "z", "r11_0", "r12_0", "gripper"),
)


def test_names_are_places():
    assert POSE.relative_pairs({"x": "pos.0", "z": "pos.2"}) == ((0, 0), (2, 2))
    assert replace(POSE, action_names=()).relative_pairs({"4": "quat.1"}) == ((4, 4),)
    for named, said in (
        ({"a": "pos.0"}, "no number of an action is 'a': they are x, y"),
        ({"x": "pos"}, "'pos' isn't observed: .* as pos.0"),
        ({"x": "pos.3"}, "'pos.3' isn't observed"),
        ({"x": "vel.0"}, "'vel.0' isn't observed"),
    ):
        with pytest.raises(InputError, match=said):
            POSE.relative_pairs(named)
    with pytest.raises(InputError, match="'x': the contract has no names"):
        replace(POSE, action_names=()).relative_pairs({"x": "pos.0"})


@pytest.mark.parametrize(
    ("relative", "contract", "said"),
    [
        ([[0, 1]], POSE, "pairs of whole numbers"),
        (((0, 1, 2),), POSE, "pairs of whole numbers"),
        (((0, True),), POSE, "pairs of whole numbers"),
        (((6, 0),), POSE, r"\(6, 0\) isn't a number of an action, below 6"),
        (((0, 8),), POSE, "column of the observation, below 8"),
        (((0, -1),), POSE, "column of the observation, below 8"),
        (((0, 0), (0, 1)), POSE, "twice"),
        (((0, 4),), POSE, "column 4 of the observation is a quaternion's"),
        (((3, 0),), POSE, "'r11_0' is a rotation's number"),
        (((0, 0),), replace(POSE, action_kind="delta"), "kind delta, which is relative already"),
    ],
)
def test_what_cant_be_relative_is_named(relative, contract, said):
    with pytest.raises(InputError, match=said):
        PolicySpec("arm", obs_dim=8, action_dim=6, contract=contract, relative=relative)


def test_every_word_of_a_rotation_is_known():
    assert {word for rotation in interpolation.ROTATIONS for word in rotation} == ROTATION_WORDS


def test_plans_of_other_policies_and_exports_are_refused():
    policy, seen = policy_of(start="warm"), windows()
    plan = policy.plan(seen)
    wide = torch.zeros(2, 3, dtype=torch.float64)
    for previous, said in (
        (replace(plan, reference=None), "is absolute, the policy relative: begin with previous=None"),
        (replace(plan, reference=wide), "aren't of as many finite numbers"),
        (replace(plan, reference=plan.reference * np.nan), "aren't of as many finite numbers"),
        (replace(plan, reference=[0, 0]), "previous.reference must be a tensor"),
        (replace(plan, solution=replace(plan.solution, sample=wide)), "aren't of as many finite numbers"),
    ):
        with pytest.raises(InputError, match=said):
            policy.plan(seen, previous)
    with pytest.raises(InputError, match="is relative, the policy absolute"):
        policy_of(replace(RELATIVE, relative=()), start="warm").plan(seen, plan)
    with pytest.raises(InputError, match="relative actions doesn't export"):
        plan_program(policy, warm=False)


def test_the_command_knows_relative_actions(toy_store, tmp_path, capsys):
    settings = [f"dataset={toy_store}", f"run={tmp_path}/run", "evaluation.seeds=0"]
    assert main(["train", *settings, "policy.relative={x: velocity.0}"]) == 2
    assert "relative: 'velocity.0' isn't observed" in capsys.readouterr().err
    config = compose("train", [*settings, "policy.relative={x: state.0, y: state.1}"])
    assert training_data(config)[2].relative == ((0, 18), (1, 19))
