"""The policy is a pure function; its parallel samplers plan what the sequential one plans."""

from __future__ import annotations

import functools
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.diffusion.schedule import SCHEDULES, NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.models.networks import NETWORKS, build_network, usable_device
from paradiffpolicy.observation import InvalidObservationError
from paradiffpolicy.policy import Policy
from paradiffpolicy.presets import preset
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_sampler, spec_schedule
from paradiffpolicy.task import Contract, ObservationField
from paradiffpolicy.types import Committed, Plan, PolicySpec

from .conftest import ROOT, TINY, assert_close, tiny_checkpoint


def policy_with(**sampler) -> Policy:
    return Policy.from_checkpoint(tiny_checkpoint(), make_sampler(spec_schedule(TINY), **sampler))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


WINDOWS = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0)) * 512


def test_a_plan_has_the_promised_shapes():
    policy = policy_with(n_steps=5)
    plan = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    assert plan.actions.shape == (3, 16, 2)
    assert plan.executed == slice(1, 9) and plan.executed_actions.shape == (3, 8, 2)
    assert torch.equal(plan.executed_actions, plan.actions[:, 1:9])
    assert plan.solution.iterations.tolist() == [5, 5, 5]
    # Clipped to the range of the data, in the environment's units.
    assert plan.actions.min() >= -1e-3 and plan.actions.max() <= 512.001


def test_planning_is_pure():
    policy = policy_with(n_steps=5)
    before = WINDOWS.clone()
    one = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    policy.plan(WINDOWS, one, generator=seeded(7, 8, 9))
    again = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    assert torch.equal(one.actions, again.actions) and torch.equal(WINDOWS, before)


@pytest.mark.parametrize("given", [np.asarray, torch.as_tensor, lambda values: {"place": values}])
def test_observations_far_from_zero_keep_their_differences(given):
    """Also by field name: nothing is rounded to float32 before its middle is taken off."""
    contract = Contract((ObservationField("place", shape=(20,)),))
    checkpoint = tiny_checkpoint(replace(TINY, contract=contract))
    far = Normalizer.fit(torch.tensor([[4e6], [4e6 + 0.01]], dtype=torch.float64).expand(2, 20))
    near = Normalizer.fit(torch.tensor([[0.0], [0.01]]).expand(2, 20))
    plans = []
    for normalizer, middle in ((far, 4e6), (near, 0.0)):
        policy = Policy.from_checkpoint(
            replace(checkpoint, observation_normalizer=normalizer),
            make_sampler(spec_schedule(TINY), solver="ddim", n_steps=3),
        )
        plans.append(policy.plan(given(np.linspace(middle, middle + 0.01, 20)), generator=0).actions)
    assert_close(*plans, atol=1e-3, rtol=0)


@pytest.mark.parametrize("offset", [1e6, -5.4e6])
def test_a_plan_far_from_zero_is_the_one_near_zero_moved(offset):
    """Observations and actions both, also where the plan keeps actions: what is in between is the same."""
    near = torch.linspace(0, 0.01, 64, dtype=torch.float64)[:, None].expand(64, 20)
    window, kept = near[:2], torch.linspace(0, 0.01, 16, dtype=torch.float64)[:, None].expand(16, 2)
    plans = []
    for moved in (0.0, offset):
        policy = Policy.from_checkpoint(
            replace(
                tiny_checkpoint(),
                observation_normalizer=Normalizer.fit(near + moved),
                action_normalizer=Normalizer.fit(near[:, :2] + moved),
            ),
            make_sampler(spec_schedule(TINY), solver="ddim", n_steps=3),
        )
        committed = Committed(kept[None] + moved, torch.full((1, 16), 0.5))
        plans.append(policy.plan(window + moved, generator=0, committed=committed))
    assert_close(plans[1].solution.sample, plans[0].solution.sample, atol=1e-6, rtol=0)
    assert plans[1].actions.dtype == torch.float64
    difference = (plans[1].actions - offset - plans[0].actions).abs().max()
    assert difference < 1e-6 * 0.01 + 4 * np.spacing(abs(offset))


