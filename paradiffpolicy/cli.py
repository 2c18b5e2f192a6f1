"""The console command: parses, composes the config, builds the objects, and runs.

Everything is built here and nowhere else; what is built knows nothing of configs.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, nearest, require_count, require_positive

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .control.clock import Clock
    from .control.joining import Joining
    from .control.planner import MakePlanner
    from .control.robot import Robot
    from .data.dataset import ObservationField
    from .data.replay_buffer import Augment
    from .evaluation.realtime import MakeEnvAt
    from .evaluation.rollout import MakeEnv
    from .policy import Policy
    from .sampling.sampler import Sampler
    from .seeing.recorder import Fields, Picture
    from .seeing.rerun_view import Project, Sink
    from .types import PolicySpec

Config = Any
"""A composed OmegaConf node."""


# ---------------------------------------------------------------------------------------- commands


def evaluate(cfg: Config) -> None:
    """Reward on the same seeds, in one of two ways of letting time pass."""
    modes = {"unlimited": evaluate_unlimited, "realtime": evaluate_realtime}
    if cfg.mode not in modes:
        raise InputError(f"unknown mode {cfg.mode!r}{nearest(cfg.mode, modes)}")
    require_count(seeds=cfg.seeds)
    require_positive(margin=cfg.margin)
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


def evaluate_unlimited(cfg: Config) -> None:
    """Samplers side by side on the same seeds: reward, rounds, latency, deadlines."""
    from rich.console import Console
    from tqdm import tqdm

    from .control.clock import MonotonicClock
    from .evaluation.compare import paced_run, results
    from .evaluation.latency import plan_latencies
    from .evaluation.report import table, write_report
    from .evaluation.rollout import rollout

    require_count(video_size=cfg.video_size)
    if not cfg.samplers:
        raise InputError("samplers=[] names none: give at least one, as samplers=[ddpm,paraddpm]")
    names = list(dict.fromkeys([cfg.reference, *cfg.samplers]))
    policy = load_policy(cfg)
    policies = {name: sampling_policy(cfg, name, policy) for name in names}
    make_env, clock = env_maker(cfg), MonotonicClock()
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    folder = Path(cfg.out or f"outputs/evaluate/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")

    episodes, latencies, records = {}, {}, {}
    for name in names:
        with tqdm(total=len(seeds) * cfg.task.max_steps, unit="step", desc=name, dynamic_ncols=True) as bar:
            episodes[name] = rollout(
                policies[name],
                make_env,
                seeds,
                cfg.task.max_steps,
                picture=lambda env: env.unwrapped.picture(cfg.video_size),  # type: ignore[attr-defined]
                n_pictured=cfg.videos,
                on_steps=bar.update,
            )
    if cfg.latency_plans:
        windows = episodes[cfg.reference][0].windows[: cfg.latency_plans]
        with tqdm(total=len(windows), unit="turn", desc="latency", dynamic_ncols=True) as bar:
            latencies = plan_latencies(policies, windows, clock, bar.update)
    if cfg.paced_ticks:
        for name in tqdm(names, desc="at the real rate", unit="sampler", dynamic_ncols=True):
            records[name] = paced_run(policies[name], make_env, cfg.first_seed, cfg.paced_ticks, clock)

    compared = results(episodes, latencies, records, cfg.reference, cfg.margin)
    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint).name}"
    about = {
        "task": cfg.task.name,
        "checkpoint": str(cfg.checkpoint),
        "reference": cfg.reference,
        "guidance_scale": cfg.guidance_scale,
        "capture": {"backend": cfg.capture, "precision": cfg.precision, "programs": programs(policies)},
        "seeds": [seeds.start, seeds.stop - 1],
        "machine": machine(),
        "samplers_config": {name: plain(cfg.sampler[name]) for name in names},
    }
    paths = write_report(folder, compared, title, about, cfg.task.control_hz)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(compared, title))
    console.print(f"on {describe(machine())}; plans: {in_words(programs(policies))}", highlight=False)
    for path in paths:
        console.print(str(path), highlight=False)


def evaluate_realtime(cfg: Config) -> None:
    """Reward while simulated time goes on: by sampler and control rate, and against latency."""
    from rich.console import Console
    from tqdm import tqdm

    from .control.clock import MonotonicClock
    from .control.controller import ticks_per_step
    from .evaluation.latency import plan_latencies
    from .evaluation.realtime import realtime_rollout, wall_rollout
    from .evaluation.realtime_report import Cell, realtime_table, write_realtime_report

    setting, clock = cfg.realtime, MonotonicClock()
    clocks = ("virtual", "wall")
    if setting.clock not in clocks:
        raise InputError(f"unknown realtime.clock {setting.clock!r}{nearest(setting.clock, clocks)}")
    require_count(**{"realtime.side_by_side": setting.side_by_side})
    rates = [float(rate) for rate in setting.rates_hz]
    require_positive(**{"realtime.rates_hz": min(rates, default=0)})
    policy, cases = load_policy(cfg), plain(setting.cases)
    for rate in rates:
        ticks_per_step(rate, policy.spec.control_hz)
    policies = {name: case_policy(cfg, name, case, policy) for name, case in cases.items()}
    joining = named_joining(setting.joining)
    joinings = {name: named_joining(chosen) for name, chosen in setting.sweep.joinings.items()}
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    seconds = cfg.task.max_steps / cfg.task.control_hz
    folder = Path(cfg.out or f"outputs/realtime/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")

    injected = {
        name: latency_seconds(name, case)
        for name, case in cases.items()
        if case.get("latency_ms") is not None
    }
    timed = {name: timed for name, timed in policies.items() if name not in injected}
    if timed and setting.clock == "virtual":
        windows = recorded_windows(cfg, sampling_policy(cfg, "realtime", policy), max(cfg.latency_plans, 1))
        with tqdm(total=len(windows), unit="turn", desc="latency", dynamic_ncols=True) as bar:
            injected |= plan_latencies(timed, windows, clock, bar.update)
    samplers = {name: sampling_policy(cfg, name, policy) for name in {c["sampler"] for c in cases.values()}}

    def run(label: str, planned: Policy, rate: float, how: Callable[..., Any], **options: Any) -> list[Any]:
        total = len(seeds) * round(seconds * rate)
        with tqdm(total=total, unit="tick", desc=label, dynamic_ncols=True) as bar:
            options |= {"rate_hz": rate, "replan_every": setting.replan_every, "on_ticks": bar.update}
            episodes: list[Any] = how(planned, env_maker_at(cfg), seeds, seconds, **options)
        return episodes

    unlimited = {
        name: run(f"{name}, unlimited", planned, rates[0], realtime_rollout)
        for name, planned in samplers.items()
    }
    references = {name: [episode.score for episode in episodes] for name, episodes in unlimited.items()}
    cells = [
        Cell(f"{name}, unlimited", rates[0], setting.joining.name, [0.0], episodes, None, cfg.margin)
        for name, episodes in unlimited.items()
    ]
    for name, case in cases.items():
        for rate in rates:
            label = f"{name}, {rate:g} Hz"
            if setting.clock == "wall":
                options = {"clock": clock, "side_by_side": setting.side_by_side, "joining": joining}
                episodes = run(label, policies[name], rate, wall_rollout, **options)
                latencies = [float(s) for e in episodes for s in e.record.plans["latency"]]
            else:
                latencies = injected[name]
                options = {"latencies": latencies, "joining": joining}
                episodes = run(label, samplers[case["sampler"]], rate, realtime_rollout, **options)
            reference = references[case["sampler"]]
            cells.append(Cell(name, rate, setting.joining.name, latencies, episodes, reference, cfg.margin))
    sweep = []
    swept = sampling_policy(cfg, setting.sweep.sampler, policy)
    for name, way in joinings.items():
        for number in setting.sweep.latency_ms if setting.clock == "virtual" else []:
            latencies = latency_seconds("sweep", {"latency_ms": number})
            label = f"{name}, {number:g} ms"
            episodes = run(label, swept, rates[0], realtime_rollout, latencies=latencies, joining=way)
            waited = references.get(setting.sweep.sampler)
            sweep.append(Cell(setting.sweep.sampler, rates[0], name, latencies, episodes, waited, cfg.margin))

    title = f"{cfg.task.name}, {cfg.seeds} seeds, {Path(cfg.checkpoint).name}, {setting.clock} clock"
    about = {
        "task": cfg.task.name,
        "checkpoint": str(cfg.checkpoint),
        "seeds": [seeds.start, seeds.stop - 1],
        "machine": machine(),
        "realtime": plain(setting),
    }
    paths = write_realtime_report(folder, cells, sweep, title, about)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(realtime_table(cells, title))
    if sweep:
        console.print(realtime_table(sweep, f"{setting.sweep.sampler} under injected latency"))
    console.print(f"on {describe(machine())}", highlight=False)
    for path in paths:
        console.print(str(path), highlight=False)


def case_policy(cfg: Config, name: str, case: dict[str, Any], policy: Policy) -> Policy:
    """What a case of ``realtime.cases`` times."""
    known = ("sampler", "capture", "network", "latency_ms")
    for key in case:
        if key not in known:
            raise InputError(f"realtime.cases.{name} has no setting {key!r}{nearest(key, known)}")
    if "sampler" not in case:
        raise InputError(f"realtime.cases.{name} needs a sampler, as {{sampler: ddpm}}")
    sized = resized(cfg, policy, case["network"]) if case.get("network") else policy
    own = {"capture": case["capture"]} if case.get("capture") else {}
    return sampling_policy(cfg, case["sampler"], sized.captured(**capture_settings(cfg, **own)))


def latency_seconds(name: str, case: Mapping[str, Any]) -> list[float]:
    """A case's injected latencies."""
    given = case["latency_ms"]
    numbers = given if isinstance(given, list) else [given]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
            raise InputError(f"{name}: latency_ms={given} must be milliseconds, or a list of them")
    if not numbers:
        raise InputError(f"{name}: latency_ms=[] must have at least one number")
    return [number / 1e3 for number in numbers]


