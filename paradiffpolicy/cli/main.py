"""The command line: parses, composes the config, and runs a command."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import InputError, nearest
from .bench import bench_control, bench_envs, bench_latency, bench_serve, bench_solvers
from .building import Config, choose_device
from .convert import convert
from .evaluate import evaluate
from .info import info
from .run import StoppedError, run
from .serve import serve
from .training import collect, train


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, what its help says, and the setting that words without = go to."""

    run: Callable[[Config], None]
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
        "network rounds, plan latency and missed deadlines; writes report.json, a picture and videos.",
        (
            ("paradiffpolicy evaluate", "DDPM, ParaDDPM, speculative and rti on PushT, 50 seeds"),
            ("paradiffpolicy evaluate 'samplers=[ddim,rti]' seeds=10", "others, quickly"),
            ("paradiffpolicy evaluate mode=realtime", "what latency costs, in virtual time"),
        ),
    ),
    "run": Command(
        run,
        "Lets a policy drive a robot in real time, the task's environment unless told otherwise, and says\n"
        "how the loop kept its time. Shows it in the Rerun viewer; keeps it as a dataset, video, pictures.\n"
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
                "as anybody may",
            ),
        ),
    ),
    "bench solvers": Command(
        bench_solvers,
        "Compares solvers, numbers of steps and drivers: rounds, network evaluations, wall time, error to\n"
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
        "GET /healthz says whether it lives, GET /metrics what it did. SIGTERM ends it after what was asked.",
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
        "Says what is in zarr stores, robomimic's HDF5 files and checkpoints; without any, what is\n"
        "installed, on what machine, and what the shipped checkpoint and the task's dataset hold.",
        (
            ("paradiffpolicy info", "the machine, the shipped checkpoint"),
            ("paradiffpolicy info demo.hdf5 outputs/collect/lift.zarr", "datasets"),
            ("paradiffpolicy info outputs/train/pusht/checkpoint", "a checkpoint"),
        ),
        words="paths",
    ),
}


def compose(command: str, overrides: list[str]) -> Config:
    """The command's config with the overrides applied.

    Raises:
        InputError: an override is malformed or names something that doesn't exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = command.replace(" ", "_")
    words_go_to = COMMANDS[command].words
    words = [o for o in overrides if "=" not in o and not o.startswith("~")] if words_go_to else []
    overrides = [override for override in overrides if override not in words]
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise InputError(f"{override!r} is not an override: write NAME=VALUE, as seeds=10")
    with initialize_config_module("paradiffpolicy.configs", version_base="1.3"):
        try:
            cfg = hydra_compose(config, overrides)
            OmegaConf.resolve(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_override_error(command, overrides, error, hydra_compose(config)))
    if words and words_go_to:
        cfg[words_go_to] = words
    return cfg


def _override_error(command: str, overrides: list[str], error: Exception, defaults: Config) -> str:
    """One line: the first override whose name doesn't exist, with the nearest that does."""
    known = list(_flat_keys(defaults))
    for override in overrides:
        name = override.split("=")[0].lstrip("+~").split("@")[0]
        if not override.startswith("+") and name not in known:
            return f"{command} has no setting {name!r}{nearest(name, known)}"
    text = str(error).splitlines()
    return f"{command}: {text[0] if text else type(error).__name__}"


def _flat_keys(node: Config, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    keys = []
    for key, value in node.items_ex(resolve=False):
        keys.append(f"{prefix}{key}")
        if isinstance(value, DictConfig):
            keys += _flat_keys(value, f"{prefix}{key}.")
    return keys


def usage() -> str:
    lines = [f"  {name:<15}{' '.join(command.help.split())}" for name, command in COMMANDS.items()]
    return (
        "paradiffpolicy COMMAND [NAME=VALUE ...]\n\n"
        + "\n".join(lines)
        + "\n\nparadiffpolicy COMMAND --help says more, with examples and every setting."
    )


def command_help(name: str) -> str:
    from omegaconf import OmegaConf

    command = COMMANDS[name]
    examples = "\n".join(f"  {line}\n      {meaning}" for line, meaning in command.examples)
    settings = compose(name, [])
    words = " [PATH ...]" if command.words else ""
    return (
        f"paradiffpolicy {name}{words} [NAME=VALUE ...]\n\n{command.help}\n\nExamples:\n{examples}\n\n"
        f"Settings, with their defaults:\n\n{OmegaConf.to_yaml(settings)}"
    )


@contextlib.contextmanager
def one_of_several(cfg: Config) -> Iterator[Config]:
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
            if "out" in cfg:
                cfg.out = f"{scratch}/out"
            yield cfg
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the console command; returns the exit code, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    try:
        words = 2 if any(command.startswith(f"{argv[0]} ") for command in COMMANDS) else 1
        name, overrides = " ".join(argv[:words]), argv[words:]
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
        if {"-h", "--help"} & set(overrides):
            print(command_help(name))
            return 0
        with one_of_several(compose(name, overrides)) as cfg:
            COMMANDS[name].run(cfg)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first speaks
            print(f"paradiffpolicy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        name = signal.Signals(stop.args[0]).name
        print(f"paradiffpolicy: stopped by {name}; what was recorded until then is written", file=sys.stderr)
        return 128 + int(stop.args[0])
    except KeyboardInterrupt:
        print("paradiffpolicy: interrupted", file=sys.stderr)
        return 130
    return 0
