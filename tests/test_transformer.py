"""The Diffusion Transformer is diffusion_policy's, also with what can be computed beforehand."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

from paradiffpolicy.benchmarks.calls import call_rows
from paradiffpolicy.benchmarks.floors import Floors, Rates, trunk_cost
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.train import training_data
from paradiffpolicy.clock import MonotonicClock
from paradiffpolicy.diffusion.denoiser import Clip, Denoiser
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.interchange.reading import read_checkpoint
from paradiffpolicy.models.networks import build_network, check_weights
from paradiffpolicy.models.precision import HALF, half_trunk, rounded_trunk
from paradiffpolicy.models.transformer import (
    DERIVED,
    TransformerForDiffusion,
    TransformerOptions,
    causal_masks,
)
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.capture import openvino
from paradiffpolicy.sampling.capture.backends import CaptureSettings
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.training.distillation import Distillation, student_spec, teacher_sampler
from paradiffpolicy.training.objective import seeded, seeded_dropout
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer, parameter_groups

from .conftest import TINY, assert_close, tiny_checkpoint
from .foreign import ReferenceTransformer, transformer_ckpt
from .test_training import assert_same_run, toy_data

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
SMALL = {"n_layer": 2, "n_head": 2, "n_emb": 16}
SPEC = replace(TINY, network="transformer", network_options=SMALL)
KINDS = pytest.mark.parametrize(
    "options",
    [{}, {"causal_attn": False}, {"n_cond_layers": 2}, {"n_cond_layers": 1, "causal_attn": False}],
    ids=str,
)


def reference(**options) -> ReferenceTransformer:
    causal, n_cond_layers = options.get("causal_attn", True), options.get("n_cond_layers", 0)
    return ReferenceTransformer(n_obs_steps=3, causal=causal, n_cond_layers=n_cond_layers)


def transformer(**options) -> TransformerForDiffusion:
    """With the reference's weights."""
    network = TransformerForDiffusion(2, 8, 3, 5, TransformerOptions(**SMALL | options))
    network.load_state_dict(reference(**options).state_dict())
    return network.eval().requires_grad_(False)


def inputs(rows: int = 3):
    draw = torch.Generator().manual_seed(1)
    sample, condition = torch.randn(rows, 8, 2, generator=draw), torch.randn(rows, 15, generator=draw)
    return sample, torch.linspace(0, 99, rows), condition


# ------------------------------------------------------------------------------------- the network


def published_names(n_obs_steps, obs_dim, action_dim, horizon, width, n_layer, n_cond_layers):
    """Names and shapes of diffusion_policy's state dict, written out from its module structure."""
    shapes = {"pos_emb": (1, horizon, width), "cond_pos_emb": (1, 1 + n_obs_steps, width)}

    def add(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0],)

    def layer(name, attentions, norms):
        for attention in attentions:
            shapes[f"{name}.{attention}.in_proj_weight"] = (3 * width, width)
            shapes[f"{name}.{attention}.in_proj_bias"] = (3 * width,)
            add(f"{name}.{attention}.out_proj", width, width)
        add(f"{name}.linear1", 4 * width, width)
        add(f"{name}.linear2", width, 4 * width)
        for k in range(1, norms + 1):
            add(f"{name}.norm{k}", width)

    add("input_emb", width, action_dim)
    add("cond_obs_emb", width, obs_dim)
    add("ln_f", width)
    add("head", action_dim, width)
    for k in range(n_layer):
        layer(f"decoder.layers.{k}", ["self_attn", "multihead_attn"], 3)
    for k in range(n_cond_layers):
        layer(f"encoder.layers.{k}", ["self_attn"], 2)
    if not n_cond_layers:
        add("encoder.0", 4 * width, width)
        add("encoder.2", width, 4 * width)
    return shapes


@pytest.mark.parametrize("n_cond_layers", [0, 2])
def test_state_dict_is_diffusion_policys_name_for_name(n_cond_layers):
    network = transformer(n_cond_layers=n_cond_layers)
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == published_names(3, 5, 2, 8, 16, 2, n_cond_layers)


def test_what_isnt_learnt_needs_no_place_in_a_state_dict():
    """Theirs has it, ours doesn't; anything else is refused as ever."""
    theirs = reference().state_dict()
    assert theirs.keys() - transformer().state_dict().keys() == set(DERIVED)
    with pytest.raises(RuntimeError, match="another"):
        transformer().load_state_dict({**theirs, "another": torch.zeros(0)})
    assert set(DERIVED) < theirs.keys()


