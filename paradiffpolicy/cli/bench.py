"""Timings: plans, solvers, the control loop, the server."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import located
from ..tables import bar, console, publish
from .building import (
    capture_settings,
    choose_device,
    load_policy,
    named_blending,
    named_interpolation,
    require_extra,
    resized,
    sampled,
    sampling_policy,
)
from .environments import recorded_windows
from .locating import locate_checkpoint
from .settings import written

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from ..policy import Policy
    from .bench_schema import (
        BenchControlConfig,
        BenchEnvsConfig,
        BenchLatencyConfig,
        BenchServeConfig,
        BenchSoakConfig,
        BenchSolversConfig,
        BenchTrainConfig,
    )
    from .parts import PolicyConfig


def measured(cfg: PolicyConfig) -> Path:
    """The checkpoint that was measured."""
    return locate_checkpoint(cfg.checkpoint)


def bench_latency(cfg: BenchLatencyConfig) -> None:
    """Times plans and network calls for one robot, as ratios within one run."""
    from ..benchmarks.timing import peak
    from ..checkpoint import read_description
    from ..evaluation.report import reported_rewards, rewards_table

    rewards = None
    if cfg.rewards is not None:
        rewards = reported_rewards(located(cfg.rewards), read_description(measured(cfg)).sha256)
    repeats, steady = per_network(cfg, "repeats", 5), per_network(cfg, "steady", 0)
    policy = load_policy(cfg)
    # Real observations: how many iterations a tolerance takes depends on them.
    windows = recorded_windows(cfg, sampling_policy(cfg, "rti", policy), max(repeats.values(), default=1))
    content: dict[str, Any] = {}
    for network, down_dims in cfg.networks.items():
        sized = policy if down_dims is None else resized(cfg, policy, down_dims)
        content[network] = network_latencies(
            cfg, network, sized, windows[: repeats[network]], steady[network]
        )
    content["peak_memory_mb"] = peak()
    tables = []
    if rewards is not None:
        content["rewards"] = rewards
        tables.append(rewards_table(rewards, cfg.samplers))
    publish(tables, content, cfg.out, [f"peak memory {peak():.0f} MB"], checkpoint=measured(cfg))


def network_latencies(
    cfg: BenchLatencyConfig,
    network: str,
    policy: Policy,
    windows: list[NDArray[Any]],
    n_steady: int,
) -> dict[str, Any]:
    """Times a network's calls and plans, prints them, and returns them as plain values."""
    from dataclasses import asdict

    from ..benchmarks.calls import call_rows, call_table
    from ..benchmarks.floors import Floors
    from ..benchmarks.latency import latency_rows, latency_table, steady_state
    from ..clock import MonotonicClock
    from ..sampling.capture.backends import CaptureSettings

    clock, screen = MonotonicClock(), console()
    n_parameters = sum(weight.numel() for weight in policy.denoiser.network.parameters())  # type: ignore[attr-defined]
    title = f"{cfg.task.name}, {network}, {n_parameters / 1e6:.1f} M parameters"
    captures = {
        f"captured {p}": CaptureSettings("auto", p, threads=cfg.threads, pinning=cfg.pinning)
        for p in cfg.precisions
    }
    unet: Any = policy.network
    floors = Floors(unet, policy.spec.horizon, policy.device, clock)
    calls = call_rows(policy, captures, cfg.call_rows, cfg.call_repeats, clock, floors)
    policies = {
        f"{name}, {capture}": sampled(  # a student's plans take as long with any weights
            cfg, name, policy.captured(**capture_settings(cfg, capture=capture))
        )
        for capture in cfg.captures  # next to each other: one library's idle threads disturb another's
        for name in cfg.samplers
    }
    with bar(network, len(windows)) as turns:
        plans = latency_rows(policies, windows, clock, turns.update, floors)
    if calls:
        screen.print(call_table(calls, f"{title}: a network call"))
    screen.print(latency_table(plans, f"{title}: a plan for one robot, {len(windows)} each"))
    for precision, rates in floors.rates.items():
        reads = f"{rates.bandwidth / 1e9:.1f} GB/s read, {rates.matrix / 1e9:.0f} GFLOP/s multiplied"
        screen.print(f"{network}, {precision}: {reads}", highlight=False)
    content = {
        "parameters": n_parameters,
        "rates": {precision: vars(rates) for precision, rates in floors.rates.items()},
        "calls": [asdict(row) for row in calls],
        "plans": [asdict(row) for row in plans],
    }
    if n_steady:
        captured = policy.captured(**capture_settings(cfg, capture="auto") | {"cache": None})
        with bar("steady", n_steady, "plan") as made:
            steady = steady_state(
                sampling_policy(cfg, "rti", captured), windows, n_steady, clock, made.update
            )
        screen.print(f"rti, captured, {steady}", highlight=False)
        content["steady"] = asdict(steady)
    return content


