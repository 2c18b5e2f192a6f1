"""Every parallel driver is the sequential one, computed in another order; or has its distribution."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paradiffpolicy.diffusion.analytic import mixture_denoiser
from paradiffpolicy.diffusion.schedule import SCHEDULES, NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling.anderson import Anderson
from paradiffpolicy.sampling.driver import IterativeDriver, Linear, evaluate_active, evaluate_all
from paradiffpolicy.sampling.noise import generators_for, noise_for
from paradiffpolicy.sampling.picard import Picard, PicardPublished
from paradiffpolicy.sampling.rti import RTI
from paradiffpolicy.sampling.sampler import DRIVERS, Sampler, make_sampler
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.solvers import SOLVERS, solver_tableau
from paradiffpolicy.sampling.spacing import SPACINGS
from paradiffpolicy.sampling.speculative import Speculative, reflection_coupling
from paradiffpolicy.sampling.warm_start import (
    STARTS,
    cold_start,
    renoised_start,
    warm_start,
    warm_start_same_noise,
)
from paradiffpolicy.types import Noise

from .conftest import DISTINCT_SOLVERS, assert_close

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
EXACT = 1e-20
"""A tolerance that only a standstill meets."""

WINDOWED = [Picard, PicardPublished, Anderson]
STOCHASTIC = {
    "ddpm": {},
    "ddim": {"eta": 0.5},
    "sde_dpm_solver_pp_2m": {},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", DISTINCT_SOLVERS)
@pytest.mark.parametrize("driver", WINDOWED)
def test_windowed_drivers_equal_sequential(driver, solver, batch):
    tableau = solver_tableau(SCHEDULE, solver, 9)
    n = tableau.n_nodes
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(n, batch)
    reference = Sequential()(denoise, tableau, noise)
    for window, evaluate in (
        (1, evaluate_all),
        (7, evaluate_all),
        (7, evaluate_active),
        (100, evaluate_active),
    ):
        solution = driver(window, EXACT, evaluate=evaluate)(denoise, tableau, noise)
        case = f"{window=}, {evaluate.__name__}"
        for name in ("sample", "x0_hats"):
            actual, expected = getattr(solution, name), getattr(reference, name)
            assert_close(actual, expected, atol=1e-9, rtol=0, msg=f"{name} for {case}")
        assert (solution.iterations <= n).all(), case
        if window == 1:
            assert (solution.iterations == n).all(), case
            assert (solution.nfe == (2 * n if driver is Anderson else n)).all(), case


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", DISTINCT_SOLVERS)
def test_rti_with_enough_iterations_equals_sequential(solver, batch):
    tableau = solver_tableau(SCHEDULE, solver, 12)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(tableau.n_nodes, batch)
    solution = RTI(tableau.n_nodes)(denoise, tableau, noise, torch.zeros_like(noise.z))
    reference = Sequential()(denoise, tableau, noise)
    assert_close(solution.sample, reference.sample, atol=1e-9, rtol=0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_drivers_equal_sequential_for_drawn_problems(data):
    draw = data.draw
    schedule = NoiseSchedule.named(draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(8, 120)))
    n_steps = draw(st.integers(4, min(30, schedule.n_train_steps - 2)))
    settings = (
        draw(st.sampled_from(sorted(SOLVERS))),
        n_steps,
        draw(st.sampled_from(sorted(SPACINGS))),
        draw(st.booleans()),
    )
    try:
        tableau = solver_tableau(schedule, *settings)
    except InputError as error:
        assert "nothing but noise" in str(error)
        tableau = solver_tableau(schedule, *settings, -6)
    n, batch = tableau.n_nodes, draw(st.integers(1, 4))
    noise = noise_for(
        n, batch, seed=draw(st.integers(0, 2**31)), shape=draw(st.sampled_from([(4, 2), (1, 3, 3)]))
    )
    denoise = mixture_denoiser(schedule)
    reference = Sequential()(denoise, tableau, noise)
    # Explicit methods can blow up on a coarse grid: equal means equal in units of what they did.
    scale = max(
        1.0, float(reference.sample.abs().max()), float(tableau.p.abs().max() + tableau.B.abs().max())
    )
    driver = draw(st.sampled_from(WINDOWED))(draw(st.integers(1, n + 3)), EXACT)
    sample = driver(denoise, tableau, noise).sample
    assert_close(sample / scale, reference.sample / scale, atol=1e-8, rtol=0)
    realtime = RTI(n)(denoise, tableau, noise, torch.zeros_like(noise.z))
    assert_close(realtime.sample / scale, reference.sample / scale, atol=1e-8, rtol=0)


def test_anderson_keeps_the_outputs_of_nodes_that_are_solved():
    schedule = NoiseSchedule.named("linear", 25)
    tableau = solver_tableau(schedule, "ddim", 24, "karras", False)
    noise, denoise = noise_for(24, 1), mixture_denoiser(schedule)
    reference = Sequential()(denoise, tableau, noise).sample
    assert_close(Anderson(3, EXACT)(denoise, tableau, noise).sample, reference, atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "sde_dpm_solver_pp_2m"])
def test_renoised_plans_go_on_from_the_last_one_at_a_nodes_level(solver):
    tableau = solver_tableau(SCHEDULE, solver, 12, "trailing")
    denoise, shape = mixture_denoiser(SCHEDULE), (4, 2)
    sampler = Sampler(tableau, Sequential(5), renoised_start)
    first = sampler(denoise, shape, generators_for(0, 3))
    assert first.nfe.tolist() == [12] * 3
    again = sampler(denoise, shape, generators_for(1, 3), first, executed_steps=1)
    assert again.nfe.tolist() == again.iterations.tolist() == [5] * 3
    moved = torch.cat((first.sample[:, 1:], first.sample[:, -1:]), dim=1)
    assert torch.equal(again.x0_hats[:7], moved.expand(7, *moved.shape))
    linear = Linear(tableau, moved)
    drift = linear.drift(again.noise)
    x = linear.all_nodes(drift, again.x0_hats)
    if solver == "ddim":  # its flow keeps the noise
        alpha, sigma = SCHEDULE.alpha(tableau.timesteps), SCHEDULE.sigma(tableau.timesteps)
        noise = (again.noise.x_T - alpha[0] * moved) / sigma[0]
        assert_close(x[7], (alpha[7] * moved + sigma[7] * noise).float(), atol=1e-5, rtol=0)
    element = torch.arange(3)
    for k in range(7, 12):
        t = tableau.timesteps[k].to(moved).expand(3)
        assert_close(again.x0_hats[k], denoise(x[k], t, element), atol=1e-5, rtol=0)
    whole = Sampler(tableau, Sequential(20), renoised_start)
    cold = Sampler(tableau, Sequential())
    drawn = [each(denoise, shape, generators_for(1, 3), first, 1).sample for each in (whole, cold)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("driver", [*WINDOWED, Speculative])
def test_batch_elements_do_not_hold_one_another(driver):
    tableau = solver_tableau(SCHEDULE, "ddpm", 50)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(50, 5, shape=(1, 1))
    together = driver(10)(denoise, tableau, noise)
    assert len(set(together.iterations.tolist())) > 1, "the problem should separate the elements"
    for b in range(5):

        def alone_denoise(x, t, element, b=b):
            return denoise(x, t, element + b)

        alone = driver(10)(alone_denoise, tableau, noise.select(torch.tensor([b])))
        assert alone.iterations[0] == together.iterations[b]
        assert alone.nfe[0] == together.nfe[b]
        assert_close(alone.sample[0], together.sample[b], atol=1e-12, rtol=0)


def test_tolerance_trades_rounds_for_error():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(100, 8)
    reference = Sequential()(denoise, tableau, noise).sample
    solutions = [Picard(100, tolerance)(denoise, tableau, noise) for tolerance in (1.0, 0.1, 0.01)]
    errors = [float((solution.sample - reference).abs().max()) for solution in solutions]
    iterations = [float(solution.iterations.double().mean()) for solution in solutions]
    assert errors[0] > errors[1] > errors[2]
    assert iterations[0] < iterations[1] < iterations[2] < 60


@pytest.mark.parametrize("driver", [Picard, Anderson])
def test_plan_tolerance_stops_when_the_executed_steps_stand(driver):
    """It saves iterations, keeps to its tolerance, and looks at nothing but the executed steps."""
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(100, 8)
    reference = Sequential()(denoise, tableau, noise).sample
    executed = slice(1, 3)
    nodes = driver(100, 1e-4)(denoise, tableau, noise)
    plan = driver(100, 1e-4, plan_tolerance=0.01, executed=executed)(denoise, tableau, noise)
    whole = driver(100, 1e-4, plan_tolerance=0.01)(denoise, tableau, noise)
    assert (plan.iterations < nodes.iterations).all() and (plan.iterations <= whole.iterations).all()
    assert (plan.iterations < whole.iterations).any()
    assert float((plan.sample - reference)[:, executed].abs().median()) < 0.01 * 2


@pytest.mark.parametrize("driver", [Picard, Anderson])
def test_plan_tolerance_waits_for_the_window_to_reach_the_end(driver):
    """The sample hardly moves while a narrow window is far away from it."""
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(100, 4)
    nodes = driver(5, EXACT)(denoise, tableau, noise)
    plan = driver(5, EXACT, plan_tolerance=1e3)(denoise, tableau, noise)
    assert (plan.iterations >= nodes.iterations - 5).all() and (plan.iterations > 50).all()


@pytest.mark.parametrize(
    ("solver", "tolerance", "window", "std"),
    [  # every pair of a solver with a tolerance, a window and a problem
        ("ddpm", 0.1, 20, 0.1),
        ("ddpm", 0.03, 100, 0.15),
        ("ddpm", 0.01, 20, 0.3),
        ("ddim", 0.1, 100, 0.15),
        ("ddim", 0.03, 20, 0.3),
        ("ddim", 0.01, 100, 0.1),
        ("dpm_solver_pp_2m", 0.1, 20, 0.3),
        ("dpm_solver_pp_2m", 0.03, 100, 0.1),
        ("dpm_solver_pp_2m", 0.01, 20, 0.15),
    ],
)
def test_anderson_never_needs_more_iterations_than_picard(solver, tolerance, window, std):
    tableau = solver_tableau(SCHEDULE, solver, 100)
    noise, denoise = noise_for(100, 64), mixture_denoiser(SCHEDULE, std=std)
    plain, faster = (driver(window, tolerance)(denoise, tableau, noise) for driver in (Picard, Anderson))
    assert (faster.iterations <= plain.iterations).all()
    # Both iterations' network calls are counted.
    assert (faster.nfe > plain.nfe).all()


def test_anderson_saves_iterations():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    noise, denoise = noise_for(100, 64), mixture_denoiser(SCHEDULE)
    plain, faster = (driver(100, 0.01)(denoise, tableau, noise) for driver in (Picard, Anderson))
    assert faster.iterations.sum() < 0.97 * plain.iterations.sum()
    reference = Sequential()(denoise, tableau, noise).sample
    error, plain_error = (float((w.sample - reference).abs().max()) for w in (faster, plain))
    assert error < 2 * plain_error


# ------------------------------------------------------------------------------------ speculation


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_a_speculative_solution_is_the_sequential_one_of_its_decided_noise(solver, batch, window, spread):
    tableau = solver_tableau(SCHEDULE, solver, 20, **STOCHASTIC[solver])
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(20, batch)
    solution = Speculative(window, spread)(denoise, tableau, noise)
    again = Sequential()(denoise, tableau, solution.noise)
    assert_close(solution.sample, again.sample, atol=1e-9, rtol=0)
    assert_close(solution.x0_hats, again.x0_hats, atol=1e-9, rtol=0)
    assert (solution.iterations <= 20).all()
    if window == 1:
        # Nothing is guessed far ahead, but a step's own output is: one iteration per node.
        assert (solution.iterations == 20).all()


@pytest.mark.parametrize("size", [0.0, 0.3, 1.5, 4.0])
def test_the_coupling_is_normal_and_maximal(size):
    """The noise is standard normal, and the guess stands with the overlap of the two distributions."""
    generator = torch.Generator().manual_seed(1)
    count = 40_000
    z = torch.randn(1, count, 3, 1, generator=generator, dtype=torch.float64)
    log_u = torch.rand(1, count, generator=generator, dtype=torch.float64).log()
    direction = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64).view(1, 1, 3, 1)
    stands, noise = reflection_coupling(z, (size * direction).expand_as(z), log_u)
    for column in range(3):
        assert stats.kstest(noise[0, :, column, 0].numpy(), "norm").pvalue > 0.001
    assert np.abs(np.corrcoef(noise[0, :, :, 0].T.numpy()) - np.eye(3)).max() < 0.03
    overlap = 2 * stats.norm.cdf(-size / 2)
    assert float(stands.double().mean()) == pytest.approx(overlap, abs=0.01)


PROBLEM = {"n_steps": 6, "count": 20_000}


def drawn_samples(driver, seed, solver="ddpm", horizon=1, **options):
    """Samples of a two-step-correlated problem where guesses are often wrong: few, large steps."""
    tableau = solver_tableau(SCHEDULE, solver, PROBLEM["n_steps"], "trailing", **options)
    noise = noise_for(PROBLEM["n_steps"], 1, seed=seed, shape=(PROBLEM["count"], horizon))
    # Every number, or every few, is a batch element of its own.
    noise = Noise(
        noise.x_T.view(-1, horizon, 1),
        noise.z.view(PROBLEM["n_steps"], -1, horizon, 1),
        torch.rand(
            PROBLEM["n_steps"],
            PROBLEM["count"],
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(1000 + seed),  # not the normals' own stream
        ),
    )
    mixture = mixture_denoiser(SCHEDULE, std=0.1)

    def denoise(x, t, element):
        return mixture(x, t, torch.zeros_like(element))

    return driver(denoise, tableau, noise)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_speculation_keeps_the_distribution(solver, spread):
    options = STOCHASTIC[solver]
    sequential = drawn_samples(Sequential(), 1, solver, **options).sample.flatten().numpy()
    speculated = drawn_samples(Speculative(6, spread), 2, solver, **options)
    # Rejections must have happened, or nothing was tested.
    assert float((speculated.iterations > 1).double().mean()) > (0.3 if spread == 0 else 0.15)
    assert stats.ks_2samp(sequential, speculated.sample.flatten().numpy()).pvalue > 0.01


def test_drafts_keep_the_distribution_of_whole_plans():
    """Along the directions in which a draft varies, and across them."""
    sequential = drawn_samples(Sequential(), 1, horizon=3).sample[..., 0].numpy()
    speculated = drawn_samples(Speculative(6, 0.5), 2, horizon=3)
    assert float((speculated.iterations > 1).double().mean()) > 0.3
    directions = torch.tensor([[1, 1, 1], [1, 2, 3], [1, -1, 0], [1, -2, 1]], dtype=torch.float64).T
    found = stats.ks_2samp(sequential @ directions.numpy(), (speculated.sample[..., 0] @ directions).numpy())
    assert found.pvalue.min() > 0.01 / 4  # of four looks


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_decided_noise_is_standard_normal(spread):
    solution = drawn_samples(Speculative(6, spread), 3)
    for step in range(PROBLEM["n_steps"] - 1):
        assert stats.kstest(solution.noise.z[step].flatten().numpy(), "norm").pvalue > 0.001
    both = solution.noise.z[:2].flatten(1).numpy()
    assert abs(np.corrcoef(both)[0, 1]) < 0.03


def test_the_distribution_test_catches_a_bias():
    """The same solution with its wrongly guessed steps accepted."""
    sequential = drawn_samples(Sequential(), 1).sample.flatten().numpy()
    always = drawn_samples(Speculative(6), 2)
    n = PROBLEM["n_steps"]
    certain = replace(always.noise, u=torch.zeros(n, PROBLEM["count"], dtype=torch.float64))
    tableau = solver_tableau(SCHEDULE, "ddpm", n, "trailing")
    mixture = mixture_denoiser(SCHEDULE, std=0.1)

    def denoise(x, t, element):
        return mixture(x, t, torch.zeros_like(element))

    # u = 0 accepts every proposal whatever it is.
    biased = Speculative(6)(denoise, tableau, certain).sample.flatten().numpy()
    assert stats.ks_2samp(sequential, biased).pvalue < 1e-6


def test_speculation_takes_far_fewer_iterations():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    solution = Speculative(50)(mixture_denoiser(SCHEDULE), tableau, noise_for(100, 16))
    assert float(solution.iterations.double().mean()) < 35


def test_speculation_on_an_exact_guess_accepts_everything():
    """With the exact as its guess, nothing is proposed wrongly."""
    tableau = solver_tableau(SCHEDULE, "ddpm", 30)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(30, 3)
    exact = Sequential()(denoise, tableau, noise)
    solution = Speculative(30)(denoise, tableau, noise, exact.x0_hats)
    assert (solution.iterations == 1).all()
    assert_close(solution.sample, exact.sample, atol=1e-12, rtol=0)


def test_drafts_are_exact_for_plans_that_walk_randomly():
    """Once the plan's mean is known from any node, no guess is wrong any more."""
    steps = torch.arange(1, 5, dtype=torch.float64) / 4
    sigma2, mean = (
        0.3 * torch.minimum(steps[:, None], steps),
        torch.tensor([0.5, 0.4, -0.2, 0.1])[:, None].double(),
    )
    tableau = solver_tableau(SCHEDULE, "ddpm", 40)
    # In the table's own terms: its first node is nothing but noise.
    alphas = tableau.B.sum(dim=1)
    noises = tableau.p.square() + tableau.C.square().sum(dim=1)

    def denoise(x, t, element):
        node = (tableau.timesteps[:, None] == t).double().argmax(dim=0)
        alpha, noise = alphas[node].view(-1, 1, 1), noises[node].view(-1, 1, 1)
        inverse = torch.linalg.inv(alpha**2 * sigma2 + noise * torch.eye(4, dtype=torch.float64))
        return mean + alpha * sigma2 @ inverse @ (x - alpha * mean)

    def iterations(spread, window=40):
        return Speculative(window, spread)(denoise, tableau, noise_for(40, 16)).iterations.double().mean()

    assert iterations(0.3) <= 2 < 3 < iterations(0.1) < iterations(0.0)
    # Nodes beyond a window are guessed from the last that was called: an iteration per window, and the first.
    assert iterations(0.3, 10) <= 1 + 40 / 10 and iterations(0.3, 5) <= 1 + 40 / 5


