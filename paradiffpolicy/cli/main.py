"""The command line: parses, composes the config, and runs a command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..errors import InputError, nearest
from .bench import bench_control, bench_envs, bench_latency, bench_serve, bench_solvers
from .building import choose_device
from .collect import collect
from .composing import compose
from .convert import convert
from .evaluate import evaluate
from .help import entry as help_entry
from .help import settings_help
from .info import info
from .run import StoppedError, run
from .serve import serve
from .train import train


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, what its help says, and the setting that words without = go to."""

    run: Callable[[Any], None]
    help: str
    examples: tuple[tuple[str, str], ...]
    words: str | None = None


COMMANDS = {
    "train": Command(
        train,
        "Trains a diffusion policy on demonstrations. The same command resumes a run that was stopped.",
        (
            ("paradiffpolicy train", "PushT on the human demonstrations"),
            ("paradiffpolicy train dataset=my.zarr run=outputs/train/mine", "your own demonstrations"),
            (
                "paradiffpolicy train training.n_steps=20000 'policy.down_dims=[256,512,1024]'",
                "larger, longer",
            ),
        ),
    ),
    "evaluate": Command(
        evaluate,
        "Runs samplers of one policy in closed loop on the same seeds. Reports rewards with intervals,\n"
        "iterations per plan, plan latency and missed deadlines; writes report.json, a picture and videos.",
        (
            ("paradiffpolicy evaluate", "DDPM, ParaDDPM, speculative and rti on PushT, 50 seeds"),
            ("paradiffpolicy evaluate 'samplers=[ddim,rti]' seeds=10", "others, quickly"),
            ("paradiffpolicy evaluate mode=realtime", "what latency costs, in virtual time"),
        ),
    ),
    "run": Command(
        run,
        "Lets a policy drive a robot in real time (the task's environment by default) and reports the\n"
        "loop's timing. Shows it in the Rerun viewer; keeps it as a dataset, video, pictures.\n"
        "Ctrl-C or SIGTERM stops the robot and writes what there is.",
        (
            ("paradiffpolicy run", "PushT for 30 s, planning in a process of its own"),
            ("paradiffpolicy run view=rerun rate_hz=50 blending.name=rtc", "faster, smoother, watched"),
            (
                "paradiffpolicy run planner=inline video=inline.mp4 record=runs.zarr",
                "waiting for plans",
            ),
        ),
    ),
    "collect": Command(
        collect,
        "Rolls a policy out and appends the episodes to a dataset that 'train' reads.\n"
        "Stopping it at any moment loses nothing that was there before.",
        (
            ("paradiffpolicy collect", "50 PushT episodes to outputs/collect/pusht.zarr"),
            ("paradiffpolicy collect out=my.zarr episodes=200 min_score=0.9", "good ones only"),
            ("paradiffpolicy collect sampler_name=ddpm first_seed=1000", "another sampler, other seeds"),
        ),
    ),
    "convert": Command(
        convert,
        "Turns a robomimic HDF5 file into a zarr store that 'train' reads, or a store into such a file,\n"
        "with absolute or delta actions. Half a dataset is never written.",
        (
            ("paradiffpolicy convert source=demo.hdf5 out=lift.zarr", "robomimic's, to absolute actions"),
            (
                "paradiffpolicy convert source=demo.hdf5 out=train.zarr mask=train observations=states",
                "a subset, with observations computed from the states",
            ),
            (
                "paradiffpolicy convert source=outputs/collect/lift.zarr out=lift.hdf5 actions=delta",
                "for robomimic",
            ),
        ),
    ),
    "bench latency": Command(
        bench_latency,
        "Times plans and network calls, eager and captured, interleaved in one run, as ratios to the loops\n"
        "that diffusion_policy and LeRobot run (diffusers). Prints tables, then one JSON line.",
        (
            ("paradiffpolicy bench latency", "the latency of every sampler"),
            ("paradiffpolicy bench latency 'samplers=[paraddpm]' sampler.paraddpm.window=20", "one, changed"),
            ("paradiffpolicy bench latency threads=1 out=latency.json", "one thread, kept in a file"),
        ),
    ),
    "bench control": Command(
        bench_control,
        "Runs a control loop beside planners in another process, in a thread and inline, taking turns.\n"
        "Reports deadline errors, missed ticks and what a tick costs. Prints a table, then one JSON line.",
        (
            ("paradiffpolicy bench control", "100 Hz for 60 s beside each, plans back to back"),
            ("paradiffpolicy bench control 'planners=[process]' rate_hz=500 seconds=20", "one, faster"),
            (
                "paradiffpolicy bench control scheduling.priority=null scheduling.awake=false",
                "without privileges",
            ),
        ),
    ),
    "bench solvers": Command(
        bench_solvers,
        "Compares solvers, numbers of steps and drivers: iterations, NFE, wall time, error to\n"
        "the sequential sample, error to the exact flow. Writes a table, JSON and a work-precision plot.",
        (
            ("paradiffpolicy bench solvers", "all of them, a few minutes"),
            ("paradiffpolicy bench solvers 'solvers=[ddpm]' 'steps=[100]'", "one solver, every driver"),
            ("paradiffpolicy bench solvers spacing=karras lambda_min=null", "on another grid"),
        ),
    ),
    "serve": Command(
        serve,
        "Serves a policy over websockets: openpi's clients, and paradiffpolicy's RemotePolicy, plan on it.\n"
        "GET /healthz answers while it runs, GET /metrics counts. SIGTERM ends it after pending answers.",
        (
            ("paradiffpolicy serve", "the shipped policy, on this machine only"),
            ("paradiffpolicy serve port=8001 sampler_name=speculative_sde", "another port, another sampler"),
            (
                "paradiffpolicy serve host=0.0.0.0 certificate=cert.pem private_key=key.pem",
                "to other machines, with TLS and the API key in PARADIFFPOLICY_API_KEY",
            ),
        ),
    ),
    "bench serve": Command(
        bench_serve,
        "Starts a server and times it: one client (round trip, planning, and what is between), then many at\n"
        "once (requests per second, batches, errors, memory). Prints tables, then one JSON line.",
        (
            ("paradiffpolicy bench serve", "a thousand requests, then 16 clients for five minutes"),
            ("paradiffpolicy bench serve seconds=10 requests=100", "quickly"),
            ("paradiffpolicy bench serve clients=50 rate_hz=1", "fifty robots that ask once a second"),
        ),
    ),
    "bench envs": Command(
        bench_envs,
        "Times the environments' control steps and resets on one core, taking turns, and robosuite's own\n"
        "step beside ours. Prints a table, then one JSON line.",
        (
            ("paradiffpolicy bench envs", "all of them, some minutes"),
            ("paradiffpolicy bench envs 'envs=[paradiffpolicy/Lift-v0]'", "one"),
            ("paradiffpolicy bench envs own=false turns=20", "longer, without robosuite's own step"),
        ),
    ),
    "info": Command(
        info,
        "Describes zarr stores, robomimic's HDF5 files and checkpoints; without any, the machine, the task\n"
        "and its environment, the checkpoint and the dataset.",
        (
            (
                "paradiffpolicy info task=./mine.yaml",
                "whether a task is complete: its environment, dataset, policy",
            ),
            ("paradiffpolicy info demo.hdf5 outputs/collect/lift.zarr", "datasets"),
            ("paradiffpolicy info outputs/train/pusht/checkpoint", "a checkpoint"),
        ),
        words="paths",
    ),
}


