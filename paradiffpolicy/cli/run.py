"""A policy drives a robot in real time."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..provenance import describe, machine
from .building import env_maker_at, load_policy, named_blending, named_planner, sampling_policy

if TYPE_CHECKING:
    from ..clock import Clock
    from ..control.record import Tick
    from ..planning.request import Plans
    from ..robots.robot import RobotSetup
    from ..telemetry.rerun import Sink
    from ..types import PolicySpec
    from .schema import RunConfig


def run(cfg: RunConfig) -> None:
    """A policy drives a robot in real time, to be looked at now and later."""
    from rich.console import Console
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..clock import MonotonicClock
    from ..control.controller import Controller, ticks_per_step
    from ..control.loop import ControlLoop, Observer
    from ..control.scheduling import Scheduling
    from ..files import require_writable
    from ..planning.anytime import Anytime
    from ..telemetry.caption import episode_lines
    from ..telemetry.recorder import DatasetRecorder, VideoRecorder
    from ..telemetry.rerun import RerunView
    from ..telemetry.summary import summary, summary_table, write_run

    planner, blending = named_planner(cfg.planner), named_blending(cfg.blending)
    scheduling = Scheduling(**vars(cfg.scheduling))
    sink, shown = view_sink(cfg.view), shown_seconds(cfg)
    folder = Path(cfg.out or f"outputs/run/{cfg.task.name}/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    files = {name: Path(path) for name, path in (("record", cfg.record), ("video", cfg.video)) if path}
    require_writable(**files)
    clock, loaded = MonotonicClock(), load_policy(cfg)
    policy: Plans = sampling_policy(cfg, cfg.sampler_name, loaded)
    if cfg.budget_ms is not None:
        policies = [sampling_policy(cfg, name, loaded) for name in cfg.anytime]
        policy = Anytime(policies, cfg.budget_ms / 1e3, clock)
    spec = policy.spec
    rate_hz = spec.control_hz if cfg.rate_hz is None else cfg.rate_hz
    stride = ticks_per_step(rate_hz, spec.control_hz)
    n_ticks = max(1, round(cfg.seconds * rate_hz))
    per_picture = max(1, round(rate_hz / PICTURES_PER_SECOND))
    named = Path(cfg.checkpoint or "").name
    title = (
        f"{cfg.task.name}, {named}, {cfg.sampler_name}, seed {cfg.seed}, {rate_hz:g} Hz, "
        f"planner: {cfg.planner}, {cfg.blending['name']}"
    )
    controller = Controller(
        policy,
        rate_hz,
        generator=seeded(cfg.seed),
        planner=planner,
        blending=blending,
        clock=clock,
        replan_every=cfg.replan_every,
        capacity=n_ticks,
    )
    with contextlib.ExitStack() as stack:
        driven = build_robot(cfg, spec, rate_hz, clock)
        stack.callback(driven.close)
        observers: list[Observer] = []

        def caption(tick: Tick) -> list[str]:
            now = driven.progress()
            if now is None:
                return []
            scores = now.seconds, now.reward, now.best, now.best_at
            return episode_lines(cfg.sampler_name, cfg.seed, *scores, ended=now.ended)

        if cfg.record:
            fields = driven.fields
            recorder = DatasetRecorder(files["record"], spec, n_ticks, every=stride, fields=fields)
            observers.append(stack.enter_context(recorder))
        if cfg.video:
            if driven.picture is None:
                raise InputError(f"video={cfg.video}: robot={cfg.robot} gives no pictures")
            video = VideoRecorder(
                files["video"], driven.picture, rate_hz, n_ticks, every=per_picture, caption=caption
            )
            observers.append(stack.enter_context(video))
        if sink is not None:
            view = RerunView(
                sink,
                spec,
                rate_hz,
                picture=driven.picture,
                every=per_picture,
                project=driven.project,
                caption=caption,
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
                "sampler": cfg.sampler[cfg.sampler_name],
                "rate_hz": rate_hz,
                "planner": cfg.planner,
                "budget_ms": cfg.budget_ms,
                "blending": cfg.blending,
                "replan_every": cfg.replan_every,
                "scheduling": vars(cfg.scheduling),
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


PICTURES_PER_SECOND = 25
"""As many as a view or a video of a run shows, or fewer."""


def build_robot(cfg: RunConfig, spec: PolicySpec, rate_hz: float, clock: Clock) -> RobotSetup:
    """The robot that the settings name."""
    from ..robots import ROBOTS
    from ..robots.robot import RobotSettings

    settings = RobotSettings(
        spec,
        rate_hz,
        clock,
        cfg.seed,
        make_env=env_maker_at(cfg),
        success_key=cfg.task.success_key,
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
