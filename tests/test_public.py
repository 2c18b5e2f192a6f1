"""What a newcomer meets first: ``import paradiffpolicy as pdp``, a policy that is ready to use, a session."""

from __future__ import annotations

import doctest
import functools
import importlib
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import paradiffpolicy as pdp
from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.environment import make_env
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.observation import InvalidObservationError
from paradiffpolicy.task import Contract, ObservationField, contract_size
from paradiffpolicy.training.settings import TrainSettings

from .conftest import ROOT, tiny_checkpoint

FAST = {"capture": "eager", "warm_up": False}


@pytest.fixture(scope="module")
def policy():
    return pdp.load_policy(**FAST)


@pytest.mark.parametrize("name", pdp.PUBLIC)
def test_every_public_name_is_there_with_a_docstring(name):
    assert getattr(pdp, name).__doc__
    assert name in dir(pdp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        _ = pdp.load_polcy


def test_importing_loads_nothing_heavy():
    code = "import sys, paradiffpolicy; print(sorted({'torch', 'numpy', 'gymnasium'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["loading", "presets", "sampling.sample", "session"])
def test_examples_in_docstrings_run(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(importlib.import_module(f"paradiffpolicy.{module}"))
    assert results.attempted and not results.failed


def test_a_loaded_policy_plans_as_typed_first(policy):
    vector = np.linspace(100.0, 300.0, 20)
    window = np.stack((vector, vector))
    fields = {"keypoint": vector[:18].reshape(9, 2), "state": np.array([*vector[18:], 7.0, 8.0, 9.0])}
    plans = [policy.plan(given).actions for given in (vector, vector.tolist(), window, fields)]
    for actions in plans[1:]:
        assert torch.equal(actions, plans[0])
    assert plans[0].shape == (1, 16, 2)


def test_a_plan_without_a_generator_is_the_same_every_time(policy):
    assert torch.equal(policy.plan([200.0] * 20).actions, policy.plan([200.0] * 20, generator=0).actions)
    assert not torch.equal(policy.plan([200.0] * 20).actions, policy.plan([200.0] * 20, generator=1).actions)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([1.0] * 19, r"\(19,\), expected \(20,\)|19"),
        ({"keypoint": np.zeros((9, 2))}, "no 'state'; it has 'keypoint'"),
        ({"keypoint": np.zeros((8, 2)), "state": np.zeros(5)}, "'keypoint' gives 16 numbers, expected 18"),
        ([float("nan")] * 20, "NaN or infinity"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(policy, observation, message):
    with pytest.raises(pdp.InputError, match=message):
        policy.plan(observation)


def test_settings_of_a_loaded_policy(policy):
    other = pdp.load_policy(sampler="ddim", n_action_steps=4, **FAST)
    assert other.plan([200.0] * 20).executed_actions.shape == (1, 4, 2)
    assert other.plan([200.0] * 20).solution.iterations.item() == 15
    for settings, message in (
        ({"sampler": "rt"}, "unknown sampler 'rt'; did you mean 'rti'"),
        ({"n_action_steps": 16}, "n_action_steps=16"),
        ({"folder": "nowhere"}, "no checkpoint at nowhere"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"device": None}, "device=None must be auto"),
        ({"warm_up": 2}, "warm_up=2 must be true or false"),
        ({"precision": "f61"}, "unknown precision 'f61'"),
    ):
        with pytest.raises(pdp.InputError, match=message):
            pdp.load_policy(**{**FAST, **settings})


def observations(count, seed=0):
    draw = np.random.default_rng(seed)
    return draw.uniform(100, 400, (count, 20))


def test_a_session_plans_what_the_policy_plans_with_its_history(policy):
    rows = observations(9)
    session = policy.session(seed=3)
    generator = torch.Generator().manual_seed(3)
    first = policy.plan(np.stack((rows[0], rows[0])), generator=generator)
    np.testing.assert_array_equal(session.plan(rows[0]), first.executed_actions[0])
    second = policy.plan(rows[7:9], first, generator=generator, executed_steps=8)
    np.testing.assert_array_equal(session.plan(rows[1:9]), second.executed_actions[0])
    third = policy.plan(rows[2:4], second, generator=generator, executed_steps=3)
    np.testing.assert_array_equal(session.plan(rows[1:4]), third.executed_actions[0])


def test_one_observation_alone_stands_for_those_not_given(policy):
    rows = observations(2)
    session = policy.session()
    session.plan(rows[0])
    first = session.last_plan
    actions = session.plan(rows[1])
    generator = torch.Generator().manual_seed(0)
    policy.plan(np.stack((rows[0], rows[0])), generator=generator)
    wanted = policy.plan(np.stack((rows[1], rows[1])), first, generator=generator, executed_steps=8)
    np.testing.assert_array_equal(actions, wanted.executed_actions[0])


def test_a_session_starts_again(policy):
    session = policy.session(seed=1)
    actions = [session.plan(rows) for rows in (observations(1), observations(4, seed=1))]
    session.reset(seed=1)
    again = [session.plan(rows) for rows in (observations(1), observations(4, seed=1))]
    np.testing.assert_array_equal(actions, again)


def test_a_session_refuses_what_is_not_a_count_or_a_seed(policy):
    session = policy.session()
    session.plan(observations(1))
    for executed in (-1, 2.5, True):
        with pytest.raises(pdp.InputError, match="executed="):
            session.plan(observations(1)[0], executed=executed)
    with pytest.raises(pdp.InputError, match="seed='a'"):
        policy.session(seed="a")
    with pytest.raises(InvalidObservationError):
        session.plan(np.zeros((3, 19)))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 2.5, True])