def train(cfg: Config) -> None:
    """Demonstrations to a checkpoint; run again to resume."""
    from .checkpoint import Checkpoint, read_metadata
    from .data.dataset import WindowDataset
    from .data.replay_buffer import ReplayBuffer, augmented
    from .evaluation.rollout import rollout
    from .evaluation.statistics import standard_error
    from .policy import Policy
    from .training.train import Trainer, TrainSettings
    from .types import PolicySpec

    device = choose_device(cfg)
    settings_of_capture = capture_settings(cfg) | {"cache": None}  # weights change
    spec = PolicySpec(
        task=cfg.task.name,
        obs_dim=cfg.task.obs_dim,
        action_dim=cfg.task.action_dim,
        **typed(PolicySpec, cfg.policy) | {"down_dims": tuple(cfg.policy.down_dims)},
    )
    settings = TrainSettings(**typed(TrainSettings, cfg.training))
    sampler = named_sampler(cfg, cfg.evaluation.sampler, spec)
    buffer = ReplayBuffer.open(locate(cfg.dataset))
    fields = observation_fields(cfg)
    keys = [field.key for field in fields] + ["action"]
    init = Checkpoint.load(locate(cfg.init)) if cfg.init else None
    about_data = {
        "name": Path(cfg.dataset).name,
        "n_episodes": buffer.n_episodes,
        "n_steps": buffer.n_steps,
        "fingerprint": buffer.fingerprint(keys),
        "augmentation": cfg.augmentation,
    }
    data = WindowDataset.of(
        augmented(buffer, named_augmentation(cfg.augmentation), keys) if cfg.augmentation else buffer,
        fields,
        n_obs_steps=spec.n_obs_steps,
        horizon=spec.horizon,
        n_action_steps=spec.n_action_steps,
    )
    sizes = (data.observations.shape[1], data.actions.shape[1])
    if sizes != (spec.obs_dim, spec.action_dim):
        raise InputError(
            f"{buffer.name} has obs_dim, action_dim {sizes}, task {spec.task!r} needs "
            f"{(spec.obs_dim, spec.action_dim)}: another dataset or task"
        )
    seeds = range(cfg.evaluation.first_seed, cfg.evaluation.first_seed + cfg.evaluation.seeds)

    def evaluate_policy(checkpoint: Checkpoint) -> dict[str, float]:
        policy = Policy(checkpoint, sampler, device).captured(**settings_of_capture)
        episodes = rollout(policy, env_maker(cfg), seeds, cfg.task.max_steps)
        scores = [episode.score for episode in episodes]
        return {
            "score": round(sum(scores) / len(scores), 4),
            "standard_error": round(standard_error(scores), 4),
            "success_rate": sum(episode.success for episode in episodes) / len(episodes),
            "n_seeds": len(seeds),
            "first_seed": seeds.start,
        }

    info = {
        "dataset": about_data,
        "init": {"sha256": read_metadata(locate(cfg.init))["weights"]["sha256"]} if init else {},
        "evaluation": {
            "sampler": plain(cfg.sampler[cfg.evaluation.sampler]),
            "max_steps": cfg.task.max_steps,
        },
        "machine": machine(),
    }
    trainer = Trainer(
        data,
        spec,
        settings,
        Path(cfg.run),
        info=info,
        init=init,
        evaluate=evaluate_policy if cfg.evaluation.seeds else None,
        device=device,
    )
    if trainer.step:
        print(f"resuming {cfg.run} at step {trainer.step} of {settings.n_steps}")
    checkpoint = trainer.run()
    places = [Path(cfg.run) / "checkpoint"]
    if cfg.checkpoint:
        checkpoint.save(cfg.checkpoint)
        places.append(Path(cfg.checkpoint))
    for score in trainer.scores[-1:]:
        print(f"score {score['score']:.3f} ± {score['standard_error']:.3f} over {score['n_seeds']} seeds")
    print("\n".join(map(str, places)))


