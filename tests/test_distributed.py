"""Training in several processes is training in one, to rounding; a failure in one ends all with one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paradiffpolicy.cli import processes
from paradiffpolicy.cli.processes import LostProcessError, noticing_ends, speaks
from paradiffpolicy.errors import InputError
from paradiffpolicy.presets import presets
from paradiffpolicy.training.distributed import OneProcess, SeveralProcesses
from paradiffpolicy.training.objective import WHOLE, Denoising, Part
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer

from .conftest import ROOT, TINY, assert_close, make_toy_store
from .test_training import state, toy_data

pytest.importorskip("accelerate", reason="pip install 'paradiffpolicy[accelerate]'")

SPEC = replace(TINY, down_dims=(16,), condition_dropout=0.3, prefix_steps=4)
SETTINGS = TrainSettings(n_steps=8, batch_size=15, warmup_steps=2, log_every=2, save_every=4)
RUNS = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},  # the form for CPUs
    "pieces": {"precision": "float32", "accumulate": 3},
}
"""Settings of runs, whose odd batches two processes share unevenly."""

AUTO = [name for name, sampler in presets().items() if sampler.get("window") == "auto"]


def trainer(folder: Path, name: str, run: str, processes: OneProcess | None = None, **changes) -> Trainer:
    settings = replace(SETTINGS, **RUNS[name], **changes)
    return Trainer(toy_data(folder / "toy.zarr"), SPEC, settings, folder / run, processes=processes)


def one_process(folder: Path, rank: int) -> None:
    """One of two processes, which run everything that the tests look at."""
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    two = SeveralProcesses(torch.device("cpu"))
    said = []
    for name in RUNS:
        trainer(folder, name, f"two_{name}", processes=two).run(progress=False)
    trainer(folder, "float32", "two_then_one", processes=two).run(until=4, progress=False)
    trainer(folder, "float32", "one_then_two", processes=two).run(progress=False)
    if rank == 1:  # a folder of its machine alone
        trainer(folder, "float32", "other_1").run(until=4, progress=False)
    for run, changes in ((f"other_{rank}", {}), ("few", {"batch_size": 3, "accumulate": 2})):
        with pytest.raises(InputError) as raised:
            trainer(folder, "float32", run, processes=two, **changes)
        said.append(str(raised.value))
    last = trainer(folder, "float32", "lost", processes=two)
    if rank == 1:
        torch.save((said, two.main), folder / "said_1.pt")
        os.kill(os.getpid(), signal.SIGKILL)
    with (
        pytest.raises(LostProcessError, match="another of the processes has ended") as raised,
        noticing_ends(),
    ):
        last.run(progress=False)
    said.append(str(raised.value))
    torch.save((said, two.main), folder / "said_0.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Where two processes, and one alone, trained."""
    folder = tmp_path_factory.mktemp("both")
    make_toy_store(folder / "toy.zarr")
    trainer(folder, "float32", "one_then_two").run(until=4, progress=False)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "torch._dynamo", "accelerate"])
    started = [forks.Process(target=one_process, args=(folder, rank)) for rank in range(2)]
    for process in started:
        process.start()
    for name in RUNS:
        trainer(folder, name, f"one_{name}").run(progress=False)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, -signal.SIGKILL]
    trainer(folder, "float32", "two_then_one").run(progress=False)
    return folder


@pytest.mark.parametrize(
    ("run", "alone", "rounding"),
    [
        ("two_float32", "one_float32", 1e-5),
        ("two_pieces", "one_float32", 1e-5),
        ("one_pieces", "one_float32", 1e-5),
        ("two_then_one", "one_float32", 1e-5),
        ("one_then_two", "one_float32", 1e-5),
        ("two_bfloat16", "one_bfloat16", 3e-3),
    ],
)
def test_the_run_is_a_single_processes_to_rounding(both, run, alone, rounding):
    """Loss curve, weights, averages and AdamW's moments, whatever computed which steps."""
    one, other = state(both / alone), state(both / run)
    assert one["step"] == other["step"] == SETTINGS.n_steps
    assert [step for step, _ in other["curve"]] == [2, 4, 6, 8]
    curves = (torch.tensor(each["curve"]) for each in (other, one))
    assert_close(*curves, rtol=rounding, atol=0)
    for part in ("network", "ema"):
        for name, weight in one[part].items():
            assert_close(other[part][name], weight, rtol=0, atol=rounding, msg=name)
    moments, others = (
        torch.cat([moments["exp_avg"].flatten() for moments in each["optimizer"]["state"].values()])
        for each in (one, other)
    )
    assert (others - moments).norm() < 30 * rounding * moments.norm()


def test_one_process_writes(both):
    """The other leaves neither scalars nor saves."""
    assert [torch.load(both / f"said_{rank}.pt")[1] for rank in range(2)] == [True, False]
    assert len(list((both / "two_float32" / "tensorboard").iterdir())) == 1
    assert not (both / "other_0").exists() and not (both / "few").exists()


def test_all_processes_refuse_what_they_cannot_share(both):
    for rank in range(2):
        other, few, *_ = torch.load(both / f"said_{rank}.pt")[0]
        assert other.endswith(
            "holds a run at step 0 for one process and 4 for another: name a folder that all machines share"
        )
        assert few.startswith("a batch of 3 windows can't be shared out in 4 parts (processes times training")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_of_a_loss_add_up_to_it(toy_store, count):
    run = Trainer(toy_data(toy_store), SPEC, SETTINGS, toy_store.parent)
    assert isinstance(run.objective, Denoising)
    with torch.no_grad():
        whole = run.objective(run.network, 3, False)
        parts = [run.objective(run.network, 3, False, part) for part in WHOLE.split(count)]
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-6) and len(parts) == count
    assert [part for half in WHOLE.split(2) for part in half.split(2)] == WHOLE.split(4)
    assert torch.cat([part.rows(torch.arange(7)) for part in WHOLE.split(count)]).tolist() == [*range(7)]
    assert sum(Part(k, count).share(torch.tensor(1.0), 7) for k in range(count)) == pytest.approx(1)


@pytest.mark.parametrize(("rank", "before", "printed"), [("0", 0, True), ("1", 0, True), ("1", 1, False)])
def test_of_several_that_fail_one_speaks(monkeypatch, rank, before, printed):
    """Another than the first speaks if it is the only one that fails."""
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=0.05))
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "RANK": rank}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", **place}.items():
        monkeypatch.setenv(name, value)
    for _ in range(before):
        assert speaks(LostProcessError("another of the processes has ended"))
    assert speaks(InputError("no such dataset")) == printed
    assert not speaks(LostProcessError("another of the processes has ended"))


@pytest.mark.slow
def test_accelerate_launches_the_command(both):
    """Which reports once; so does torchrun, which it starts processes with."""
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    tiny = (
        "augmentation=null policy.down_dims=[16] policy.diffusion_step_embed_dim=16 device=cpu capture=eager"
    )
    samplers = " ".join(f"~sampler.{name}" for name in AUTO)  # which would be tried out
    steps = "training.batch_size=15 training.n_steps=4 training.log_every=2 evaluation.seeds=0"
    words = f"-m {launch} --dynamo_backend no -m paradiffpolicy train {tiny} {samplers} {steps}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words.split(), "dataset=toy.zarr", "run=launched"]
    done = subprocess.run(command, cwd=both, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched/checkpoint\n"
    assert [step for step, _ in state(both / "launched")["curve"]] == [2, 4]
    assert len(list((both / "launched" / "tensorboard").iterdir())) == 1