# ------------------------------------------------------------------------------------ the others


def test_exact_linear_form_needs_fewer_iterations_than_the_published():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(100, 8)
    linear = Picard(50, 0.1)(denoise, tableau, noise)
    published = PicardPublished(50, 0.1)(denoise, tableau, noise)
    assert linear.iterations.double().mean() < 0.7 * published.iterations.double().mean()


def test_picard_from_the_solution_stops_at_once():
    tableau = solver_tableau(SCHEDULE, "ddpm", 30)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(30, 2)
    exact = Sequential()(denoise, tableau, noise)
    solution = Picard(30, 1e-3)(denoise, tableau, noise, exact.x0_hats)
    assert (solution.iterations == 1).all()


def test_rti_without_a_start_is_sequential():
    tableau = solver_tableau(SCHEDULE, "ddim", 10)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(10, 2)
    solution = RTI(2)(denoise, tableau, noise)
    assert torch.equal(solution.sample, Sequential()(denoise, tableau, noise).sample)
    assert (solution.iterations == 10).all()


def test_rti_counts_its_iterations():
    tableau = solver_tableau(SCHEDULE, "ddim", 10)
    noise = noise_for(10, 2)
    solution = RTI(3)(mixture_denoiser(SCHEDULE), tableau, noise, torch.zeros_like(noise.z))
    assert (solution.iterations == 3).all() and (solution.nfe == 30).all()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_continuing_moves_everything_by_the_executed_steps(solver):
    tableau = solver_tableau(SCHEDULE, solver, 6)
    generators = [torch.Generator().manual_seed(b) for b in range(2)]
    noise, _ = cold_start(tableau, (8, 2), None, 0, generators)
    solution = Sequential()(mixture_denoiser(SCHEDULE), tableau, noise)
    following, start = warm_start_same_noise(tableau, (8, 2), solution, 3, generators)
    assert torch.equal(following.x_T[:, :5], noise.x_T[:, 3:])
    assert torch.equal(following.z[..., :5, :], noise.z[..., 3:, :])
    assert torch.equal(start[..., :5, :], solution.x0_hats[..., 3:, :])
    assert torch.equal(start[..., 5:, :], solution.x0_hats[..., -1:, :].expand(6, 2, 3, 2))
    assert not torch.equal(following.x_T[:, 5:], noise.x_T[:, 5:])
    assert following.z.shape == noise.z.shape and following.u.shape == noise.u.shape


