"""One convention for every network: predictions, thresholds, guidance."""

from __future__ import annotations

import math

import pytest
import torch

from paradiffpolicy.diffusion.denoiser import (
    PREDICTIONS,
    Clip,
    Denoiser,
    DynamicThreshold,
    denoising_loss,
    unbounded,
)
from paradiffpolicy.diffusion.guidance import classifier, classifier_free
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.models.unet1d import ConditionalUnet1D
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.sampler import DRIVERS, make_sampler
from paradiffpolicy.sampling.sequential import Sequential

from .conftest import assert_close, gaussian_denoiser

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
FLOW = NoiseSchedule.named("flow", 100)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [*((SCHEDULE, name) for name in PREDICTIONS), *((FLOW, name) for name in ("velocity", "v", "sample"))],
)
def test_a_perfect_network_has_no_loss_and_denoises(schedule, prediction):
    """The target, given back as the output, leads to x0, at every timestep."""
    torch.manual_seed(0)
    x0 = torch.rand(100, 4, 2, dtype=torch.float64) * 1.8 - 0.9
    eps, t = torch.randn_like(x0), torch.arange(100)
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1), schedule.sigma(t).view(-1, 1, 1)

    def perfect(x, t, condition):
        return PREDICTIONS[prediction].target(x0, eps, alpha, sigma)

    condition = torch.zeros(100, 1)
    loss = denoising_loss(perfect, schedule, prediction, x0, condition, t, eps)
    assert float(loss) < 1e-12 and math.isfinite(float(loss))
    denoised = Denoiser(perfect, schedule, prediction)(alpha * x0 + sigma * eps, t, condition)
    assert_close(denoised, x0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_what_leaves_x0_open_at_pure_noise_is_refused(prediction):
    with pytest.raises(InputError, match=f"'{prediction}' leaves x_0 open .*: velocity, v or sample"):
        Denoiser(lambda x, t, condition: x, FLOW, prediction)


def test_score_is_weighted_as_epsilon():
    """Its squared error, times sigma squared, is epsilon's."""
    torch.manual_seed(0)
    x0, eps, t = torch.randn(100, 4, 2).double(), torch.randn(100, 4, 2).double(), torch.arange(100)
    sigma = SCHEDULE.sigma(t).view(-1, 1, 1)
    losses = [
        denoising_loss(lambda x, t, c, s=scale: 0.3 * x * s, SCHEDULE, kind, x0, torch.zeros(100, 1), t, eps)
        for kind, scale in (("epsilon", 1.0), ("score", -1 / sigma))
    ]
    assert_close(losses[0], losses[1])


def test_x0_is_clipped():
    denoise = Denoiser(lambda x, t, condition: x * 0 + 5, SCHEDULE, "sample", Clip(1.0))
    assert float(denoise(torch.zeros(1, 2, 2), torch.tensor([3]), torch.zeros(1, 1)).max()) == 1.0


def test_a_dynamic_threshold_is_each_rows_own():
    x0 = torch.linspace(-1, 1, 101)[:, None] * torch.tensor([0.5, 1.0, 4.0])  # [101, 3]
    rows = x0.T[..., None]
    bounded = DynamicThreshold(ratio=0.9)(rows)
    assert_close(bounded[:2], rows[:2])  # nothing over 1: nothing happens
    assert float(bounded[2].abs().max()) == 1.0
    assert_close(bounded[2, 50:90], rows[2, 50:90] / 3.6)
    alone = DynamicThreshold(ratio=0.9)(rows[2:])
    assert torch.equal(alone[0], bounded[2])


@pytest.mark.parametrize(
    "make", [lambda: DynamicThreshold(0.0), lambda: DynamicThreshold(1.5), lambda: Clip(0.0)]
)
def test_thresholds_refuse_nonsense(make):
    with pytest.raises(InputError):
        make()


# --------------------------------------------------------------------------------------- guidance


def conditional_network(calls=None):
    """Epsilon of a Gaussian whose mean is the condition; a zero condition stands for none."""

    def network(x, t, condition):
        if calls is not None:
            calls.append(len(x))
        alpha, sigma = SCHEDULE.alpha(t).view(-1, 1, 1), SCHEDULE.sigma(t).view(-1, 1, 1)
        x0 = condition[:, None] + alpha * 0.1 / (alpha**2 * 0.1 + sigma**2) * (x - alpha * condition[:, None])
        return (x - alpha * x0) / sigma

    return network


CONDITION = torch.tensor([[0.3, -0.2], [-0.5, 0.1], [0.2, 0.6]], dtype=torch.float64)
BLANK = torch.zeros_like(CONDITION)
SCALES = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)


def test_classifier_free_guidance_is_the_papers():
    """``eps = eps_blank + scale (eps_condition - eps_blank)``, in one network call."""
    calls = []
    denoiser = Denoiser(conditional_network(calls), SCHEDULE, "epsilon", unbounded)
    x, t = noise_for(1, 3, shape=(4, 2)).x_T, torch.tensor([5.0, 50.0, 90.0])
    element = torch.tensor([2, 0, 1])
    guided = classifier_free(denoiser, CONDITION, BLANK, SCALES)(x, t, element)
    assert calls == [6]
    given, without = (denoiser.network(x, t, c[element]) for c in (CONDITION, BLANK))
    eps = without + SCALES[element].view(-1, 1, 1) * (given - without)
    alpha, sigma = SCHEDULE.alpha(t).view(-1, 1, 1), SCHEDULE.sigma(t).view(-1, 1, 1)
    assert_close(guided, (x - sigma * eps) / alpha, atol=1e-9, rtol=0)


