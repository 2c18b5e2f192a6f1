"""Samplers compared in closed loop: the simulation waits for every plan, or goes on meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..provenance import about, describe, in_words, machine, programs
from ..tables import bar, console
from .building import (
    capture_settings,
    env_maker,
    env_maker_at,
    env_workers,
    load_policy,
    locate,
    named_blending,
    recorded_windows,
    resized,
    sampling_policy,
)

if TYPE_CHECKING:
    from ..evaluation.compare import RealtimeComparison, SamplerResult
    from ..policy import Policy
    from .schema import CaseConfig, EvaluateConfig


def evaluate(cfg: EvaluateConfig) -> None:
    """Compares samplers on the same seeds, in one of two ways of letting time pass."""
    modes = {"unlimited": evaluate_unlimited, "realtime": evaluate_realtime}
    with quiet("paradiffpolicy.control"):  # faults are in the report; a line for each would bury it
        modes[cfg.mode](cfg)


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Raises a logger's level to errors."""
    named = logging.getLogger(logger)
    before = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(before)


def out_folder(cfg: EvaluateConfig, command: str) -> Path:
    """The report's folder: as given, or named by the time."""
    return Path(cfg.out or f"outputs/{command}/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")


def evaluate_unlimited(cfg: EvaluateConfig) -> None:
    """Samplers side by side on the same seeds: reward, iterations, latency, deadlines."""
    from ..clock import MonotonicClock
    from ..environment import picture
    from ..evaluation.compare import compare
    from ..evaluation.report import sampler_table, write_episodes, write_report

    workers = env_workers(cfg.workers)
    names = list(dict.fromkeys([cfg.reference, *cfg.samplers]))
    policy = load_policy(cfg)
    policies = {name: sampling_policy(cfg, name, policy) for name in names}
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    folder, rate = out_folder(cfg, "evaluate"), policy.spec.control_hz
    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint or '').name}"
    videos = []

    def write(results: Sequence[SamplerResult]) -> list[Path]:
        head = about(
            locate(cfg.checkpoint, "checkpoint"),
            checkpoint=str(cfg.checkpoint),
            task=cfg.task.name,
            reference=cfg.reference,
            guidance_scale=cfg.guidance_scale,
            capture={"backend": cfg.capture, "precision": cfg.precision, "programs": programs(policies)},
            seeds=[seeds.start, seeds.stop - 1],
            samplers_config={name: cfg.sampler[name] for name in names},
        )
        return write_report(folder, results, title, head, rate, names[len(results) :])

    def finished(results: Sequence[SamplerResult]) -> None:
        write(results)
        videos.extend(write_episodes(folder, results[-1], rate))

    with contextlib.closing(workers):
        results = compare(
            policies,
            env_maker(cfg, policy.spec),
            seeds,
            cfg.task.max_steps,
            reference=cfg.reference,
            clock=MonotonicClock(),
            margin=cfg.margin,
            latency_plans=cfg.latency_plans,
            paced_ticks=cfg.paced_ticks,
            on_result=finished,
            progress=bar,
            picture=functools.partial(picture, size=cfg.video_size),
            n_pictured=cfg.videos,
            workers=workers,
            side_by_side=cfg.side_by_side,
            success_key=cfg.task.success_key,
        )
    screen, paths = console(), write(results)
    screen.print(sampler_table(results, title))
    screen.print(f"on {describe(machine())}; plans: {in_words(programs(policies))}", highlight=False)
    for path in (*paths, *videos):
        screen.print(str(path), highlight=False)


