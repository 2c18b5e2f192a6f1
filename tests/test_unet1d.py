"""The network is diffusion_policy's: names, shapes, parameter counts, and what it computes."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paradiffpolicy.errors import InputError
from paradiffpolicy.models.ema import EMA, ema_decay
from paradiffpolicy.models.matmul_unet1d import Int8Weight, MatmulUnet1D, Taps, Weight, Windows
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.models.precision import HALF, Model, half_trunk, rounded_trunk, trunk_in
from paradiffpolicy.models.training_unet1d import TrainingUnet1D, training_form
from paradiffpolicy.models.unet1d import ConditionalUnet1D, SinusoidalPosEmb

from .conftest import ROOT, TINY, assert_close


def published_names(input_dim, cond_dim, dsed, down_dims, kernel=5):
    """Names and shapes of diffusion_policy's state dict, written out from its module structure."""
    shapes = {}

    def add(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0],)

    def conv_block(name, c_in, c_out):
        add(f"{name}.block.0", c_out, c_in, kernel)
        add(f"{name}.block.1", c_out)

    def residual(name, c_in, c_out):
        conv_block(f"{name}.blocks.0", c_in, c_out)
        conv_block(f"{name}.blocks.1", c_out, c_out)
        add(f"{name}.cond_encoder.1", 2 * c_out, dsed + cond_dim)
        if c_in != c_out:
            add(f"{name}.residual_conv", c_out, c_in, 1)

    add("diffusion_step_encoder.1", 4 * dsed, dsed)
    add("diffusion_step_encoder.3", dsed, 4 * dsed)
    dims = [input_dim, *down_dims]
    for level, (c_in, c_out) in enumerate(itertools.pairwise(dims)):
        residual(f"down_modules.{level}.0", c_in, c_out)
        residual(f"down_modules.{level}.1", c_out, c_out)
        if level < len(down_dims) - 1:
            add(f"down_modules.{level}.2.conv", c_out, c_out, 3)
    for block in range(2):
        residual(f"mid_modules.{block}", dims[-1], dims[-1])
    for level, (c_in, c_out) in enumerate(reversed(list(itertools.pairwise(down_dims)))):
        residual(f"up_modules.{level}.0", 2 * c_out, c_in)
        residual(f"up_modules.{level}.1", c_in, c_in)
        add(f"up_modules.{level}.2.conv", c_in, c_in, 4)
    conv_block("final_conv.0", down_dims[0], down_dims[0])
    add("final_conv.1", input_dim, down_dims[0], 1)
    return shapes


@pytest.mark.parametrize("down_dims", [(64, 128, 256), (256, 512, 1024), (128, 256), (32, 64, 128, 256)])
def test_state_dict_is_diffusion_policys_name_for_name(down_dims):
    network = ConditionalUnet1D(2, 40, 256, down_dims)
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == published_names(2, 40, 256, down_dims)


def test_the_published_low_dim_network_has_65_8_million_parameters():
    assert sum(p.numel() for p in ConditionalUnet1D(2, 40).parameters()) == 65_783_298


