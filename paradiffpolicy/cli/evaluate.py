"""Samplers compared in closed loop: when the simulation waits for every plan, and when it doesn't."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..provenance import describe, in_words, machine, programs
from .building import (
    capture_settings,
    env_maker,
    env_maker_at,
    env_workers,
    load_policy,
    named_blending,
    recorded_windows,
    resized,
    sampling_policy,
)

if TYPE_CHECKING:
    from ..policy import Policy
    from .schema import CaseConfig, EvaluateConfig


def evaluate(cfg: EvaluateConfig) -> None:
    """Reward on the same seeds, in one of two ways of letting time pass."""
    modes = {"unlimited": evaluate_unlimited, "realtime": evaluate_realtime}
    with quiet("paradiffpolicy.control"):  # faults are in the report; a line for each would bury it
        modes[cfg.mode](cfg)


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Only errors are logged there."""
    named = logging.getLogger(logger)
    before = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(before)


def evaluate_unlimited(cfg: EvaluateConfig) -> None:
    """Samplers side by side on the same seeds: reward, rounds, latency, deadlines."""
    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks.timing import plan_latencies
    from ..clock import MonotonicClock
    from ..environment import picture
    from ..evaluation.compare import paced_run, results
    from ..evaluation.report import table, write_report
    from ..evaluation.rollout import rollout

    workers = env_workers(cfg.workers)
    if not cfg.samplers:
        raise InputError("samplers=[] names none: give at least one, as samplers=[ddpm,paraddpm]")
    names = list(dict.fromkeys([cfg.reference, *cfg.samplers]))
    policy = load_policy(cfg)
    policies = {name: sampling_policy(cfg, name, policy) for name in names}
    make_env, clock = env_maker(cfg, policy.spec), MonotonicClock()
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    folder = Path(cfg.out or f"outputs/evaluate/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")

    episodes, latencies, records = {}, {}, {}
    total = len(seeds) * cfg.task.max_steps
    with contextlib.closing(workers):
        for name in names:
            with tqdm(total=total, unit="step", desc=name, dynamic_ncols=True) as bar:
                episodes[name] = rollout(
                    policies[name],
                    make_env,
                    seeds,
                    cfg.task.max_steps,
                    picture=functools.partial(picture, size=cfg.video_size),
                    n_pictured=cfg.videos,
                    workers=workers,
                    side_by_side=cfg.side_by_side,
                    on_steps=bar.update,
                )
    if cfg.latency_plans:
        windows = [window for episode in episodes[cfg.reference] for window in episode.windows]
        windows = windows[: cfg.latency_plans]
        with tqdm(total=len(windows), unit="turn", desc="latency", dynamic_ncols=True) as bar:
            latencies = plan_latencies(policies, windows, clock, bar.update)
    if cfg.paced_ticks:
        for name in tqdm(names, desc="at the real rate", unit="sampler", dynamic_ncols=True):
            records[name] = paced_run(policies[name], make_env, cfg.first_seed, cfg.paced_ticks, clock)

    compared = results(episodes, latencies, records, cfg.reference, cfg.margin)
    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint or '').name}"
    about = {
        "task": cfg.task.name,
        "checkpoint": str(cfg.checkpoint),
        "reference": cfg.reference,
        "guidance_scale": cfg.guidance_scale,
        "capture": {"backend": cfg.capture, "precision": cfg.precision, "programs": programs(policies)},
        "seeds": [seeds.start, seeds.stop - 1],
        "machine": machine(),
        "samplers_config": {name: cfg.sampler[name] for name in names},
    }
    paths = write_report(folder, compared, title, about, policy.spec.control_hz)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(compared, title))
    console.print(f"on {describe(machine())}; plans: {in_words(programs(policies))}", highlight=False)
    for path in paths:
        console.print(str(path), highlight=False)


