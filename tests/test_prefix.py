"""Training-time real-time chunking: committed actions are given to the network, and plans continue them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from einops import rearrange

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.data.dataset import WindowDataset, batch_windows
from paradiffpolicy.diffusion.denoiser import denoising_loss
from paradiffpolicy.diffusion.prefix import clean_steps, committed_delays, delay_numbers, with_delay
from paradiffpolicy.errors import InputError
from paradiffpolicy.export.folder import export_policy
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.models.vision import Sight
from paradiffpolicy.planning.blending import Grid, Prefix
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler, spec_schedule
from paradiffpolicy.training.distillation import student_spec
from paradiffpolicy.training.objective import Denoising, Part, seeded
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.types import Committed, PolicySpec

from .conftest import TINY, assert_close, tiny_checkpoint
from .test_export import check_equal
from .test_training import SETTINGS, SMALL, assert_same_run, toy_data
from .test_vision import SEEING

SPEC = replace(TINY, prefix_steps=6)
WINDOWS = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0)) * 512
DELAYS = torch.tensor([0, 2, 6])


def policy_of(spec: PolicySpec = SPEC, **sampler) -> Policy:
    return Policy.from_checkpoint(tiny_checkpoint(spec), spec_sampler(spec, **{"n_steps": 6, **sampler}))


def commitment(*delays: int, more: int = 0) -> Committed:
    """Actions that are committed up to a delay per row, and so many steps more."""
    actions = 512 * torch.rand(len(delays), 16, 2, generator=torch.Generator().manual_seed(7))
    ends = torch.tensor(delays)[:, None] + 1 + more
    return Committed(actions, (torch.arange(16) < ends).float())


class Heard:
    """The samples and conditions that a network is called with."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.x: list[torch.Tensor] = []
        self.condition: list[torch.Tensor] = []
        network.register_forward_pre_hook(self.hear)

    def hear(self, module, inputs) -> None:
        self.x.append(inputs[0].detach().clone())
        self.condition.append(inputs[2].detach().clone())


# ------------------------------------------------------------------------------------------------- steps


def test_steps_are_clean_up_to_the_delay():
    clean = clean_steps(SPEC, DELAYS)
    assert clean.sum(dim=1).tolist() == [0, 1 + 2, 1 + 6]  # with the step that was executed before
    assert clean.long().diff(dim=1).max() <= 0
    numbers = delay_numbers(SPEC, DELAYS)
    assert numbers.shape == (3, 2, 6) and numbers.sum(dim=2).tolist() == [[0, 0], [2, 2], [6, 6]]
    assert torch.equal(numbers[1, 0], torch.tensor([1.0, 1, 0, 0, 0, 0]))
    assert SPEC.condition_dim == TINY.condition_dim + 2 * 6


def test_delays_are_those_of_what_is_committed_for_certain():
    weight = torch.zeros(6, 16)
    weight[1, 0] = weight[2, :4] = weight[3, :12] = 1
    weight[4, 1:4] = 1  # nothing before is known
    weight[5, :3], weight[5, 3:6] = 1, 0.9
    assert committed_delays(SPEC, weight).tolist() == [0, 0, 3, 6, 0, 2]


# ---------------------------------------------------------------------------------------------- training


def objective(data: WindowDataset, spec: PolicySpec, **changes) -> Denoising:
    trained = replace(data, observations=data.observations.float(), actions=data.actions.float() / 512)
    return Denoising(trained, spec, replace(SETTINGS, **changes))


def test_the_loss_is_of_the_other_steps():
    """Neither the noise nor the output at a clean step counts, and the network sees actions there."""
    torch.manual_seed(0)
    x0, eps, condition = torch.rand(3, 16, 2), torch.randn(3, 16, 2), torch.zeros(3, 1)
    clean, outputs, seen = clean_steps(SPEC, DELAYS), torch.randn(3, 16, 2, requires_grad=True), []
    weight = (~clean).float() / (~clean).float().mean()

    def loss(eps):
        def network(x, t, c):
            seen.append(x)
            return outputs

        t = torch.tensor([3, 50, 99])
        return denoising_loss(network, spec_schedule(SPEC), "epsilon", x0, condition, t, eps, weight)

    value = loss(eps)
    value.backward()
    assert (outputs.grad[clean] == 0).all() and (outputs.grad[~clean] != 0).all()
    assert torch.equal(seen[0][clean], x0[clean]) and not (seen[0] == x0)[~clean].any()
    assert torch.equal(value, loss(torch.where(clean[:, :, None], 100.0, eps)))
    assert_close(value, (outputs - eps)[~clean].square().mean())  # the mean over the batch's free steps