def test_timesteps_are_embedded_as_published():
    """sin and cos of t / 10000^(k / (half - 1)), sines first."""
    embedding = SinusoidalPosEmb(8)(torch.tensor([0.0, 3.0]))
    expected = [3.0 / 10000 ** (k / 3) for k in range(4)]
    assert_close(embedding[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert_close(embedding[1, :4], torch.tensor(expected).sin())
    assert_close(embedding[1, 4:], torch.tensor(expected).cos())


def test_film_scales_and_shifts():
    """A residual block against its formula, from plain functions."""
    torch.manual_seed(0)
    block = ConditionalUnet1D(2, 3, 8, (8,), n_groups=4).down_modules[0][0]
    x, condition = torch.randn(2, 2, 4), torch.randn(2, 11)
    film = nn.functional.linear(
        nn.functional.mish(condition), block.cond_encoder[1].weight, block.cond_encoder[1].bias
    )
    scale, bias = film[:, :8, None], film[:, 8:, None]

    def conv_block(module, x):
        h = nn.functional.conv1d(x, module.block[0].weight, module.block[0].bias, padding=2)
        h = nn.functional.group_norm(h, 4, module.block[1].weight, module.block[1].bias)
        return nn.functional.mish(h)

    expected = conv_block(block.blocks[1], scale * conv_block(block.blocks[0], x) + bias)
    expected = expected + nn.functional.conv1d(x, block.residual_conv.weight, block.residual_conv.bias)
    assert_close(block(x, film), expected)


def test_without_scale_the_condition_is_added():
    network = ConditionalUnet1D(2, 4, 8, (16, 32), cond_predict_scale=False)
    assert network.down_modules[0][0].cond_encoder[1].weight.shape == (16, 12)
    assert network(torch.randn(3, 8, 2), torch.zeros(3), torch.randn(3, 4)).shape == (3, 8, 2)


def test_batch_elements_are_independent():
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 4, 8, (16, 32)).eval()
    x, t, condition = torch.randn(3, 8, 2), torch.tensor([0, 50, 99]), torch.randn(3, 4)
    together = network(x, t, condition)
    alone = network(x[1:2], t[1:2], condition[1:2])
    assert_close(together[1:2], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("down_dims", "n_groups"), [((), 8), ((12, 20), 8), ((12, 8), 4)])
def test_impossible_widths_are_refused(down_dims, n_groups):
    with pytest.raises(ValueError, match="multiple of"):
        ConditionalUnet1D(2, 4, 8, down_dims, n_groups=n_groups)


@pytest.mark.parametrize(("down_dims", "horizon"), [((8,), 1), ((16, 8), 2)])
def test_groups_of_one_value_are_refused(down_dims, horizon):
    """They would be 0, and torch refuses them for a batch of one."""
    spec = replace(TINY, down_dims=down_dims, horizon=horizon, n_obs_steps=1, n_action_steps=1)
    with pytest.raises(InputError, match="leave one value in a group"):
        build_network(spec)
    build_network(replace(spec, horizon=2 * horizon))


@pytest.mark.parametrize("n_groups", [2, 4, 16])
def test_the_last_block_has_eight_groups_whatever_the_others_have(n_groups):
    """As in the networks that published weights were trained with."""
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 4, 8, (16, 32), n_groups=n_groups).eval().requires_grad_(False)
    x, film = torch.randn(3, 8, 2), torch.randn(3, sum(network.film_sizes))
    entered: list[torch.Tensor] = []
    network.final_conv.register_forward_pre_hook(lambda module, args: entered.extend(args))
    output = network.trunk(x, film)
    (conv, norm, _), last = network.final_conv[0].block, network.final_conv[1]
    h = nn.functional.group_norm(conv(entered[0]), 8, norm.weight, norm.bias)
    assert_close(output, last(nn.functional.mish(h)).transpose(1, 2))
    assert_close(MatmulUnet1D(network)(x, film), output)
    assert network.mid_modules[0].blocks[0].block[1].num_groups == n_groups


LEROBOT = ROOT.parent / "shared" / "fixtures" / "lerobot" / "0.4.4-state_env_odd"


@pytest.mark.skipif(not LEROBOT.exists(), reason=f"LeRobot's weights are not at {LEROBOT}")
def test_lerobots_weights_with_four_groups_compute_what_they_do_there():
    config = json.loads((LEROBOT / "config.json").read_text())
    there = {"conv1.": "blocks.0.", "conv2.": "blocks.1."}
    weights = {}
    for name, value in safetensors.torch.load_file(LEROBOT / "model.safetensors").items():
        if name.startswith("diffusion.unet."):
            name = re.sub(r"conv[12]\.", lambda found: there[found[0]], name.removeprefix("diffusion.unet."))
            weights[re.sub(r"(_modules\.\d+\.2)\.", r"\1.conv.", name)] = value
    expected = {name: torch.from_numpy(value) for name, value in np.load(LEROBOT / "expected.npz").items()}
    x, condition = expected["x_T"], expected["global_cond"]
    network = ConditionalUnet1D(
        x.shape[-1],
        condition.shape[-1],
        config["diffusion_step_embed_dim"],
        config["down_dims"],
        config["kernel_size"],
        config["n_groups"],
        config["use_film_scale_modulation"],
    )
    network.load_state_dict(weights)
    with torch.inference_mode():
        output = network(x, torch.full((len(x),), 37.0), condition)
    assert config["n_groups"] == 4
    assert_close(output, expected["unet_output_at_x_T"], atol=2e-5, rtol=0)


