"""Windows over several processes: every process comes to the single process's result, bit for bit.

Run as a module (by torchrun, from the tests), this file is one of the processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paradiffpolicy.cli.main import main
from paradiffpolicy.diffusion.analytic import mixture_denoiser
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.driver import Evaluate, evaluate_active
from paradiffpolicy.sampling.noise import noise_for
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.sampling.sharded import Sharded, join_from_environment
from paradiffpolicy.sampling.spec import spec_sampler

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
PROCESSES = 2
"""Divides some of the windows."""


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


SHARDED = "sampler.paraddpm.evaluate=sharded"
TOO_MANY = ["evaluate", "samplers=[paraddpm]", SHARDED, "sampler.paraddpm.window=1"]


def evaluation(folder: Path, name: str, *more: str) -> list[str]:
    settings = "samplers=[paraddpm] reference=paraddpm seeds=2 task.max_steps=16 paced_ticks=2"
    settings += (
        " latency_plans=2 videos=0 capture=eager sampler.paraddpm.n_steps=20 sampler.paraddpm.window=20"
    )
    folders = f"checkpoint={folder / 'tiny'}", f"out={folder / name}"
    return ["evaluate", *settings.split(), *folders, *more]


def one_process(folder: Path) -> None:
    """Everything that one of torchrun's processes does for the tests."""
    torch.set_num_threads(1)
    said, init = [], dist.init_process_group
    for command in (TOO_MANY, evaluation(folder, "sharded", SHARDED)):
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            said.append([main(command)])
        said[-1] += [out.getvalue(), err.getvalue()]
        # torchrun's own meeting place serves once.
        place = {"init_method": f"file://{folder}/{len(said)}", "world_size": PROCESSES}
        dist.init_process_group = partial(init, rank=int(os.environ["RANK"]), **place)
    rank = join_from_environment("cpu")
    with torch.inference_mode():
        results = samples_of_the_mixture("sharded") + plans_of_a_network(Sharded())
    torch.save((said, [result.clone() for result in results]), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """Where the processes, started once, wrote what they did and said."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_checkpoint().save(folder / "tiny")
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    subprocess.run(
        [sys.executable, "-m", *command, "-m", "tests.test_sharded", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return folder


def test_processes_agree_with_one_bit_for_bit(launched):
    with torch.inference_mode():
        alone = samples_of_the_mixture("active") + plans_of_a_network(in_shares(PROCESSES))
    for rank in range(PROCESSES):
        _, together = torch.load(launched / f"{rank}.pt")
        assert len(together) == len(alone)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one, other)


def test_more_processes_than_nodes_are_refused_in_one_line(launched):
    refused = [torch.load(launched / f"{rank}.pt")[0][0] for rank in range(PROCESSES)]
    line = "sampler.paraddpm: 2 processes for a window of 1 nodes: start at most 1, or widen it"
    assert refused == [[2, "", f"paradiffpolicy: {line}\n"], [2, "", ""]]


def test_a_sharded_evaluation_is_the_single_one(launched):
    said = [torch.load(launched / f"{rank}.pt")[0][1] for rank in range(PROCESSES)]
    assert [code for code, *_ in said] == [0, 0]
    assert [out.count("score ±") for _, out, _ in said] == [1, 0], "one process reports"
    assert main(evaluation(launched, "alone")) == 0
    scores = []
    for name in ("sharded", "alone"):
        report = json.loads((launched / name / "report.json").read_text())
        result = report["samplers"]["paraddpm"]
        scores.append((result["score"], result["iterations_per_plan"]))
    assert scores[0] == scores[1]


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