def test_plans_are_equal_by_value():
    policy = policy_with(n_steps=2)
    plan, again, other = (policy.plan(WINDOWS[:2], generator=seed) for seed in (0, 0, 1))
    assert plan == again and plan != other and plan != plan.select([0]) and plan.solution == again.solution
    assert plan.to(policy.device) == plan == Plan.cat([plan.select([0]), plan.select([1])])
    assert policy.sampler == policy_with(n_steps=2).sampler != policy_with(n_steps=3).sampler
    assert tiny_checkpoint() == tiny_checkpoint() != tiny_checkpoint(seed=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_policies_of_every_schedule_go_through_pickle(schedule):
    policy = Policy.from_checkpoint(
        tiny_checkpoint(replace(TINY, schedule=schedule, prediction="velocity")),
        make_sampler(NoiseSchedule.named(schedule, 100), solver="ddim", n_steps=3),
    )
    policy.plan(WINDOWS, generator=0)
    again = pickle.loads(pickle.dumps(policy))
    assert again.plan(WINDOWS, generator=0) == policy.plan(WINDOWS, generator=0)
    assert pickle.loads(pickle.dumps(policy.schedule)) == policy.schedule


def test_numpy_and_single_windows_are_taken():
    policy = policy_with(n_steps=5)
    one = policy.plan(WINDOWS[0].numpy().astype(np.float64), generator=seeded(0)[0])
    batch = policy.plan(WINDOWS[:1], generator=seeded(0))
    assert_close(one.actions, batch.actions)


def test_an_element_does_not_depend_on_its_neighbours():
    policy = policy_with(n_steps=20, driver="picard", window=6)
    together = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    alone = policy.plan(WINDOWS[1:2], generator=seeded(1))
    assert_close(together.actions[1], alone.actions[0], atol=0.01, rtol=0)
    assert together.solution.iterations[1] == alone.solution.iterations[0]


@pytest.mark.parametrize("driver", ["picard", "picard_published"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm_solver_pp_2m"])
def test_parallel_plans_are_the_sequential_ones(driver, solver):
    sequential = policy_with(solver=solver, n_steps=25)
    parallel = policy_with(solver=solver, n_steps=25, driver=driver, window=8, tolerance=1e-9)
    expected = sequential.plan(WINDOWS, generator=seeded(0, 1, 2)).actions
    actual = parallel.plan(WINDOWS, generator=seeded(0, 1, 2)).actions
    assert_close(actual, expected, atol=0.02, rtol=0)


def test_rti_starts_from_the_last_plan():
    """From a solved plan whose problem hasn't changed, one iteration finds the same plan again."""
    policy = policy_with(solver="ddim", n_steps=10, driver="rti", iterations=1)
    first = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    second = policy.plan(WINDOWS, first, generator=seeded(3, 4, 5), executed_steps=0)
    assert first.solution.iterations.tolist() == [10] * 3 and second.solution.iterations.tolist() == [1] * 3
    assert_close(second.actions, first.actions, atol=0.02, rtol=0)


def test_with_sampler_shares_the_weights():
    policy = policy_with(n_steps=5)
    other = policy.with_sampler(make_sampler(policy.schedule, solver="ddim", n_steps=3))
    assert other.denoiser.network is policy.denoiser.network
    assert policy.plan(WINDOWS, generator=seeded(0, 1, 2)).solution.iterations[0] == 5
    assert other.plan(WINDOWS, generator=seeded(0, 1, 2)).solution.iterations[0] == 3


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (torch.zeros(1, 2, 19), r"\(1, 2, 19\) .* must be \[obs_dim=20\], \[n_obs_steps=2, obs_dim\] or"),
        (torch.zeros(1, 3, 20), "n_obs_steps=2"),
        (torch.zeros(19), r"\(19,\) .* must be \[obs_dim=20\]"),
        (torch.zeros(1, 2, 20).index_fill(2, torch.tensor([7]), float("nan")), "step 0, column 7"),
        (torch.zeros(1, 2, 20).index_fill(1, torch.tensor([1]), float("inf")), "step 1, column 0"),
        (torch.zeros(1, 2, 20).index_fill(2, torch.tensor([5]), 1e25), "too far .* step 0, column 5"),
        (torch.zeros(1, 2, 20, dtype=torch.complex64), "dense tensor of real numbers, not torch.complex64"),
        (torch.zeros(1, 2, 20).to_sparse(), "dense tensor"),
        (torch.zeros(1, 2, 20, device="meta"), "dense tensor"),
        (np.zeros((1, 2, 20), complex), "complex128 isn't a type of real numbers"),
        (np.zeros((1, 2, 20), "datetime64[s]"), "datetime64"),
        (np.zeros((1, 2, 20), [("a", float)]), "isn't a type of real numbers"),
        ([["1"] * 20] * 2, "isn't a type of real numbers"),
        ([[b"1", *[2**70] * 19]] * 2, "isn't a type of real numbers"),
        ([[10**400] * 20] * 2, "too large"),
    ],
)
def test_bad_observations_are_refused(window, message):
    with pytest.raises(InvalidObservationError, match=message):
        policy_with(n_steps=2).plan(window, generator=seeded(0))


def test_the_batch_must_agree():
    policy = policy_with(n_steps=2)
    with pytest.raises(InputError, match="3 observation windows need as many generators, got 2"):
        policy.plan(WINDOWS, generator=seeded(0, 1))
    with pytest.raises(InputError, match="3 previous plans"):
        policy.plan(WINDOWS[:1], policy.plan(WINDOWS, generator=seeded(0, 1, 2)), generator=seeded(0))


def warm_policy(start: str | None = None) -> Policy:
    return policy_with(solver="ddim", n_steps=6, driver="rti", start=start)


def with_solution(plan: Plan, **changes) -> Plan:
    return replace(plan, solution=replace(plan.solution, **changes))


LAST = warm_policy().plan(WINDOWS)
NOISE, X0 = LAST.solution.noise, LAST.solution.x0_hats


@pytest.mark.parametrize(
    ("previous", "message"),
    [
        (3, "previous must be a plan that a policy made, not int"),
        ([LAST] * 3, "not list"),
        (LAST.solution, "not Solution"),
        (replace(LAST, solution=None), "must be a plan"),
        (replace(LAST, actions=LAST.actions.numpy()), "previous.actions must be a tensor, not ndarray"),
        (policy_with(n_steps=5).plan(WINDOWS), r"x0_hats \(5, 3, 16, 2\) .* another sampler's or policy's"),
        (with_solution(LAST, x0_hats=X0[..., :-1, :]), r"not \(6, 3, 16, 2\) float32"),
        (with_solution(LAST, x0_hats=X0[:, :1]), r"not \(6, 3, 16, 2\) float32"),
        (with_solution(LAST, x0_hats=X0.double()), "float64, not"),
        (with_solution(LAST, x0_hats=X0.to("meta")), "x0_hats must be a dense tensor"),
        (with_solution(LAST, x0_hats=X0 / 0), "NaN or infinity in x0_hats"),
        (with_solution(LAST, noise=None), "has no noise"),
        (with_solution(LAST, noise=replace(NOISE, x_T=NOISE.x_T[:, :-1])), r"x_T \(3, 15, 2\)"),
        (with_solution(LAST, noise=replace(NOISE, z=NOISE.z / 0)), "NaN or infinity in z"),
    ],
)
@pytest.mark.parametrize("start", ["warm", "warm_same_noise"])
def test_what_is_no_plan_to_go_on_from_is_named(start, previous, message):
    with pytest.raises(InputError, match=message):
        warm_policy(start).plan(WINDOWS, previous)


@pytest.mark.parametrize(
    ("committed", "message"),
    [
        ((torch.zeros(3, 16, 2), torch.zeros(3, 16)), r"must be Committed\(actions, weight\), not tuple"),
        (Committed(np.zeros((3, 16, 2)), np.zeros((3, 16))), "committed.actions must be a tensor"),
        (Committed(torch.zeros(3, 16, 2) + 1j, torch.zeros(3, 16)), "real numbers, not torch.complex64"),
        (Committed(torch.zeros(3, 16, 2), torch.zeros(3, 16) * 1j), "committed.weight must be"),
        (Committed(torch.zeros(3, 16, 2).to("meta"), torch.zeros(3, 16)), "dense"),
        (Committed(torch.zeros(3, 16, 2).double() + 1e39, torch.zeros(3, 16)), "must be finite"),
        (Committed(torch.zeros(3, 16, 2), torch.full((3, 16), 1.5)), "from 0 to 1"),
        (Committed(torch.zeros(3, 15, 2), torch.zeros(3, 15)), r"= \(3, 16, 2\)"),
    ],
)
def test_what_cant_be_committed_is_named(committed, message):
    with pytest.raises(InputError, match=message):
        warm_policy().plan(WINDOWS, committed=committed)


def test_tensors_of_any_layout_and_type_of_real_numbers_are_taken():
    policy, actions, weight = warm_policy(), torch.full((3, 16, 2), 200), torch.ones(3, 16)
    expected = policy.plan(WINDOWS.double(), LAST, committed=Committed(actions, weight))
    turned = WINDOWS.double().mT.contiguous().mT.requires_grad_()
    kept = Committed(actions.double().mT.contiguous().mT.requires_grad_(), weight.bool())
    assert policy.plan(turned, LAST, committed=kept) == expected
    assert (expected.actions - 200).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda policy: policy.with_sampler(None), "sampler must be a Sampler"),
        (lambda policy: policy.with_network(None), "must be a torch.nn.Module, not NoneType"),
        (lambda policy: policy.with_network(lambda x, t, g: x), "must be a torch.nn.Module, not function"),
        (lambda policy: policy.warm_up(-1), "batch=-1"),
        (lambda policy: policy.warm_up("a"), "batch=a"),
        (lambda policy: policy.plan(WINDOWS, LAST, executed_steps=torch.tensor(True)), "executed_steps="),
        (lambda policy: policy.plan(WINDOWS, generator={1: 0, 2: 0, 3: 0}), "3 observation windows need"),
        (lambda policy: policy.session(1.5), "seed=1.5"),
    ],
)
def test_what_a_policy_cant_be_asked_for_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(warm_policy())