def test_seeds_that_a_simulator_or_training_doesnt_take_are_refused(policy, seed):
    env = functools.partial(gymnasium.make, "paradiffpolicy/PushT-v0", obs_type="keypoints")
    for use in (
        lambda: rollout(policy, env, [seed], max_steps=1),
        lambda: pdp.EnvRobot(env(), seed=seed, clock=VirtualClock()),
        lambda: TrainSettings(n_steps=1, seed=seed),
    ):
        with pytest.raises(pdp.InputError, match=f"seed={seed}"):
            use()


@pytest.mark.parametrize("seed", [2**64, 2**70 + 3])
def test_any_whole_number_seeds_noise(policy, seed):
    actions = [policy.session(seed=each).plan(observations(1)) for each in (seed, seed % 2**64)]
    np.testing.assert_array_equal(*actions)
    pdp.Controller(policy, 10, generator=seed)


class Parts(gymnasium.Env):
    """Observes a dict, as many environments do."""

    observation_space = spaces.Dict({"arm": spaces.Box(-1, 1, (3,)), "cube": spaces.Box(-1, 1, (17,))})
    action_space = spaces.Box(0, 512, (2,))


def test_dicts_as_observations_are_refused_with_their_names(policy, tmp_path, capsys):
    said = "Parts has dicts of arm, cube as observations: wrap it"
    with pytest.raises(pdp.InputError, match=said):
        rollout(policy, Parts, seeds=[0], max_steps=8)
    with pytest.raises(pdp.InputError, match=said):
        pdp.EnvRobot(Parts(), seed=0, clock=VirtualClock(), control_hz=10)
    gymnasium.register("Parts-v0", Parts)
    (tmp_path / "pusht.yaml").write_text("env: {id: Parts-v0}\ncontrol_hz: 10\nname: pusht\n")
    words = [f"task={tmp_path}/pusht.yaml", "checkpoint=checkpoints/pusht_keypoints", "capture=eager"]
    for command in (["run", "planner=inline"], ["evaluate", "samplers=[rti]", "reference=rti"], ["collect"]):
        assert main([*command, *words, f"out={tmp_path}/out.zarr"]) == 2
        assert said in capsys.readouterr().err


def test_whatever_an_environment_raises_when_it_is_made_is_one_line():
    gymnasium.register("Broken-v0", lambda sizes: sizes["arm"])
    with pytest.raises(pdp.InputError, match="Broken-v0 can't be made: KeyError: 'arm'"):
        make_env("Broken-v0", sizes={})


def test_a_contract_survives_its_file(tmp_path):
    fields = (ObservationField("keypoint", shape=(9, 2), unit="px"), ObservationField("state", 0, 2, (5,)))
    contract = Contract(fields, "position", ("x", "y"), "px")
    assert Contract.from_dict(contract.to_dict()) == contract
    assert contract_size(fields) == 20
    checkpoint = tiny_checkpoint()
    saved = checkpoint.with_spec(contract=contract)
    saved.save(tmp_path)
    assert pdp.Checkpoint.load(tmp_path).spec.contract == contract


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action_kind": "positon"}, "did you mean 'position'"),
        ({"observation": [{"ky": "a"}]}, "malformed"),
        ({"observation": 3}, "malformed"),
    ],
)
def test_a_malformed_contract_is_named(values, message):
    with pytest.raises(pdp.InputError, match=message):
        Contract.from_dict(values)