def usage() -> str:
    """The commands, each with its first sentence."""
    lines = [help_entry(name, " ".join(command.help.split())) for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "paradiffpolicy COMMAND [NAME=VALUE ...]",
            "paradiffpolicy --version",
            "",
            *lines,
            "",
            "paradiffpolicy COMMAND --help says more, with examples and every setting.",
        ]
    )


def command_help(name: str) -> str:
    """A command's description, examples and settings."""
    command = COMMANDS[name]
    examples = "\n".join(f"  {line}\n      {meaning}" for line, meaning in command.examples)
    words = " [PATH ...]" if command.words else ""
    return (
        f"paradiffpolicy {name}{words} [NAME=VALUE ...]\n\n{command.help}\n\nExamples:\n{examples}\n\n"
        f"{settings_help(compose(name, []))}"
    )


@contextlib.contextmanager
def one_of_several(cfg: Any) -> Iterator[Any]:
    """Joins the other processes if torchrun started several.  All compute the same; the first
    reports, the others are silent and write to a folder that goes away."""
    if "WORLD_SIZE" not in os.environ:
        yield cfg
        return
    import torch.distributed as dist

    from ..sampling.sharded import join_from_environment

    rank = join_from_environment(choose_device(cfg))
    try:
        if rank == 0:
            yield cfg
            return
        with (
            tempfile.TemporaryDirectory() as scratch,
            open(os.devnull, "w") as nowhere,  # noqa: PTH123  a stream, not a path
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            if hasattr(cfg, "out"):
                cfg.out = f"{scratch}/out"
            yield cfg
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the console command; returns the exit code, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return dispatch(argv)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first speaks
            print(f"paradiffpolicy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        name = signal.Signals(stop.args[0]).name
        print(f"paradiffpolicy: stopped by {name}; what was recorded until then is written", file=sys.stderr)
        return 128 + int(stop.args[0])
    except BrokenPipeError:  # as of '--help | head'
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  nothing fails at exit
        return 0
    except KeyboardInterrupt:
        print("paradiffpolicy: interrupted", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    """Runs the command that the arguments name, or prints help."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), flush=True)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"paradiffpolicy {__version__}")
        return 0
    words = 2 if any(command.startswith(f"{argv[0]} ") for command in COMMANDS) else 1
    name, overrides = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    if {"-h", "--help"} & set(overrides):
        print(command_help(name), flush=True)
        return 0
    words_go_to = COMMANDS[name].words
    paths = (
        [word for word in overrides if "=" not in word and not word.startswith("~")] if words_go_to else []
    )
    if paths:
        overrides = [word for word in overrides if word not in paths]
        overrides.append(f"{words_go_to}={json.dumps(paths)}")
    with one_of_several(compose(name, overrides)) as cfg:
        COMMANDS[name].run(cfg)
    return 0