@KINDS
def test_it_computes_what_pytorchs_layers_do(options):
    expected = reference(**options)(*inputs())
    assert_close(transformer(**options)(*inputs()), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.3


def test_masks_hide_what_comes_later():
    """A step sees itself, those before it, the timestep, and the observations up to its own time."""
    own, memory = causal_masks(4, 3)
    assert (own == 0).tolist() == [[k <= step for k in range(4)] for step in range(4)]
    assert (memory == 0).tolist() == [[True, True, False], *[[True, True, True]] * 3]
    assert own.isneginf().sum() == 6 and memory.isneginf().sum() == 1
    sample, t, condition = inputs()
    network, other = transformer(), sample.clone()
    other[:, 5:] += 1
    assert torch.equal(network(other, t, condition)[:, :5], network(sample, t, condition)[:, :5])
    newest = condition.clone()
    newest[:, 10:] += 1
    changed = (network(sample, t, newest) - network(sample, t, condition)).abs().amax(dim=(0, 2))
    assert (changed[:2] == 0).all() and (changed[2:] > 1e-3).all()


def test_batch_elements_are_independent():
    sample, t, condition = inputs()
    together, alone = transformer()(sample, t, condition), transformer()(sample[1:2], t[1:2], condition[1:2])
    assert_close(together[1:2], alone, atol=1e-5, rtol=0)


@KINDS
def test_a_denoiser_at_nodes_is_the_denoiser(options):
    """Features of nodes and of observations, computed beforehand, are those of each call."""
    network, nodes = transformer(**options).double(), torch.tensor([91.0, 40.5, 0.0]).double()
    denoiser = Denoiser(network, SCHEDULE, "epsilon", Clip(1.0))
    at_nodes = denoiser.at(nodes, torch.zeros((), dtype=torch.float64))
    calls: list[int] = []
    network.encoder.register_forward_hook(lambda *args: calls.append(1))
    network.cond_obs_emb.register_forward_hook(lambda *args: calls.append(1))
    condition = inputs()[2].double()
    observed = at_nodes.observe(condition)
    assert len(calls) == (1 if options.get("n_cond_layers") else 2)
    node, element = torch.tensor([2, 0, 1, 0]), torch.tensor([2, 1, 0, 2])
    x = noise_for(1, 4, shape=(8, 2)).x_T
    found = at_nodes.bind(observed)(x, node, element)
    assert len(calls) == (1 if options.get("n_cond_layers") else 2)
    assert_close(found, denoiser.bind(condition)(x, nodes[node], element), atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 2}, r"no network_options.n_layers; did you mean 'n_layer'"),
        ({"n_layer": 0}, r"network_options.n_layer=0 must be a whole number from 1 to 256"),
        ({"n_layer": True}, r"network_options.n_layer=True"),
        ({"n_emb": 15}, r"network_options.n_emb=15 must be even"),
        ({"n_head": 3}, r"network_options.n_emb=16 must be a multiple of n_head=3"),
        ({"n_emb": 10**9}, r"network_options.n_emb=1000000000"),
        ({"p_drop_attn": 1.0}, r"network_options.p_drop_attn=1.0 must be a number from 0 to under 1"),
        ({"p_drop_emb": "0.1"}, r"network_options.p_drop_emb='0.1'"),
        ({"causal_attn": 1}, r"network_options.causal_attn=1 must be true or false"),
        ({3: 4}, r"no network_options.3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build_network(replace(SPEC, network_options=SMALL | options))


def test_plans_that_are_too_long_for_attention_are_refused():
    with pytest.raises(InputError, match="horizon=2000 must be a whole number from 1 to 1024"):
        build_network(replace(SPEC, horizon=2000))


def test_weights_are_checked_before_their_memory_is_taken():
    huge = SMALL | {"n_emb": 2**14, "n_layer": 20}  # 340 GB
    with pytest.raises(InputError, match="weights don't fit its spec"):
        check_weights(replace(SPEC, network_options=huge), transformer().state_dict())
    checkpoint = tiny_checkpoint(SPEC)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(SPEC, n_steps=2))
    assert policy.network.mask.isneginf().any() and not policy.network.mask.is_meta


# ------------------------------------------------------------------------- policies, captured and exported


