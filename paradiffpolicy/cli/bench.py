"""Timings: plans, solvers, the control loop, the server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError, require_count, require_positive
from ..provenance import describe, machine
from .building import (
    Config,
    capture_settings,
    load_policy,
    make_env,
    named_blending,
    named_planner,
    plain,
    recorded_windows,
    require_extra,
    resized,
    sampling_policy,
    typed,
)


def bench_latency(cfg: Config) -> None:
    """Timings, as ratios within one run."""
    from dataclasses import asdict

    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks import latency
    from ..clock import MonotonicClock
    from ..files import write_atomically
    from ..sampling.capture.backends import CaptureSettings

    repeats_of, steady_of = per_network(cfg, "repeats", 5), per_network(cfg, "steady", 0)
    require_count(**repeats_of, call_repeats=cfg.call_repeats)
    console, clock = Console(width=None if sys.stdout.isatty() else 120), MonotonicClock()
    policy = load_policy(cfg)
    # Real observations: how many rounds a tolerance takes depends on them.
    most = max(repeats_of.values(), default=1)
    windows = recorded_windows(cfg, sampling_policy(cfg, "rti", policy), most)
    rates = latency.measured_rates(policy.device, clock)
    rate_line = f"{rates.bandwidth / 1e9:.1f} GB/s read, {rates.matrix / 1e9:.0f} GFLOP/s multiplied"
    content: dict[str, Any] = {"machine": machine(), "rates": vars(rates)}
    for network, down_dims in cfg.networks.items():
        sized = policy if down_dims is None else resized(cfg, policy, down_dims)
        n_parameters = sum(weight.numel() for weight in sized.denoiser.network.parameters())  # type: ignore[attr-defined]
        title = f"{cfg.task.name}, {network}, {n_parameters / 1e6:.1f} M parameters"
        calls = latency.call_rows(
            sized,
            {
                f"captured {p}": CaptureSettings("auto", p, threads=cfg.threads, pinning=cfg.pinning)
                for p in cfg.precisions
            },
            cfg.call_rows,
            cfg.call_repeats,
            clock,
            rates,
        )
        policies = {
            f"{name}, {capture}": sampling_policy(
                cfg, name, sized.captured(**capture_settings(cfg, capture=capture))
            )
            for capture in cfg.captures  # next to each other: one library's idle threads disturb another's
            for name in cfg.samplers
        }
        repeats = repeats_of[network]
        with tqdm(total=repeats, unit="turn", desc=network, dynamic_ncols=True) as bar:
            rows = latency.latency_rows(policies, windows[:repeats], clock, bar.update, rates)
        if calls:
            console.print(latency.call_table(calls, f"{title}: a network call"))
        console.print(latency.latency_table(rows, f"{title}: a plan for one robot, {repeats} each"))
        content[network] = {
            "parameters": n_parameters,
            "calls": [asdict(row) for row in calls],
            "plans": [asdict(row) for row in rows],
        }
        if n_steady := steady_of[network]:
            settings = capture_settings(cfg, capture="auto") | {"cache": None}
            steady_policy = sampling_policy(cfg, "rti", sized.captured(**settings))
            with tqdm(total=n_steady, unit="plan", desc="steady", dynamic_ncols=True) as bar:
                steady = latency.steady_state(steady_policy, windows, n_steady, clock, bar.update)
            console.print(
                f"rti, captured, {steady.plans} plans in a row: first {steady.first:.0f} ms, p50 "
                f"{steady.p50:.1f}, p99 {steady.p99:.1f}, p99.9 {steady.p999:.1f} ms; memory grew by "
                f"{steady.growth:.1f} MB"
            )
            content[network]["steady"] = asdict(steady)
        del policies, sized
    content["peak_memory_mb"] = latency.peak()
    console.print(
        f"on {describe(machine())}; {rate_line}; peak memory {latency.peak():.0f} MB", highlight=False
    )
    line = json.dumps(content)
    print(line)
    if cfg.out:
        write_atomically(Path(cfg.out), lambda path: path.write_text(line + "\n"))


def per_network(cfg: Config, name: str, otherwise: int) -> dict[str, int]:
    """A setting that is one number for all networks, or one for each."""
    value = cfg[name]
    numbers = plain(value) if hasattr(value, "items") else dict.fromkeys(cfg.networks, value)
    chosen = {network: numbers.get(network, otherwise) for network in cfg.networks}
    for network, number in chosen.items():
        if not isinstance(number, int):
            raise InputError(f"{name}.{network}={number} must be a whole number")
    return chosen


def bench_control(cfg: Config) -> None:
    """The loop's deadlines and ticks beside every kind of planner."""
    from dataclasses import asdict

    import numpy as np
    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks.control import control_rows, control_table, timed_runs
    from ..clock import MonotonicClock
    from ..control.scheduling import Scheduling
    from ..files import write_atomically

    require_count(turns=cfg.turns)
    require_positive(seconds=cfg.seconds, rate_hz=cfg.rate_hz)
    planners = {name: named_planner(name) for name in cfg.planners}
    scheduling, blending = Scheduling(**typed(Scheduling, cfg.scheduling)), named_blending(cfg.blending)
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))
    observations = np.stack([window[-1] for window in recorded_windows(cfg, policy, 30)])
    with tqdm(total=cfg.turns * len(planners), unit="run", desc="control", dynamic_ncols=True) as bar:
        records = timed_runs(
            policy,
            planners,
            observations,
            MonotonicClock(),
            rate_hz=cfg.rate_hz,
            seconds=cfg.seconds,
            turns=cfg.turns,
            blending=blending,
            replan_every=cfg.replan_every,
            scheduling=scheduling,
            on_turn=bar.update,
        )
    rows = control_rows(records, cfg.rate_hz)
    title = (
        f"{cfg.task.name}, {cfg.sampler_name}, {cfg.rate_hz:g} Hz for {cfg.seconds:g} s beside each planner"
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(control_table(rows, title))
    console.print(f"on {describe(machine())}", highlight=False)
    content = {"machine": machine(), "config": plain(cfg.scheduling), "rows": [asdict(row) for row in rows]}
    line = json.dumps(content)
    print(line)
    if cfg.out:
        write_atomically(Path(cfg.out), lambda path: path.write_text(line + "\n"))


def bench_solvers(cfg: Config) -> None:
    """Solver by steps by driver: rounds, evaluations, errors, wall time."""
    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks.solvers import Case, solver_rows, solver_table, work_precision
    from ..clock import MonotonicClock
    from ..files import write_atomically
    from ..policy import spec_sampler

    require_count(windows=cfg.windows)
    policy = load_policy(cfg)
    cases = []
    for solver in cfg.solvers:
        for n_steps in cfg.steps:
            grid = {"n_steps": n_steps, "spacing": cfg.spacing, "lambda_min": cfg.lambda_min}
            tableau = spec_sampler(policy.spec, solver=solver, **grid).tableau
            for name, settings in plain(cfg.drivers).items():
                if settings["driver"] == "speculative" and not tableau.stochastic:
                    continue
                window = {} if settings["driver"] == "sequential" else {"window": tableau.n_nodes}
                sampler = spec_sampler(policy.spec, solver=solver, **grid, **(window | settings))
                cases.append(Case(solver, n_steps, name, sampler))
    guide = policy.with_sampler(spec_sampler(policy.spec, solver="ddim", n_steps=10))
    windows = recorded_windows(cfg, guide, cfg.windows)
    with tqdm(total=cfg.windows, unit="turn", desc="solvers", dynamic_ncols=True) as bar:
        rows = solver_rows(policy, cases, windows, MonotonicClock(), bar.update)
    title = f"{cfg.task.name}, {Path(cfg.checkpoint).name}, {cfg.spacing} spacing"
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(solver_table(rows, title))
    console.print(f"on {describe(machine())}", highlight=False)
    content = {"machine": machine(), "spacing": cfg.spacing, "rows": [vars(row) for row in rows]}
    folder, figure = Path(cfg.out), work_precision(rows, title)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / "solvers.json", lambda path: path.write_text(text))
    write_atomically(folder / "solvers.png", lambda path: figure.savefig(path))
    for name in ("solvers.json", "solvers.png"):
        console.print(str(folder / name), highlight=False)


