"""Draws a run: which plan acted when, how long plans took, and by how much ticks missed their deadlines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..control.record import FAULTS, Record
from ..errors import InputError
from ..tables import quantiles
from .axes import plain_ticks

matplotlib.use("Agg")

FALLBACK: dict[str, Any] = {"facecolor": "0.88", "edgecolor": "0.55", "hatch": "////", "linewidth": 0}
"""Style of a tick at which the fallback acted."""

COLORS = ["C0", "C1", "C2", "C4", "C5", "C9", "C8", "C6"]
"""Colors of plans, in turn; red and gray are for faults and the fallback."""

FAULT_MARKS = "xv^<>sPDdphH*X"
"""Markers of ``FAULTS``, in turn."""

WIDTH, MOST_BINS = 11.0, 40
"""Width of a picture in inches, bins of a histogram."""

MOST_NAMED = 12
"""Plans in a picture up to which their latencies are written beside them: more don't leave room."""

READABLE = 7.0
"""Size in points from which on a dot has a number in it."""

LEAST_ERROR = 1e-2
"""Deadline error in ms, below which it is drawn as this: a logarithmic axis has no zero."""

FAULT_ROW = 0.22
"""Height of a row of faults, where a plan's is 1."""

SHOWN_QUANTILES = ("p50", "p99", "max")
"""Those that a histogram shows; see ``tables.quantiles``."""

SHOWN_PLANS, LEAST_TICKS = 4, 20
"""Plans, and at least so many ticks, that a picture shows by default."""


@dataclass(frozen=True)
class _Bar:
    """A plan to draw.

    Attributes:
        tick: of its observation.
        asked, arrived: when it was requested and received, in seconds since tick 0.
        latency: seconds of its computation.
        acted: ``(index, second)`` of its steps that acted.
        dropped: seconds of its steps whose time was over when it arrived.
    """

    tick: int
    asked: float
    arrived: float
    latency: float
    refused: bool
    acted: list[tuple[int, float]]
    dropped: list[float]
    lane: int
    color: str


