"""The policy is a pure function; its parallel samplers plan what the sequential one plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import InvalidObservationError, Policy, spec_schedule
from paradiffpolicy.sampling.sampler import make_sampler

from .conftest import ROOT, TINY, tiny_checkpoint


def policy_with(**sampler) -> Policy:
    return Policy(tiny_checkpoint(), make_sampler(spec_schedule(TINY), **sampler))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


WINDOWS = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0)) * 512


def test_a_plan_has_the_promised_shapes():
    policy = policy_with(n_steps=5)
    plan = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    assert plan.actions.shape == (3, 16, 2)
    assert plan.executed == slice(1, 9) and plan.executed_actions.shape == (3, 8, 2)
    assert torch.equal(plan.executed_actions, plan.actions[:, 1:9])
    assert plan.solution.iterations.tolist() == [5, 5, 5]
    # Clipped to the range of the data, in the environment's units.
    assert plan.actions.min() >= -1e-3 and plan.actions.max() <= 512.001


def test_planning_is_pure():
    policy = policy_with(n_steps=5)
    before = WINDOWS.clone()
    one = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    policy.plan(WINDOWS, one, generator=seeded(7, 8, 9))
    again = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    assert torch.equal(one.actions, again.actions) and torch.equal(WINDOWS, before)


def test_numpy_and_single_windows_are_taken():
    policy = policy_with(n_steps=5)
    one = policy.plan(WINDOWS[0].numpy().astype(np.float64), generator=seeded(0)[0])
    batch = policy.plan(WINDOWS[:1], generator=seeded(0))
    torch.testing.assert_close(one.actions, batch.actions)


def test_an_element_does_not_depend_on_its_neighbours():
    policy = policy_with(n_steps=20, driver="picard", window=6)
    together = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    alone = policy.plan(WINDOWS[1:2], generator=seeded(1))
    torch.testing.assert_close(together.actions[1], alone.actions[0], atol=0.01, rtol=0)
    assert together.solution.iterations[1] == alone.solution.iterations[0]


@pytest.mark.parametrize("driver", ["picard", "picard_published"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm_solver_pp_2m"])
def test_parallel_plans_are_the_sequential_ones(driver, solver):
    sequential = policy_with(solver=solver, n_steps=25)
    parallel = policy_with(solver=solver, n_steps=25, driver=driver, window=8, tolerance=1e-9)
    expected = sequential.plan(WINDOWS, generator=seeded(0, 1, 2)).actions
    actual = parallel.plan(WINDOWS, generator=seeded(0, 1, 2)).actions
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)


def test_realtime_continues_the_last_plan():
    """From a solved plan whose problem hasn't changed, one round finds the same plan again."""
    policy = policy_with(solver="ddim", n_steps=10, driver="rti", iterations=1)
    first = policy.plan(WINDOWS, generator=seeded(0, 1, 2))
    second = policy.plan(WINDOWS, first, generator=seeded(3, 4, 5), executed_steps=0)
    assert first.solution.iterations.tolist() == [10] * 3 and second.solution.iterations.tolist() == [1] * 3
    torch.testing.assert_close(second.actions, first.actions, atol=0.02, rtol=0)


def test_with_sampler_shares_the_weights():
    policy = policy_with(n_steps=5)
    other = policy.with_sampler(make_sampler(policy.schedule, solver="ddim", n_steps=3))
    assert other.denoiser.network is policy.denoiser.network
    assert policy.plan(WINDOWS, generator=seeded(0, 1, 2)).solution.iterations[0] == 5
    assert other.plan(WINDOWS, generator=seeded(0, 1, 2)).solution.iterations[0] == 3


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (torch.zeros(1, 2, 19), r"\(1, 2, 19\) must be \[batch, n_obs_steps=2, obs_dim=20\]"),
        (torch.zeros(1, 3, 20), "n_obs_steps=2"),
        (torch.zeros(20), "n_obs_steps=2"),
        (torch.zeros(1, 2, 20).index_fill(2, torch.tensor([7]), float("nan")), "step 0, column 7"),
        (torch.zeros(1, 2, 20).index_fill(1, torch.tensor([1]), float("inf")), "step 1, column 0"),
    ],
)
def test_bad_observations_are_refused(window, message):
    with pytest.raises(InvalidObservationError, match=message):
        policy_with(n_steps=2).plan(window, generator=seeded(0))