def policy_with(spec=SPEC, **sampler) -> Policy:
    torch.manual_seed(0)
    checkpoint = tiny_checkpoint(spec)
    for weight in checkpoint.weights.values():
        weight.add_(0.1 * torch.randn(weight.shape))
    return Policy.from_checkpoint(checkpoint, make_sampler(SCHEDULE, **sampler))


def planned(policy: Policy, rows: int = 3) -> torch.Tensor:
    """Normalised."""
    window = 512 * torch.rand(rows, 2, 20, generator=torch.Generator().manual_seed(2))
    return policy.action_normalizer.normalize(policy.plan(window, generator=3).actions)


@pytest.mark.parametrize("n_cond_layers", [0, 1])
@pytest.mark.parametrize(
    ("backend", "tolerance"), [("emulated", 0.0), ("openvino", 2e-5)], ids=["emulated", "openvino"]
)
def test_captured_plans_are_the_eager_ones(backend, tolerance, n_cond_layers):
    spec = replace(SPEC, network_options=SMALL | {"n_cond_layers": n_cond_layers})
    parallel = {"driver": "picard", "evaluate": "all", "window": 3}
    for sampler in ({"driver": "rti", "solver": "ddim"}, parallel)[: 1 if n_cond_layers else 2]:
        policy = policy_with(spec, n_steps=5, **sampler)
        captured = policy.captured(backend, precision="f32")
        assert_close(planned(captured).float(), planned(policy).float(), atol=tolerance, rtol=0)
        assert captured.programs[0].method != "eager"


def test_guided_plans_are_captured():
    spec = replace(SPEC, condition_dropout=0.1)
    policy = policy_with(spec, n_steps=4, solver="ddim", driver="rti")
    guided = policy.with_guidance(2.0)
    assert_close(planned(guided.captured("openvino", precision="f32")), planned(guided), atol=2e-5, rtol=0)
    assert (planned(guided) - planned(policy)).abs().max() > 1e-3


def test_bfloat16_is_near():
    """As in float32 but for its rounding; the emulation is the eager plan, bit by bit."""
    policy = policy_with(replace(SPEC, prediction="sample"), n_steps=4, solver="ddim", driver="rti")
    exact = planned(policy)
    backends = ["eager", "emulated"]
    if "BF16" in openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):  # others refuse it
        backends.append("openvino")
    plans = {backend: planned(policy.captured(backend, precision="bf16")) for backend in backends}
    for backend, plan in plans.items():
        assert 0 < (plan - exact).abs().max() < 0.03, backend
    assert torch.equal(plans["eager"], plans["emulated"])


@KINDS
@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_rounded_is_as_accurate_as_half(precision, options):
    network, dtype = transformer(**options), HALF[precision]
    sample, t, condition = inputs(16)
    features = network.combine(network.time_features(t), network.condition_features(condition))
    exact = network.trunk(sample, features)
    rounded, half = (make(network, dtype)(sample, features) for make in (rounded_trunk, half_trunk))
    errors = [float((values - exact).square().mean().sqrt()) for values in (rounded, half)]
    assert errors[0] > 0 and 0.2 < errors[0] / errors[1] < 5
    assert_close(network.trunk(sample, features), exact)  # the network itself stays as it was


def test_int8_is_refused_in_a_line():
    with pytest.raises(InputError, match="precision=int8 is of the U-Net alone"):
        policy_with(n_steps=2).captured("emulated", precision="int8")


def test_a_policy_travels_to_other_processes():
    policy = policy_with(n_steps=3, solver="ddim")
    assert torch.equal(planned(pickle.loads(pickle.dumps(policy))), planned(policy))


def test_networks_of_the_same_weights_and_other_options_are_other_programs():
    """Heads and masks are in no state dict."""
    policy = policy_with(n_steps=2)
    other = build_network(replace(SPEC, network_options=SMALL | {"n_head": 4}))
    other.load_state_dict(policy.network.state_dict())
    other = policy.with_network(other)
    assert other.model.digest == policy.model.digest
    assert other.executor.identity() != policy.executor.identity()


def test_calls_are_timed_beside_a_floor():
    policy = policy_with(n_steps=2)
    floors = Floors(policy.network, 16, policy.device, MonotonicClock())
    floors.rates["f32"] = Rates(1e9, 1e9)
    rows = call_rows(policy, {"f32": CaptureSettings("emulated")}, [1], 1, MonotonicClock(), floors)
    assert [row.name for row in rows] == ["eager", "f32"] and all(row.floor > 0 for row in rows)