def test_seeds_and_counts_may_be_numpys():
    window = WINDOWS[0]
    sessions = [warm_policy().session(7), warm_policy().session(np.int64(7))]
    plans = [(each.plan(window), each.plan(window, np.int64(3))) for each in sessions]
    np.testing.assert_array_equal(*plans)


def test_seeds_stand_for_generators():
    policy = policy_with(n_steps=2)
    expected = policy.plan(WINDOWS, generator=seeded(4, 5, 6)).actions
    assert torch.equal(policy.plan(WINDOWS, generator=[4, 5, 6]).actions, expected)
    assert torch.equal(
        policy.plan(WINDOWS[:1], generator=4).actions, policy.plan(WINDOWS[0], generator=[4]).actions
    )
    with pytest.raises(InputError, match="one generator serves several of 3 observation windows"):
        policy.plan(WINDOWS, generator=seeded(0) * 3)


# -------------------------------------------------------------------------------- parts of one's own


def test_the_preset_of_paraddpm_gives_the_references_plans():
    """To a tenth of a pixel; a tolerance of 0.05 is a pixel off."""
    policy = shipped_policy("pusht_keypoints")
    draw = torch.empty(3, 2, 20).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    windows = policy.observation_normalizer.unnormalize(draw)
    reference, plan = (
        policy.with_sampler(spec_sampler(policy.spec, **preset(name))).plan(windows, generator=0)
        for name in ("ddpm", "paraddpm")
    )
    assert (plan.executed_actions - reference.executed_actions).abs().max() < 0.1
    assert plan.solution.iterations.max() < 20


class OwnNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.action, self.observation = torch.nn.Linear(2, 2), torch.nn.Linear(40, 2)

    def forward(self, x, t, condition):
        return self.action(x) + self.observation(condition)[:, None] + t[:, None, None] / 100


def test_a_policy_of_a_network_of_ones_own():
    like, network = policy_with(solver="ddim", n_steps=5), OwnNetwork()
    policy = Policy.from_network(
        TINY, network, like.observation_normalizer, like.action_normalizer, solver="ddim", n_steps=5
    )
    plan = policy.plan(WINDOWS, generator=0)
    assert torch.equal(like.with_network(network).plan(WINDOWS, generator=0).actions, plan.actions)
    assert not torch.equal(like.plan(WINDOWS, generator=0).actions, plan.actions)
    captured = policy.captured("openvino")
    assert_close(captured.plan(WINDOWS, generator=0).actions, plan.actions, atol=0.02, rtol=0)
    assert [program.method for program in captured.programs] == ["one OpenVINO model"]
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(InputError, match="needs a network with a trunk, and OwnNetwork has none"):
        policy.captured("openvino", precision="int8")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.nn.Linear(2, 2), r"Linear can't be called as network\(x \[rows, T, A\]"),
        (torch.nn.Bilinear(2, 40, 2), "Bilinear can't be called"),
    ],
)
def test_a_network_that_doesnt_fit_is_named(network, message):
    with pytest.raises(InputError, match=message):
        policy_with(n_steps=2).with_network(network)


def test_a_network_with_another_output_is_named():
    network = OwnNetwork()
    network.forward = lambda x, t, condition: condition
    with pytest.raises(InputError, match=r"gives \(2, 40\), expected \(2, 16, 2\)"):
        policy_with(n_steps=2).with_network(network)