def timeline(
    record: Record,
    seconds: tuple[float, float] | None = None,
    *,
    ticks_per_step: float = 1,
    title: str = "",
) -> Figure:
    """Draws the plans, and below them the plan that acted at each tick.

    A plan is a bar from its request to its arrival, paler once it was computed.  Under it are its steps,
    at their ticks: hollow if their time was over when the plan arrived, with their index if they acted
    (small, without it, if only for the end of their time).  The lowest row has every tick in its plan's
    color, and the faults.

    Args:
        seconds: ``(from, to)`` since tick 0; None: the first few plans.
        ticks_per_step: ticks that a plan's step lasts.

    Raises:
        InputError: there is no tick in that time.
    """
    all_ticks = record.ticks
    if not len(all_ticks):
        raise InputError("a run without a tick has no timeline")
    origin, period = _grid(all_ticks)
    low, high = seconds or _first_plans(record, origin, period)
    at = all_ticks["deadline"] - origin
    ticks = all_ticks[(at >= low - 1e-9) & (at < high - 1e-9)]
    if not len(ticks):
        raise InputError(f"no tick between {low:g} and {high:g} s: the run had {at[0]:g} to {at[-1]:g} s")
    at = ticks["deadline"] - origin
    bars = _bars(record, ticks, origin, period, low, high, ticks_per_step)
    lanes = 1 + max((bar.lane for bar in bars), default=0)
    n_faults = sum(bool((ticks["faults"] & fault.value).any()) for fault in FAULTS)
    below = 0.75 + FAULT_ROW * max(0, n_faults - 1)
    figure = Figure(figsize=(WIDTH, 1.4 + 0.62 * (lanes + below)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(low - 0.01 * (high - low), high + 0.005 * (high - low))
    axes.set_ylim(-below, lanes + 0.1)
    step = period * ticks_per_step
    size = float(np.clip(0.8 * 0.9 * 72 * WIDTH * step / (high - low), 2.0, 12.0))
    for bar in bars:
        _draw_plan(axes, bar, lanes - 1 - bar.lane, step, size, named=len(bars) <= MOST_NAMED)
    marks = _draw_ticks(axes, ticks, at, period, {bar.tick: bar.color for bar in bars})
    axes.set_yticks([-0.22, (lanes + 0.1) / 2], ["robot", "plans"])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds since tick 0")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Patch(facecolor=COLORS[0], alpha=0.9, label="a plan is computed"),
        Patch(facecolor=COLORS[0], alpha=0.3, label="and waits for the next tick"),
        _dot(COLORS[0], COLORS[0], "step that acted (its index)"),
        _dot("white", COLORS[0], "step that came too late"),
        Patch(**FALLBACK, label="fallback active"),
        *marks,
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    return figure


def _dot(face: str, edge: str, label: str) -> Line2D:
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 8}
    return Line2D([], [], markerfacecolor=face, markeredgecolor=edge, label=label, **style)


def _grid(ticks: NDArray[Any]) -> tuple[float, float]:
    """The deadline of tick 0, and the period; both follow from any two deadlines."""
    first, last = ticks[0], ticks[-1]
    between = int(last["index"] - first["index"])
    period = float(last["deadline"] - first["deadline"]) / between if between else 1.0
    return float(first["deadline"] - first["index"] * period), period


def _first_plans(record: Record, origin: float, period: float) -> tuple[float, float]:
    ticks, plans = record.ticks, record.plans
    start = float(ticks["deadline"][0]) - origin
    end = start + LEAST_TICKS * period
    if len(plans) > SHOWN_PLANS:
        end = max(end, float(plans["asked"][SHOWN_PLANS]) - origin)
    elif len(plans):
        end = max(end, float(ticks["deadline"][-1]) - origin + period)
    return start, end


def _bars(
    record: Record,
    ticks: NDArray[Any],
    origin: float,
    period: float,
    low: float,
    high: float,
    ticks_per_step: float,
) -> list[_Bar]:
    """The plans of the shown time, each in the first lane that is free for as long as it takes."""
    bars: list[_Bar] = []
    lane_ends: list[float] = []
    acting = ~ticks["fallback_active"]
    for plan in np.sort(record.plans, order="tick"):
        asked, arrived = float(plan["asked"]) - origin, float(plan["arrived"]) - origin
        own = ticks[acting & (ticks["plan"] == plan["tick"])]
        if not len(own) and (arrived < low or asked >= high):
            continue
        # The first tick at which each step acted.
        _, first = np.unique(own["plan_index"], return_index=True)
        acted = [(int(tick["plan_index"]), float(tick["deadline"]) - origin) for tick in own[first]]
        steps = 0 if plan["refused"] else int(int(plan["delay"]) / ticks_per_step + 1e-9)
        dropped = [(int(plan["tick"]) + k * ticks_per_step) * period for k in range(steps)]
        dropped = [second for second in dropped if low <= second + 1e-9 < high]
        seconds = [*dropped, *(second for _, second in acted)]
        start, end = min([asked, *seconds]), max([arrived, *seconds])
        lane = next((k for k, over in enumerate(lane_ends) if over < start), len(lane_ends))
        lane_ends[lane : lane + 1] = [end + 0.5 * period * ticks_per_step]
        bars.append(
            _Bar(
                *(int(plan["tick"]), asked, arrived, float(plan["latency"]), bool(plan["refused"])),
                *(acted, dropped, lane, COLORS[len(bars) % len(COLORS)]),
            )
        )
    return bars


def _draw_plan(axes: Axes, bar: _Bar, floor: float, step: float, size: float, *, named: bool) -> None:
    """Draws a plan from ``floor`` to ``floor + 1``: the bar above, its steps of ``step`` seconds below."""
    color = "C3" if bar.refused else bar.color
    until = float(np.clip(bar.asked + bar.latency, bar.asked, bar.arrived))
    axes.broken_barh([(bar.asked, until - bar.asked)], (floor + 0.64, 0.2), color=color, alpha=0.9)
    axes.broken_barh([(until, bar.arrived - until)], (floor + 0.64, 0.2), color=color, alpha=0.3)
    low, high = axes.get_xlim()
    if named and bar.arrived < high - 0.08 * (high - low):
        latency = f" {1e3 * bar.latency:.3g} ms" if math.isfinite(bar.latency) else ""
        words = f"{latency}, refused" if bar.refused else latency
        axes.text(bar.arrived, floor + 0.74, words, va="center", fontsize=8, color=color, clip_on=True)
    for k, (index, second) in enumerate(bar.acted):
        partly = k + 1 < len(bar.acted) and bar.acted[k + 1][1] - second < 0.8 * step
        axes.plot([second, second], [-0.05, floor + 0.3], color=color, alpha=0.3, linewidth=0.8, zorder=1)
        axes.plot(second, floor + 0.3, "o", color=color, markersize=size / 3 if partly else size, zorder=3)
        if size > READABLE and not partly:
            axes.annotate(
                str(index),
                (second, floor + 0.3),
                ha="center",
                va="center_baseline",
                fontsize=0.62 * size,
                color="white",
                zorder=4,
            )
    axes.plot(
        *(bar.dropped, [floor + 0.3] * len(bar.dropped), "o"),
        markerfacecolor="white",
        markeredgecolor=color,
        markersize=size,
        zorder=3,
    )


def _draw_ticks(
    axes: Axes, ticks: NDArray[Any], at: NDArray[np.float64], period: float, colors: dict[int, str]
) -> list[Line2D]:
    """Draws the lowest row, which plan acted at each tick, and the faults; returns the faults' legend."""
    spans = [(float(second), 0.9 * period) for second in at]
    for fallback_active, plan, span in zip(ticks["fallback_active"], ticks["plan"], spans, strict=True):
        color = None if fallback_active else colors.get(int(plan))
        if color is None:
            axes.broken_barh([span], (-0.4, 0.35), **FALLBACK)
        else:
            axes.broken_barh([span], (-0.4, 0.35), color=color, alpha=0.9)
    legend: list[Line2D] = []
    for fault, mark in zip(FAULTS, FAULT_MARKS, strict=False):
        when = at[(ticks["faults"] & fault.value) != 0]
        if len(when):
            row = -0.58 - FAULT_ROW * len(legend)  # a row for each fault, since several may occur together
            name = str(fault.name).lower().replace("_", " ")
            style: dict[str, Any] = {"linestyle": "", "marker": mark, "color": "C3", "markersize": 6}
            axes.plot(when + 0.45 * period, [row] * len(when), **style)
            legend.append(Line2D([], [], label=name, **style))
    return legend


def latencies(record: Record, title: str = "") -> Figure:
    """Draws histograms of plan latencies and deadline errors, with the median and the tail."""
    figure = Figure(figsize=(WIDTH, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    plans = 1e3 * record.plans["latency"]
    _histogram(left, plans[np.isfinite(plans)], "plan latency, ms", "plans", "C0")
    errors = np.maximum(1e3 * record.deadline_errors, LEAST_ERROR)
    if len(errors) and errors.max() > LEAST_ERROR:
        right.set_xscale("log")
    _histogram(right, errors, "deadline error, ms", "ticks", "C1")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def _histogram(axes: Axes, values: NDArray[np.float64], name: str, counted: str, color: str) -> None:
    axes.set_xlabel(name)
    axes.set_ylabel(counted)
    axes.spines[["top", "right"]].set_visible(False)
    if not len(values):
        axes.set_title(f"no {counted}", loc="left", fontsize="medium")
        return
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = 0.9 * low, 1.1 * high + LEAST_ERROR
    n_bins = int(np.clip(2 * math.sqrt(len(values)), 8, MOST_BINS))
    space = np.geomspace if axes.get_xscale() == "log" else np.linspace
    axes.hist(values, bins=space(low, high, n_bins + 1).tolist(), color=color, alpha=0.75)
    marks = {name: value for name, value in quantiles(values).items() if value and name in SHOWN_QUANTILES}
    for (name, value), style in zip(marks.items(), ("-", "--", ":"), strict=False):
        axes.axvline(value, color="black", linewidth=1.2, linestyle=style, label=f"{name} {value:.3g}")
    axes.set_title(f"{len(values)} {counted}", loc="left", fontsize="medium")
    # Beside the title, where there is no bar.
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=3, frameon=False, borderaxespad=0.0)
    if axes.get_xscale() == "log":
        plain_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
