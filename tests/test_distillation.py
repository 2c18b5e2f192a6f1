"""Distillation: a student learns its teacher's plans, from every node on the way to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.errors import InputError
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.spec import spec_sampler, spec_schedule
from paradiffpolicy.training.distillation import Distillation, student_spec, teacher_sampler
from paradiffpolicy.training.objective import WHOLE
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.types import PolicySpec

from .conftest import TINY, make_toy_store, tiny_checkpoint
from .test_training import assert_same_run, toy_data

SMALL = replace(TINY, down_dims=(16,))
SETTINGS = TrainSettings(
    n_steps=40, batch_size=16, learning_rate=3e-3, warmup_steps=3, log_every=2, save_every=9
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_toy_store(tmp_path_factory.mktemp("distillation") / "toy.zarr")


def teacher(nodes: int = 2) -> Policy:
    return Policy.from_checkpoint(tiny_checkpoint(SMALL), teacher_sampler(SMALL, nodes))


def distillation(store: Path, nodes: int = 6) -> Distillation:
    plans = teacher(nodes)
    data = toy_data(store)
    normal = replace(
        data,
        observations=plans.observation_normalizer.normalize(data.observations),
        actions=plans.action_normalizer.normalize(data.actions),
    )
    return Distillation(normal, student_spec(SMALL, nodes), SETTINGS, teacher=plans)


def test_trajectories_are_the_teachers_from_every_node(store):
    made = distillation(store)
    cold, warm = made.solved(3)
    schedule, times = spec_schedule(SMALL), made.tableau.timesteps
    alpha, sigma = schedule.alpha(times).float(), schedule.sigma(times).float()
    assert (cold.first == 0).all() and (warm.first == 3).all()
    for part in (cold, warm):
        for k in range(int(part.first[0]), 5):  # DDIM's step, from what the network says there
            t = times[k].float().expand(len(part.plan))
            D = made.teacher.denoiser(part.x[k], t, part.condition)
            eps = (part.x[k] - alpha[k] * D) / sigma[k]
            assert_close(part.x[k + 1], alpha[k + 1] * D + sigma[k + 1] * eps, atol=1e-4, rtol=0)
        last = made.teacher.denoiser(part.x[5], times[5].float().expand(len(part.plan)), part.condition)
        assert_close(part.plan, last, atol=1e-5, rtol=0)


def test_renoised_plans_follow_those_of_the_same_episode(store):
    made = distillation(store)
    cold, warm = made.solved(0)
    schedule, t = spec_schedule(SMALL), made.tableau.timesteps[3]
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    moved = torch.cat((cold.plan[:, 8:], cold.plan[:, -1:].expand(-1, 8, -1)), dim=1)
    start = cold.condition.eq(warm.condition).all(dim=1)  # an episode's first windows: the same one again
    assert 0 < int(start.sum()) < len(start)
    guess = torch.where(start[:, None, None], cold.plan, moved)
    left = (warm.x[3] - alpha * guess) / sigma
    assert abs(float(left.mean())) < 0.15 and abs(float(left.std()) - 1) < 0.1  # it is standard normal


def test_a_student_that_gives_the_plans_has_no_loss(store):
    made = distillation(store)
    pool = made._pool_at(0)
    schedule = spec_schedule(SMALL)
    asked = []

    class Oracle(torch.nn.Module):
        def forward(self, x, t, condition):
            asked.append(t)
            at = [torch.where((pool.x == row).flatten(2).all(dim=2))[1][0] for row in x]
            alpha, sigma = (level(t).float()[:, None, None] for level in (schedule.alpha, schedule.sigma))
            return (alpha * x - pool.plan[torch.stack(at)]) / sigma

    assert float(made(Oracle(), 0, False)) < 1e-8
    entries, anywhere = (torch.cat(asked) == 99).sum(), len(torch.cat(asked).unique())
    assert entries > 0 and anywhere > 3
    assert float(made(Zero(), 0, False)) > 1e-2
    assert torch.equal(made._pool_at(71).plan, pool.plan)
    assert not torch.equal(made._pool_at(72).plan, pool.plan)  # every node was drawn about once


def test_shares_of_a_loss_add_up_to_it(store):
    made = distillation(store)
    shares = [float(made(Zero(), 0, False, part)) for part in WHOLE.split(3)]
    assert sum(shares) == pytest.approx(float(made(Zero(), 0, False)), rel=1e-5)


class Zero(torch.nn.Module):
    def forward(self, x, t, condition):
        return torch.zeros_like(x)


def run_of(store: Path, folder: Path) -> Trainer:
    init = replace(tiny_checkpoint(SMALL), spec=student_spec(SMALL, 2))
    made = partial(Distillation, teacher=teacher())
    return Trainer(toy_data(store), init.spec, SETTINGS, folder, init=init, objective=made)


def test_resumed_is_uninterrupted_and_the_student_comes_closer(store, tmp_path):
    whole = run_of(store, tmp_path / "whole")
    whole.run(progress=False)
    for stop in (5, 25, 40):  # a pool is 24 steps
        run_of(store, tmp_path / "parts").run(until=stop, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert whole.curve[-1][1] < 0.7 * whole.curve[0][1]


def test_a_student_plans_in_one_call_and_refuses_more():
    spec = student_spec(SMALL, 4)
    assert PolicySpec.from_dict({**vars(spec), "student_timesteps": list(spec.student_timesteps)}) == spec
    policy = Policy.from_checkpoint(tiny_checkpoint(spec), spec_sampler(spec))
    window = policy.middle_window()
    assert policy.plan(window).solution.nfe.tolist() == [1]
    two = {"solver": "ddim", "n_steps": 2, "spacing": "trailing"}
    warm = policy.with_sampler(spec_sampler(spec, **two, warm_iterations=1))
    first = warm.plan(window)
    assert first.solution.nfe.tolist() == [2] and warm.plan(window, first).solution.nfe.tolist() == [1]
    captured = warm.captured("emulated").plan(window, first, generator=3)
    assert_close(captured.actions, warm.plan(window, first, generator=3).actions, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=r"a student that learnt 4 timesteps \(99 to 24\).* asks for 8"):
        policy.with_sampler(spec_sampler(spec, **two | {"n_steps": 8}))
    with pytest.raises(InputError, match="student_timesteps"):
        replace(spec, student_timesteps=(100.0,))
    with pytest.raises(InputError, match="nodes=3 must be even"):
        teacher_sampler(SMALL, 3)


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_distill_and_evaluate_beside_the_teacher(capsys, store, tmp_path):
    place = tmp_path / "policy"
    tiny_checkpoint(SMALL).save(place)
    common = [f"dataset={store}", "augmentation=null", "nodes=2", "training.batch_size=8"]
    few = ["training.n_steps=3", "evaluation.seeds=2", "task.max_steps=16", "capture=eager"]
    settings = [*common, *few, f"checkpoint={place}", f"run={tmp_path / 'run'}"]
    evaluate = [
        "evaluate", f"checkpoint={place}", "seeds=2", "task.max_steps=16", "capture=eager", "videos=0",
        "latency_plans=0", "paced_ticks=0", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    code, _out, err = call(capsys, *evaluate, "reference=student", "samplers=[student]")
    assert code == 2 and f"no student at {place / 'student'}: make one with paradiffpolicy distill" in err
    code, _out, err = call(capsys, "distill", *settings, f"student={place / 'student'}")
    assert code == 0, err
    made = Checkpoint.load(place / "student")
    assert made.spec.student_timesteps == (99.0, 49.0) and made.spec.prediction == "v"
    assert made.info["training"]["scores"][0]["n_seeds"] == 2 and made.info["teacher"]["sha256"]
    code, _out, err = call(capsys, *evaluate, "reference=student", "samplers=[student_warm,dpm_solver_pp_6]")
    assert code == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    weights = json.loads((place / "student/policy.json").read_text())["weights"]
    assert report["student_sha256"] == dict.fromkeys(("student", "student_warm"), weights["sha256"])
    student = place / "student"
    code, _out, err = call(capsys, "distill", *settings, f"checkpoint={student}")
    assert code == 2 and f"checkpoint={student} is a student itself: name its teacher, as {place}" in err
    code, _out, err = call(capsys, *evaluate, f"checkpoint={student}", "samplers=[student]")
    assert code == 2 and "sampler.ddpm: the policy is a student" in err
    other = tmp_path / "other"
    shutil.copytree(place, other)
    tiny_checkpoint(replace(made.spec, obs_dim=18)).save(other / "student")
    code, _out, err = call(
        capsys, *evaluate, f"checkpoint={other}", "reference=student", "samplers=[student]"
    )
    assert code == 2 and "has another obs_dim than the policy" in err


def test_bad_spacings_and_starts_are_refused_in_a_line():
    make = partial(make_sampler, spec_schedule(SMALL), solver="ddim")
    for bad, message in (
        ({"n_steps": 2, "spacing": [10, 20]}, r"spacing=\[10, 20\] must be falling timesteps"),
        ({"n_steps": 3, "spacing": [70, 30]}, "spacing lists 2 timesteps: n_steps must be as many"),
        ({"n_steps": 2, "spacing": [100, 3]}, r"must be timesteps from 99 to 0"),
        ({"n_steps": 2, "spacing": ["a", 3]}, "must be falling timesteps"),
        ({"n_steps": 4, "warm_iterations": 2, "start": "cold"}, "goes on from the last plan"),
        ({"n_steps": 4, "warm_iterations": 0}, "warm_iterations=0 must be"),
    ):
        with pytest.raises(InputError, match=message):
            make(**bad)
