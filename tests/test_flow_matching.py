"""Flow matching: the straight path is a schedule like others, under every solver that can begin at noise."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.diffusion.analytic import mixture_denoiser
from paradiffpolicy.diffusion.denoiser import Denoiser, unbounded
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.noise import generators_for, noise_for
from paradiffpolicy.sampling.reference import probability_flow
from paradiffpolicy.sampling.rti import RTI
from paradiffpolicy.sampling.sample import sample
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.sequential import Sequential
from paradiffpolicy.sampling.solvers import SOLVERS, solver_tableau
from paradiffpolicy.sampling.spec import spec_sampler, spec_schedule
from paradiffpolicy.sampling.speculative import Speculative
from paradiffpolicy.sampling.warm_start import STARTS
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.types import Committed, Noise

from .conftest import DISTINCT_SOLVERS, FLOW, UNMEASURED, assert_close, gaussian_denoiser, tiny_checkpoint
from .test_drivers import EXACT, WINDOWED
from .test_solvers import ORDERS, measured_order
from .test_training import SETTINGS, assert_same_run, toy_data

SCHEDULE = NoiseSchedule.named("flow", 1000)
FROM_NOISE = ["ddpm", "sde_dpm_solver_pp_2m", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m"]
"""Solvers that can begin at the noisiest timestep."""
STOCHASTIC = {"ddpm": {}, "ddim": {"eta": 0.5}, "sde_dpm_solver_pp_2m": {}}


# --------------------------------------------------------------------------------------- Euler's method


def velocity(x, time, condition):
    """A small random network, in float64, of times from 0 to 1 with noise at 1."""
    draw = torch.Generator().manual_seed(0)
    W, V = (torch.randn(8, 8, generator=draw, dtype=torch.float64) / 3 for _ in range(2))
    hidden = torch.tanh(x.flatten(1) @ W + time.view(-1, 1) + condition)
    return (hidden @ V).view_as(x)


def euler_loop(x, condition, n):
    """What openpi runs: Euler's method from time 1 to 0."""
    for k in range(n):
        time = torch.full((len(x),), 1 - k / n, dtype=torch.float64)
        x = x - velocity(x, time, condition) / n
    return x


CONDITION = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)


@pytest.mark.parametrize(("n_train_steps", "n"), [(1000, 10), (100, 5), (7, 7)])
def test_the_euler_solver_is_eulers_method_on_the_velocity(n_train_steps, n):
    schedule = NoiseSchedule.named("flow", n_train_steps, time_scale=1)
    sampler = make_sampler(schedule, solver="euler", n_steps=n, spacing="trailing")
    noise = noise_for(n, 3)
    denoise = Denoiser(velocity, schedule, "velocity", unbounded).bind(CONDITION)
    actual = sampler.driver(denoise, sampler.tableau, noise).sample
    assert_close(actual, euler_loop(noise.x_T, CONDITION, n), atol=1e-13, rtol=0)


def test_time_may_run_the_other_way():
    """Where noise is at time 0 and the velocity points to the data, the network is wrapped."""

    def towards_data(x, time, condition):
        return -velocity(x, 1 - time, condition)

    schedule = NoiseSchedule.named("flow", 1000, time_scale=1)
    wrapped = Denoiser(lambda x, s, c: -towards_data(x, 1 - s, c), schedule, "velocity", unbounded)
    sampler = make_sampler(schedule, solver="euler", n_steps=10, spacing="trailing")
    noise = noise_for(10, 3)
    x = noise.x_T
    for k in range(10):
        x = x + towards_data(x, torch.full((3,), k / 10, dtype=torch.float64), CONDITION) / 10
    actual = sampler.driver(wrapped.bind(CONDITION), sampler.tableau, noise).sample
    assert_close(actual, x, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("time_scale", "times"), [(None, [9, 4]), (1, [1, 0.5]), (1000.0, [1000, 500])])
def test_the_network_is_called_with_its_own_time(time_scale, times):
    """In sampling, at nodes as at any time, and in training."""
    schedule, seen = NoiseSchedule.named("flow", 10, time_scale=time_scale), []

    def network(x, time):
        seen.append(float(time[0]))
        return x

    sample(network, (1, 2), schedule=schedule, prediction="velocity", n_steps=2, spacing="trailing")
    assert seen == times
    denoiser = Denoiser(lambda x, time, condition: network(x, time), schedule, "velocity")
    denoiser(torch.zeros(1, 2), torch.tensor([4.0]), torch.zeros(1, 1))
    assert seen[2] == times[1]


# ------------------------------------------------------------------------------------- tables from noise


@pytest.mark.parametrize("solver", DISTINCT_SOLVERS)
def test_a_solver_begins_at_noise_alone_or_is_refused(solver):
    if solver in FROM_NOISE:
        assert solver_tableau(SCHEDULE, solver, 10, "trailing").timesteps[0] == 999
        return
    with pytest.raises(InputError, match=f"'{solver}' can't begin at timestep 999.*euler.*lambda_min=-6"):
        solver_tableau(SCHEDULE, solver, 10, "trailing")
    assert solver_tableau(SCHEDULE, solver, 10, "trailing", True, -6).p.isfinite().all()