def per_network(cfg: BenchLatencyConfig, name: str, otherwise: int) -> dict[str, int]:
    """A setting that is one number for all networks, or one for each."""
    value = getattr(cfg, name)
    numbers = value if isinstance(value, dict) else dict.fromkeys(cfg.networks, value)
    return {network: numbers.get(network, otherwise) for network in cfg.networks}


def bench_control(cfg: BenchControlConfig) -> None:
    """Times a control loop beside every kind of planner."""
    import numpy as np

    from ..benchmarks.control import control_rows, control_table, timed_runs
    from ..clock import MonotonicClock
    from ..control.scheduling import Scheduling
    from ..planning import planner_beside

    planners = {name: planner_beside(name, cfg.scheduling.cores) for name in cfg.planners}
    scheduling, blending = Scheduling(**vars(cfg.scheduling)), named_blending(cfg.blending)
    interpolation = named_interpolation(cfg.interpolation)
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))
    observations = np.stack([window[-1] for window in recorded_windows(cfg, policy, 30)])
    with bar("control", cfg.turns * len(planners), "run") as runs:
        records = timed_runs(
            policy,
            planners,
            observations,
            MonotonicClock(),
            rate_hz=cfg.rate_hz,
            seconds=cfg.seconds,
            turns=cfg.turns,
            blending=blending,
            interpolation=interpolation,
            replan_every=cfg.replan_every,
            scheduling=scheduling,
            on_turn=runs.update,
        )
    rows = control_rows(records, cfg.rate_hz)
    loop = f"{cfg.rate_hz:g} Hz for {cfg.seconds:g} s beside each planner"
    title = f"{cfg.task.name}, {cfg.sampler_name}, {loop}"
    content = {"config": vars(cfg.scheduling), "interpolation": cfg.interpolation, "rows": rows}
    publish([control_table(rows, title)], content, cfg.out, checkpoint=measured(cfg))


def bench_soak(cfg: BenchSoakConfig) -> None:
    """Runs a control loop for long, among faults."""
    import logging

    import numpy as np

    from ..benchmarks.soak import Attacks, soak, soak_tables
    from ..control.scheduling import Scheduling

    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))
    observations = np.stack([window[-1] for window in recorded_windows(cfg, policy, 30)])
    shares = {"dropped": cfg.dropped, "not_finite": cfg.not_finite}
    attacks = Attacks(kills=cfg.kills, stops=cfg.stops, generator=np.random.default_rng(cfg.seed), **shares)
    for room in ("control", "planning"):  # a line per fault would be thousands; they are counted
        logging.getLogger(f"paradiffpolicy.{room}").setLevel(logging.CRITICAL)
    with bar("soak", round(cfg.seconds * cfg.rate_hz), "tick") as ticks:
        values = soak(
            policy,
            observations,
            attacks,
            rate_hz=cfg.rate_hz,
            seconds=cfg.seconds,
            planner_timeout=cfg.planner_timeout,
            scheduling=Scheduling(**vars(cfg.scheduling)),
            seed=cfg.seed,
            on_tick=lambda tick: ticks.update(1 + tick.missed),
        )
    title = f"{cfg.task.name}, {cfg.sampler_name}, {cfg.rate_hz:g} Hz for {cfg.seconds:g} s, seed {cfg.seed}"
    content = {"config": vars(cfg.scheduling), **values}
    publish(soak_tables(values, title), content, cfg.out, checkpoint=measured(cfg))


