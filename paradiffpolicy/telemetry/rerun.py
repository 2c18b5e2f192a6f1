"""Shows a control loop in the Rerun viewer, while it runs or afterwards.

::

    observation, action     a line per number
    scene/picture           the scene
    scene/plan              the plan's actions as a line in the picture, a point for each step
    scene/action            the action that is applied, on it
    caption                 seed, sampler, time and score
    plan/0, plan/1, ...     where actions aren't points in a picture: the plan ahead, a line per number,
                            at the ticks that its steps are for; plans that overlap go to different ones
    timing/ticks            deadline error, time from start to action, age of the plan, ms
    timing/latency          of a plan's computation, ms, when it arrives
    timing/delay            ticks from a plan's observation to its arrival
    state/fallback_active   1 while the fallback acts
    faults                  in words, when they start

on two timelines: ``tick``, and ``control_time``, seconds since tick 0.

Numbers go to the viewer in packets, a few times per second, which costs a tenth of sending them one by
one; Rerun encodes and writes them in threads of its own.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ..control.rate import ticks_per_step
from ..control.record import FAULTS, Fault, Tick
from ..errors import InputError, first_line, require_count
from ..files import Closing
from ..planning.request import PlanReply
from ..task import NUMBERS
from ..types import PolicySpec
from .recorder import Caption, Picture

log = logging.getLogger(__name__)

PACKET_SECONDS = 0.2
"""Time that numbers may lag behind."""

ANSWER_SECONDS = 2.0
"""Time that a viewer in the network may take to answer at the start."""

CLOSING_SECONDS = 5.0
"""Time that a viewer may take to receive the rest at the end of a run."""

ACTING, FALLBACK, PLANNED = 0xDC3C3CFF, 0x969696FF, 0x4169E1FF
"""Colors, RGBA."""

Sink = Callable[[Any, Any], object]
"""Connects a ``(recording stream, blueprint)`` to a file or a viewer."""

Project = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps actions ``[n, A]`` to pixels of the picture, ``[n, 2]``."""


def rerun_sdk() -> Any:
    """Imports the Rerun SDK.

    Raises:
        InputError: it isn't installed.
    """
    try:
        import rerun
        import rerun.blueprint
    except ImportError:
        raise InputError("the view needs Rerun: pip install 'paradiffpolicy[rerun]'")
    return rerun


def to_file(path: Path) -> Sink:
    """Writes to an .rrd file during the run: it has everything that was sent before a crash."""

    def connect(stream: Any, blueprint: Any) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream.save(path, default_blueprint=blueprint)
        except (OSError, RuntimeError) as error:
            raise InputError(f"view={path} can't be written ({first_line(error)})")

    return connect


def to_viewer(stream: Any, blueprint: Any) -> None:
    """Opens the viewer on this machine."""
    try:
        stream.spawn(default_blueprint=blueprint)
    except RuntimeError as error:
        raise InputError(f"the viewer doesn't open ({first_line(error)}): save with view=PATH.rrd")


def to_url(url: str) -> Sink:
    """Sends to a viewer that is open, here or on another machine: rerun+http://HOST:PORT/proxy."""

    def connect(stream: Any, blueprint: Any) -> None:
        place = urlsplit(url)
        try:
            # Rerun itself would try for seconds, at the start and at the end, and not say so.
            socket.create_connection((place.hostname or "", place.port or 9876), ANSWER_SECONDS).close()
            stream.connect_grpc(url, default_blueprint=blueprint)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"view={url}: {first_line(error)}")

    return connect


