"""Solvers against diffusers step for step, against exact distributions, and at their order."""

from __future__ import annotations

import functools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paradiffpolicy.diffusion.analytic import mixture_denoiser
from paradiffpolicy.diffusion.denoiser import Clip, Denoiser, unbounded
from paradiffpolicy.diffusion.schedule import CLEAN, SCHEDULES, DiscreteSchedule, NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.reference import probability_flow
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.solvers import SOLVERS, solver_tableau
from paradiffpolicy.sampling.spacing import SPACINGS, time_grid
from paradiffpolicy.sampling.tableau import Tableau
from paradiffpolicy.sampling.trace import Trace
from paradiffpolicy.types import Noise

from .conftest import DISTINCT_SOLVERS, assert_close, gaussian_denoiser

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
LINEAR = NoiseSchedule.named("linear", 100)
DIFFUSERS_BETAS = {
    "squared_cosine": "squaredcos_cap_v2",
    "linear": "linear",
    "scaled_linear": "scaled_linear",
}


def network(x, t, condition):
    """A smooth stand-in for an epsilon network: any function shows a difference in the steps."""
    return 0.8 * x + 0.3 * torch.sin(3 * x + t.to(x).view(-1, 1, 1) / 30)


def our_sample(schedule, tableau, noise, threshold=unbounded, prediction="epsilon"):
    denoiser = Denoiser(network, schedule, prediction, threshold)
    return Sequential()(denoiser.bind(torch.zeros(len(noise.x_T), 1)), tableau, noise).sample


def their_sample(scheduler, x, noise_of_step=lambda i: {}, **step_options):
    """The loop that diffusers' users write, with the noise given."""
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)), None)
        x = scheduler.step(output, t, x, **step_options, **noise_of_step(i)).prev_sample
    return x


def on_our_grid(scheduler, schedule, grid):
    """Gives a diffusers scheduler the grid's times, which its own can differ from by one, and the
    sigmas that belong to them."""
    n = len(grid) - 1
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(n)
    scheduler.timesteps = grid[:-1]
    scheduler.sigmas = schedule.sigma(grid) / schedule.alpha(grid)
    return scheduler


@pytest.mark.parametrize("name", DIFFUSERS_BETAS)
@pytest.mark.parametrize("n_train_steps", [100, 1000])
def test_schedules_equal_diffusers(name, n_train_steps):
    ours = NoiseSchedule.named(name, n_train_steps)
    theirs = diffusers.DDPMScheduler(n_train_steps, beta_schedule=DIFFUSERS_BETAS[name])
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n_steps", [100, 20, 7])
def test_ddpm_equals_diffusers(spacing, n_steps, prediction, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        100,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing=spacing,
        clip_sample=True,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.set_timesteps(n_steps)
    tableau = solver_tableau(SCHEDULE, "ddpm", n_steps, spacing)
    assert tableau.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = noise_for(n_steps, 2)
    # diffusers adds noise at every timestep above 0, with variance 0 on a last step: z isn't used.
    draws = iter(noise.z)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(draws)
    )
    theirs = their_sample(scheduler, noise.x_T)
    ours = our_sample(SCHEDULE, tableau, noise, Clip(1.0), prediction)
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("n_steps", [100, 10, 5])
def test_ddim_equals_diffusers(spacing, n_steps, eta):
    scheduler = diffusers.DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing, clip_sample=True
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(n_steps)
    tableau = solver_tableau(SCHEDULE, "ddim", n_steps, spacing, eta=eta)
    assert tableau.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = noise_for(n_steps, 2)
    # Ours takes epsilon from the clipped x0, always; diffusers calls that use_clipped_model_output.
    theirs = their_sample(
        scheduler,
        noise.x_T,
        lambda i: {"variance_noise": noise.z[i]} if eta else {},
        eta=eta,
        use_clipped_model_output=True,
    )
    ours = our_sample(SCHEDULE, tableau, noise, Clip(1.0))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