def bench_solvers(cfg: BenchSolversConfig) -> None:
    """Compares solvers, numbers of steps and drivers: iterations, NFE, errors, wall time."""
    from ..benchmarks.solvers import solver_cases, solver_rows, solver_table, work_precision
    from ..clock import MonotonicClock
    from ..files import write_atomically
    from ..sampling.spec import spec_sampler

    policy = load_policy(cfg)
    grid = {"spacing": cfg.spacing, "lambda_min": cfg.lambda_min}
    cases = solver_cases(policy.spec, cfg.solvers, cfg.steps, cfg.drivers, **grid)
    guide = policy.with_sampler(spec_sampler(policy.spec, solver="ddim", n_steps=10))
    windows = recorded_windows(cfg, guide, cfg.windows)
    with bar("solvers", cfg.windows) as turns:
        rows = solver_rows(policy, cases, windows, MonotonicClock(), turns.update)
    title = f"{cfg.task.name}, {Path(cfg.checkpoint or '').name}, {cfg.spacing} spacing"
    folder, figure = Path(cfg.out), work_precision(rows, title)
    write_atomically(folder / "solvers.png", lambda path: figure.savefig(path))
    written = [str(folder / name) for name in ("solvers.json", "solvers.png")]
    content = {
        "spacing": cfg.spacing,
        "windows": cfg.windows,
        "drivers": cfg.drivers,
        "rows": [vars(row) for row in rows],
    }
    publish([solver_table(rows, title)], content, written[0], written, checkpoint=measured(cfg))


def bench_serve(cfg: BenchServeConfig) -> None:
    """Times a server in a process of its own, and its clients in this one."""
    from ..clock import MonotonicClock

    require_extra("serve")
    from ..benchmarks import hostile, serving

    windows = recorded_windows(cfg, sampling_policy(cfg, cfg.sampler_name, load_policy(cfg)), 32)
    clock = MonotonicClock()
    own = {"requests", "clients", "hostile", "seconds", "rate_hz", "first_seed", "out", "sampler", "task"}
    settings = {name: value for name, value in vars(cfg).items() if name not in own}
    settings |= {"port": 0, "max_sessions": cfg.clients + cfg.hostile + 1}
    settings[f"++sampler.{cfg.sampler_name}"] = cfg.sampler[cfg.sampler_name]
    settings |= {"task.name": cfg.task.name, "task.control_hz": cfg.task.control_hz}
    overrides = [f"{name}={written(value)}" for name, value in settings.items()]
    command = [sys.executable, "-m", "paradiffpolicy", "serve", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "PARADIFFPOLICY_API_KEY"}
    with serving.served(command, environment) as uri:
        with bar("one client", cfg.requests, "request") as sent:
            alone = serving.one_client(uri, windows, cfg.requests, clock, sent.update)
        load = (uri, windows, cfg.clients, cfg.rate_hz, clock)
        quiet = cfg.seconds / 10 if cfg.hostile else cfg.seconds
        with bar(f"{cfg.clients} clients", quiet, "s") as passed:
            undisturbed = serving.many_clients(*load, quiet, passed.update)
        content, notes = {"one_client": alone, "many_clients": undisturbed}, []
        crowds = {"undisturbed": undisturbed}
        if cfg.hostile:
            messages = list(itertools.islice(serving.requests_of(windows), len(windows)))
            with (
                hostile.attacked(uri, cfg.hostile, messages, cfg.first_seed) as attacks,
                bar("beside hostile ones", cfg.seconds, "s") as passed,
            ):
                disturbed = serving.many_clients(*load, cfg.seconds, passed.update)
            content |= {"beside_hostile": disturbed, "attacks": attacks}
            crowds[f"beside {cfg.hostile} hostile ones"] = disturbed
            notes.append("hostile connections: " + ", ".join(f"{n} {name}" for name, n in attacks.items()))
    title = f"{cfg.task.name}, {cfg.sampler_name}, over loopback, openpi's protocol"
    tables = [serving.alone_table(alone, title), serving.crowd_table(crowds, title)]
    publish(tables, content, cfg.out, notes, checkpoint=measured(cfg))