def test_without_delays_the_loss_is_what_it_always_was(toy_store):
    """Bit for bit: as many random numbers are drawn, and all steps count."""
    of, network = objective(toy_data(toy_store), SMALL), build_network(SMALL)
    windows = batch_windows(len(of.data), 16, 5, SETTINGS.seed)
    generator, (observations, actions) = seeded(SETTINGS, 5), of.data.batch(windows)
    t = of.schedule.draw(16, generator)
    eps = torch.randn(actions.shape, generator=generator)
    given = network, of.schedule, "epsilon", actions, rearrange(observations, "b t o -> b (t o)"), t, eps
    expected = denoising_loss(*given)
    assert torch.equal(of(network, 5, False), expected)
    assert torch.equal(denoising_loss(*given, torch.ones(16, 16)), expected)


def test_delays_are_uniform_and_told(toy_store):
    spec = replace(SMALL, prefix_steps=3)
    of, network = objective(toy_data(toy_store), spec, batch_size=40), build_network(spec)
    heard, counts = Heard(network), torch.zeros(4)
    for step in range(20):
        of(network, step, False)
        windows = batch_windows(len(of.data), 40, step, SETTINGS.seed)
        observations, actions = of.data.batch(windows)
        told = heard.condition[-1].view(40, 2, 23)
        assert torch.equal(told[..., :20], observations)
        delays = told[:, 0, 20:].sum(dim=1).long()
        assert torch.equal(told[..., 20:], delay_numbers(spec, delays))
        clean = clean_steps(spec, delays)
        assert torch.equal((heard.x[-1] == actions).all(dim=2), clean)
        counts += delays.bincount(minlength=4)
    assert counts.min() > 150 and counts.max() < 250  # 200 each


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_parts_of_a_batch_add_up(toy_store, bfloat16):
    spec = replace(SMALL, prefix_steps=8, condition_dropout=0.3)
    of, network = objective(toy_data(toy_store), spec, batch_size=15), build_network(spec)
    parts = torch.stack([of(network, 2, bfloat16, Part(k, 4)) for k in range(4)])
    assert_close(parts.sum(), of(network, 2, bfloat16), rtol=1e-2 if bfloat16 else 1e-5)


def test_a_run_that_was_interrupted_ends_with_the_same_weights(toy_store, tmp_path):
    spec, data, runs = replace(SMALL, prefix_steps=4), toy_data(toy_store), [tmp_path / k for k in "ab"]
    settings = replace(SETTINGS, n_steps=6, save_every=6)
    Trainer(data, spec, settings, runs[0]).run(progress=False)
    for stop in (4, 6):
        Trainer(data, spec, settings, runs[1]).run(until=stop, progress=False)
    assert_same_run(*runs)
    with pytest.raises(InputError, match="prefix_steps=4 there, 0 here"):
        Trainer(data, SMALL, settings, runs[1])
    checkpoint = Checkpoint.load(runs[0] / "checkpoint")
    assert checkpoint.spec == spec
    with pytest.raises(InputError, match="init has another spec"):
        Trainer(data, SMALL, SETTINGS, tmp_path / "other", init=checkpoint)


def test_pictures_and_delays_condition_together():
    spec = replace(SEEING, prefix_steps=6)
    network, draw = build_network(spec), torch.Generator().manual_seed(0)
    numbers = torch.rand(3, 2, 2, generator=draw)
    pixels = torch.randint(256, (3, 2, 2 * 40 * 36 * 3), dtype=torch.uint8, generator=draw)
    x, t, delay = torch.rand(3, 16, 2), torch.tensor([1.0, 5, 9]), delay_numbers(spec, DELAYS)
    kept = torch.tensor([1.0, 0, 1])
    condition = network.encode(numbers, pixels) * kept[:, None]
    given = Sight(numbers, pixels, None, kept, delay)
    assert_close(network(x, t, given), network.head(x, t, with_delay(condition, delay)))
    policy = policy_of(spec, n_steps=2, solver="ddim")
    plan = policy.plan(policy.middle_window(3), committed=commitment(0, 2, 6))
    assert plan.actions.isfinite().all()
    assert policy.condition(policy.middle_window(3)).shape == (3, spec.condition_dim)


# ---------------------------------------------------------------------------------------------- planning


def test_the_network_sees_what_is_committed_at_every_call():
    policy = policy_of(solver="ddim").captured("eager")
    whole = policy.with_network(Whole(policy.network))  # without a trunk, whose calls no hook sees
    heard, kept = Heard(whole.network), commitment(0, 2, 6)
    whole.plan(WINDOWS, generator=0, committed=kept)
    clean, actions = clean_steps(SPEC, DELAYS), whole.action_normalizer.normalize(kept.actions)
    assert len(heard.x) == 6
    for x, condition in zip(heard.x, heard.condition, strict=True):
        assert torch.equal((x == actions).all(dim=2), clean)
        assert torch.equal(condition.view(3, 2, 26)[..., 20:], delay_numbers(SPEC, DELAYS))


