"""Image networks of diffusers under our drivers."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

from paradiffpolicy.diffusion.denoiser import Clip, DynamicThreshold, unbounded
from paradiffpolicy.diffusion.foreign import diffusers_denoiser
from paradiffpolicy.diffusion.guidance import classifier_free
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling.sampler import DRIVERS, make_sampler
from paradiffpolicy.sampling.sequential import Sequential

from .conftest import assert_close, load_script

SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}
DDPM = diffusers.DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")


@pytest.fixture(scope="module")
def digits():
    """The example, as a module."""
    return load_script("digits")


@functools.cache
def unconditional():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**SIZES, **blocks).eval().requires_grad_(False)


@functools.cache
def text_conditional():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = diffusers.UNet2DConditionModel(**SIZES, **blocks, cross_attention_dim=16, attention_head_dim=4)
    return unet.eval().requires_grad_(False)


def seeded(n):
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


def test_an_unconditional_model_samples_as_in_its_own_pipeline(monkeypatch):
    unet = unconditional()
    denoiser = diffusers_denoiser(unet, DDPM.config)
    sampler = make_sampler(denoiser.schedule, n_steps=10)
    with torch.inference_mode():
        solution = sampler(denoiser.bind(torch.zeros(2)), (1, 8, 8), seeded(2))
        draws = iter(solution.noise.z)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(draws)
        )
        DDPM.set_timesteps(10)
        x = solution.noise.x_T
        for t in DDPM.timesteps:
            x = DDPM.step(unet(x, t).sample, t, x).prev_sample
    assert_close(solution.sample, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("driver", ["picard", "picard_published", "anderson", "speculative"])
def test_a_text_conditional_model_is_guided_in_parallel(driver):
    denoiser = diffusers_denoiser(text_conditional(), DDPM.config)
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    denoise = classifier_free(denoiser, states, torch.zeros_like(states), torch.tensor([1.5, 3.0]))
    exact = {} if driver == "speculative" else {"tolerance": 1e-4}
    sampler = make_sampler(denoiser.schedule, n_steps=8, driver=driver, window=8, **exact)
    with torch.inference_mode():
        solution = sampler(denoise, (1, 8, 8), seeded(2))
        reference = Sequential()(denoise, sampler.tableau, solution.noise)
    assert_close(solution.sample, reference.sample, atol=1e-3, rtol=0)
    assert (solution.iterations <= 8).all()


def test_the_schedulers_config_is_read():
    unet = unconditional()
    plain = diffusers.DDIMScheduler(50, beta_schedule="linear", clip_sample=False)
    denoiser = diffusers_denoiser(unet, plain.config)
    assert denoiser.threshold is unbounded and denoiser.schedule.n_train_steps == 50
    assert_close(denoiser.schedule.alphas_cumprod.float(), plain.alphas_cumprod)
    v = diffusers_denoiser(unet, {**DDPM.config, "prediction_type": "v_prediction", "clip_sample_range": 2.0})
    assert v.prediction == "v_prediction" and v.threshold == Clip(2.0)
    dynamic = diffusers_denoiser(unet, {**DDPM.config, "thresholding": True})
    assert dynamic.threshold == DynamicThreshold(0.995, 1.0)
    own = diffusers_denoiser(unet, {**DDPM.config, "trained_betas": [0.1, 0.2, 0.3]})
    assert_close(own.schedule.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow"}, "unknown prediction type"),
        ({"beta_schedule": "sigmoid"}, "unknown noise schedule"),
        ({"rescale_betas_zero_snr": True}, "pure noise"),
    ],
)
def test_what_is_not_known_is_named(change, message):
    with pytest.raises(InputError, match=message):
        diffusers_denoiser(unconditional(), {**DDPM.config, **change})


def test_the_digits_example_learns_and_samples_in_parallel(digits, tmp_path):
    unet, denoiser = digits.new_denoiser()
    losses = digits.train(unet, denoiser, n_steps=40, batch_size=24, progress=range)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    unet.eval().requires_grad_(False)
    labels, settings = torch.arange(2), {"n_steps": 25}
    reference = digits.sample(denoiser, labels, 2.0, **settings)
    parallel = digits.sample(denoiser, labels, 2.0, **settings, driver="picard", window=25, tolerance=1e-3)
    assert_close(parallel.sample, reference.sample, atol=5e-3, rtol=0)
    assert float(parallel.iterations.double().mean()) < 18
    # The label matters, and more so with more guidance.
    other = digits.sample(denoiser, labels + 1, 2.0, **settings)
    assert (other.sample - reference.sample).abs().mean() > 0.01
    digits.picture({"a": reference, "b": parallel}, columns=1).savefig(tmp_path / "digits.png")


def test_image_samplers_take_every_driver_that_needs_no_time_axis():
    denoiser = diffusers_denoiser(unconditional(), DDPM.config)
    for driver in DRIVERS:
        sampler = make_sampler(denoiser.schedule, n_steps=4, driver=driver)
        with torch.inference_mode():
            solution = sampler(denoiser.bind(torch.zeros(1)), (1, 8, 8), seeded(1))
        assert solution.sample.shape == (1, 1, 8, 8)