def bench_envs(cfg: BenchEnvsConfig) -> None:
    """Times environments that take turns: control steps per second."""
    from ..benchmarks.environments import environment_rows, environments_table, figures, measure
    from ..clock import MonotonicClock
    from ..environment import make_env

    rows = []
    for name in cfg.envs:
        rows += environment_rows(name.split("/")[-1], make_env(name, max_episode_steps=-1), cfg.own)
    with bar("environments", cfg.turns) as turns:
        measure(rows, cfg.turns, cfg.steps, MonotonicClock(), turns.update)
    values = figures(rows)
    publish([environments_table(values)], {"environments": values}, cfg.out)


def bench_train(cfg: BenchTrainConfig) -> None:
    """Times training steps beside diffusion_policy's, as ratios within one run."""
    from ..benchmarks.training import training_rows, training_table
    from ..clock import MonotonicClock
    from ..types import PolicySpec

    device, tables = choose_device(cfg), []
    content: dict[str, Any] = {}
    for network, down_dims in cfg.networks.items():
        batch_size = cfg.batch_sizes.get(network, 128)
        spec = PolicySpec("pusht", obs_dim=20, action_dim=2, down_dims=tuple(down_dims))
        with bar(network, cfg.turns) as turns:
            rows = training_rows(
                spec, batch_size, cfg.precisions, cfg.turns, device, MonotonicClock(), turns.update
            )
        tables.append(training_table(rows, f"{network} {down_dims}, batch {batch_size}: a training step"))
        content[network] = {"down_dims": down_dims, "batch_size": batch_size, "steps": rows}
    if cfg.recipe is not None:
        content["reading"], view = reading(cfg, cfg.recipe, device)
        tables.append(view)
    publish(tables, content, cfg.out)


def reading(cfg: BenchTrainConfig, recipe: str, device: str) -> tuple[dict[str, Any], Table]:
    """How much of a training step of a recipe with pictures is reading its windows."""
    from ..benchmarks.training import reading_rows, reading_table
    from ..clock import MonotonicClock
    from ..presets import recipes
    from ..task import Camera, Contract
    from ..training.settings import TrainSettings
    from ..types import PolicySpec
    from .parts import NetworkConfig, TrainingConfig

    parts = recipes()[recipe]
    policy = vars(NetworkConfig(**parts.get("policy", {})))
    policy["down_dims"] = tuple(policy["down_dims"])
    size = cfg.picture_size
    seen = Contract(cameras=(Camera("camera", (size, size, 3)),))
    spec = PolicySpec("pusht", obs_dim=2, action_dim=2, contract=seen, **{**policy, "relative": ()})
    settings = TrainSettings(**{**vars(TrainingConfig(**parts.get("training", {}))), "n_steps": cfg.turns})
    with bar(recipe, cfg.turns) as turns:
        row = reading_rows(spec, settings, device, MonotonicClock(), turns.update)
    about = {"recipe": recipe, "picture_size": size, "batch_size": settings.batch_size}
    title = f"{recipe}, {size} x {size} pictures, batch {settings.batch_size}: reading a step's windows"
    return {**about, **row}, reading_table(row, title)
