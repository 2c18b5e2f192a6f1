"""Any network can be sampled: with or without conditions, eagerly or captured."""

from __future__ import annotations

import doctest

import pytest
import torch

from paradiffpolicy.diffusion.denoiser import Denoiser, unbounded
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling import sample as module
from paradiffpolicy.sampling.noise import generators_for
from paradiffpolicy.sampling.sample import NetworkSampler, sample
from paradiffpolicy.sampling.sampler import make_sampler

from .conftest import assert_close

SHAPE = (3, 4, 2)
QUICK = {"solver": "ddim", "n_steps": 6}


class Towards(torch.nn.Module):
    """Epsilon that depends on x, on the timestep and on a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, t, condition):
        return self.layer(x) + t[:, None, None] / 100 + condition["goal"][:, None]


CONDITION = {
    "goal": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "unused": torch.ones(3, 1, 5),
}


def test_the_example_in_the_docs_runs():
    assert doctest.testmod(module).failed == 0


def test_a_sample_is_the_samplers():
    schedule = NoiseSchedule.named("squared_cosine", 100)
    denoiser = Denoiser(lambda x, t, condition: x * condition, schedule, "epsilon", unbounded)
    condition = torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1)
    expected = make_sampler(schedule, **QUICK)(denoiser.bind(condition), SHAPE[1:], generators_for(0, 3))
    solution = sample(lambda x, t, c: x * c, SHAPE, condition=condition, **QUICK)
    assert_close(solution.sample, expected.sample, atol=1e-6, rtol=0)
    assert str(solution) == "Solution(sample (3, 4, 2), 6 nodes, 6 iterations, 6 NFE on average)"


@pytest.mark.parametrize("capture", ["emulated", "openvino", "auto"])
def test_a_captured_network_gives_the_same(capture):
    network = Towards()
    expected = sample(network, SHAPE, condition=CONDITION, **QUICK)
    assert not expected.sample.requires_grad
    captured = NetworkSampler(network, **QUICK, driver="picard", tolerance=1e-6, capture=capture)
    for _ in range(2):
        solution = captured(SHAPE, condition=CONDITION)
        assert_close(solution.sample, expected.sample, atol=1e-5, rtol=0)
    assert [program.method == "eager" for program in captured.executor.programs] == [False]


def test_an_elements_sample_depends_on_its_own_noise_and_condition_alone():
    draws = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = sample(Towards(), SHAPE, condition=CONDITION, generator=draws, **QUICK)
    last = {name: value[2:] for name, value in CONDITION.items()}
    alone = sample(Towards(), (1, 4, 2), condition=last, generator=7, **QUICK)
    assert_close(together.sample[2:], alone.sample, atol=1e-6, rtol=0)


def test_a_driver_of_ones_own_calls_the_network_at_its_own_times():
    called = []

    def euler_twice(denoise, tableau, noise, guess=None):
        sequential = make_sampler(NoiseSchedule.named("squared_cosine", 100), **QUICK).driver
        element = torch.arange(len(noise.x_T))
        called.append(denoise(noise.x_T, torch.full((len(noise.x_T),), 41.5), element).shape)
        return sequential(denoise, tableau, noise)

    solution = sample(Towards(), SHAPE, condition=CONDITION, driver=euler_twice, **QUICK)
    assert called == [SHAPE] and torch.equal(
        solution.sample, sample(Towards(), SHAPE, condition=CONDITION, **QUICK).sample
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition": torch.zeros(2, 2)}, r"condition must be a tensor \[batch=3, …\], not \(2, 2\)"),
        ({"condition": {"goal": 1}}, r"condition\.goal must be a tensor"),
        ({"generator": torch.Generator()}, "3 batch elements need as many generators, got 1"),
        ({"capture": "opnvino"}, "unknown capture"),
        ({"schedule": "cosin"}, "unknown noise schedule"),
        ({"prediction": "velocty"}, "unknown prediction type"),
        ({"windwo": 3}, "no option 'windwo'"),
        ({"schedule": 3}, "schedule=3 must be a name"),
        ({"n_train_steps": "a"}, "n_train_steps='a'"),
        ({"n_train_steps": 10**12}, "n_train_steps=1000000000000"),
        ({"dtype": torch.int64}, "dtype=torch.int64 must be"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64 must be"),
        ({"dtype": "f32"}, "dtype='f32' must be"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        sample(lambda x, t: x, SHAPE, **{**QUICK, **settings})


def test_what_isnt_a_network_is_named():
    with pytest.raises(InputError, match="must be a module or a function"):
        sample(3, SHAPE)
    for shape in ((3,), 3, None, (1.5, 2), (True, 2), ("a", 2), (0, 2)):
        with pytest.raises(InputError, match="shape="):
            sample(lambda x, t: x, shape)


@pytest.mark.parametrize("network", [lambda x, t: x[:, :1], lambda x, t: x.long(), lambda x, t: None])
def test_what_a_network_cant_give_is_named(network):
    """Broadcasting would make a sample of it."""
    with pytest.raises(InputError, match=r"the network gives .* expected real numbers"):
        sample(network, SHAPE, **QUICK)


@pytest.mark.parametrize("seeds", [0, 7, [1, 2, 3], [torch.Generator().manual_seed(1), 2, 3]])
def test_every_element_has_noise_of_its_own(seeds):
    drawn = [torch.randn(4, generator=g).tolist() for g in generators_for(seeds, 3)]
    assert len({tuple(values) for values in drawn}) == 3


def test_one_seed_gives_an_element_the_same_noise_in_any_batch():
    few, many = generators_for(5, 2), generators_for(5, 4)
    assert [g.initial_seed() for g in few] == [g.initial_seed() for g in many[:2]]
    assert few[0].initial_seed() == 5
    assert many[1].initial_seed() != generators_for(6, 4)[0].initial_seed()


@pytest.mark.parametrize("seeds", [[torch.Generator()] * 3, None, 0.5, ["a", 1, 2], [1, 2]])
def test_generators_that_dont_fit_are_refused(seeds):
    with pytest.raises(InputError, match="generator"):
        generators_for(seeds, 3)