def test_scale_one_is_the_network_and_zero_leaves_the_condition_out():
    denoiser = Denoiser(conditional_network(), SCHEDULE, "epsilon", Clip(1.0))
    x, t, element = noise_for(1, 3).x_T, torch.full((3,), 40.0), torch.arange(3)
    for scale, condition in ((1.0, CONDITION), (0.0, BLANK)):
        guided = classifier_free(denoiser, CONDITION, BLANK, torch.full((3,), scale).double())
        assert_close(guided(x, t, element), denoiser.bind(condition)(x, t, element))


def test_classifier_guidance_of_a_gaussian_is_bayes():
    """Prior N(0.1, 0.4^2) and a measurement of x_0: the guided denoiser is the posterior's."""
    mean, std, noise, y = 0.1, 0.4, 0.3, 0.6

    def log_probability(x, t, element):
        """``y = x_0 + noise``, so given x_t it is Gaussian about D."""
        alpha, sigma = SCHEDULE.alpha(t).view(-1, 1, 1), SCHEDULE.sigma(t).view(-1, 1, 1)
        D = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        spread = noise**2 + std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
        return (-((y - D) ** 2) / (2 * spread)).sum(dim=(1, 2))

    def network(x, t, condition):
        return gaussian_denoiser(SCHEDULE, torch.tensor([[mean]], dtype=torch.float64), std)(x, t, None)

    denoiser = Denoiser(network, SCHEDULE, "sample", unbounded)
    guided = classifier(denoiser, torch.zeros(3, 1), log_probability, torch.ones(3, dtype=torch.float64))
    gain = std**2 / (std**2 + noise**2)
    posterior = gaussian_denoiser(
        SCHEDULE, torch.tensor([[mean + gain * (y - mean)]], dtype=torch.float64), std * math.sqrt(1 - gain)
    )
    x, t, element = noise_for(1, 3, shape=(2, 1)).x_T, torch.tensor([3.0, 50.0, 95.0]), torch.arange(3)
    with torch.inference_mode():
        guided_x0 = guided(x, t, element)
    assert_close(guided_x0, posterior(x, t, element), atol=1e-9, rtol=0)


def pulls_right(x, t, element):
    """A reward: the last number should be large, more so for later batch elements."""
    return (1 + element) * x[:, -1, -1]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", ["classifier_free", "classifier"])
def test_guidance_works_under_every_driver(driver, kind):
    denoiser = Denoiser(conditional_network(), SCHEDULE, "epsilon", Clip(1.0))
    denoise = {
        "classifier_free": classifier_free(denoiser, CONDITION, BLANK, SCALES),
        "classifier": classifier(denoiser, CONDITION, pulls_right, 0.2 * SCALES),
    }[kind]
    exact = {"tolerance": 1e-20} if driver in ("picard", "picard_published", "anderson") else {}
    exact |= {"iterations": 20} if driver == "rti" else {}
    sampler = make_sampler(SCHEDULE, n_steps=20, driver=driver, **exact)
    noise = noise_for(20, 3)
    with torch.inference_mode():
        solution = sampler.driver(denoise, sampler.tableau, noise, torch.zeros_like(noise.z))
        reference = Sequential()(denoise, sampler.tableau, solution.noise)
        plain = Sequential()(denoiser.bind(CONDITION), sampler.tableau, solution.noise)
    assert_close(solution.sample, reference.sample, atol=1e-9, rtol=0)
    assert (reference.sample - plain.sample).abs().max() > 0.05


# ------------------------------------------------------------------------------------------ at nodes

NODES = torch.tensor([91.0, 40.5, 7.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["split", "whole"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_denoiser_at_nodes_is_the_denoiser(kind, prediction):
    """Values computed beforehand equal those computed each time; guided too."""
    torch.manual_seed(0)
    unet = ConditionalUnet1D(2, 2, 8, (8, 16), n_groups=4).double().eval().requires_grad_(False)
    network = unet if kind == "split" else lambda x, t, condition: unet(x, t, condition)
    denoiser = Denoiser(network, SCHEDULE, prediction, Clip(1.0))
    at_nodes = denoiser.at(NODES, torch.zeros((), dtype=torch.float64))
    x = noise_for(1, 5, shape=(4, 2)).x_T
    node, element = torch.tensor([3, 0, 2, 1, 0]), torch.tensor([2, 1, 0, 0, 2])
    observed, blank = at_nodes.observe(CONDITION), at_nodes.observe(BLANK)
    expected = denoiser.bind(CONDITION)(x, NODES[node], element)
    assert_close(at_nodes.bind(observed)(x, node, element), expected, atol=1e-10, rtol=0)
    expected = classifier_free(denoiser, CONDITION, BLANK, SCALES)(x, NODES[node], element)
    guided = classifier_free(at_nodes, observed, blank, SCALES)(x, node, element)
    assert_close(guided, expected, atol=1e-10, rtol=0)