def collect(cfg: Config) -> None:
    """Rollouts of a policy, appended to a dataset."""
    import numpy as np
    from tqdm import tqdm

    from .data.replay_buffer import ReplayBuffer
    from .evaluation.rollout import rollout

    require_count(episodes=cfg.episodes, batch=cfg.batch)
    policy = load_policy(cfg)
    policy = sampling_policy(cfg, cfg.sampler_name, policy)
    out = Path(cfg.out)
    buffer = ReplayBuffer.open(out, "r+") if out.exists() else ReplayBuffer.create(out)
    first = buffer.n_episodes if cfg.first_seed is None else cfg.first_seed
    written, scores = 0, []
    with tqdm(total=cfg.episodes * cfg.task.max_steps, unit="step", dynamic_ncols=True) as bar:
        for begin in range(first, first + cfg.episodes, cfg.batch):
            seeds = range(begin, min(begin + cfg.batch, first + cfg.episodes))
            episodes = rollout(
                policy, env_maker(cfg), seeds, cfg.task.max_steps, keep_infos=True, on_steps=bar.update
            )
            for episode in episodes:
                scores.append(episode.score)
                if episode.score < cfg.min_score:
                    continue
                steps = {key: np.stack([info[key] for info in episode.infos]) for key in cfg.task.record}
                steps["action"] = np.stack(episode.actions)
                buffer.append({key: values.astype(np.float32) for key, values in steps.items()})
                written += 1
            bar.set_postfix(written=written, score=f"{np.mean(scores):.3f}")
    print(f"{written} of {cfg.episodes} episodes written, mean score {np.mean(scores):.3f}")
    print(f"{out}: {buffer.n_episodes} episodes, {buffer.n_steps} steps")