def test_a_registered_network_is_built_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(NETWORKS, "_choices", dict(NETWORKS))
    NETWORKS.register("mine", lambda spec: OwnNetwork())
    NETWORKS.register("none", lambda spec: None)
    spec = replace(TINY, network="mine", network_options={"width": 3})
    tiny_checkpoint(spec).save(tmp_path)
    policy = Policy.load(tmp_path, n_steps=3)
    assert isinstance(policy.network, OwnNetwork) and policy.spec == spec
    with pytest.raises(InputError, match=r"returned NoneType, not a torch.nn.Module"):
        build_network(replace(TINY, network="none"))
    with pytest.raises(InputError, match="unknown network 'mien'; did you mean 'mine'"):
        build_network(replace(TINY, network="mien"))


def test_a_registered_network_that_doesnt_fit_is_named(monkeypatch):
    monkeypatch.setitem(NETWORKS._choices, "first", lambda spec: FirstStep())
    checkpoint = replace(tiny_checkpoint(), spec=replace(TINY, network="first"), weights={})
    with pytest.raises(InputError, match=r"FirstStep gives \(2, 1, 2\), expected \(2, 16, 2\)"):
        Policy.from_checkpoint(checkpoint, make_sampler(spec_schedule(TINY), n_steps=2))


class FirstStep(nn.Module):
    def forward(self, x, t, condition):
        return x[:, :1]


def test_a_policy_is_immutable_and_derived_ones_share_the_weights():
    policy = policy_with(n_steps=5)
    for name in ("denoiser", "sampler", "network"):
        with pytest.raises(AttributeError):
            setattr(policy, name, None)
    derived = policy.captured("emulated").with_sampler(make_sampler(policy.schedule, n_steps=3))
    assert derived.model is policy.model and derived.capture.backend == "emulated"


def test_a_pickled_policy_is_the_policy():
    policy = policy_with(solver="ddim", n_steps=3, driver="rti").captured("emulated")
    expected = policy.plan(WINDOWS, generator=0).actions
    again = pickle.loads(pickle.dumps(policy))
    assert not again.programs and torch.equal(again.plan(WINDOWS, generator=0).actions, expected)


def test_policies_and_plans_print_on_one_line():
    policy = policy_with(n_steps=5)
    assert str(policy).startswith(
        "Policy(pusht, ConditionalUnet1D of 0.1 M weights, cpu, capture=eager, f32, Sampler("
    )
    plan = str(policy.plan(WINDOWS, generator=0))
    assert plan.startswith("Plan(actions (3, 16, 2), executed 1 to 8, Solution(")
    assert all(len(text) < 200 and "\n" not in text for text in (str(policy), plan))