def test_ema_decay_warms_up_as_diffusion_policys():
    assert ema_decay(1) == 0.0
    assert ema_decay(2) == pytest.approx(1 - 2**-0.75)
    assert ema_decay(1001) == pytest.approx(1 - 1001**-0.75)
    assert ema_decay(10**9) == 0.9999


def test_ema_averages():
    network = nn.Linear(1, 1)
    ema = EMA(network)
    with torch.no_grad():
        network.weight.fill_(2.0)
        ema.update(network, 1)  # decay 0: takes the trained weights
        assert float(ema.network.weight) == 2.0
        network.weight.fill_(4.0)
        ema.update(network, 2)
    assert float(ema.network.weight) == pytest.approx(4 - 2 * (1 - 2**-0.75))


# ---------------------------------------------------------------------------- the trunk in other forms


def random_trunk(down_dims, kernel_size=5, scale=True, seed=0):
    torch.manual_seed(seed)
    network = ConditionalUnet1D(2, 5, 8, down_dims, kernel_size, n_groups=4, cond_predict_scale=scale)
    return network.eval().requires_grad_(False)


@settings(max_examples=30, deadline=None)
@given(
    down_dims=st.lists(st.sampled_from([4, 8, 12]), max_size=3).map(lambda widths: [8, *widths]),
    steps=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    scale=st.booleans(),
)
def test_a_trunk_of_matrix_products_is_the_trunk(down_dims, steps, kernel_size, scale):
    network = random_trunk(down_dims, kernel_size, scale).double()
    sample = torch.randn(3, steps * network.horizon_multiple, 2, dtype=torch.float64)
    film = torch.randn(3, sum(network.film_sizes), dtype=torch.float64)
    expected = network.trunk(sample, film)
    for form in (Taps, Windows):
        assert_close(MatmulUnet1D(network, Weight, form)(sample, film), expected, atol=1e-10, rtol=1e-10)


def test_film_is_a_part_for_the_time_and_a_part_for_the_condition():
    network = random_trunk((8, 16)).double()
    t, condition = torch.tensor([3.0, 70.0]).double(), torch.randn(2, 5).double()
    both = torch.cat((network.diffusion_step_encoder(t), condition), dim=-1)
    expected = [block.cond_encoder(both) for block in network.residual_blocks]
    parts = network.combine(network.time_features(t), network.condition_features(condition))
    assert_close(parts, torch.cat(expected, dim=-1))
    assert network.film_sizes == [part.shape[1] for part in expected]


def test_int8_weights_are_near_and_small():
    """Rounded by at most half a step of a 127th of their row's largest; only the large ones."""
    network = random_trunk((16, 64, 128))
    trunk = trunk_in(network, "int8", torch.device("cpu"))
    kinds = [type(module) for module in trunk.modules()]
    assert kinds.count(Int8Weight) > 10 and kinds.count(Weight) > 10
    assert all(m.quantized.dtype is torch.int8 for m in trunk.modules() if isinstance(m, Int8Weight))
    nbytes = sum(buffer.nbytes for buffer in trunk.buffers())
    assert nbytes < 0.4 * sum(p.nbytes for p in network.parameters())
    weight = torch.randn(5, 7)
    error = (Int8Weight(weight)(torch.eye(7)).T - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 127 / 2 + 1e-6).all()
    sample, film = torch.randn(3, 16, 2), torch.randn(3, sum(network.film_sizes))
    exact, near = network.trunk(sample, film), trunk(sample, film)
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_rounded_is_as_accurate_as_half(precision):
    """The same numbers to a few roundings, and its outputs are halves."""
    network, dtype = random_trunk((16, 32)), HALF[precision]
    sample, film = torch.randn(3, 16, 2), torch.randn(3, sum(network.film_sizes))
    exact = network.trunk(sample, film)
    rounded, half = (make(network, dtype)(sample, film) for make in (rounded_trunk, half_trunk))
    errors = [float((values - exact).abs().max()) for values in (rounded, half)]
    assert errors[0] > 0 and 0.2 < errors[0] / errors[1] < 5
    assert torch.equal(rounded.to(dtype).float(), rounded)
    assert_close(network.trunk(sample, film), exact)  # the network itself stays as it was