def run(cfg: Config) -> None:
    """A policy drives a robot in real time, to be looked at now and later."""
    from rich.console import Console
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .control.clock import MonotonicClock
    from .control.controller import Controller, ticks_per_step
    from .control.loop import ControlLoop, Observer
    from .control.scheduling import Scheduling
    from .files import require_writable
    from .seeing.recorder import DatasetRecorder, VideoRecorder
    from .seeing.rerun_view import RerunView
    from .seeing.summary import summary, summary_table, write_run

    require_positive(seconds=cfg.seconds)
    require_count(picture_size=cfg.picture_size)
    require_whole(seed=cfg.seed, replan_every=0 if cfg.replan_every is None else cfg.replan_every)
    planner, joining = named_planner(cfg.planner), named_joining(cfg.joining)
    if cfg.robot not in ROBOTS:
        raise InputError(f"unknown robot {cfg.robot!r}{nearest(cfg.robot, ROBOTS)}")
    scheduling = Scheduling(**typed(Scheduling, cfg.scheduling))
    sink, shown = view_sink(cfg.view), shown_seconds(cfg)
    folder = Path(cfg.out or f"outputs/run/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    files = {name: Path(cfg[name]) for name in ("record", "video") if cfg[name]}
    require_writable(**files)
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))
    spec = policy.spec
    rate_hz = spec.control_hz if cfg.rate_hz is None else cfg.rate_hz
    stride = ticks_per_step(rate_hz, spec.control_hz)
    n_ticks = max(1, round(cfg.seconds * rate_hz))
    per_picture = max(1, round(rate_hz / PICTURES_PER_SECOND))
    title = (
        f"{cfg.task.name}, {Path(cfg.checkpoint).name}, {cfg.sampler_name}, {rate_hz:g} Hz, "
        f"planner: {cfg.planner}, {cfg.joining.name}"
    )
    clock = MonotonicClock()
    controller = Controller(
        policy,
        rate_hz,
        generator=seeded(cfg.seed),
        planner=planner,
        joining=joining,
        clock=clock,
        replan_every=cfg.replan_every,
        capacity=n_ticks,
    )
    with contextlib.ExitStack() as stack:
        driven = ROBOTS[cfg.robot](cfg, rate_hz, clock)
        stack.callback(driven.close)
        observers: list[Observer] = []
        if cfg.record:
            fields = driven.fields
            recorder = DatasetRecorder(files["record"], spec, n_ticks, every=stride, fields=fields)
            observers.append(stack.enter_context(recorder))
        if cfg.video:
            if driven.picture is None:
                raise InputError(f"video={cfg.video}: robot={cfg.robot} gives no pictures")
            video = VideoRecorder(files["video"], driven.picture, rate_hz, n_ticks, every=per_picture)
            observers.append(stack.enter_context(video))
        if sink is not None:
            view = RerunView(
                sink,
                spec,
                rate_hz,
                picture=driven.picture,
                every=per_picture,
                project=driven.project,
            )
            observers.append(stack.enter_context(view))
        require_writable(out=folder / "report.json")
        stack.enter_context(controller)
        stack.enter_context(logging_redirect_tqdm())
        noted = stack.enter_context(noted_signals(signal.SIGINT, signal.SIGTERM))
        bar = stack.enter_context(tqdm(total=n_ticks, unit="tick", desc=cfg.robot, dynamic_ncols=True))
        observers.append(lambda tick: bar.update(1 + tick.missed))
        loop = ControlLoop(controller, driven.robot, observers=observers, scheduling=scheduling)
        report: dict[str, Any] = {}
        try:
            loop.run(n_ticks, until=lambda: bool(noted) or driven.finished())
        finally:
            bar.close()
            report |= summary(controller.record) | driven.outcome()
            about = {
                "task": cfg.task.name,
                "checkpoint": str(cfg.checkpoint),
                "sampler": plain(cfg.sampler[cfg.sampler_name]),
                "rate_hz": rate_hz,
                "planner": cfg.planner,
                "joining": plain(cfg.joining),
                "replan_every": cfg.replan_every,
                "scheduling": plain(cfg.scheduling),
                "seed": cfg.seed,
                "machine": machine(),
            }
            paths = write_run(
                *(folder, controller.record, about | report, title), ticks_per_step=stride, seconds=shown
            )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(summary_table(report, title))
    console.print(f"on {describe(machine())}", highlight=False)
    written = [*paths, *files.values(), *([Path(cfg.view)] if cfg.view and cfg.view.endswith(".rrd") else [])]
    for path in written:
        if path.exists():
            console.print(str(path), highlight=False)
    if noted:
        raise StoppedError(noted[0])