GRIDS = [("leading", True), ("trailing", True), ("linspace", True), ("linspace", False), ("karras", True)]
"""Spacing, and whether the last step goes to the clean sample."""


@pytest.mark.parametrize(("spacing", "denoise_to_zero"), GRIDS)
@pytest.mark.parametrize("n_steps", [20, 10, 7])
@pytest.mark.parametrize(
    ("solver", "order", "sde"),
    [
        ("dpm_solver_pp_1", 1, False),
        ("dpm_solver_pp_2m", 2, False),
        ("dpm_solver_pp_3m", 3, False),
        ("sde_dpm_solver_pp_1", 1, True),
        ("sde_dpm_solver_pp_2m", 2, True),
    ],
)
def test_multistep_dpm_solvers_equal_diffusers(solver, order, sde, n_steps, spacing, denoise_to_zero):
    """Order 1 is DDIM.  It covers linspace and strides that don't divide, where diffusers' DDIM
    steps to ``t - 100 // n_steps``, which isn't the next timestep."""
    grid = time_grid(LINEAR, n_steps, spacing, denoise_to_zero)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        100,
        beta_schedule="linear",
        solver_order=order,
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        final_sigmas_type="zero" if denoise_to_zero else "sigma_min",
        lower_order_final=False,
    )
    on_our_grid(scheduler, LINEAR, grid)
    options = {
        "dpm_solver_pp_2m": {"lower_order_final": False},
        "dpm_solver_pp_3m": {"lower_order_final": False, "curvature": 0.5},
    }.get(solver, {})
    tableau = SOLVERS[solver](LINEAR, grid, **options)
    noise = noise_for(n_steps, 2)
    theirs = their_sample(scheduler, noise.x_T, lambda i: {"variance_noise": noise.z[i]} if sde else {})
    assert_close(our_sample(LINEAR, tableau, noise), theirs, atol=1e-5, rtol=0)


def test_lower_order_final_equals_diffusers():
    grid = time_grid(LINEAR, 10, "linspace", denoise_to_zero=False)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        100, beta_schedule="linear", solver_order=3, final_sigmas_type="sigma_min"
    )
    theirs = their_sample(on_our_grid(scheduler, LINEAR, grid), noise_for(10, 2).x_T)
    ours = our_sample(LINEAR, SOLVERS["dpm_solver_pp_3m"](LINEAR, grid, curvature=0.5), noise_for(10, 2))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


# diffusers refuses the step to the clean sample for noise prediction; without lower_order_final it
# leaves out what is over a multiple of the order, and for data prediction the last step's order.
SINGLESTEP = [
    (solver, order, n_steps, lower_order_final)
    for solver, order in [
        ("dpm_solver_1", 1),
        ("dpm_solver_2", 2),
        ("dpm_solver_3", 3),
        ("dpm_solver_pp_2s", 2),
    ]
    for n_steps in (6, 7, 8, 18)
    for lower_order_final in (True, False)
    if lower_order_final or (n_steps % order == 0 and solver != "dpm_solver_pp_2s")
]