def test_precisions_that_dont_exist_are_named():
    cpu, network = torch.device("cpu"), random_trunk((8,))
    with pytest.raises(InputError, match=r"unknown precision 'f61'.*f16"):
        trunk_in(network, "f61", cpu)
    with pytest.raises(InputError, match="no form of matrix products in bf16"):
        trunk_in(network, "bf16", cpu, make_convolution=Taps)
    with pytest.raises(InputError, match="precision=int8 needs a network with a trunk"):
        Model(lambda x, t, condition: x).check("int8")


def gradients(network: nn.Module, unet: nn.Module, batch, autocast=False) -> dict[str, torch.Tensor]:
    *inputs, target = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = network(*inputs)
    unet.zero_grad()
    ((output.float() if autocast else output) - target).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in unet.named_parameters()}


def training_batch(network: ConditionalUnet1D, horizon: int, dtype: torch.dtype, rows: int = 3):
    draw = torch.Generator().manual_seed(3)
    sample, target = torch.randn(2, rows, horizon, 2, generator=draw, dtype=dtype)
    condition = torch.randn(rows, network.global_cond_dim, generator=draw, dtype=dtype)
    return sample, torch.arange(rows).to(dtype), condition, target


@pytest.mark.parametrize(
    ("down_dims", "kernel", "scale", "horizon", "dtype", "error"),
    [
        ((16, 32, 64), 5, True, 16, torch.float32, 1e-5),
        ((16, 32, 64), 5, True, 16, torch.float64, 1e-13),
        ((16, 24), 3, False, 2, torch.float64, 1e-12),
        ((8,), 7, True, 3, torch.float64, 1e-12),
    ],
)
def test_the_training_form_has_the_networks_gradients(down_dims, kernel, scale, horizon, dtype, error):
    torch.manual_seed(0)
    unet = ConditionalUnet1D(2, 10, 16, down_dims, kernel, cond_predict_scale=scale).to(dtype)
    batch = training_batch(unet, horizon, dtype)
    plain, form = (gradients(network, unet, batch) for network in (unet, TrainingUnet1D(unet)))
    for name, gradient in plain.items():
        assert_close(form[name], gradient, atol=error, rtol=error)


def test_the_training_form_in_bfloat16_is_as_close_to_float32_as_autocast():
    torch.manual_seed(0)
    unet = ConditionalUnet1D(2, 10, 32, (32, 64))
    batch = training_batch(unet, 16, torch.float32, rows=64)
    exact = gradients(unet, unet, batch)
    errors = []
    for network in (unet, TrainingUnet1D(unet)):
        found = gradients(network, unet, batch, autocast=True)
        off = torch.cat([(found[name] - exact[name]).flatten() for name in exact])
        errors.append(float(off.norm() / torch.cat([g.flatten() for g in exact.values()]).norm()))
    assert 0 < errors[1] < 1.5 * errors[0] < 0.03


def test_other_networks_and_devices_train_in_their_own_form():
    unet, other = ConditionalUnet1D(2, 10, 16, (16,)), nn.Linear(2, 2)
    assert training_form(other, torch.device("cpu"), True) is other
    assert training_form(unet, torch.device("cuda"), True) is unet
    assert training_form(unet, torch.device("cpu"), False) is unet
    assert isinstance(training_form(unet, torch.device("cpu"), True), TrainingUnet1D)