class RerunView(Closing):
    """Sends every tick of a control loop, as its observer, to the Rerun viewer or to a file.

    Args:
        sink: ``to_viewer``, ``to_url(...)`` or ``to_file(...)``.
        spec: of the policy.
        rate_hz: of the loop.
        policy_hz: steps of a plan per second; None: the demonstrations'.
        picture: draws the scene; None: there is no picture.
        every: ticks per picture, and per caption.
        project: maps actions to pixels; None: actions of two numbers are pixels, and others are shown
            over time.
        caption: lines beside the scene; none by default.

    Raises:
        InputError: Rerun isn't installed, the sink doesn't open, or the rates don't divide.
    """

    def __init__(
        self,
        sink: Sink,
        spec: PolicySpec,
        rate_hz: float,
        *,
        policy_hz: float | None = None,
        picture: Picture | None = None,
        every: int = 1,
        project: Project | None = None,
        caption: Caption | None = None,
    ) -> None:
        require_count(every=every)
        self._rr = rerun_sdk()
        self._spec, self._rate, self._every = spec, rate_hz, every
        self._picture, self._caption = picture, caption
        self._stride = ticks_per_step(rate_hz, spec.control_hz if policy_hz is None else policy_hz)
        if project is None and spec.action_dim == 2:
            project = np.asarray
        self._project = project
        self._packet = max(1, round(PACKET_SECONDS * rate_hz))
        self._series = {
            "observation": (spec.obs_dim, [str(k) for k in range(spec.obs_dim)]),
            "action": (spec.action_dim, [str(k) for k in range(spec.action_dim)]),
            "timing/ticks": (3, ["deadline error, ms", "start to action, ms", "plan age, ms"]),
            "state/fallback_active": (1, ["fallback active"]),
        }
        self._rows = {path: np.zeros((self._packet, size)) for path, (size, _) in self._series.items()}
        self._ticks, self._times = np.zeros(self._packet, np.int64), np.zeros(self._packet)
        self._points = np.zeros((self._packet, 2), np.float32)
        self._colors = np.zeros(self._packet, np.uint32)
        self._waiting = 0
        self._plan: PlanReply | None = None
        self._faults = Fault.NONE
        self._lane_ends: list[int] = []
        self._stream: Any = self._rr.RecordingStream("paradiffpolicy")
        sink(self._stream, self._blueprint())
        self._describe()

    def _describe(self) -> None:
        rr = self._rr
        for path, (_, names) in self._series.items():
            self._stream.log(path, rr.SeriesLines(names=names), static=True)
        for path, name in (("timing/latency", "plan latency, ms"), ("timing/delay", "delay, ticks")):
            self._stream.log(path, rr.SeriesPoints(names=[name]), static=True)
        if self._project is not None:
            self._stream.log("scene/action", rr.Points2D.from_fields(radii=5.0), static=True)

    def _blueprint(self) -> Any:
        """Arranges the scene on the left, and everything over time on the right."""
        views = self._rr.blueprint
        ahead = [] if self._project else [views.TimeSeriesView(origin="plan", name="plan ahead")]
        over_time = views.Vertical(
            *ahead,
            views.TimeSeriesView(origin="action", name="action"),
            views.TimeSeriesView(origin="observation", name="observation"),
            views.TimeSeriesView(contents=["timing/ticks", "timing/latency"], name="timing, ms"),
            views.TimeSeriesView(contents=["timing/delay", "state/**"], name="delay, fallback active"),
            views.TextLogView(origin="faults", name="faults"),
        )
        left = [views.TextDocumentView(origin="caption", name="caption")] if self._caption else []
        if self._project or self._picture:
            left.append(views.Spatial2DView(origin="scene", name="scene"))
        shares = [1, 8][: len(left)] if self._caption else None
        scene = [views.Vertical(*left, row_shares=shares)] if left else []
        return views.Blueprint(views.Horizontal(*scene, over_time), collapse_panels=True)

    def __call__(self, tick: Tick) -> None:
        time = tick.started - tick.deadline + tick.index / self._rate
        self._note(tick, time)
        arrived = tick.plan is not None and tick.plan is not self._plan
        due = tick.index % self._every == 0 and bool(self._picture or self._caption)
        new_faults, self._faults = tick.faults & ~self._faults, tick.faults
        if arrived or due or new_faults:
            self._stream.set_time("tick", sequence=tick.index)
            self._stream.set_time("control_time", duration=time)
        if due and self._picture:
            self._stream.log("scene/picture", self._rr.Image(self._picture()))
        if due and self._caption:
            self._stream.log("caption", self._rr.TextDocument("\n".join(self._caption(tick))))
        if arrived and tick.plan is not None:
            self._plan = tick.plan
            self._show(tick, tick.plan)
        if new_faults:
            words = "; ".join(words for fault, words in FAULTS.items() if fault in new_faults)
            self._stream.log("faults", self._rr.TextLog(words, level="WARN"))

    def _note(self, tick: Tick, time: float) -> None:
        """Adds the tick's numbers to the packet, and sends it when it is full."""
        row = self._waiting
        self._ticks[row], self._times[row] = tick.index, time
        observed = tick.observation
        if observed is not None and observed.dtype.names:
            observed = observed[NUMBERS]
        good = observed is not None and np.shape(observed) == (self._spec.obs_dim,)
        # NaN is shown as a gap in the line.
        self._rows["observation"][row] = observed if good else math.nan
        self._rows["action"][row] = math.nan if tick.action is None else tick.action
        error, took = tick.started - tick.deadline, tick.ended - tick.started
        self._rows["timing/ticks"][row] = 1e3 * error, 1e3 * took, 1e3 * tick.plan_age
        self._rows["state/fallback_active"][row] = tick.fallback_active
        if self._project is not None:
            self._points[row] = math.nan if tick.action is None else self._project(tick.action[None])[0]
            self._colors[row] = FALLBACK if tick.fallback_active else ACTING
        self._waiting += 1
        if self._waiting == self._packet:
            self._send()

    def _send(self) -> None:
        n, self._waiting = self._waiting, 0
        if not n:
            return
        # Copies, because Rerun reads them later in its own thread, when the packet is being filled again.
        ticks, times = self._ticks[:n].copy(), self._times[:n].copy()
        for path, rows in self._rows.items():
            self._columns(path, ticks, times, self._rr.Scalars.columns(scalars=rows[:n].copy()))
        if self._project is not None:
            points, colors = self._points[:n].copy(), self._colors[:n].copy()
            columns = self._rr.Points2D.columns(positions=points, colors=colors)
            self._columns("scene/action", ticks, times, columns)

    def _columns(self, path: str, ticks: NDArray[np.int64], times: NDArray[np.float64], columns: Any) -> None:
        index = [
            self._rr.TimeColumn("tick", sequence=ticks),
            self._rr.TimeColumn("control_time", duration=times),
        ]
        self._stream.send_columns(path, indexes=index, columns=columns)

    def _show(self, tick: Tick, plan: PlanReply) -> None:
        """Sends a plan at the tick of its first action."""
        self._stream.log("timing/latency", self._rr.Scalars(1e3 * plan.latency))
        self._stream.log("timing/delay", self._rr.Scalars(float(tick.index - plan.tick + plan.waited)))
        ahead = plan.actions[self._spec.executed.start :]
        if self._project is not None:
            points = self._project(ahead)
            line = self._rr.LineStrips2D([points], radii=1.0, colors=[PLANNED])
            self._stream.log("scene/plan", line)
            dots = self._rr.Points2D(points, radii=2.5, colors=[PLANNED])
            self._stream.log("scene/plan/steps", dots)
            return
        moments = plan.tick + self._stride * np.arange(len(ahead) + 1, dtype=np.float64)
        ticks = np.ceil(moments - 1e-9).astype(np.int64)
        # The NaN at the end keeps the line from going on to the next plan.
        values = np.concatenate((ahead, np.full((1, self._spec.action_dim), math.nan)))
        columns = self._rr.Scalars.columns(scalars=values)
        self._columns(f"plan/{self._lane(plan.tick, int(ticks[-1]))}", ticks, moments / self._rate, columns)

    def _lane(self, start: int, end: int) -> int:
        """Takes the first lane whose plans are over, for a plan of the ticks from ``start`` to ``end``."""
        free = (lane for lane, over in enumerate(self._lane_ends) if over <= start)
        lane = next(free, len(self._lane_ends))
        self._lane_ends[lane : lane + 1] = [end]
        return lane

    def close(self) -> None:
        """Sends the last packet, and ends the recording.  A viewer that doesn't answer isn't waited for."""
        if self._stream is None:
            return
        self._send()
        try:
            self._stream.flush(timeout_sec=CLOSING_SECONDS)
        except (RuntimeError, ValueError) as error:
            log.warning("the viewer doesn't answer (%s): it misses the end of the run", first_line(error))
        self._stream.disconnect()
        self._stream = None
