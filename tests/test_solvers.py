"""Solvers against diffusers step for step, and against exact laws."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from paradiffpolicy.diffusion.denoiser import Denoiser
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.solvers import SOLVERS, SPACINGS, ddim, ddpm, solver_tableau
from paradiffpolicy.sampling.tableau import Tableau

from .problems import SCHEDULE, gaussian_denoiser, mixture_denoiser, noise_for

DIFFUSERS_BETAS = {
    "squared_cosine": "squaredcos_cap_v2",
    "linear": "linear",
    "scaled_linear": "scaled_linear",
}


def network(x, t, condition):
    """A smooth stand-in for an epsilon network: any function shows a difference in the steps."""
    return 0.8 * x + 0.3 * torch.sin(3 * x + t.to(x).view(-1, 1, 1) / 30)


def our_sample(schedule, tableau, x_T, z, clip, prediction="epsilon"):
    denoiser = Denoiser(network, schedule, prediction, clip)
    return Sequential()(denoiser.bind(torch.zeros(len(x_T), 1)), tableau, x_T, z)


def their_sample(scheduler, x_T, noise_of_step, **step_options):
    """The loop that diffusers' users write, with the noise given."""
    x, nodes = x_T, []
    for i, t in enumerate(scheduler.timesteps):
        nodes.append(x)
        output = network(x, t.expand(len(x)), None)
        x = scheduler.step(output, t, x, **step_options, **noise_of_step(i)).prev_sample
    return x


@pytest.mark.parametrize("name", DIFFUSERS_BETAS)
@pytest.mark.parametrize("n_train_steps", [100, 1000])
def test_schedules_equal_diffusers(name, n_train_steps):
    ours = NoiseSchedule.named(name, n_train_steps)
    theirs = diffusers.DDPMScheduler(n_train_steps, beta_schedule=DIFFUSERS_BETAS[name])
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
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
    x_T, z = noise_for(n_steps, 2)
    # diffusers adds noise at every timestep above 0, with variance 0 on a last step: z isn't used.
    draws = iter(z)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(draws)
    )
    theirs = their_sample(scheduler, x_T, lambda i: {})
    ours = our_sample(SCHEDULE, tableau, x_T, z, clip=1.0, prediction=prediction).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


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
    x_T, z = noise_for(n_steps, 2)
    # Ours takes epsilon from the clipped x0, always; diffusers calls that use_clipped_model_output.
    theirs = their_sample(
        scheduler,
        x_T,
        lambda i: {"variance_noise": z[i]} if eta else {},
        eta=eta,
        use_clipped_model_output=True,
    )
    ours = our_sample(SCHEDULE, tableau, x_T, z, clip=1.0).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n_steps", [20, 10, 7])
