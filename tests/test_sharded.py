"""Windows over several processes: every process comes to the single process's result, bit for bit.

Run as a module (by torchrun, from the tests), this file is one of the processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paradiffpolicy.cli.main import main
from paradiffpolicy.diffusion.analytic import mixture_denoiser
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.policy import Policy, spec_sampler
from paradiffpolicy.sampling.driver import Evaluate, evaluate_active
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.sharded import Sharded, join_from_environment

from .conftest import ROOT, TINY, tiny_checkpoint

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)
CASES = [
    {"driver": "picard", "window": 7},
    {"driver": "picard", "window": 30, "solver": "dpm_solver_pp_2m"},
    {"driver": "picard_published", "window": 10},
    {"driver": "anderson", "window": 7, "tolerance": 0.01},
    {"driver": "speculative", "window": 10},
    {"driver": "rti", "iterations": 3},
]


def samples_of_the_mixture(evaluate: str) -> list[torch.Tensor]:
    """Every case on a denoiser whose rows don't depend on what else is in the call."""
    found = []
    for case in CASES:
        sampler = make_sampler(SCHEDULE, n_steps=30, **case, evaluate=evaluate)
        noise = noise_for(30, 2, dtype=torch.float32)
        start = torch.zeros_like(noise.z) if case["driver"] == "rti" else None
        solution = sampler.driver(mixture_denoiser(SCHEDULE), sampler.tableau, noise, start)
        found += [solution.sample, solution.x0_hats, solution.iterations, solution.nfe]
    return found


def plans_of_a_network(evaluate: Evaluate | str) -> list[torch.Tensor]:
    """Every case on a real network."""
    found = []
    for case in CASES:
        sampler = spec_sampler(TINY, n_steps=30, **case)
        sampler = replace(sampler, driver=replace(sampler.driver, evaluate=evaluate))
        policy = Policy.from_checkpoint(tiny_checkpoint(), sampler)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        plan = policy.plan(np.full((2, 2, 20), 200.0), generator=generators)
        again = policy.plan(np.full((2, 2, 20), 210.0), plan, generator=generators)
        found += [plan.actions, again.actions, again.solution.iterations]
    return found


def in_shares(n: int) -> Evaluate:
    """One process that calls the network as n do: a convolution's rounding depends on how many rows
    are in the call."""

    def evaluate(denoise, x, t, active):
        share = math.ceil(len(x) / n)
        parts = zip(*(tensor.split(share) for tensor in (x, t, active)), strict=True)
        return torch.cat([evaluate_active(denoise, *part) for part in parts])

    return evaluate


def launch(n: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


@pytest.mark.slow
def test_processes_agree_with_one_bit_for_bit(tmp_path):
    n = 3  # divides one of the windows
    launch(n, "-m", "tests.test_sharded", str(tmp_path))
    with torch.inference_mode():
        alone = samples_of_the_mixture("active") + plans_of_a_network(in_shares(n))
    for rank in range(n):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert len(together) == len(alone)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_more_processes_than_nodes_are_refused_in_one_line():
    done = launch(
        2,
        "-m",
        "paradiffpolicy",
        "evaluate",
        "samplers=[paraddpm]",
        "sampler.paraddpm.evaluate=sharded",
        "sampler.paraddpm.window=1",
        check=False,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("paradiffpolicy:")]
    assert lines == [
        "paradiffpolicy: sampler.paraddpm: 2 processes for a window of 1 nodes: start at most 1, or widen it"
    ]


@pytest.mark.slow
def test_a_sharded_evaluation_is_the_single_one(tmp_path):
    tiny_checkpoint().save(tmp_path / "tiny")
    common = [f"checkpoint={tmp_path / 'tiny'}", "samplers=[paraddpm]", "reference=paraddpm", "seeds=2"]
    common += ["task.max_steps=16", "paced_ticks=9", "latency_plans=2", "videos=0", "capture=eager"]
    sharded = launch(
        2,
        "-m",
        "paradiffpolicy",
        "evaluate",
        *common,
        "sampler.paraddpm.evaluate=sharded",
        f"out={tmp_path / 'sharded'}",
    )
    assert sharded.stdout.count("score ±") == 1, "one process reports"
    assert main(["evaluate", *common, f"out={tmp_path / 'alone'}"]) == 0

    scores = []
    for name in ("sharded", "alone"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        result = report["samplers"]["paraddpm"]
        scores.append((result["score"], result["iterations_per_plan"]))
    assert scores[0] == scores[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = join_from_environment("cpu")
    with torch.inference_mode():
        results = samples_of_the_mixture("sharded") + plans_of_a_network(Sharded())
    torch.save([result.clone() for result in results], Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