def bench_latency(cfg: Config) -> None:
    """Timings, as ratios within one run."""
    from dataclasses import asdict

    from rich.console import Console
    from tqdm import tqdm

    from .control.clock import MonotonicClock
    from .evaluation import latency
    from .files import write_atomically
    from .sampling.capture.backends import CaptureSettings

    repeats_of, steady_of = per_network(cfg, "repeats", 5), per_network(cfg, "steady", 0)
    require_count(**repeats_of, call_repeats=cfg.call_repeats)
    console, clock = Console(width=None if sys.stdout.isatty() else 120), MonotonicClock()
    policy = load_policy(cfg)
    # Real observations: how many rounds a tolerance takes depends on them.
    most = max(repeats_of.values(), default=1)
    windows = recorded_windows(cfg, sampling_policy(cfg, "realtime", policy), most)
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
            steady_policy = sampling_policy(cfg, "realtime", sized.captured(**settings))
            with tqdm(total=n_steady, unit="plan", desc="steady", dynamic_ncols=True) as bar:
                steady = latency.steady_state(steady_policy, windows, n_steady, clock, bar.update)
            console.print(
                f"realtime, captured, {steady.plans} plans in a row: first {steady.first:.0f} ms, p50 "
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

    from .control.clock import MonotonicClock
    from .control.scheduling import Scheduling
    from .evaluation.control import control_rows, control_table, timed_runs
    from .files import write_atomically

    require_count(turns=cfg.turns)
    require_positive(seconds=cfg.seconds, rate_hz=cfg.rate_hz)
    planners = {name: named_planner(name) for name in cfg.planners}
    scheduling, joining = Scheduling(**typed(Scheduling, cfg.scheduling)), named_joining(cfg.joining)
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
            joining=joining,
            replan_every=cfg.replan_every,
            scheduling=scheduling,
            on_turn=bar.update,
        )
    rows = control_rows(records)
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

    from .control.clock import MonotonicClock
    from .evaluation.solvers import Case, solver_rows, solver_table, work_precision
    from .files import write_atomically
    from .policy import spec_sampler

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


def serve(cfg: Config) -> None:
    """A policy for clients over the network, until SIGINT or SIGTERM."""
    import asyncio
    import gc
    import signal

    from omegaconf import OmegaConf
    from tqdm import tqdm

    from .control.clock import MonotonicClock

    require_extra("serve")
    from .serving.server import PolicyServer, ServerSettings

    key = os.environ.get("PARADIFFPOLICY_API_KEY") if cfg.api_key is None else cfg.api_key
    names = ["host", "port", "max_batch", "max_queue", "max_message", "max_sessions", "send_timeout", "seed"]
    settings = ServerSettings(
        api_key=key,
        certificate=None if cfg.certificate is None else Path(cfg.certificate),
        private_key=None if cfg.private_key is None else Path(cfg.private_key),
        **typed(ServerSettings, OmegaConf.masked_copy(cfg, names)),
    )
    settings.tls()  # says what is wrong with it before anything takes time
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))

    async def until_told() -> None:
        told, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)
        server = PolicyServer(policy, cfg.sampler_name, settings, MonotonicClock())
        try:
            sizes = server.warm_up_sizes
            with tqdm(total=sizes, unit="batch size", desc="warming up", dynamic_ncols=True) as bar:
                await server.warm_up(bar.update)
            gc.collect()
            gc.freeze()  # what is there now stays: looking through it takes tenths of a second
            await server.start()
            how = in_words(programs({cfg.sampler_name: policy}))
            print(f"{cfg.task.name}, {cfg.sampler_name}, {how}; listening on {server.uri}", flush=True)
            await told.wait()
        finally:
            await server.stop()

    asyncio.run(until_told())


def bench_serve(cfg: Config) -> None:
    """A server in a process of its own, and its clients in this one."""
    from dataclasses import asdict

    from rich.console import Console
    from tqdm import tqdm

    from .control.clock import MonotonicClock
    from .files import write_atomically

    require_extra("serve")
    from .evaluation import serving

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
    settings |= {f"++task.{name}": cfg.task[name] for name in ("name", "obs_dim", "action_dim")}
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


def info(cfg: Config) -> None:
    """What is installed, on what machine, and what a checkpoint and a dataset are."""
    from rich.console import Console
    from rich.table import Table

    from .checkpoint import read_metadata
    from .data.replay_buffer import ReplayBuffer

    console = Console(width=None if sys.stdout.isatty() else 120)

    def show(title: str, values: Mapping[str, Any]) -> None:
        view = Table(title=title, title_justify="left", show_header=False)
        for key, value in values.items():
            view.add_row(key, str(value))
        console.print(view)

    choose_device(cfg)
    show("machine", machine())
    metadata = read_metadata(locate(cfg.checkpoint))
    training = metadata.get("info", {}).get("training", {})
    show(
        f"checkpoint {cfg.checkpoint}",
        {
            **metadata["spec"],
            "weights": metadata["weights"]["file"],
            "trained on": metadata.get("info", {}).get("dataset", {}),
            "steps": training.get("step"),
            "minutes": training.get("minutes"),
            "scores": training.get("scores"),
        },
    )
    path = locate(cfg.dataset)
    if not path.exists():
        console.print(f"dataset {cfg.dataset}: not there")
        return
    buffer = ReplayBuffer.open(path)
    shapes = {field: buffer.read(field, 0, 1).shape[1:] for field in buffer.fields}
    show(
        f"dataset {cfg.dataset}",
        {
            "episodes": buffer.n_episodes,
            "steps": buffer.n_steps,
            **{f"data/{k}": v for k, v in shapes.items()},
        },
    )