@pytest.mark.parametrize(("solver", "order", "n_steps", "lower_order_final"), SINGLESTEP)
def test_singlestep_dpm_solvers_equal_diffusers(solver, order, n_steps, lower_order_final):
    data = solver == "dpm_solver_pp_2s"
    denoise_to_zero = data
    grid = time_grid(LINEAR, n_steps, "linspace", denoise_to_zero)
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        100,
        beta_schedule="linear",
        solver_order=order,
        algorithm_type="dpmsolver++" if data else "dpmsolver",
        final_sigmas_type="zero" if denoise_to_zero else "sigma_min",
        lower_order_final=lower_order_final,
    )
    on_our_grid(scheduler, LINEAR, grid)
    scheduler.order_list = scheduler.get_order_list(n_steps)
    options = {} if order == 1 else {"lower_order_final": lower_order_final}
    tableau = SOLVERS[solver](LINEAR, grid, **options)
    assert tableau.n_nodes == n_steps
    noise = noise_for(n_steps, 2)
    theirs = their_sample(scheduler, noise.x_T)
    assert_close(our_sample(LINEAR, tableau, noise), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spacing", "denoise_to_zero", "variant"),
    # diffusers' bh1 gives NaN on the step to the clean sample.
    [(*grid, "bh2") for grid in GRIDS] + [("linspace", False, "bh1")],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers(order, variant, spacing, denoise_to_zero):
    grid = time_grid(LINEAR, 10, spacing, denoise_to_zero)
    scheduler = diffusers.UniPCMultistepScheduler(
        100,
        beta_schedule="linear",
        solver_order=order,
        solver_type=variant,
        final_sigmas_type="zero" if denoise_to_zero else "sigma_min",
    )
    on_our_grid(scheduler, LINEAR, grid)
    noise = noise_for(10, 2)
    theirs = their_sample(scheduler, noise.x_T)
    ours = our_sample(LINEAR, SOLVERS["unipc"](LINEAR, grid, order=order, variant=variant), noise)
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_heun_equals_diffusers(spacing, clipped):
    grid = time_grid(LINEAR, 10, spacing)
    scheduler = diffusers.HeunDiscreteScheduler(
        100, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=clipped
    )
    scheduler.alphas_cumprod = LINEAR.alphas_cumprod
    scheduler.set_timesteps(10)
    times, sigmas = grid[:-1], LINEAR.sigma(grid) / LINEAR.alpha(grid)
    scheduler.timesteps = torch.cat((times[:1], times[1:].repeat_interleave(2)))
    scheduler.sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
    tableau = SOLVERS["heun"](LINEAR, grid)
    assert tableau.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = noise_for(tableau.n_nodes, 2)
    # Theirs is in x / alpha.
    theirs = their_sample(scheduler, noise.x_T / LINEAR.alpha(grid[0]))
    ours = our_sample(LINEAR, tableau, noise, Clip(1.0) if clipped else unbounded)
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["plms", "pndm"])
@pytest.mark.parametrize("n_steps", [5, 10, 25, 50])
def test_pndm_equals_diffusers(solver, n_steps):
    scheduler = diffusers.PNDMScheduler(
        100, beta_schedule="squaredcos_cap_v2", skip_prk_steps=solver == "plms", set_alpha_to_one=True
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.set_timesteps(n_steps)
    tableau = solver_tableau(SCHEDULE, solver, n_steps)
    assert tableau.timesteps.tolist() == scheduler.timesteps.tolist()
    noise = noise_for(tableau.n_nodes, 2)
    theirs = their_sample(scheduler, noise.x_T)
    assert_close(our_sample(SCHEDULE, tableau, noise), theirs, atol=1e-5, rtol=0)


def test_ddim_with_eta_one_is_ddpm():
    grid = time_grid(SCHEDULE, 20)
    one, other = SOLVERS["ddim"](SCHEDULE, grid, eta=1.0), SOLVERS["ddpm"](SCHEDULE, grid)
    for name in ("p", "B", "C"):
        assert_close(getattr(one, name), getattr(other, name), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("variance", "widest"), [("fixed_small", 0.03), ("fixed_large", 0.03)])
def test_ddpm_has_the_right_distribution(variance, widest):
    """With the exact denoiser of a Gaussian, 100 steps sample that Gaussian."""
    mean, std, count = torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.4, 20_000
    tableau = solver_tableau(SCHEDULE, "ddpm", 100, variance=variance)
    noise = noise_for(100, count, shape=(1, 2))
    sample = Sequential()(gaussian_denoiser(SCHEDULE, mean, std), tableau, noise).sample
    for column in range(2):
        distance = stats.kstest(sample[:, 0, column].numpy(), stats.norm(float(mean[0, column]), std).cdf)
        assert distance.statistic < widest


def test_ddpm_samples_every_mode_of_a_mixture():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    noise = noise_for(100, 1, shape=(9000, 1))
    sample = Sequential()(mixture_denoiser(SCHEDULE, std=0.1), tableau, noise).sample
    shares = [float(((sample - m).abs() < 0.25).double().mean()) for m in (-0.6, 0.1, 0.7)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


VP = NoiseSchedule.named("vp_linear", 1000)
FROM, TO = 700.0, 50.0
ORDERS = {
    "ddim": (1, {}),
    "dpm_solver_2": (2, {"lower_order_final": False}),
    "dpm_solver_3": (3, {"lower_order_final": False}),
    "dpm_solver_pp_2s": (2, {"lower_order_final": False}),
    "dpm_solver_pp_2m": (2, {"lower_order_final": False}),
    "dpm_solver_pp_3m": (3, {"lower_order_final": False}),
    "unipc": (3, {"order": 2, "lower_order_final": False}),
    "plms": (2, {}),
    "pndm": (2, {}),
    "heun": (2, {}),
    "rk4": (4, {}),
}


def test_every_ode_solver_has_a_claimed_order():
    deterministic = {name for name in DISTINCT_SOLVERS if not solver_tableau(SCHEDULE, name, 10).stochastic}
    assert deterministic == set(ORDERS)


def order_grid(solver, n):
    """n steps from FROM to TO: with equal strides in t where the solver's formulas assume that, else
    in lambda.  The first step of a third-order multistep solver is only of first order: it is made
    so short here that what follows shows."""
    if solver in ("plms", "pndm"):
        return torch.linspace(FROM, TO, n + 1, dtype=torch.float64)
    lambdas = torch.linspace(VP.at(FROM).lam, VP.at(TO).lam, n + 1, dtype=torch.float64).tolist()
    if solver == "dpm_solver_pp_3m":
        stride = lambdas[1] - lambdas[0]
        lambdas.insert(1, lambdas[0] + 0.2 * stride**2)
    return torch.tensor([VP.timestep(lam) for lam in lambdas], dtype=torch.float64)


def measured_order(errors):
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


MIXTURE = mixture_denoiser(VP, std=0.4)


def from_the_same_noise(n):
    """Noise for n nodes of an ODE solver, with the same x_T for every n."""
    x_T = noise_for(1, 2, shape=(2, 1)).x_T
    return Noise(x_T, x_T.new_zeros(n, 2, 2, 1), x_T.new_zeros(n, 2))


@functools.cache
def exact_flow():
    """The adaptive solver's solution from FROM to TO, which all solvers here approximate."""
    tableau = SOLVERS["ddim"](VP, order_grid("ddim", 4))
    return probability_flow(MIXTURE, tableau, from_the_same_noise(4), VP, rtol=1e-12, atol=1e-12).sample


def solver_errors(solver, **options):
    """Largest errors on a Gaussian mixture in 48, 96 and 192 steps."""
    errors = []
    for n in (48, 96, 192):
        tableau = SOLVERS[solver](VP, order_grid(solver, n), **options)
        sample = Sequential()(MIXTURE, tableau, from_the_same_noise(tableau.n_nodes)).sample
        errors.append(float((sample - exact_flow()).abs().max()))
    return errors


@pytest.mark.parametrize("solver", ORDERS)
def test_ode_solvers_converge_at_their_order(solver):
    order, options = ORDERS[solver]
    errors = solver_errors(solver, **options)
    assert measured_order(errors) == pytest.approx(order, abs=0.15), errors


def test_the_common_3m_is_of_second_order():
    errors = solver_errors("dpm_solver_pp_3m", lower_order_final=False, curvature=0.5)
    assert measured_order(errors) == pytest.approx(2, abs=0.2), errors


@pytest.mark.parametrize(("order", "variant"), [(1, "bh2"), (3, "bh2"), (2, "bh1")])
def test_unipc_has_one_order_more_than_its_name(order, variant):
    errors = solver_errors("unipc", order=order, variant=variant, lower_order_final=False)
    assert measured_order(errors) == pytest.approx(order + 1, abs=0.2), errors


def test_the_reference_is_the_flow_of_a_gaussian():
    """``x_t`` keeps its place in units of the marginal's standard deviation."""
    mean, std = torch.tensor([[0.3]], dtype=torch.float64), 0.4
    tableau = SOLVERS["ddim"](VP, order_grid("ddim", 5))
    noise = noise_for(5, 3, shape=(1, 1))
    s, t = VP.at(FROM), VP.at(TO)
    spread = [math.hypot(point.alpha * std, point.sigma) for point in (s, t)]
    exact = t.alpha * mean + (noise.x_T - s.alpha * mean) * spread[1] / spread[0]
    solution = probability_flow(gaussian_denoiser(VP, mean, std), tableau, noise, VP, rtol=1e-10, atol=1e-10)
    assert_close(solution.sample, exact, atol=1e-8, rtol=0)


def test_the_reference_agrees_with_many_small_steps():
    noise = noise_for(100, 2)
    denoise = mixture_denoiser(VP)
    fine = solver_tableau(VP, "dpm_solver_pp_2m", 1000, "uniform_lambda")
    reference = Sequential()(denoise, fine, type(noise)(noise.x_T, torch.zeros(1000, 2, 4, 2), noise.u))
    tableau = solver_tableau(VP, "ddim", 10, "uniform_lambda")
    solution = probability_flow(denoise, tableau, noise, VP)
    assert_close(solution.sample, reference.sample, atol=1e-4, rtol=0)


def test_the_reference_steps_each_element_by_itself():
    tableau = solver_tableau(SCHEDULE, "ddim", 8)
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(8, 3)
    together = probability_flow(denoise, tableau, noise, SCHEDULE)
    last = noise.select(torch.tensor([2]))
    alone = probability_flow(lambda x, t, element: denoise(x, t, element + 2), tableau, last, SCHEDULE)
    assert torch.equal(together.sample[2], alone.sample[0])
    assert together.iterations[2] == alone.iterations[0]


def test_the_reference_refuses_what_it_cant_solve():
    noise, denoise = noise_for(8, 1), mixture_denoiser(SCHEDULE)
    with pytest.raises(InputError, match="probability flow"):
        probability_flow(denoise, solver_tableau(SCHEDULE, "ddpm", 8), noise, SCHEDULE)
    with pytest.raises(InputError, match=r"rtol=0\.0"):
        probability_flow(denoise, solver_tableau(SCHEDULE, "ddim", 8), noise, SCHEDULE, rtol=0.0)


@pytest.mark.parametrize("solver", DISTINCT_SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_step_form_is_the_same_table(solver, spacing):
    tableau = solver_tableau(SCHEDULE, solver, 25, spacing, True, -5.1)
    a, q, S, R = tableau.step_form
    p, B, C = tableau.p[:1], tableau.B[0], tableau.C[0]
    for i in range(tableau.n_nodes):
        p, B, C = a[i] * p + q[i], a[i] * B + S[i], a[i] * C + R[i]
        assert_close(p[0], tableau.p[i + 1], atol=1e-10, rtol=0)
        assert_close(B, tableau.B[i + 1], atol=1e-10, rtol=0)
        assert_close(C, tableau.C[i + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", DISTINCT_SOLVERS)
def test_tables_are_well_conditioned(solver):
    """In float32 the solution differs from float64 by rounding alone."""
    tableau = solver_tableau(SCHEDULE, solver, 20, "linspace", True, -5.1)
    noise, denoise = noise_for(tableau.n_nodes, 2), mixture_denoiser(SCHEDULE)
    rounded = type(noise)(noise.x_T.float(), noise.z.float(), noise.u.float())
    low, high = (Sequential()(denoise, tableau, given).sample for given in (rounded, noise))
    assert_close(low.double(), high, atol=1e-5, rtol=0)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    n=st.integers(5, 300),
    where=st.floats(0, 1),
    shift=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_schedules_are_consistent(name, n, where, shift):
    """alpha, sigma, lambda and its inverse agree at any time; the noise grows."""
    schedule = NoiseSchedule.named(name, n)
    t = where * (n - 1)
    point = schedule.at(t)
    power = 1 if name == "flow" else 2
    assert point.alpha**power + point.sigma**power == pytest.approx(1)
    assert float(schedule.alpha(torch.tensor(t, dtype=torch.float64))) == pytest.approx(
        point.alpha, rel=1e-12
    )
    assert float(schedule.sigma(torch.tensor(t, dtype=torch.float64))) == pytest.approx(point.sigma, rel=1e-9)
    assert schedule.timestep(point.lam) == pytest.approx(t, abs=1e-6)
    later = t + (shift + 1e-3) * (n - 1 - t)
    if later > t + 1e-9:  # else rounding decides
        assert schedule.at(later).lam < point.lam
    assert schedule.at(CLEAN).sigma == 0 and float(schedule.sigma(torch.tensor(-1))) == 0


def test_continuous_schedules_are_the_limit_of_the_discrete():
    fine = NoiseSchedule.named("linear", 1000)
    times = torch.tensor([0.0, 100.0, 500.0, 999.0])
    assert_close(VP.alpha(times), fine.alpha(times), atol=5e-4, rtol=1e-2)
    cosine, discrete = (NoiseSchedule.named(name, 1000) for name in ("vp_cosine", "squared_cosine"))
    middle = torch.tensor([10.0, 300.0, 600.0])
    # The continuous one's time ends at 0.9946.
    assert_close(cosine.alpha(middle), discrete.alpha(middle * 0.9946), atol=2e-3, rtol=0)


@given(
    spacing=st.sampled_from(sorted(SPACINGS)),
    name=st.sampled_from(sorted(SCHEDULES)),
    n_train=st.integers(10, 200),
    n=st.integers(1, 10),
    to_zero=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_grids_fall_within_the_schedule(spacing, name, n_train, n, to_zero):
    if n + (not to_zero) > n_train:
        return
    schedule = NoiseSchedule.named(name, n_train)
    if name == "flow" and spacing in ("uniform_lambda", "karras"):
        with pytest.raises(InputError, match=r"nothing but noise.*lambda_min=-6"):
            time_grid(schedule, n, spacing, to_zero)
        if n + (not to_zero) > n_train - 1:
            return
        grid = time_grid(schedule, n, spacing, to_zero, lambda_min=-6)
    else:
        grid = time_grid(schedule, n, spacing, to_zero)
    assert len(grid) == n + 1
    assert (grid.diff() < 0).all() and grid[0] <= n_train - 1
    assert (grid[-1] == CLEAN) == to_zero and (grid[:-1] >= -1e-9).all()


def test_lambda_min_leaves_out_what_is_only_noise():
    grid = time_grid(SCHEDULE, 10, "linspace", lambda_min=-5.1)
    assert SCHEDULE.at(float(grid[0])).lam >= -5.1 > SCHEDULE.at(float(grid[0]) + 1).lam


def adams_bashforth(schedule, grid):
    """The two-step method for ``dy/dlambda = D - y``, ``y = x / alpha``, on equal strides."""
    trace = Trace(schedule, grid.tolist())
    x, before = trace.x_T, None
    for s, t in trace.steps:
        slope = trace.denoise(x, s) - x / s.alpha
        mean = slope if before is None else 3 / 2 * slope - 1 / 2 * before
        x, before = t.alpha * (x / s.alpha + (t.lam - s.lam) * mean), slope
    return trace.tableau(x)


@pytest.mark.parametrize("driver", ["sequential", "picard", "picard_published", "anderson"])
def test_a_new_solver_is_one_function(driver):
    errors, denoise = [], mixture_denoiser(VP)
    for n in (40, 80, 160):
        sampler = make_sampler(
            VP,
            solver=adams_bashforth,
            n_steps=n,
            spacing="uniform_lambda",
            denoise_to_zero=False,
            lambda_min=-4.0,
            driver=driver,
            **({} if driver == "sequential" else {"tolerance": 1e-9}),
        )
        noise = noise_for(n, 1, shape=(1, 1))
        exact = probability_flow(denoise, sampler.tableau, noise, VP, rtol=1e-9, atol=1e-9).sample
        errors.append(float((sampler.driver(denoise, sampler.tableau, noise).sample - exact).abs().max()))
    assert measured_order(errors) == pytest.approx(2, abs=0.2), errors


def stepping(step):
    """A solver whose step computes anything."""

    def solver(schedule, grid):
        trace = Trace(schedule, grid.tolist())
        x = trace.x_T
        for s, _ in trace.steps:
            x = step(x, trace.denoise(x, s))
        return trace.tableau(x)

    return solver


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (stepping(lambda x, D: x * D), "must be linear .* multiplies by one of them"),
        (stepping(lambda x, D: x / D), "divides by one of them"),
        (stepping(lambda x, D: D + 1.0), "adds a float"),
        (stepping(lambda x, D: 1.0 + D), "adds a float"),
        (stepping(lambda x, D: D - 1.0), "subtracts a float"),
        (stepping(lambda x, D: torch.sin(D)), "must be linear"),
        (stepping(lambda x, D: D**2), "must be linear"),
        (stepping(lambda x, D: None), "calls the network on a NoneType"),
        (lambda schedule, grid: None, "returned NoneType, not a table"),
        (lambda schedule, grid: Trace(schedule, grid.tolist()).tableau(None), "returns a NoneType"),
    ],
)
def test_a_solver_that_gives_no_table_is_named(solver, message):
    with pytest.raises(InputError, match=f"solver '.*{message}") as caught:
        solver_tableau(SCHEDULE, solver, 3)
    assert "\n" not in str(caught.value)


def test_a_registered_solver_and_spacing_have_names(monkeypatch):
    for registry in (SOLVERS, SPACINGS):
        monkeypatch.setattr(registry, "_choices", dict(registry))
    SOLVERS.register("mine", stepping(lambda x, D: 0.5 * x + 0.5 * D))
    SPACINGS.register("dense", lambda schedule, n, last: torch.arange(n - 1, -1, -1, dtype=torch.float64))
    tableau = solver_tableau(SCHEDULE, "mine", 3, "dense")
    assert tableau.timesteps.tolist() == [2, 1, 0] and tableau.p.tolist() == [1, 0.5, 0.25, 0.125]


def test_a_tableau_checks_itself():
    good = solver_tableau(SCHEDULE, "ddpm", 5)
    values = {name: getattr(good, name) for name in ("timesteps", "p", "B", "C", "variance", "end")}
    uses_itself = good.B.clone()
    uses_itself[2, 2] = 1.0
    for name, bad in [
        ("B", uses_itself),
        ("p", good.p * 2),
        ("C", good.C.float()),
        ("variance", good.variance[1:]),
        ("timesteps", good.timesteps.long()),
        ("B", good.B * float("inf")),
    ]:
        with pytest.raises(ValueError):
            Tableau(**{**values, name: bad})


def test_schedules_refuse_nonsense():
    with pytest.raises(InputError, match="did you mean 'squared_cosine'"):
        NoiseSchedule.named("squared_cosin", 100)
    with pytest.raises(InputError, match="fall strictly"):
        NoiseSchedule.named("linear", 10, beta_start=0.0, beta_end=0.0)
    with pytest.raises(InputError, match="float64"):
        DiscreteSchedule(torch.tensor([0.9, 0.5]))