def test_a_device_is_chosen_in_one_place():
    found = Policy.from_checkpoint(tiny_checkpoint(), make_sampler(spec_schedule(TINY)), "auto").device
    assert found == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    for wrong, message in (("gpu", "device=gpu can't be used here"), (2.5, "device=2.5 must be auto")):
        with pytest.raises(InputError, match=message):
            usable_device(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_isnt_there_is_named():
    with pytest.raises(InputError, match=r"device=cuda can't be used here.*: device=cpu"):
        Policy.from_checkpoint(tiny_checkpoint(), make_sampler(spec_schedule(TINY)), "cuda")


def test_a_spec_goes_through_json():
    field = ObservationField("keypoint", shape=(10, 2), unit="px")
    spec = replace(TINY, contract=Contract((field,), "position", ("x", "y"), "px"), network_options={"a": 1})
    spec = replace(spec, schedule="flow", schedule_options={"training_timesteps": "beta", "time_scale": 1.0})
    assert PolicySpec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec
    old = {name: value for name, value in asdict(TINY).items() if name not in ("network", "contract")}
    assert PolicySpec.from_dict(old) == replace(TINY, contract=Contract())
    with pytest.raises(InputError, match="unknown setting 'horzion'; did you mean 'horizon'"):
        PolicySpec.from_dict({**asdict(TINY), "horzion": 8})
    with pytest.raises(InputError, match="malformed"):
        PolicySpec.from_dict({"task": "pusht"})


# --------------------------------------------------------------------------------------- guidance

GUIDED = replace(TINY, condition_dropout=0.1)


def test_guidance_changes_plans_and_scale_one_does_not():
    window = np.random.default_rng(0).uniform(100, 400, (2, 2, 20))
    schedule = spec_schedule(GUIDED)
    policy = Policy.from_checkpoint(tiny_checkpoint(GUIDED), make_sampler(schedule, solver="ddim", n_steps=5))
    plain, one, three, per_element = (
        p.plan(window, generator=seeded(0, 1)).actions
        for p in (
            policy,
            policy.with_guidance(1.0),
            policy.with_guidance(3.0),
            policy.with_guidance(torch.tensor([1.0, 3.0])),
        )
    )
    assert_close(one, plain, atol=1e-3, rtol=0)
    assert (three - plain).abs().max() > 0.1
    assert_close(per_element, torch.stack((plain[0], three[1])), atol=1e-3, rtol=0)
    assert policy.guidance_scale is None  # the policy itself stays as it was


def test_a_dynamic_threshold_bounds_plans():
    window = np.full((2, 20), 100.0)
    policy = Policy.from_checkpoint(
        tiny_checkpoint(GUIDED), make_sampler(spec_schedule(GUIDED), solver="ddim", n_steps=5)
    )
    bounded = policy.with_guidance(4.0, dynamic_threshold=0.9)
    clipped = policy.with_guidance(4.0)
    plans = [p.plan(window, generator=seeded(0)).solution.sample for p in (bounded, clipped)]
    assert plans[0].abs().max() <= 1 and not torch.equal(*plans)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((math.nan,), "guidance_scale=nan"),
        (("2",), "guidance_scale='2'"),
        ((True,), "guidance_scale=True"),
        ((torch.tensor([1.0, math.inf, 1.0]),), r"\[batch\] finite numbers"),
        ((torch.ones(3, 3),), r"guidance_scale \(3, 3\)"),
        ((torch.ones(3) * 1j,), "real numbers"),
        ((torch.ones(2),), "2 guidance scales for a batch of 3"),
        ((1.0, "0.9"), "ratio='0.9'"),
        ((1.0, True), "ratio=True"),
        ((1.0, math.nan), "ratio=nan"),
    ],
)
def test_guidance_that_cant_be_is_named(given, message):
    checkpoint = tiny_checkpoint(replace(TINY, condition_dropout=0.1))
    policy = Policy.from_checkpoint(checkpoint, make_sampler(spec_schedule(TINY), n_steps=2))
    with pytest.raises(InputError, match=message):
        policy.with_guidance(*given).plan(WINDOWS)


def test_guiding_an_unconditional_policy_is_refused():
    policy = Policy.from_checkpoint(tiny_checkpoint(), make_sampler(spec_schedule(TINY)))
    with pytest.raises(InputError, match="condition dropout"):
        policy.with_guidance(2.0)


STORED = np.load(Path(__file__).parent / "stored_plans.npz")
"""Two plans each, one after the other, of the shipped checkpoints, from before names and places changed."""

STORED_SAMPLERS = {
    "ddpm": {"solver": "ddpm", "n_steps": 20},
    "paraddpm": {"solver": "ddpm", "driver": "picard", "window": 50, "tolerance": 0.05},
    "ddim": {"solver": "ddim", "n_steps": 15},
    "paraddim": {"solver": "ddim", "n_steps": 15, "driver": "picard", "window": 15, "tolerance": 0.05}
    | {"start": "warm"},
    "speculative": {"solver": "ddpm", "driver": "speculative", "window": 20},
    "rti": {"solver": "ddim", "n_steps": 10, "spacing": "trailing", "driver": "rti", "iterations": 2},
}


shipped_policy = functools.cache(lambda task: Policy.load(ROOT / "checkpoints" / task))


@pytest.mark.parametrize("name", STORED_SAMPLERS)
@pytest.mark.parametrize("task", ["pusht_keypoints", "lift", "can", "square"])
def test_shipped_checkpoints_give_the_plans_that_they_always_gave(task, name):
    policy = shipped_policy(task)
    policy = policy.with_sampler(spec_sampler(policy.spec, **STORED_SAMPLERS[name]))
    draw = torch.Generator().manual_seed(1)
    window = torch.empty(1, policy.spec.n_obs_steps, policy.spec.obs_dim).uniform_(-0.5, 0.5, generator=draw)
    window = policy.observation_normalizer.unnormalize(window)
    generator = torch.Generator().manual_seed(0)
    first = policy.plan(window, generator=generator)
    second = policy.plan(window, first, generator=generator)
    plans = policy.action_normalizer.normalize(torch.cat((first.actions, second.actions)))
    stored = policy.action_normalizer.normalize(torch.from_numpy(STORED[f"{task}/{name}"]))
    assert_close(plans, stored, atol=2e-4, rtol=0)