def bench_serve(cfg: Config) -> None:
    """A server in a process of its own, and its clients in this one."""
    from dataclasses import asdict

    from rich.console import Console
    from tqdm import tqdm

    from ..clock import MonotonicClock
    from ..files import write_atomically

    require_extra("serve")
    from ..benchmarks import serving

    require_count(requests=cfg.requests, clients=cfg.clients)
    require_positive(seconds=cfg.seconds)
    if cfg.rate_hz is not None:
        require_positive(rate_hz=cfg.rate_hz)
    windows = recorded_windows(cfg, sampling_policy(cfg, cfg.sampler_name, load_policy(cfg)), 32)
    clock, console = MonotonicClock(), Console(width=None if sys.stdout.isatty() else 120)
    own = {"requests", "clients", "seconds", "rate_hz", "first_seed", "out", "sampler", "task"}
    settings = {name: value for name, value in plain(cfg).items() if name not in own}
    settings |= {"port": 0, "max_sessions": cfg.clients + 1}
    settings[f"++sampler.{cfg.sampler_name}"] = plain(cfg.sampler[cfg.sampler_name])
    settings |= {f"++task.{name}": cfg.task[name] for name in ("name", "obs_dim", "action_dim", "control_hz")}
    overrides = [f"{name}={hydra_value(value)}" for name, value in settings.items()]
    command = [sys.executable, "-m", "paradiffpolicy", "serve", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "PARADIFFPOLICY_API_KEY"}
    with serving.served(command, environment) as uri:
        with tqdm(total=cfg.requests, unit="request", desc="one client", dynamic_ncols=True) as bar:
            alone = serving.one_client(uri, windows, cfg.requests, clock, bar.update)
        with tqdm(total=cfg.seconds, unit="s", desc=f"{cfg.clients} clients", dynamic_ncols=True) as bar:
            crowd = serving.many_clients(
                uri, windows, cfg.clients, cfg.seconds, cfg.rate_hz, clock, bar.update
            )
    title = f"{cfg.task.name}, {cfg.sampler_name}, over loopback, openpi's protocol"
    console.print(serving.alone_table(alone, title))
    console.print(serving.crowd_table(crowd, title))
    console.print(f"on {describe(machine())}", highlight=False)
    content = {"machine": machine(), "one_client": asdict(alone), "many_clients": asdict(crowd)}
    line = json.dumps(content)
    print(line)
    if cfg.out:
        write_atomically(Path(cfg.out), lambda path: path.write_text(line + "\n"))