def evaluate_realtime(cfg: EvaluateConfig) -> None:
    """Reward while simulated time goes on: by sampler and control rate, and against latency."""
    from rich.console import Console
    from tqdm import tqdm

    from ..benchmarks.timing import plan_latencies
    from ..clock import MonotonicClock
    from ..control.controller import ticks_per_step
    from ..evaluation.realtime import realtime_rollout, wall_rollout
    from ..evaluation.realtime_report import Cell, realtime_table, write_realtime_report

    setting, clock = cfg.realtime, MonotonicClock()
    policy, cases = load_policy(cfg), setting.cases
    rates = setting.rates_hz or [policy.spec.control_hz]
    for rate in rates:
        ticks_per_step(rate, policy.spec.control_hz)
    policies = {name: case_policy(cfg, case, policy) for name, case in cases.items()}
    blending = named_blending(setting.blending)
    blendings = {name: named_blending(chosen) for name, chosen in setting.sweep.blendings.items()}
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    seconds = cfg.task.max_steps / policy.spec.control_hz
    folder = Path(cfg.out or f"outputs/realtime/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")

    injected = {
        name: latency_seconds(case.latency_ms) for name, case in cases.items() if case.latency_ms is not None
    }
    timed = {name: timed for name, timed in policies.items() if name not in injected}
    if timed and setting.clock == "virtual":
        windows = recorded_windows(cfg, sampling_policy(cfg, "rti", policy), max(cfg.latency_plans, 1))
        with tqdm(total=len(windows), unit="turn", desc="latency", dynamic_ncols=True) as bar:
            injected |= plan_latencies(timed, windows, clock, bar.update)
    samplers = {name: sampling_policy(cfg, name, policy) for name in {c.sampler for c in cases.values()}}

    def run(label: str, planned: Policy, rate: float, how: Callable[..., Any], **options: Any) -> list[Any]:
        total = len(seeds) * round(seconds * rate)
        with tqdm(total=total, unit="tick", desc=label, dynamic_ncols=True) as bar:
            options |= {"rate_hz": rate, "replan_every": setting.replan_every, "on_ticks": bar.update}
            options.setdefault("side_by_side", cfg.side_by_side)  # the wall clock's is another setting
            episodes: list[Any] = how(planned, env_maker_at(cfg, policy.spec), seeds, seconds, **options)
        return episodes

    unlimited = {
        name: run(f"{name}, unlimited", planned, rates[0], realtime_rollout)
        for name, planned in samplers.items()
    }
    references = {name: [episode.score for episode in episodes] for name, episodes in unlimited.items()}
    cells = [
        Cell(f"{name}, unlimited", rates[0], setting.blending["name"], [0.0], episodes, None, cfg.margin)
        for name, episodes in unlimited.items()
    ]
    for name, case in cases.items():
        for rate in rates:
            label = f"{name}, {rate:g} Hz"
            if setting.clock == "wall":
                options = {"clock": clock, "side_by_side": setting.side_by_side, "blending": blending}
                episodes = run(label, policies[name], rate, wall_rollout, **options)
                latencies = [float(s) for e in episodes for s in e.record.plans["latency"]]
            else:
                latencies = injected[name]
                options = {"latencies": latencies, "blending": blending}
                episodes = run(label, samplers[case.sampler], rate, realtime_rollout, **options)
            reference = references[case.sampler]
            cells.append(
                Cell(name, rate, setting.blending["name"], latencies, episodes, reference, cfg.margin)
            )
    sweep = []
    swept = sampling_policy(cfg, setting.sweep.sampler, policy)
    for name, way in blendings.items():
        for number in setting.sweep.latency_ms if setting.clock == "virtual" else []:
            latencies = latency_seconds(number)
            label = f"{name}, {number:g} ms"
            episodes = run(label, swept, rates[0], realtime_rollout, latencies=latencies, blending=way)
            waited = references.get(setting.sweep.sampler)
            sweep.append(Cell(setting.sweep.sampler, rates[0], name, latencies, episodes, waited, cfg.margin))

    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint or '').name}, {setting.clock} clock"
    about = {
        "task": cfg.task.name,
        "checkpoint": str(cfg.checkpoint),
        "seeds": [seeds.start, seeds.stop - 1],
        "machine": machine(),
        "realtime": asdict(setting),
    }
    paths = write_realtime_report(folder, cells, sweep, title, about)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(realtime_table(cells, title))
    if sweep:
        console.print(realtime_table(sweep, f"{setting.sweep.sampler} under injected latency"))
    console.print(f"on {describe(machine())}", highlight=False)
    for path in paths:
        console.print(str(path), highlight=False)


def case_policy(cfg: EvaluateConfig, case: CaseConfig, policy: Policy) -> Policy:
    """What a case of ``realtime.cases`` times."""
    sized = resized(cfg, policy, case.network) if case.network else policy
    own = {"capture": case.capture} if case.capture else {}
    return sampling_policy(cfg, case.sampler, sized.captured(**capture_settings(cfg, **own)))


def latency_seconds(latency_ms: Any) -> list[float]:
    """Injected latencies, of a number of milliseconds or a list of them."""
    numbers = latency_ms if isinstance(latency_ms, list) else [latency_ms]
    if not numbers:
        raise InputError("latency_ms=[] must have at least one number")
    return [number / 1e3 for number in numbers]