# ------------------------------------------------------------------------------ building from configs


def load_policy(cfg: Config) -> Policy:
    """The checkpoint's policy, checked against the task, with the reference sampler."""
    from .checkpoint import Checkpoint
    from .policy import Policy, check_task, spec_sampler

    device = choose_device(cfg)
    checkpoint = Checkpoint.load(locate(cfg.checkpoint))
    check_task(checkpoint.spec, cfg.task.name, cfg.task.obs_dim, cfg.task.action_dim)
    policy = Policy(checkpoint, spec_sampler(checkpoint.spec), device)
    guided = policy.with_guidance(cfg.get("guidance_scale"), cfg.get("dynamic_threshold"))
    return guided.captured(**capture_settings(cfg))


def capture_settings(cfg: Config, **changes: Any) -> dict[str, Any]:
    """What ``Policy.captured`` takes."""
    from .sampling.capture.backends import default_cache

    cache = default_cache() if cfg.capture_cache == "auto" else cfg.capture_cache
    return {
        "backend": changes.get("capture", cfg.capture),
        "precision": changes.get("precision", cfg.precision),
        "cache": None if cache is None else Path(cache),
        "threads": cfg.threads,
        "pinning": cfg.pinning,
        "tf32": cfg.tf32,
    }


def resized(cfg: Config, policy: Policy, down_dims: Any) -> Policy:
    """The same policy with other widths and random weights, for timings."""
    import torch

    from .checkpoint import Checkpoint
    from .policy import Policy, build_network

    spec = replace(policy.spec, down_dims=tuple(down_dims))
    torch.manual_seed(0)
    weights = dict(build_network(spec).state_dict())
    normalizers = policy.observation_normalizer, policy.action_normalizer
    random = Checkpoint(spec, weights, *normalizers, {"note": "random weights"})
    return Policy(random, policy.sampler, policy.device).captured(**capture_settings(cfg))


def programs(policies: Mapping[str, Policy]) -> dict[str, Any]:
    """What each policy has captured: how, for how many shapes, and the megabytes that it keeps."""
    return {
        name: {
            "how": sorted({program.rung for program in policy.programs}),
            "shapes": len(policy.programs),
            "megabytes": round(sum(program.nbytes for program in policy.programs) / 2**20, 1),
        }
        for name, policy in policies.items()
    }


def in_words(captured: Mapping[str, Any]) -> str:
    how = " or ".join(sorted({rung for entry in captured.values() for rung in entry["how"]}))
    shapes = sum(entry["shapes"] for entry in captured.values())
    megabytes = sum(entry["megabytes"] for entry in captured.values())
    return f"{how} ({shapes} programs, {megabytes:.0f} MB)" if megabytes else how or "not captured"


EXTRAS = {"serve": ("msgpack", "prometheus_client", "websockets")}
"""Modules that the package's optional extras install."""

CAPTURE_KEYS = ("capture", "precision")
"""Settings that a sampler's config may have of its own."""


def sampling_policy(cfg: Config, name: str, policy: Policy) -> Policy:
    """The policy with the sampler that the config calls ``name``, captured as that says."""
    sampler = named_sampler(cfg, name, policy.spec)
    own = {key: cfg.sampler[name][key] for key in CAPTURE_KEYS if key in cfg.sampler[name]}
    try:
        policy = policy.captured(**capture_settings(cfg, **own)) if own else policy
        return policy.with_sampler(sampler)
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")


def named_sampler(cfg: Config, name: str, spec: PolicySpec) -> Sampler:
    """The sampler that the config calls ``name``, for the policy's noise schedule."""
    from .policy import spec_sampler

    if name not in cfg.sampler:
        raise InputError(f"unknown sampler {name!r}{nearest(name, cfg.sampler)}")
    try:
        settings = {k: v for k, v in plain(cfg.sampler[name]).items() if k not in CAPTURE_KEYS}
        return spec_sampler(spec, **settings)
    except InputError as error:
        raise InputError(f"sampler.{name}: {error}")


def env_maker(cfg: Config) -> MakeEnv:
    """Makes the task's environment."""
    import gymnasium

    from . import envs  # noqa: F401  registers the environments

    kwargs = plain(cfg.task.env.kwargs)
    return lambda: gymnasium.make(cfg.task.env.id, max_episode_steps=cfg.task.max_steps, **kwargs)