def test_guessing_takes_the_plan_but_not_its_noise():
    tableau = solver_tableau(SCHEDULE, "ddpm", 6)
    generators = [torch.Generator().manual_seed(b) for b in range(2)]
    noise, _ = cold_start(tableau, (8, 2), None, 0, generators)
    solution = Sequential()(mixture_denoiser(SCHEDULE), tableau, noise)
    following, start = warm_start(tableau, (8, 2), solution, 3, generators)
    _, shifted = warm_start_same_noise(tableau, (8, 2), solution, 3, generators)
    assert torch.equal(start, shifted)
    assert not (following.x_T[:, :5] == noise.x_T[:, 3:]).any()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_noise_of_an_element_is_its_generators_alone(start, solver):
    tableau = solver_tableau(SCHEDULE, solver, 6)

    def noise_of(seeds):
        return STARTS[start](tableau, (4, 2), None, 0, [torch.Generator().manual_seed(s) for s in seeds])[0]

    together, alone = noise_of((3, 4)), noise_of((4,))
    assert torch.equal(together.x_T[1], alone.x_T[0])
    assert torch.equal(together.z[:, 1], alone.z[:, 0])
    assert torch.equal(together.u[:, 1], alone.u[:, 0])


@pytest.mark.parametrize("driver", [Picard(5), PicardPublished(5), Anderson(5), Speculative(5)])
def test_a_nan_from_the_network_ends_the_solution(driver):
    tableau = solver_tableau(SCHEDULE, "ddpm", 10)
    solution = driver(lambda x, t, element: x * float("nan"), tableau, noise_for(10, 1))
    assert solution.iterations[0] <= 10 and not solution.sample.isfinite().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": "picard", "window": 0}, "window=0"),
        ({"driver": "picard", "tolerance": 0.0}, "tolerance=0.0"),
        ({"driver": "picard_published", "tolerance": -1}, "tolerance=-1"),
        ({"driver": "picard_published", "plan_tolerance": 0.1}, "no option 'plan_tolerance'"),
        ({"driver": "rti", "iterations": 0}, "iterations=0"),
        ({"driver": "picard", "plan_tolerance": 0.0}, "plan_tolerance=0.0"),
        ({"driver": "picard", "executed_steps": 3}, "no option 'executed_steps'"),
        ({"driver": "picard", "evaluate": "al"}, "did you mean 'all'"),
        ({"driver": "picard", "evaluate": "sharded"}, "torchrun"),
        ({"driver": "anderson", "memory": 0}, "memory=0"),
        ({"driver": "speculative", "window": 0}, "window=0"),
        ({"driver": "speculative", "spread": -0.1}, "spread=-0.1 must be 0 to 1"),
        ({"driver": "speculative", "spread": "wide"}, "spread='wide' must be 0 to 1"),
        ({"driver": "speculative", "start": "warm_same_noise"}, "start='warm'"),
        ({"driver": "speculative", "solver": "ddim"}, "adds noise on every step"),
        ({"driver": "speculative", "solver": "dpm_solver_pp_2m"}, "adds noise on every step"),
        ({"driver": "rk45"}, "unknown driver 'rk45'"),
        ({"start": "wram"}, "did you mean 'warm'"),
        ({"solver": "unipc", "n_steps": 2, "solver_options": {"order": 3}}, "order=3 needs at least 3"),
        ({"solver": "unipc", "solver_options": {"order": 4}}, "order=4 must be 1 to 3"),
        ({"solver": "unipc", "solver_options": {"variant": "bh3"}}, "bh1 or bh2"),
        ({"solver": "dpm_solver_3", "n_steps": 2}, "order=3 needs at least 3"),
        ({"solver": "pndm", "n_steps": 3}, "at least 4 steps"),
        ({"n_steps": 95, "lambda_min": -2.0}, "with lambda_min=-2"),
        ({"lambda_min": 50.0}, "n_steps=100 must be 1 to 0"),
        ({"denoise_to_zero": False}, "must be 1 to 99"),
        ({"driver": "picrad"}, "did you mean 'picard'"),
        ({"driver": "picard", "windwo": 3}, "did you mean 'window'"),
        ({"solver": "ddmp"}, "did you mean 'ddpm'"),
        ({"spacing": "trialing"}, "did you mean 'trailing'"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_steps": 101}, "n_steps=101"),
        ({"solver": "ddim", "solver_options": {"eta": 2.0}}, "eta=2.0"),
        ({"solver": "ddim", "solver_options": {"etta": 0.0}}, "did you mean 'eta'"),
        ({"solver": "ddim", "solver_options": {"eta": True}}, "eta=True"),
        ({"solver": "ddim", "solver_options": {"schedule": 3}}, "no option 'schedule'"),
        ({"solver_options": {1: 2}}, "must be names and values"),
        ({"solver_options": 0}, "must be names and values"),
        ({"schedule": None}, "schedule=None must be a NoiseSchedule"),
        ({"driver": "picard", "executed": 3}, "executed=3 must be a slice"),
        ({"driver": "anderson", "executed": slice("a", 2)}, "must be a slice"),
        ({"driver": "picard", "executed": slice(3, 3)}, "must be a slice"),
        ({"solver": "ddpm", "solver_options": {"variance": "fixed_smal"}}, "did you mean 'fixed_small'"),
    ],
)
def test_bad_sampler_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        make_sampler(**{"schedule": SCHEDULE, **options})