@pytest.mark.parametrize("n_cond_layers", [0, 1])
def test_a_trunks_cost_is_of_the_weights_that_it_reads(n_cond_layers):
    """Those that its output has a gradient for."""
    network = transformer(n_cond_layers=n_cond_layers).requires_grad_(True)
    sample, t, condition = inputs(1)
    features = network.combine(network.time_features(t), network.condition_features(condition)).detach()
    network.trunk(sample, features).square().sum().backward()
    touched = [weight.grad for weight in network.parameters() if weight.grad is not None]
    rows = sum(int(grad.flatten(1).any(dim=1).sum()) * grad[0].numel() for grad in touched if grad.ndim == 2)
    cost = trunk_cost(network, 8)
    matrices = cost.weights - sum(grad.numel() for grad in touched if grad.ndim != 2)
    hoisted_biases = 0 if n_cond_layers else -2 * 16 * 2
    assert matrices == rows + hoisted_biases
    assert cost.operations > 2 * 4 * rows
    with pytest.raises(InputError, match="the cost of Identity isn't known"):
        trunk_cost(torch.nn.Identity(), 8)


# ----------------------------------------------------------------------------------------- training

SETTINGS = TrainSettings(
    n_steps=6, batch_size=8, warmup_steps=2, log_every=3, save_every=2, weight_decay=0.1, precision="float32"
)
DROPPING = replace(SPEC, network_options=SMALL | {"p_drop_emb": 0.1, "p_drop_attn": 0.3})


def trainer(store, folder, spec=DROPPING, **changes) -> Trainer:
    return Trainer(toy_data(store), spec, replace(SETTINGS, **changes), folder)


def test_a_resumed_run_is_an_uninterrupted_one(toy_store, tmp_path):
    """Its dropout, too, whatever else draws at random meanwhile."""
    trainer(toy_store, tmp_path / "whole").run(progress=False)
    for stop in (1, 4, 6):
        torch.manual_seed(stop)
        trainer(toy_store, tmp_path / "parts").run(until=stop, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_dropout_depends_on_seed_and_step_alone(toy_store, tmp_path):
    ones, cpu = torch.ones(200), torch.device("cpu")

    def dropped(seed, step):
        with seeded_dropout(replace(SETTINGS, seed=seed), step, cpu):
            return torch.nn.functional.dropout(ones, 0.5)

    before = torch.get_rng_state()
    assert torch.equal(dropped(0, 3), dropped(0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dropped(0, 3), dropped(0, 4)) and not torch.equal(dropped(0, 3), dropped(1, 3))
    drawn = torch.randn(200, generator=seeded(SETTINGS, 3))
    with seeded_dropout(SETTINGS, 3, cpu):
        assert not torch.equal(torch.randn(200), drawn)  # else dropout would go by the batch's noise
    losses = []
    for spec in (DROPPING, SPEC):
        run = trainer(toy_store, tmp_path, spec)
        losses.append(run.objective(run.form, 0, False).item())
    assert losses[0] != losses[1]


def test_averaged_weights_plan_without_dropout(toy_store, tmp_path):
    checkpoint = trainer(toy_store, tmp_path).run(until=2, progress=False)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, n_steps=2))
    assert torch.equal(planned(policy), planned(policy))