def env_maker_at(cfg: Config) -> MakeEnvAt:
    """Makes the task's environment for a control rate, without an end."""
    import gymnasium

    from . import envs  # noqa: F401  registers the environments

    kwargs = plain(cfg.task.env.kwargs)
    # -1: an episode's length is a matter of seconds here.
    return lambda rate_hz: gymnasium.make(cfg.task.env.id, control_hz=rate_hz, max_episode_steps=-1, **kwargs)


PICTURES_PER_SECOND = 25
"""As many as a view or a video of a run shows, or fewer."""


@dataclass(frozen=True)
class Driven:
    """A robot, and what can be seen of it.

    Attributes:
        fields: see ``DatasetRecorder``.
        picture: what there is to see, or None.
        project: where in it actions are, or None.
        finished: whether there is no more to do.
        outcome: what it came to, for the report.
        close: gives it back.
    """

    robot: Robot
    fields: Fields
    picture: Picture | None
    project: Project | None
    finished: Callable[[], bool]
    outcome: Callable[[], dict[str, Any]]
    close: Callable[[], object]


def env_robot(cfg: Config, rate_hz: float, clock: Clock) -> Driven:
    """The task's environment, whose time is the clock's."""
    import gymnasium
    import numpy as np

    from .seeing.watched import WatchedEnvRobot

    try:
        env = env_maker_at(cfg)(rate_hz)
    except ValueError as error:
        raise InputError(f"rate_hz={rate_hz:g}: {cfg.task.env.id}: {error}")
    robot = WatchedEnvRobot(env, cfg.seed, clock)
    space, size = env.action_space, cfg.picture_size
    project: Project | None = None
    if isinstance(space, gymnasium.spaces.Box) and space.shape == (2,):
        low, span = space.low, space.high - space.low

        def project(actions: Any) -> Any:
            return (np.asarray(actions) - low) / span * size

    return Driven(
        robot,
        fields=lambda: robot.fields(cfg.task.record),
        picture=lambda: robot.picture(size),
        project=project,
        finished=lambda: robot.finished,
        outcome=lambda: {"score": robot.score, "success": robot.success},
        close=env.close,
    )


ROBOTS: dict[str, Callable[[Config, float, Clock], Driven]] = {"env": env_robot}
"""What can be driven, by name."""


def named_planner(name: str) -> MakePlanner:
    """Where plans are made."""
    from .control.planner import InlinePlanner, ThreadPlanner
    from .control.process import ProcessPlanner

    planners: dict[str, MakePlanner] = {
        "inline": InlinePlanner,
        "thread": ThreadPlanner,
        "process": ProcessPlanner,
    }
    if name not in planners:
        raise InputError(f"unknown planner {name!r}{nearest(str(name), planners)}")
    return planners[name]


def named_joining(node: Config) -> Joining:
    """Which action runs where plans overlap: a name, and its options."""
    import inspect

    from .control.joining import JOININGS

    options = plain(node)
    name = options.pop("name", None)
    if name not in JOININGS:
        raise InputError(f"unknown joining {name!r}{nearest(str(name), JOININGS)}")
    known = [option for option in inspect.signature(JOININGS[name]).parameters if option != "grid"]
    for option, value in options.items():
        if option not in known:
            raise InputError(f"joining {name!r} has no option {option!r}{nearest(option, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise InputError(f"joining.{option}={value} must be a number, not below 0")
    return functools.partial(JOININGS[name], **options)


def view_sink(view: str | None) -> Sink | None:
    """Where a view goes: the viewer, a file, or a viewer's address."""
    from .files import require_writable
    from .seeing.rerun_view import rerun, to_file, to_url, to_viewer

    if view is None:
        return None
    rerun()
    if view == "rerun":
        return to_viewer
    if view.startswith("rerun+http"):
        return to_url(view)
    if view.endswith(".rrd"):
        require_writable(view=Path(view))
        return to_file(Path(view))
    raise InputError(f"view={view} must be rerun, a path that ends in .rrd, or rerun+http://HOST:PORT/proxy")


def shown_seconds(cfg: Config) -> tuple[float, float] | None:
    """What of a run its timeline shows."""
    if cfg.timeline is None:
        return None
    values = plain(cfg.timeline)
    numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != 2 or not 0 <= values[0] < min(values[1], cfg.seconds):
        raise InputError(f"timeline={values} must be [from, to], in seconds of a run of {cfg.seconds}")
    return values[0], values[1]


class StoppedError(Exception):
    """A run was ended early, and in order, by the signal that it holds."""


@contextlib.contextmanager
def noted_signals(*signals: int) -> Iterator[Sequence[int]]:
    """The first of the signals that comes is noted, so that what runs can end in order; the second
    interrupts it."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seeded(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def require_whole(**values: int) -> None:
    """Raises ``InputError`` that names the first value that is not a whole number, 0 or above."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name}={value} must be a whole number, 0 or above")


def recorded_windows(cfg: Config, guide: Policy, count: int) -> list[Any]:
    """Observation windows ``[To, O]`` of an episode that ``guide`` runs, again from its start if short."""
    from .evaluation.rollout import rollout

    episode = rollout(guide, env_maker(cfg), [cfg.first_seed], cfg.task.max_steps)[0]
    return [episode.windows[k % len(episode.windows)] for k in range(count)]