def test_dpm_solver_pp_equals_diffusers(spacing, n_steps, order):
    """Order 1 is DDIM.  It covers linspace and strides that don't divide, where diffusers' DDIM
    steps to ``t - 100 // n_steps``, which isn't the next timestep."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        100,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        solver_order=order,
        timestep_spacing=spacing,
        final_sigmas_type="zero",
    )
    schedule = NoiseSchedule.named("linear", 100)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(n_steps)
    tableau = solver_tableau(schedule, "dpm_solver_pp_2m" if order == 2 else "ddim", n_steps, spacing)
    # Its own grid can differ by one: give it the table's, and the sigmas that belong to it.
    scheduler.timesteps = tableau.timesteps
    sigma, alpha = schedule.sigma(tableau.timesteps), schedule.alpha(tableau.timesteps)
    scheduler.sigmas = torch.cat((sigma / alpha, torch.zeros(1, dtype=torch.float64)))
    scheduler.config.lower_order_final = n_steps < 15
    x_T, z = noise_for(n_steps, 2)
    theirs = their_sample(scheduler, x_T, lambda i: {})
    ours = our_sample(schedule, tableau, x_T, z, clip=None).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_ddim_with_eta_one_is_ddpm():
    timesteps = SPACINGS["leading"](100, 20)
    one, other = ddim(SCHEDULE, timesteps, eta=1.0), ddpm(SCHEDULE, timesteps)
    for name in ("p", "B", "C"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("variance", "widest"), [("fixed_small", 0.03), ("fixed_large", 0.03)])
def test_ddpm_has_the_right_law(variance, widest):
    """With the exact denoiser of a Gaussian, 100 steps sample that Gaussian."""
    mean, std, count = torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.4, 20_000
    tableau = solver_tableau(SCHEDULE, "ddpm", 100, variance=variance)
    x_T, z = noise_for(100, count, shape=(1, 2))
    sample = Sequential()(gaussian_denoiser(SCHEDULE, mean, std), tableau, x_T, z).sample
    for column in range(2):
        distance = stats.kstest(sample[:, 0, column].numpy(), stats.norm(float(mean[0, column]), std).cdf)
        assert distance.statistic < widest


def test_ddpm_samples_every_mode_of_a_mixture():
    tableau = solver_tableau(SCHEDULE, "ddpm", 100)
    x_T, z = noise_for(100, 1, shape=(9000, 1))
    sample = Sequential()(mixture_denoiser(SCHEDULE, std=0.1), tableau, x_T, z).sample
    shares = [float(((sample - m).abs() < 0.25).double().mean()) for m in (-0.6, 0.1, 0.7)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm_solver_pp_2m", 2)])
def test_ode_solvers_converge_at_their_order(solver, order):
    """On a Gaussian the probability flow is known: ``x_0 = mean + (x_T - a m) std / sqrt(a^2 std^2 +
    s^2)`` from any t; the error of the last node before the clean one is measured, since the clean
    step (lambda infinite) is first order for all."""
    schedule = NoiseSchedule.named("linear", 1000, beta_end=0.012)
    mean, std = torch.tensor([[0.3]], dtype=torch.float64), 0.4
    denoise = gaussian_denoiser(schedule, mean, std)
    errors = []
    for n in (40, 80, 160):
        # Equal strides in lambda make the order visible at few steps.
        lambdas = (schedule.alpha(torch.arange(1000)) / schedule.sigma(torch.arange(1000))).log()
        ends = torch.linspace(float(lambdas[999]), float(lambdas[200]), n + 1, dtype=torch.float64)
        timesteps = torch.stack([(lambdas - value).abs().argmin() for value in ends])
        tableau = SOLVERS[solver](schedule, torch.cat((timesteps, torch.tensor([0]))))
        x_T, z = noise_for(len(tableau.timesteps), 1, shape=(1, 1))
        walk = Sequential()(denoise, tableau, x_T, z)
        node = n
        x = tableau.p[node] * x_T + torch.tensordot(tableau.B[node, :node], walk.x0_hats[:node], dims=1)
        marginal = [
            (schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2).sqrt() for t in timesteps[[0, -1]]
        ]
        a = [schedule.alpha(t) for t in timesteps[[0, -1]]]
        exact = a[1] * mean + (x_T - a[0] * mean) * marginal[1] / marginal[0]
        errors.append(float((x - exact).abs().max()))
    measured = np.log2(errors[0] / errors[2]) / 2
    assert measured == pytest.approx(order, abs=0.35), errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_step_form_is_the_same_table(solver):
    tableau = solver_tableau(SCHEDULE, solver, 25)
    again = Tableau.from_steps(tableau.timesteps, *tableau.step_form, tableau.variance)
    torch.testing.assert_close(again.B, tableau.B, atol=1e-12, rtol=0)
    torch.testing.assert_close(again.C, tableau.C, atol=1e-12, rtol=0)


def test_a_tableau_checks_itself():
    good = solver_tableau(SCHEDULE, "ddpm", 5)
    values = {name: getattr(good, name) for name in ("timesteps", "p", "B", "C", "variance")}
    uses_itself = good.B.clone()
    uses_itself[2, 2] = 1.0
    for name, bad in [
        ("B", uses_itself),
        ("p", good.p * 2),
        ("C", good.C.float()),
        ("variance", good.variance[1:]),
        ("B", good.B * float("inf")),
    ]:
        with pytest.raises(ValueError):
            Tableau(**{**values, name: bad})


def test_schedules_refuse_nonsense():
    with pytest.raises(InputError, match="did you mean 'squared_cosine'"):
        NoiseSchedule.named("squared_cosin", 100)
    with pytest.raises(InputError, match="fall strictly"):
        NoiseSchedule.named("linear", 10, beta_start=0.0, beta_end=0.0)