def test_biases_norms_and_positions_dont_decay():
    network = build_network(DROPPING)
    decayed, others = parameter_groups(network, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(weight): name for name, weight in network.named_parameters()}
    assert {names[id(weight)].split(".")[-1] for weight in decayed["params"]} == {"weight", "in_proj_weight"}
    assert all(weight.ndim == 2 for weight in decayed["params"])
    assert {"pos_emb", "cond_pos_emb", "ln_f.weight"} <= {names[id(weight)] for weight in others["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    (whole,) = parameter_groups(build_network(TINY), 0.1)
    assert whole["weight_decay"] == 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls(precision, toy_store, tmp_path):
    settings = {"n_steps": 60, "learning_rate": 3e-3, "precision": precision, "weight_decay": 1e-6}
    run = trainer(toy_store, tmp_path, log_every=20, save_every=60, **settings)
    run.run(progress=False)
    assert run.curve[-1][1] < 0.8 * run.curve[0][1]


def test_a_student_of_a_transformer(toy_store, tmp_path):
    teacher = tiny_checkpoint(DROPPING)
    plans = Policy.from_checkpoint(teacher, teacher_sampler(DROPPING, 4))
    spec = student_spec(DROPPING, 4)
    objective = partial(Distillation, teacher=plans.captured("openvino", precision="f32"))
    run = Trainer(toy_data(toy_store), spec, SETTINGS, tmp_path, objective=objective)
    assert run.run(until=2, progress=False).spec.student_timesteps


def test_the_recipe_trains_it(toy_store, tmp_path):
    words = ["recipe=pusht_transformer", f"dataset={toy_store}", "augmentation=null"]
    _, _, spec = training_data(compose("train", words))
    assert sum(weight.numel() for weight in build_network(spec).parameters()) == 5_255_490
    cfg = compose("train", [*words, "policy.network_options.n_layer=1", "training.n_steps=3"])
    data, _, spec = training_data(cfg)
    checkpoint = Trainer(data, spec, TrainSettings(**vars(cfg.training)), tmp_path).run(progress=False)
    checkpoint.save(tmp_path / "published")
    assert Checkpoint.load(tmp_path / "published").spec.network_options["n_layer"] == 1


# ------------------------------------------------------------------------- diffusion_policy's checkpoints


@pytest.mark.parametrize("options", [{}, {"causal_attn": False, "n_cond_layers": 1}], ids=str)
def test_a_file_of_diffusion_policy_is_read(tmp_path, options):
    changes = {f"policy__model__{name}": value for name, value in options.items()}
    theirs = ReferenceTransformer(
        causal=options.get("causal_attn", True), n_cond_layers=options.get("n_cond_layers", 0)
    )
    checkpoint = read_checkpoint(transformer_ckpt(tmp_path / "a.ckpt", theirs, **changes))
    spec = checkpoint.spec
    assert (spec.network, spec.executed, spec.obs_dim) == ("transformer", slice(1, 5), 5)
    assert spec.network_options["p_drop_attn"] == 0.3
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(spec))
    sample, t, condition = (each[:, :10] if each.ndim == 2 else each for each in inputs())
    assert_close(policy.network(sample, t, condition), theirs(sample, t, condition), atol=1e-5, rtol=0)
    checkpoint.save(tmp_path / "ours")
    assert Checkpoint.load(tmp_path / "ours").spec == spec


def test_options_that_a_config_leaves_out_are_theirs(tmp_path):
    left_out = {f"policy__model__{name}": None for name in ("causal_attn", "p_drop_emb", "n_cond_layers")}
    options = read_checkpoint(transformer_ckpt(tmp_path / "a.ckpt", **left_out)).spec.network_options
    assert options["causal_attn"] is False and options["p_drop_emb"] == 0.1 and options["n_cond_layers"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_as_cond": False}, "policy.obs_as_cond=False: conditioning by inpainting"),
        ({"model__time_as_cond": False}, "policy.model.time_as_cond=False: encoder-only transformers"),
        ({"model__cond_dim": 0}, "policy.model.cond_dim=0: only policy.obs_dim=5"),
        ({"model__input_dim": 7}, "policy.model.input_dim=7: only policy.action_dim=2"),
        ({"model__horizon": 10}, "policy.model.horizon=10: only policy.horizon=8"),
        ({"model__n_obs_steps": 3}, "policy.model.n_obs_steps=3: only policy.n_obs_steps=2"),
        ({"pred_action_steps_only": True}, "policy.pred_action_steps_only=True: plans must be as long"),
        ({"model__n_head": 3}, "network_options.n_emb=16 must be a multiple of n_head=3"),
        ({"model__n_head": "2"}, "policy.model.n_head='2' isn't of the kind"),
        ({"model__n_layer": 3}, "weights don't fit its spec"),
        ({"model___target_": "x.ConditionalUnet1D"}, "only TransformerForDiffusion is read"),
        (
            {"_target_": "x.DiffusionTransformerHybridImagePolicy"},
            "DiffusionTransformerLowdimPolicy",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(tmp_path, changes, message):
    given = {f"policy__{name}": value for name, value in changes.items()}
    with pytest.raises(InputError, match=message):
        read_checkpoint(transformer_ckpt(tmp_path / "a.ckpt", **given))


def test_plans_of_executed_steps_alone_begin_at_the_first(tmp_path):
    changes = {"policy__pred_action_steps_only": True, "policy__n_action_steps": 8}
    assert read_checkpoint(transformer_ckpt(tmp_path / "a.ckpt", **changes)).spec.executed == slice(0, 8)