def evaluate_realtime(cfg: EvaluateConfig) -> None:
    """Reward while simulated time goes on: by sampler and control rate, and against latency."""
    from ..control.rate import ticks_per_step
    from ..evaluation.compare import RealtimeComparison
    from ..evaluation.report import realtime_table, write_realtime_report, write_results

    setting = cfg.realtime
    policy = load_policy(cfg)
    rates = setting.rates_hz or [policy.spec.control_hz]
    for rate in rates:
        ticks_per_step(rate, policy.spec.control_hz)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    folder = out_folder(cfg, "realtime")
    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint or '').name}, {setting.clock} clock"
    head = about(
        locate(cfg.checkpoint, "checkpoint"),
        checkpoint=str(cfg.checkpoint),
        task=cfg.task.name,
        seeds=[seeds.start, seeds.stop - 1],
        realtime=asdict(setting),
    )
    run = RealtimeComparison(
        env_maker_at(cfg, policy.spec),
        seeds,
        cfg.task.max_steps / policy.spec.control_hz,
        rates,
        setting.blending["name"],
        named_blending(setting.blending),
        cfg.margin,
        options={
            "replan_every": setting.replan_every,
            "side_by_side": cfg.side_by_side,
            "success_key": cfg.task.success_key,
        },
        on_result=lambda: write_results(folder, run.results, run.sweep, head),
        progress=bar,
    )
    run_cases(cfg, run, policy)
    screen = console()
    screen.print(realtime_table(run.results, title))
    if run.sweep:
        screen.print(realtime_table(run.sweep, f"{setting.sweep.sampler} under injected latency"))
    screen.print(f"on {describe(machine())}", highlight=False)
    for path in write_realtime_report(folder, run.results, run.sweep, title, head):
        screen.print(str(path), highlight=False)


def run_cases(cfg: EvaluateConfig, run: RealtimeComparison, policy: Policy) -> None:
    """Runs every sampler with unlimited time, then the cases, then the sweep of injected latencies."""
    from ..clock import MonotonicClock

    setting, cases = cfg.realtime, cfg.realtime.cases
    virtual = setting.clock == "virtual"
    timed = {name: case_policy(cfg, case, policy) for name, case in cases.items()}
    blendings = {name: named_blending(chosen) for name, chosen in setting.sweep.blendings.items()}
    latencies = case_latencies(cfg, cases, timed, policy)
    samplers = {name: sampling_policy(cfg, name, policy) for name in {c.sampler for c in cases.values()}}
    swept = sampling_policy(cfg, setting.sweep.sampler, policy)
    for name, planned in samplers.items():
        run.unlimited(name, planned)
    wall = {"clock": MonotonicClock(), "side_by_side": setting.side_by_side}
    for name, case in cases.items():
        if virtual:
            run.case(name, case.sampler, samplers[case.sampler], latencies[name])
        else:
            run.case(name, case.sampler, timed[name], None, **wall)
    for name, blending in blendings.items():
        for ms in setting.sweep.latency_ms if virtual else []:
            run.inject(setting.sweep.sampler, swept, name, blending, ms)


def case_latencies(
    cfg: EvaluateConfig, cases: Mapping[str, CaseConfig], timed: Mapping[str, Policy], policy: Policy
) -> dict[str, list[float]]:
    """Seconds per plan of every case on the virtual clock: as given, or measured now."""
    from ..benchmarks.timing import plan_latencies
    from ..clock import MonotonicClock

    given = {
        name: latency_seconds(case.latency_ms) for name, case in cases.items() if case.latency_ms is not None
    }
    measured = {name: timed[name] for name in cases if name not in given}
    if not measured or cfg.realtime.clock != "virtual":
        return given
    windows = recorded_windows(cfg, sampling_policy(cfg, "rti", policy), max(cfg.latency_plans, 1))
    with bar("latency", len(windows)) as turns:
        return given | plan_latencies(measured, windows, MonotonicClock(), turns.update)


def case_policy(cfg: EvaluateConfig, case: CaseConfig, policy: Policy) -> Policy:
    """The policy whose plans a case of ``realtime.cases`` times."""
    sized = resized(cfg, policy, case.network) if case.network else policy
    own = {"capture": case.capture} if case.capture else {}
    return sampling_policy(cfg, case.sampler, sized.captured(**capture_settings(cfg, **own)))


def latency_seconds(latency_ms: Any) -> list[float]:
    """Injected latencies, of a number of milliseconds or a list of them."""
    return [number / 1e3 for number in (latency_ms if isinstance(latency_ms, list) else [latency_ms])]