class Whole(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x, t, condition):
        return self.inner(x, t, condition)


@pytest.mark.parametrize("spec", [
    SPEC,
    replace(SPEC, schedule="flow", prediction="velocity"),
    replace(SPEC, network="transformer", network_options={"n_layer": 1, "n_head": 2, "n_emb": 16}),
], ids=["unet", "flow", "transformer"])  # fmt: skip
@pytest.mark.parametrize("settings", [
    {"solver": "ddim"},
    {"driver": "rti", "solver": "ddim", "iterations": 2},
    {"driver": "picard", "solver": "dpm_solver_pp_2m", "tolerance": 1e-6},
], ids=str)  # fmt: skip
def test_committed_actions_are_kept_and_continued(spec, settings):
    policy, kept = policy_of(spec, **settings), commitment(0, 2, 6)
    free = policy.plan(WINDOWS, generator=0)
    for plan in (policy.plan(WINDOWS, generator=0, committed=kept),
                 policy.plan(WINDOWS, free, generator=0, committed=kept)):  # fmt: skip
        held = kept.weight == 1
        assert_close(plan.actions[held], kept.actions[held], atol=1e-3, rtol=0)
        moved = (plan.actions - free.actions).abs().amax(dim=2)[:, 7:].amax(dim=1)
        assert (moved[1:] > 1e-3).all()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("driver", ["picard", "picard_published", "anderson"])
def test_parallel_plans_are_the_sequential_ones(driver, solver):
    settings = {"solver": solver, "n_steps": 12}
    sequential, parallel = (
        policy_of(**settings, **more) for more in ({}, {"driver": driver, "window": 5, "tolerance": 1e-9})
    )
    expected, actual = (
        policy.plan(WINDOWS, generator=0, committed=commitment(0, 2, 6)).actions
        for policy in (sequential, parallel)
    )
    assert_close(actual, expected, atol=0.02, rtol=0)


def test_a_speculative_plan_is_the_sequential_one_of_its_noise():
    policy, kept = policy_of(driver="speculative", n_steps=10), commitment(0, 2, 6)
    plan = policy.plan(WINDOWS, generator=0, committed=kept)
    sequential, solution = policy_of(n_steps=10), plan.solution
    inputs = sequential._inputs(sequential.checked(WINDOWS), kept)
    expected = sequential.executor.run(inputs, solution.noise).sample
    assert_close(solution.sample, expected, atol=1e-4, rtol=0)


SEQUENTIAL = {"solver": "ddim"}
RTI = {"driver": "rti", "solver": "ddim"}
PICARD = {"driver": "picard", "window": 3, "evaluate": "all"}
SPECULATIVE = {"driver": "speculative", "evaluate": "all"}


@pytest.mark.parametrize(("backend", "atol", "settings"), [
    *(("emulated", 0, settings) for settings in (SEQUENTIAL, RTI, PICARD, SPECULATIVE)),
    *(("openvino", 0.02, settings) for settings in (RTI, PICARD)),
], ids=str)  # fmt: skip
def test_captured_policies_plan_the_same(backend, atol, settings):
    spec = replace(SPEC, down_dims=(16,))
    eager = policy_of(spec, **{"n_steps": 4, **settings})
    captured, plans = eager.captured(backend, precision="f32"), []
    for policy in (eager, captured):
        plan = None
        for k, kept in enumerate((commitment(0, 6), commitment(2, 8))):
            plan = policy.plan(WINDOWS[:2] + k, plan, generator=k, committed=kept)
            plans.append(plan.actions)
        plans.append(policy.plan(WINDOWS[:2], generator=3).actions)
    assert_close(torch.stack(plans[3:]), torch.stack(plans[:3]), atol=atol, rtol=0)
    assert all("eager" not in program.method for program in captured.programs)


def test_nothing_committed_is_no_delay():
    policy = policy_of(solver="ddim")
    free = policy.plan(WINDOWS, generator=0).actions
    nothing = Committed(commitment(0, 0, 0).actions, torch.zeros(3, 16))
    assert torch.equal(policy.plan(WINDOWS, generator=0, committed=nothing).actions, free)
    assert not policy.condition(WINDOWS).view(3, 2, 26)[..., 20:].any()
    mixed = policy.plan(WINDOWS, generator=[0, 1, 2], committed=commitment(0, 2, 6)).actions
    alone = policy.plan(WINDOWS[1:2], generator=[1], committed=commitment(0, 2, 6).select([1])).actions
    assert_close(mixed[1:2], alone, atol=1e-2, rtol=0)