def test_the_batch_must_agree():
    policy = policy_with(n_steps=2)
    with pytest.raises(InputError, match="3 observation windows need as many generators, got 2"):
        policy.plan(WINDOWS, generator=seeded(0, 1))
    with pytest.raises(InputError, match="3 previous plans"):
        policy.plan(WINDOWS[:1], policy.plan(WINDOWS, generator=seeded(0, 1, 2)), generator=seeded(0))


# --------------------------------------------------------------------------------------- guidance

GUIDED = replace(TINY, condition_dropout=0.1)


def test_guidance_changes_plans_and_scale_one_does_not():
    window = np.random.default_rng(0).uniform(100, 400, (2, 2, 20))
    schedule = spec_schedule(GUIDED)
    policy = Policy(tiny_checkpoint(GUIDED), make_sampler(schedule, solver="ddim", n_steps=5))
    plain, one, three, per_element = (
        p.plan(window, generator=seeded(0, 1)).actions
        for p in (
            policy,
            policy.with_guidance(1.0),
            policy.with_guidance(3.0),
            policy.with_guidance(torch.tensor([1.0, 3.0])),
        )
    )
    torch.testing.assert_close(one, plain, atol=1e-3, rtol=0)
    assert (three - plain).abs().max() > 0.1
    torch.testing.assert_close(per_element, torch.stack((plain[0], three[1])), atol=1e-3, rtol=0)
    assert policy.guidance_scale is None  # the policy itself stays as it was


def test_a_dynamic_threshold_bounds_plans():
    window = np.full((2, 20), 100.0)
    policy = Policy(tiny_checkpoint(GUIDED), make_sampler(spec_schedule(GUIDED), solver="ddim", n_steps=5))
    bounded = policy.with_guidance(4.0, dynamic_threshold=0.9)
    clipped = policy.with_guidance(4.0)
    plans = [p.plan(window, generator=seeded(0)).solution.sample for p in (bounded, clipped)]
    assert plans[0].abs().max() <= 1 and not torch.equal(*plans)


def test_guiding_an_unconditional_policy_is_refused():
    policy = Policy(tiny_checkpoint(), make_sampler(spec_schedule(TINY)))
    with pytest.raises(InputError, match="condition dropout"):
        policy.with_guidance(2.0)


STORED = np.load(Path(__file__).parent / "stored_plans.npz")
"""Two plans each, one after the other, of the shipped checkpoints, from before names and places changed."""

STORED_SAMPLERS = {
    "ddpm": {"solver": "ddpm", "n_steps": 20},
    "paraddpm": {"solver": "ddpm", "driver": "picard", "window": 50, "tolerance": 0.05},
    "ddim": {"solver": "ddim", "n_steps": 15},
    "paraddim": {"solver": "ddim", "n_steps": 15, "driver": "picard", "window": 15, "tolerance": 0.05}
    | {"start": "warm"},
    "speculative": {"solver": "ddpm", "driver": "speculative", "window": 20},
    "rti": {"solver": "ddim", "n_steps": 10, "spacing": "trailing", "driver": "rti", "iterations": 2},
}


@pytest.mark.parametrize("name", STORED_SAMPLERS)
@pytest.mark.parametrize("task", ["pusht_keypoints", "lift", "can", "square"])
def test_shipped_checkpoints_give_the_plans_that_they_always_gave(task, name):
    policy = Policy.load(ROOT / "checkpoints" / task, **STORED_SAMPLERS[name])
    draw = torch.Generator().manual_seed(1)
    window = torch.empty(1, policy.spec.n_obs_steps, policy.spec.obs_dim).uniform_(-0.5, 0.5, generator=draw)
    window = policy.observation_normalizer.unnormalize(window)
    generator = torch.Generator().manual_seed(0)
    first = policy.plan(window, generator=generator)
    second = policy.plan(window, first, generator=generator)
    plans = policy.action_normalizer.normalize(torch.cat((first.actions, second.actions)))
    stored = policy.action_normalizer.normalize(torch.from_numpy(STORED[f"{task}/{name}"]))
    torch.testing.assert_close(plans, stored, atol=2e-4, rtol=0)