class Backwards:
    """No driver: it can't be called."""


class Unfinished(IterativeDriver):
    """A driver that lacks its method."""


class Partial(IterativeDriver):
    """A driver whose iterations lack theirs."""

    def on(self, tableau, like, warm):
        return SimpleNamespace(init=None, iterate=None, count=None)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (Backwards(), r"driver Backwards can't be called: give it __call__\(denoise, tableau, noise"),
        (Backwards, "driver Backwards can't be called"),
        (Unfinished, "driver 'Unfinished' can't be made .*'?on'?"),
        (Partial, "driver Partial: .* lacks limit, done, finish"),
    ],
)
def test_a_driver_that_lacks_something_is_named(driver, message):
    with pytest.raises(InputError, match=message):
        make_sampler(SCHEDULE, n_steps=4, driver=driver)


def test_drivers_and_starts_of_ones_own(monkeypatch):
    monkeypatch.setattr(DRIVERS, "_choices", dict(DRIVERS))
    DRIVERS.register("mine", Picard)
    by_name = make_sampler(SCHEDULE, n_steps=4, driver="mine", window=3, start=warm_start)
    assert by_name.driver == Picard(3) and by_name.start is warm_start
    assert make_sampler(SCHEDULE, n_steps=4, driver=Picard, window=3).driver == Picard(3)
    assert make_sampler(SCHEDULE, n_steps=4, driver=RTI(1)).start is warm_start_same_noise
    with pytest.raises(InputError, match="driver Picard is made already: it takes no option 'window'"):
        make_sampler(SCHEDULE, n_steps=4, driver=Picard(), window=3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_driver_is_made_and_samples(driver):
    sampler = make_sampler(SCHEDULE, n_steps=8, driver=driver)
    solution = sampler(mixture_denoiser(SCHEDULE), (4, 2), [torch.Generator().manual_seed(0)])
    assert solution.sample.shape == (1, 4, 2) and solution.sample.isfinite().all()
    assert solution.x0_hats.shape == (8, 1, 4, 2) and solution.noise.z.shape == (8, 1, 4, 2)
