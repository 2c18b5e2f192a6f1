"""Every parallel driver is the sequential one, computed in another order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling.picard import Picard, PicardPublished
from paradiffpolicy.sampling.realtime import Realtime, warm_start
from paradiffpolicy.sampling.sampler import DRIVERS, fresh, make_sampler
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.solvers import SOLVERS, SPACINGS, solver_tableau
from paradiffpolicy.sampling.walk import evaluate_active, evaluate_all

from .problems import SCHEDULE, mixture_denoiser, noise_for

EXACT = 1e-20
"""A tolerance that only a standstill meets."""

WINDOWED = [Picard, PicardPublished]


@pytest.mark.parametrize("evaluate", [evaluate_all, evaluate_active])
@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("driver", WINDOWED)
def test_windowed_drivers_equal_sequential(driver, solver, batch, window, evaluate):
    tableau = solver_tableau(SCHEDULE, solver, 20)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(20, batch)
    reference = Sequential()(denoise, tableau, x_T, z)
    walk = driver(window, EXACT, evaluate)(denoise, tableau, x_T, z)
    torch.testing.assert_close(walk.sample, reference.sample, atol=1e-9, rtol=0)
    torch.testing.assert_close(walk.x0_hats, reference.x0_hats, atol=1e-9, rtol=0)
    assert (walk.rounds <= 20).all()
    if window == 1:
        assert (walk.rounds == 20).all() and (walk.evaluations == 20).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_drivers_equal_sequential_for_drawn_problems(data):
    draw = data.draw
    schedule = NoiseSchedule.named(
        draw(st.sampled_from(["squared_cosine", "linear", "scaled_linear"])), draw(st.integers(5, 120))
    )
    n = draw(st.integers(1, min(30, schedule.n_train_steps)))
    tableau = solver_tableau(
        schedule, draw(st.sampled_from(sorted(SOLVERS))), n, draw(st.sampled_from(sorted(SPACINGS)))
    )
    batch = draw(st.integers(1, 4))
    x_T, z = noise_for(n, batch, seed=draw(st.integers(0, 2**31)))
    denoise = mixture_denoiser(schedule)
    reference = Sequential()(denoise, tableau, x_T, z)
    driver = draw(st.sampled_from(WINDOWED))(draw(st.integers(1, n + 3)), EXACT)
    torch.testing.assert_close(driver(denoise, tableau, x_T, z).sample, reference.sample, atol=1e-8, rtol=0)
    realtime = Realtime(n)(denoise, tableau, x_T, z, torch.zeros_like(z))
    torch.testing.assert_close(realtime.sample, reference.sample, atol=1e-8, rtol=0)


@pytest.mark.parametrize("driver", WINDOWED)
def test_batch_elements_do_not_hold_one_another(driver):
    tableau = solver_tableau(SCHEDULE, "ddpm", 50)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(50, 5, shape=(1, 1))
    together = driver(10, 0.1)(denoise, tableau, x_T, z)
    assert len(set(together.rounds.tolist())) > 1, "the problem should separate the elements"
    for b in range(5):

        def alone_denoise(x, t, element, b=b):
            return denoise(x, t, element + b)

        alone = driver(10, 0.1)(alone_denoise, tableau, x_T[b : b + 1], z[:, b : b + 1])
        assert alone.rounds[0] == together.rounds[b]
        assert alone.evaluations[0] == together.evaluations[b]
        torch.testing.assert_close(alone.sample[0], together.sample[b], atol=1e-12, rtol=0)


def test_tolerance_trades_rounds_for_error():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(100, 8)
    reference = Sequential()(denoise, tableau, x_T, z).sample
    walks = [Picard(100, tolerance)(denoise, tableau, x_T, z) for tolerance in (1.0, 0.1, 0.01)]
    errors = [float((walk.sample - reference).abs().max()) for walk in walks]
    rounds = [float(walk.rounds.double().mean()) for walk in walks]
    assert errors[0] > errors[1] > errors[2]
    assert rounds[0] < rounds[1] < rounds[2] < 60


def test_exact_linear_form_needs_fewer_rounds_than_the_published():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(100, 8)
    linear = Picard(50, 0.1)(denoise, tableau, x_T, z)
    published = PicardPublished(50, 0.1)(denoise, tableau, x_T, z)
    assert linear.rounds.double().mean() < 0.7 * published.rounds.double().mean()


def test_picard_from_the_solution_stops_at_once():
    tableau = solver_tableau(SCHEDULE, "ddpm", 30)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(30, 2)
    solution = Sequential()(denoise, tableau, x_T, z)
    walk = Picard(30, 1e-3)(denoise, tableau, x_T, z, solution.x0_hats)
    # The last node's variance is 0: it is solved by becoming a window's first node.
    assert (walk.rounds <= 2).all()


def test_realtime_without_a_start_is_sequential():
    tableau = solver_tableau(SCHEDULE, "ddim", 10)
    denoise, (x_T, z) = mixture_denoiser(SCHEDULE), noise_for(10, 2)
    walk = Realtime(2)(denoise, tableau, x_T, z)
    assert torch.equal(walk.sample, Sequential()(denoise, tableau, x_T, z).sample)
    assert (walk.rounds == 10).all()


def test_realtime_counts_its_rounds():
    tableau = solver_tableau(SCHEDULE, "ddim", 10)
    x_T, z = noise_for(10, 2)
    walk = Realtime(3)(mixture_denoiser(SCHEDULE), tableau, x_T, z, torch.zeros_like(z))
    assert (walk.rounds == 3).all() and (walk.evaluations == 30).all()


def test_warm_start_moves_everything_by_the_executed_steps():
    tableau = solver_tableau(SCHEDULE, "ddpm", 6)
    generators = [torch.Generator().manual_seed(b) for b in range(2)]
    x_T, z, _ = fresh(tableau, (8, 2), None, 0, generators)
    walk = Sequential()(mixture_denoiser(SCHEDULE), tableau, x_T, z)
    x_T_next, z_next, start = warm_start(walk, 3, generators)
    assert torch.equal(x_T_next[:, :5], x_T[:, 3:])
    assert torch.equal(z_next[..., :5, :], z[..., 3:, :])
    assert torch.equal(start[..., :5, :], walk.x0_hats[..., 3:, :])
    assert torch.equal(start[..., 5:, :], walk.x0_hats[..., -1:, :].expand(6, 2, 3, 2))
    assert not torch.equal(x_T_next[:, 5:], x_T[:, 5:])


def test_noise_of_an_element_is_its_generators_alone():
    tableau = solver_tableau(SCHEDULE, "ddpm", 6)
    together = fresh(tableau, (4, 2), None, 0, [torch.Generator().manual_seed(s) for s in (3, 4)])
    alone = fresh(tableau, (4, 2), None, 0, [torch.Generator().manual_seed(4)])
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][:, 1], alone[1][:, 0])


def test_a_nan_from_the_network_ends_the_walk():
    tableau = solver_tableau(SCHEDULE, "ddpm", 10)
    x_T, z = noise_for(10, 1)
    walk = Picard(5, 0.1)(lambda x, t, element: x * float("nan"), tableau, x_T, z)
    assert walk.rounds[0] <= 10 and not walk.sample.isfinite().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": "picard", "window": 0}, "window=0"),
        ({"driver": "picard", "tolerance": 0.0}, "tolerance=0.0"),
        ({"driver": "picard_published", "tolerance": -1}, "tolerance=-1"),
        ({"driver": "realtime", "rounds": 0}, "rounds=0"),
        ({"driver": "picrad"}, "did you mean 'picard'"),
        ({"driver": "picard", "windwo": 3}, "did you mean 'window'"),
        ({"solver": "ddmp"}, "did you mean 'ddpm'"),
        ({"spacing": "trialing"}, "did you mean 'trailing'"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_steps": 101}, "n_steps=101"),
        ({"solver": "ddim", "solver_options": {"eta": 2.0}}, "eta=2.0"),
        ({"solver": "ddim", "solver_options": {"etta": 0.0}}, "etta"),
        ({"solver": "ddpm", "solver_options": {"variance": "fixed_smal"}}, "did you mean 'fixed_small'"),
    ],
)
def test_bad_sampler_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        make_sampler(SCHEDULE, **options)


def test_every_driver_is_listed():
    for driver in DRIVERS:
        assert make_sampler(SCHEDULE, driver=driver).tableau.n_nodes == 100