MIXTURE = mixture_denoiser(SCHEDULE, std=0.4)
ORDERS_FROM = [
    *((899.0, solver, order, options) for solver, (order, options) in ORDERS.items()),
    (999.0, "ddim", 1, {}),
    (999.0, "dpm_solver_pp_2m", 2, {"lower_order_final": False}),
    (999.0, "dpm_solver_pp_3m", 2.6, {"lower_order_final": False}),  # its first step is of first order
]


X_T = noise_for(1, 2, shape=(2, 1)).x_T


def order_grid(begin, n):
    """Equal strides, as of Euler's method."""
    return torch.linspace(begin, 49, n + 1, dtype=torch.float64)


@functools.cache
def exact_flow(begin):
    """The adaptive solver's solution, which all solvers here approximate."""
    tableau, noise = SOLVERS["ddim"](SCHEDULE, order_grid(begin, 4)), Noise.of_flow(X_T, 4)
    return probability_flow(MIXTURE, tableau, noise, SCHEDULE, rtol=1e-12, atol=1e-12).sample


@pytest.mark.parametrize(("begin", "solver", "order", "options"), ORDERS_FROM)
def test_solvers_converge_at_their_order(begin, solver, order, options):
    errors = []
    for n in (48, 96, 192):
        tableau = SOLVERS[solver](SCHEDULE, order_grid(begin, n), **options)
        solution = Sequential()(MIXTURE, tableau, Noise.of_flow(X_T, tableau.n_nodes))
        errors.append(float((solution.sample - exact_flow(begin)).abs().max()))
    assert measured_order(errors) == pytest.approx(order, abs=0.35), errors


@pytest.mark.parametrize("solver", FROM_NOISE)
def test_a_gaussian_is_sampled(solver):
    """From the path's pure noise, with the exact denoiser."""
    mean, std = torch.tensor([[0.3]], dtype=torch.float64), 0.4
    tableau = solver_tableau(SCHEDULE, solver, 100, "trailing")
    found = Sequential()(gaussian_denoiser(SCHEDULE, mean, std), tableau, noise_for(100, 5000, shape=(1, 1)))
    distance = stats.kstest(found.sample.flatten().numpy(), stats.norm(0.3, std).cdf)
    assert distance.statistic < 0.035


# ---------------------------------------------------------------------------------------------- drivers


@pytest.mark.parametrize("solver", FROM_NOISE)
@pytest.mark.parametrize("driver", [*WINDOWED, RTI])
def test_parallel_drivers_equal_sequential(driver, solver):
    tableau = solver_tableau(SCHEDULE, solver, 10, "trailing")
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(10, 3)
    expected = Sequential()(denoise, tableau, noise)
    for built in [RTI(10)] if driver is RTI else [driver(1, EXACT), driver(4, EXACT), driver(20, EXACT)]:
        solution = built(denoise, tableau, noise, torch.zeros_like(noise.z))
        assert_close(solution.sample, expected.sample, atol=1e-9, rtol=0)
        assert_close(solution.x0_hats, expected.x0_hats, atol=1e-9, rtol=0)