def named_augmentation(name: str) -> Augment:
    """What makes a second episode of every recorded one."""
    from .envs.pusht import mirrored

    augmentations = {"pusht_mirror": mirrored}
    if name not in augmentations:
        raise InputError(f"unknown augmentation {name!r}{nearest(name, augmentations)}")
    return augmentations[name]


def observation_fields(cfg: Config) -> list[ObservationField]:
    from .data.dataset import ObservationField

    return [ObservationField(**plain(field)) for field in cfg.task.observation]


def choose_device(cfg: Config) -> str:
    """Sets the number of threads and names the device."""
    import torch

    if cfg.threads is not None:
        require_count(threads=cfg.threads)
        torch.set_num_threads(cfg.threads)
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={cfg.device} can't be used here ({str(error).splitlines()[0]}): device=cpu can"
        )
    return str(cfg.device)


def locate(path: str) -> Path:
    """A path as given, from the working folder, or else from the checkout that this code lies in."""
    given = Path(path)
    beside = Path(__file__).resolve().parent.parent / given
    return beside if not given.exists() and beside.exists() else given


@contextlib.contextmanager
def one_of_several(cfg: Config) -> Iterator[Config]:
    """Joins the other processes if torchrun started several.  All compute the same; the first
    reports, the others are silent and write to a folder that goes away."""
    if "WORLD_SIZE" not in os.environ:
        yield cfg
        return
    import torch.distributed as dist

    from .sampling.sharded import join_from_environment

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


def require_extra(extra: str) -> None:
    """Raises ``InputError`` unless what an optional extra installs is there."""
    from importlib.util import find_spec

    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} isn't installed: pip install 'paradiffpolicy[{extra}]'")


def hydra_value(value: Any) -> str:
    """A plain value as an override's right side."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {hydra_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(hydra_value, value)) + "]"
    return json.dumps(value)


def plain(node: Config) -> Any:
    """A config node as dicts, lists and numbers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


def typed(cls: type, node: Config) -> dict[str, Any]:
    """A config node's values, checked against the annotations of the dataclass they are for."""
    import typing

    hints = typing.get_type_hints(cls)
    values = plain(node)
    for name, value in values.items():
        wanted = hints[name]
        allowed = (int, float) if wanted is float else wanted
        if wanted in (int, float, str, bool) and (
            not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool)
        ):
            raise InputError(f"{name}={value} must be a {wanted.__name__}")
    return dict(values)


def machine() -> dict[str, Any]:
    """What a figure should be read with."""
    import torch

    from . import __version__

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
    return {
        "paradiffpolicy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe(values: Mapping[str, Any]) -> str:
    gpu = values["gpu"] or "no GPU"
    return f"{values['cpu']}, {values['cores']} cores, {gpu}; torch {values['torch']}"


# -------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, and what its help says."""

    run: Callable[[Config], None]
    help: str
    examples: tuple[tuple[str, str], ...]


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
            ("paradiffpolicy evaluate", "DDPM, ParaDDPM, speculative and realtime on PushT, 50 seeds"),
            ("paradiffpolicy evaluate 'samplers=[ddim,realtime]' seeds=10", "others, quickly"),
            ("paradiffpolicy evaluate checkpoint=outputs/train/pusht/checkpoint", "your own policy"),
            ("paradiffpolicy evaluate mode=realtime", "what latency costs, in virtual time"),
            (
                "paradiffpolicy evaluate mode=realtime realtime.clock=wall 'realtime.rates_hz=[10]'",
                "the same at the real rate",
            ),
        ),
    ),
    "run": Command(
        run,
        "Lets a policy drive a robot in real time, the task's environment unless told otherwise, and says\n"
        "how the loop kept its time. Shows it in the Rerun viewer; keeps it as a dataset, video, pictures.\n"
        "Ctrl-C or SIGTERM stops the robot and writes what there is.",
        (
            ("paradiffpolicy run", "PushT for 30 s, planning in a process of its own"),
            ("paradiffpolicy run view=rerun rate_hz=50 joining.name=commit", "faster, smoother, watched"),
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
    "info": Command(
        info,
        "Says what is installed, on what machine, and what a checkpoint and a dataset hold.",
        (
            ("paradiffpolicy info", "the shipped checkpoint"),
            ("paradiffpolicy info checkpoint=outputs/train/pusht/checkpoint", "yours"),
            ("paradiffpolicy info dataset=my.zarr", "a dataset"),
        ),
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
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise InputError(f"{override!r} is not an override: write NAME=VALUE, as seeds=10")
    with initialize_config_module("paradiffpolicy.configs", version_base="1.3"):
        try:
            cfg = hydra_compose(config, overrides)
            OmegaConf.resolve(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_override_error(command, overrides, error, hydra_compose(config)))
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
    return (
        f"paradiffpolicy {name} [NAME=VALUE ...]\n\n{command.help}\n\nExamples:\n{examples}\n\n"
        f"Settings, with their defaults:\n\n{OmegaConf.to_yaml(settings)}"
    )


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
