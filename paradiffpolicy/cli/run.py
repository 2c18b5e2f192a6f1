"""A policy drives a robot in real time."""

from __future__ import annotations

import contextlib
import datetime
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError
from ..provenance import describe, machine
from ..tables import console
from .building import load_policy, named_blending, named_interpolation, sampling_policy
from .environments import env_maker_at
from .settings import written

if TYPE_CHECKING:
    from ..clock import Clock
    from ..control.controller import Controller
    from ..control.loop import Observer
    from ..control.record import Tick
    from ..planning.request import Plans
    from ..robots.robot import RobotSetup
    from ..telemetry.rerun import Sink
    from ..types import PolicySpec
    from .schema import RunConfig

T = TypeVar("T")


def run(cfg: RunConfig) -> None:
    """A policy drives a robot in real time; its run is recorded, shown and summed up."""
    from ..clock import MonotonicClock
    from ..control.controller import Controller
    from ..control.rate import ticks_per_step
    from ..disturbances import in_title
    from ..files import require_writable
    from ..planning import planner_beside
    from ..telemetry.summary import summary, summary_table, write_run

    blending, sink, shown = named_blending(cfg.blending), view_sink(cfg.view), shown_seconds(cfg)
    interpolation = named_interpolation(cfg.interpolation)
    folder = Path(cfg.out or f"outputs/run/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    files = {name: Path(path) for name, path in (("record", cfg.record), ("video", cfg.video)) if path}
    clock = MonotonicClock()
    policy = timed_policy(cfg, clock)
    rate_hz = policy.spec.control_hz if cfg.rate_hz is None else cfg.rate_hz
    stride, n_ticks = ticks_per_step(rate_hz, policy.spec.control_hz), max(1, round(cfg.seconds * rate_hz))
    title = (
        f"{cfg.task.name}, {Path(cfg.checkpoint or '').name}, {cfg.sampler_name}, seed {cfg.seed}, "
        f"{rate_hz:g} Hz, planner: {cfg.planner}, {cfg.blending['name']}{in_title(cfg.disturbances)}"
    )
    planner = planner_beside(cfg.planner, cfg.scheduling.cores)
    options: dict[str, Any] = {"planner": planner, "blending": blending, "interpolation": interpolation}
    options |= {
        "forward": cfg.forward,
        "replan_every": cfg.replan_every,
        "generator": cfg.seed,
        "clock": clock,
        "capacity": n_ticks,
    }
    controller = Controller(policy, rate_hz, **options, **vars(cfg.safety))

    def finish() -> tuple[dict[str, Any], list[Path]]:
        report = about(cfg, rate_hz) | summary(controller.record)
        try:
            report |= driven.outcome()
        finally:  # also when the robot can't say
            paths = write_run(folder, controller.record, report, title, ticks_per_step=stride, seconds=shown)
        return report, paths

    with contextlib.ExitStack() as stack:
        driven = stack.enter_context(contextlib.closing(build_robot(cfg, policy.spec, rate_hz, clock)))
        watching = recorders(cfg, driven, policy.spec, rate_hz, n_ticks, sink)
        observers = [stack.enter_context(recorder) for recorder in watching]
        require_writable(out=folder / "report.json")
        (report, paths), signals = drive(cfg, controller, driven, observers, n_ticks, finish)
    screen = console()
    screen.print(summary_table(report, title))
    screen.print(f"on {describe(machine())}", highlight=False)
    made = [*paths, *files.values(), *([Path(cfg.view)] if cfg.view and cfg.view.endswith(".rrd") else [])]
    for path in filter(Path.exists, made):
        screen.print(str(path), highlight=False)
    if signals:
        raise StoppedError(signals[0])


def drive(
    cfg: RunConfig,
    controller: Controller,
    driven: RobotSetup,
    observers: Sequence[Observer],
    n_ticks: int,
    finish: Callable[[], T],
) -> tuple[T, Sequence[int]]:
    """Runs the loop; returns what ``finish`` returns, which is called however it ends, and the signal that
    ended it."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..control.loop import ControlLoop
    from ..control.scheduling import Scheduling

    with (
        controller,
        logging_redirect_tqdm(),
        noted_signals(signal.SIGINT, signal.SIGTERM) as noted,
        tqdm(total=n_ticks, unit="tick", desc=cfg.robot, dynamic_ncols=True) as bar,
    ):
        watching = [*observers, lambda tick: bar.update(1 + tick.missed)]
        scheduling = Scheduling(**vars(cfg.scheduling))
        loop = ControlLoop(controller, driven.robot, observers=watching, scheduling=scheduling)
        try:
            loop.run(n_ticks, until=lambda: bool(noted) or driven.finished())
        finally:
            bar.close()
            finished = finish()
    return finished, noted


PICTURES_PER_SECOND = 25
"""As many as a view or a video of a run shows, or fewer."""


def timed_policy(cfg: RunConfig, clock: Clock) -> Plans:
    """The policy with its sampler, or within a budget with the first of several that fits."""
    from ..planning.anytime import Anytime

    loaded = load_policy(cfg)
    if cfg.budget_ms is None:
        return sampling_policy(cfg, cfg.sampler_name, loaded)
    return Anytime([sampling_policy(cfg, name, loaded) for name in cfg.anytime], cfg.budget_ms / 1e3, clock)


def recorders(
    cfg: RunConfig, driven: RobotSetup, spec: PolicySpec, rate_hz: float, n_ticks: int, sink: Sink | None
) -> Iterator[Any]:
    """Makes what records and shows a run: each observes ticks, and is a context manager."""
    from ..control.rate import whole_ticks_per_step
    from ..telemetry.caption import episode_lines
    from ..telemetry.recorder import DatasetRecorder, VideoRecorder
    from ..telemetry.rerun import RerunView

    def caption(tick: Tick) -> list[str]:
        now = driven.progress()
        if now is None:
            return []
        scores = now.seconds, now.reward, now.best, now.best_at
        return episode_lines(cfg.sampler_name, cfg.seed, *scores, ended=now.ended)

    shown: dict[str, Any] = {"every": max(1, round(rate_hz / PICTURES_PER_SECOND)), "caption": caption}
    if cfg.record:
        stride = whole_ticks_per_step(
            rate_hz, spec.control_hz, f"record={cfg.record} holds the policy's steps"
        )
        yield DatasetRecorder(Path(cfg.record), spec, n_ticks, every=stride, fields=driven.fields)
    if cfg.video:
        if driven.picture is None:
            raise InputError(f"video={cfg.video}: robot={cfg.robot} gives no pictures")
        yield VideoRecorder(Path(cfg.video), driven.picture, rate_hz, n_ticks, **shown)
    if sink is not None:
        yield RerunView(sink, spec, rate_hz, picture=driven.picture, project=driven.project, **shown)


def about(cfg: RunConfig, rate_hz: float) -> dict[str, Any]:
    """What the report says of a run's settings."""
    return {
        "task": cfg.task.name,
        "checkpoint": str(cfg.checkpoint),
        "sampler": cfg.sampler[cfg.sampler_name],
        "rate_hz": rate_hz,
        "planner": cfg.planner,
        "budget_ms": cfg.budget_ms,
        "blending": cfg.blending,
        "interpolation": cfg.interpolation,
        "forward": cfg.forward,
        "replan_every": cfg.replan_every,
        "disturbances": cfg.disturbances,
        "safety": vars(cfg.safety),
        "scheduling": vars(cfg.scheduling),
        "seed": cfg.seed,
        "machine": machine(),
    }


def build_robot(cfg: RunConfig, spec: PolicySpec, rate_hz: float, clock: Clock) -> RobotSetup:
    """The robot that the settings name."""
    from ..robots import ROBOTS
    from ..robots.robot import RobotSettings

    if cfg.disturbances and cfg.robot != "env":
        raise InputError(
            f"disturbances={written(cfg.disturbances)} are of the task's environment: they need robot=env"
        )
    settings = RobotSettings(
        spec,
        rate_hz,
        clock,
        cfg.seed,
        make_env=env_maker_at(cfg, spec, **cfg.disturbances),
        success_key=cfg.task.success_key,
        scoring=cfg.task.scoring,
        recorded=tuple(cfg.task.record),
        picture_size=cfg.picture_size,
        address=cfg.robot_address,
        options=cfg.robot_options,
    )
    return ROBOTS.named(cfg.robot)(settings)


def view_sink(view: str | None) -> Sink | None:
    """Where a view goes: the viewer, a file, or a viewer's address."""
    from ..files import require_writable
    from ..telemetry.rerun import rerun_sdk, to_file, to_url, to_viewer

    if view is None:
        return None
    rerun_sdk()
    if view == "rerun":
        return to_viewer
    if view.startswith("rerun+http"):
        return to_url(view)
    if view.endswith(".rrd"):
        require_writable(view=Path(view))
        return to_file(Path(view))
    raise InputError(f"view={view} must be rerun, a path that ends in .rrd, or rerun+http://HOST:PORT/proxy")


def shown_seconds(cfg: RunConfig) -> tuple[float, float] | None:
    """What of a run its timeline shows."""
    if cfg.timeline is None:
        return None
    values = cfg.timeline
    if len(values) != 2 or not values[0] < min(values[1], cfg.seconds):
        raise InputError(
            f"timeline={written(values)} must be [from, to], in seconds of a run of {cfg.seconds:g}"
        )
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