@pytest.mark.parametrize("start", STARTS)
def test_every_start_ends_at_the_sequential_sample(start):
    sampler = make_sampler(
        SCHEDULE, solver="euler", n_steps=10, spacing="trailing", driver="picard", tolerance=1e-6, start=start
    )
    denoise = mixture_denoiser(SCHEDULE)
    last = sampler(denoise, (4, 2), generators_for(0, 3))
    solution = sampler(denoise, (4, 2), generators_for(1, 3), last, executed_steps=1)
    expected = Sequential()(denoise, sampler.tableau, solution.noise)
    assert_close(solution.sample, expected.sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", STOCHASTIC)
@pytest.mark.parametrize("window", [1, 7, 100])
def test_a_speculative_solution_is_the_sequential_one_of_its_decided_noise(solver, window):
    tableau = solver_tableau(SCHEDULE, solver, 20, "trailing", **STOCHASTIC[solver])
    denoise, noise = mixture_denoiser(SCHEDULE), noise_for(20, 3)
    solution = Speculative(window)(denoise, tableau, noise)
    again = Sequential()(denoise, tableau, solution.noise)
    assert_close(solution.sample, again.sample, atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_speculation_keeps_the_distribution(solver):
    tableau = solver_tableau(SCHEDULE, solver, 8, "trailing", **STOCHASTIC[solver])
    mixture = mixture_denoiser(SCHEDULE, std=0.1)

    def denoise(x, t, element):
        return mixture(x, t, torch.zeros_like(element))

    samples = [
        driver(denoise, tableau, noise_for(8, 3000, seed, (1, 1)))
        for seed, driver in enumerate((Sequential(), Speculative(6)))
    ]
    assert float((samples[1].iterations > 1).double().mean()) > 0.3  # some guesses were wrong
    one, other = (solution.sample.flatten().numpy() for solution in samples)
    assert stats.ks_2samp(one, other).pvalue > 0.01


# --------------------------------------------------------------------------------------------- policies

FLAT = replace(
    FLOW, down_dims=(8,), n_groups=4, diffusion_step_embed_dim=8, schedule_options={"time_scale": 30}
)
WINDOW = torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(0)) * 512


def flow_policy(**sampler) -> Policy:
    settings = {"solver": "euler", "n_steps": 6, "spacing": "trailing", **sampler}
    return Policy.from_checkpoint(tiny_checkpoint(FLAT), spec_sampler(FLAT, **settings))


def planned(policy: Policy) -> torch.Tensor:
    """Plans that continue one another."""
    plan, plans = None, []
    for k in range(3):
        plan = policy.plan(WINDOW + k, plan, generator=k)
        plans.append(plan.actions)
    return torch.stack(plans)


@pytest.mark.parametrize("settings", [
    {"driver": "sequential"},
    {"driver": "rti"},
    {"driver": "picard", "window": 3, "evaluate": "all"},
    {"driver": "speculative", "solver": "ddpm", "evaluate": "all"},
])  # fmt: skip
@pytest.mark.parametrize(("backend", "atol"), [("emulated", 0), ("openvino", 0.02)])
def test_captured_policies_plan_the_same(backend, atol, settings):
    policy = flow_policy(**settings)
    assert_close(planned(policy.captured(backend, precision="f32")), planned(policy), atol=atol, rtol=0)


@pytest.mark.parametrize("settings", [
    *({"solver": solver} for solver in FROM_NOISE),
    {"driver": "picard", "tolerance": 1e-6},
    {"driver": "rti", "iterations": 1},
])  # fmt: skip
def test_committed_actions_are_kept(settings):
    """The others are fitted to them."""
    policy = flow_policy(**settings)
    free = policy.plan(WINDOW, generator=0)
    weight = torch.zeros(2, 16)
    weight[:, :4] = 1
    actions = free.actions + 40
    plan = policy.plan(WINDOW, generator=0, committed=Committed(actions, weight))
    assert_close(plan.actions[:, :4], actions[:, :4], atol=1e-3, rtol=0)
    assert (plan.actions - free.actions)[:, 4:].abs().max() > 1e-3


# --------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("name", "expected"), [("uniform", stats.uniform()), ("beta", stats.beta(1.5, 1))])
def test_training_timesteps_have_their_distribution(name, expected):
    schedule = NoiseSchedule.named("flow", 1000, training_timesteps=name)
    s = schedule.sigma(schedule.draw(5000, torch.Generator().manual_seed(0))).numpy()
    assert s.min() >= 0.001 and s.max() <= 1
    assert stats.kstest((s - 0.001) / 0.999, expected.cdf).pvalue > 0.01


def test_a_flow_trains_resumes_and_samples(toy_store, tmp_path):
    spec = replace(FLOW, down_dims=(16,), schedule_options={"training_timesteps": "beta"})
    data, runs = toy_data(toy_store), [tmp_path / "whole", tmp_path / "resumed"]
    Trainer(data, spec, SETTINGS, runs[0]).run(progress=False)
    for stop in (5, 12):
        Trainer(data, spec, SETTINGS, runs[1]).run(until=stop, progress=False)
    assert_same_run(*runs)
    with pytest.raises(InputError, match="schedule_options"):
        Trainer(data, replace(spec, schedule_options={}), SETTINGS, runs[1]).run(progress=False)
    checkpoint = Checkpoint.load(runs[0] / "checkpoint")
    assert checkpoint.spec == spec
    policy = Policy.load(runs[0] / "checkpoint", solver="euler", n_steps=10, spacing="trailing")
    assert policy.plan(WINDOW, generator=0).actions.isfinite().all()


def test_the_command_line_trains_a_flow(capsys, toy_store, tmp_path):
    settings = ["policy.schedule=flow", "policy.prediction=velocity", "policy.down_dims=[16]"]
    settings += ["policy.schedule_options={training_timesteps: beta}", "policy.diffusion_step_embed_dim=16"]
    settings += ["training.n_steps=2", "training.batch_size=4", "evaluation.seeds=0", f"run={tmp_path}"]
    main(["train", f"dataset={toy_store}", *settings, *UNMEASURED])
    spec = Checkpoint.load(tmp_path / "checkpoint").spec
    assert spec_schedule(spec) == NoiseSchedule.named("flow", 100, training_timesteps="beta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training_timesteps": "betta"}, "unknown distribution of training timesteps 'betta'; did you mean"),
        ({"time_scale": 0}, "time_scale=0 must be a number above 0"),
        ({"time_scale": math.nan}, "time_scale=nan"),
        ({"scale": 1}, "noise schedule 'flow' has no option 'scale'"),
        ({"n_train_steps": 9}, "has no option 'n_train_steps'"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        spec_schedule(replace(FLOW, schedule_options=options))


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_training_refuses_what_leaves_x0_open(prediction, toy_store, tmp_path):
    with pytest.raises(InputError, match="leaves x_0 open"):
        Trainer(toy_data(toy_store), replace(FLOW, prediction=prediction), SETTINGS, tmp_path)