def bench_envs(cfg: Config) -> None:
    """Control steps per second, environments taking turns."""
    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks import environments
    from ..clock import MonotonicClock
    from ..files import write_atomically

    require_count(turns=cfg.turns, steps=cfg.steps)
    rows = []
    for name in cfg.envs:
        env = make_env(name, max_episode_steps=-1)
        label = name.split("/")[-1]
        inner: Any = env.unwrapped
        simulation = getattr(inner, "simulation", None)
        if simulation is None or not cfg.own:
            rows.append(environments.env_row(label, env))
            continue
        own = f"{label}, robosuite's own"
        env.reset(seed=0)
        rows.append(environments.env_row(label, env, own))
        rows.append(environments.robosuite_row(own, simulation.another(), inner.command(inner.hold_action)))
    with tqdm(total=cfg.turns, unit="turn", dynamic_ncols=True) as bar:
        environments.measure(rows, cfg.turns, cfg.steps, MonotonicClock(), bar.update)
    values = environments.figures(rows)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(environments.environments_table(values))
    console.print(f"on {describe(machine())}", highlight=False)
    line = json.dumps({"machine": machine(), "environments": values})
    print(line)
    if cfg.out:
        write_atomically(Path(cfg.out), lambda path: path.write_text(line + "\n"))


def hydra_value(value: Any) -> str:
    """A plain value as an override's right side."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {hydra_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(hydra_value, value)) + "]"
    return json.dumps(value)