def test_what_is_committed_beyond_the_trained_delays_is_kept_too():
    """As a policy that wasn't trained so keeps it: x0_hats are replaced, and inputs aren't."""
    policy, kept = policy_of(solver="ddim"), commitment(9, 6, 2, more=1)
    whole = policy.with_network(Whole(policy.network))
    heard = Heard(whole.network)
    plan = whole.plan(WINDOWS, generator=0, committed=kept)
    held = kept.weight == 1
    assert held.sum(dim=1).tolist() == [11, 8, 4]
    assert_close(plan.actions[held], kept.actions[held], atol=1e-3, rtol=0)
    actions = whole.action_normalizer.normalize(kept.actions)
    assert (heard.x[0] == actions).all(dim=2).sum(dim=1).tolist() == [7, 7, 4]


def test_guidance_leaves_the_delay_where_it_blanks_the_observation():
    spec = replace(SPEC, condition_dropout=0.1)
    policy = policy_of(spec, solver="ddim", n_steps=1)
    whole = policy.with_network(Whole(policy.network)).with_guidance(2.0)
    heard = Heard(whole.network)
    whole.plan(WINDOWS, generator=0, committed=commitment(0, 2, 6))
    given, blank = heard.condition[0].view(2, 3, 2, 26)
    assert not blank[..., :20].any() and given[..., :20].any()
    for half in (given, blank):
        assert torch.equal(half[..., 20:], delay_numbers(spec, DELAYS))


def test_exported_plans_have_no_delay(tmp_path):
    policy = policy_of(replace(SPEC, down_dims=(16,)), driver="rti", solver="ddim", n_steps=4, iterations=2)
    export_policy(policy, tmp_path / "out", batch=2)
    check_equal(policy, tmp_path / "out", batch=2)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("steps", [-1, 15, 2.0, True, "8", None])
def test_delays_that_cant_be_are_named(steps):
    with pytest.raises(InputError, match=r"prefix_steps=.* must be a whole number from 0 to 14"):
        replace(TINY, prefix_steps=steps)
    values = json.loads(json.dumps(asdict(SPEC)))
    assert PolicySpec.from_dict(values) == SPEC
    del values["prefix_steps"]
    assert PolicySpec.from_dict(values) == TINY  # a file of before


def test_only_a_policy_that_was_trained_so_takes_the_blending(capsys):
    Prefix(Grid(SPEC, 1))
    with pytest.raises(InputError, match=r"trained with delays.*policy.prefix_steps=8"):
        Prefix(Grid(TINY, 1))
    commands = (
        ["run", "blending.name=prefix", "seconds=1"],
        ["evaluate", "mode=realtime", "realtime.blending.name=prefix", "seeds=1"],
    )
    for command in commands:
        assert main(command) == 2
        assert "blending 'prefix' needs a policy that was trained with delays" in capsys.readouterr().err


def test_what_delays_dont_go_with_is_refused():
    with pytest.raises(InputError, match=r"dynamic_threshold=0.9 .*prefix_steps=6"):
        policy_of().with_guidance(None, 0.9)
    with pytest.raises(InputError, match="trained with prefix_steps=6, and a student"):
        student_spec(SPEC, 4)


# ---------------------------------------------------------------------------------------- what it is for


def test_a_policy_learns_to_go_on_as_it_began(tmp_path):
    """Demonstrations stand at 1 or at -1, whatever is observed: a plan that doesn't know which the last one
    had chosen joins it with a jump, in half of the cases."""
    draw = torch.Generator().manual_seed(0)
    side = (torch.arange(20) % 2 * 2.0 - 1).repeat_interleave(16)[:, None]
    data = WindowDataset(
        torch.rand(320, 1, generator=draw).double(), side.double(), torch.arange(320).view(20, 16), 2
    )
    spec = PolicySpec("any", obs_dim=1, action_dim=1, down_dims=(16,), diffusion_step_embed_dim=16)
    spec = replace(spec, prefix_steps=4)
    settings = replace(SETTINGS, n_steps=120, learning_rate=1e-2, batch_size=20, save_every=120)
    checkpoint = Trainer(data, spec, settings, tmp_path).run(progress=False)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(spec, solver="ddim", n_steps=10))
    last = (torch.arange(32) % 2 * 2.0 - 1)[:, None].expand(32, 16)
    weight = (torch.arange(16) < 1 + 3).float().expand(32, 16)
    windows = torch.rand(32, 2, 1, generator=draw)
    free, continued = (
        policy.plan(windows, generator=list(range(32)), committed=kept).actions[..., 0]
        for kept in (None, Committed(last[..., None], weight))
    )
    joins = [float((actions - last)[:, 4].abs().mean()) for actions in (free, continued)]
    assert joins[1] < joins[0] / 2
