"""Pictures of a run: which plan acted when, and how late plans and ticks were."""

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
from .axes import plain_ticks

matplotlib.use("Agg")

HOLDING: dict[str, Any] = {"facecolor": "0.88", "edgecolor": "0.55", "hatch": "////", "linewidth": 0}
"""What a tick looks like that no plan acted at."""

COLORS = ["C0", "C1", "C2", "C4", "C5", "C9", "C8", "C6"]
"""Of plans, in turn; red and gray are for what went wrong."""

FAULT_MARKS = "xv^<>sPD"
"""One for each of ``FAULTS``."""

WIDTH, MOST_BINS = 11.0, 40
"""Of a picture in inches, of a histogram."""

MOST_NAMED = 12
"""Plans in a picture whose latency is written beside them: more don't leave room."""

READABLE = 7.0
"""Points that a dot must have for a number in it."""

LEAST_ERROR = 1e-2
"""Milliseconds below which a deadline error counts as none: a logarithmic axis has no zero."""

FAULT_ROW = 0.22
"""Of the height of a plan."""

SHOWN_PLANS, LEAST_TICKS = 4, 20
"""As much of a run as a picture shows unless told otherwise."""


@dataclass(frozen=True)
class _Bar:
    """A plan as it is drawn.

    Attributes:
        tick: that it was made for.
        asked, arrived: when, in seconds since tick 0.
        acted: ``(index, second)`` of its steps that acted.
        dropped: the seconds of those that it came too late for.
        lane, color: where and how.
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
    ticks_per_step: int = 1,
    title: str = "",
) -> Figure:
    """Plans above, what the robot did below.

    A plan is a bar from when it was asked for to when it arrived, paler once it was computed.  Under it
    stand its steps, at the ticks that they were for: hollow if the plan came too late for them, with
    their index if they acted (small, without it, if only for the end of their time).
    The lowest row has every tick in its plan's color.

    Args:
        seconds: ``(from, to)`` since tick 0; None: the first few plans.
        ticks_per_step: how many ticks a plan's step lasts.

    Raises:
        InputError: there is no tick in there.
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
        Patch(facecolor=COLORS[0], alpha=0.3, label="and waits for the loop's next tick"),
        _dot(COLORS[0], COLORS[0], "step that acted (its index in the plan)"),
        _dot("white", COLORS[0], "dropped: arrived too late for it"),
        Patch(**HOLDING, label="fallback_active"),
        *marks,
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    return figure


def _dot(face: str, edge: str, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="",
        marker="o",
        markersize=8,
        markerfacecolor=face,
        markeredgecolor=edge,
        label=label,
    )


def _grid(ticks: NDArray[Any]) -> tuple[float, float]:
    """When tick 0 was due, and the period; both follow from any two deadlines."""
    first, last = ticks[0], ticks[-1]
    between = int(last["index"] - first["index"])
    period = float(last["deadline"] - first["deadline"]) / between if between else 1.0
    return float(first["deadline"] - first["index"] * period), period


def _first_plans(record: Record, origin: float, period: float) -> tuple[float, float]:
    ticks, plans = record.ticks, record.plans
    begin = float(ticks["deadline"][0]) - origin
    end = begin + LEAST_TICKS * period
    if len(plans) > SHOWN_PLANS:
        end = max(end, float(plans["asked"][SHOWN_PLANS]) - origin)
    elif len(plans):
        end = max(end, float(ticks["deadline"][-1]) - origin + period)
    return begin, end


def _bars(
    record: Record,
    ticks: NDArray[Any],
    origin: float,
    period: float,
    low: float,
    high: float,
    ticks_per_step: int,
) -> list[_Bar]:
    """The plans that are seen, each in the first lane that is free for as long as it takes."""
    bars: list[_Bar] = []
    lane_ends: list[float] = []
    acting = ~ticks["fallback_active"]
    for plan in np.sort(record.plans, order="tick"):
        asked, arrived = float(plan["asked"]) - origin, float(plan["arrived"]) - origin
        own = ticks[acting & (ticks["plan"] == plan["tick"])]
        if not len(own) and (arrived < low or asked >= high):
            continue
        # Of the ticks that a step lasts, the first that it acted at.
        _, first = np.unique(own["plan_index"], return_index=True)
        acted = [(int(tick["plan_index"]), float(tick["deadline"]) - origin) for tick in own[first]]
        steps = 0 if plan["refused"] else int(plan["delay"]) // ticks_per_step
        dropped = [(int(plan["tick"]) + k * ticks_per_step) * period for k in range(steps)]
        dropped = [second for second in dropped if low <= second + 1e-9 < high]
        seconds = [*dropped, *(second for _, second in acted)]
        begin, end = min([asked, *seconds]), max([arrived, *seconds])
        lane = next((k for k, over in enumerate(lane_ends) if over < begin), len(lane_ends))
        lane_ends[lane : lane + 1] = [end + 0.5 * period * ticks_per_step]
        bars.append(
            _Bar(
                *(int(plan["tick"]), asked, arrived, float(plan["latency"]), bool(plan["refused"])),
                *(acted, dropped, lane, COLORS[len(bars) % len(COLORS)]),
            )
        )
    return bars


def _draw_plan(axes: Axes, bar: _Bar, floor: float, step: float, size: float, *, named: bool) -> None:
    """Between ``floor`` and ``floor + 1``: the bar above, its steps below, every ``step`` seconds."""
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
        late = k + 1 < len(bar.acted) and bar.acted[k + 1][1] - second < 0.8 * step
        axes.plot([second, second], [-0.05, floor + 0.3], color=color, alpha=0.3, linewidth=0.8, zorder=1)
        axes.plot(second, floor + 0.3, "o", color=color, markersize=size / 3 if late else size, zorder=3)
        if size > READABLE and not late:
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
    """The lowest row: what acted, and what was wrong; gives the legend of the latter."""
    spans = [(float(second), 0.9 * period) for second in at]
    for fallback_active, plan, span in zip(ticks["fallback_active"], ticks["plan"], spans, strict=True):
        color = None if fallback_active else colors.get(int(plan))
        if color is None:
            axes.broken_barh(
                [span], (-0.4, 0.35), facecolor="0.88", edgecolor="0.55", hatch="////", linewidth=0
            )
        else:
            axes.broken_barh([span], (-0.4, 0.35), color=color, alpha=0.9)
    legend: list[Line2D] = []
    for fault, mark in zip(FAULTS, FAULT_MARKS, strict=True):
        when = at[(ticks["faults"] & fault.value) != 0]
        if len(when):
            row = -0.58 - FAULT_ROW * len(legend)  # each fault in a row of its own: they come together
            name = str(fault.name).lower().replace("_", " ")
            style: dict[str, Any] = {"linestyle": "", "marker": mark, "color": "C3", "markersize": 6}
            axes.plot(when + 0.45 * period, [row] * len(when), **style)
            legend.append(Line2D([], [], label=name, **style))
    return legend


def latencies(record: Record, title: str = "") -> Figure:
    """How long plans took to compute, and by how much ticks began late: histograms, with the median and
    the 99th percentile."""
    figure = Figure(figsize=(WIDTH, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    plans = 1e3 * record.plans["latency"]
    _histogram(left, plans[np.isfinite(plans)], "plan latency, ms", "plans", "C0")
    late = np.maximum(1e3 * record.deadline_errors, LEAST_ERROR)
    if len(late) and late.max() > LEAST_ERROR:
        right.set_xscale("log")
    _histogram(right, late, "deadline error, ms", "ticks", "C1")
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
    p50, p99 = np.percentile(values, [50, 99])
    axes.axvline(p50, color="black", linewidth=1.2, label=f"p50 {p50:.3g}")
    axes.axvline(p99, color="black", linewidth=1.2, linestyle="--", label=f"p99 {p99:.3g}")
    axes.set_title(f"{len(values)} {counted}", loc="left", fontsize="medium")
    # Beside the title, where no bar is.
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, frameon=False, borderaxespad=0.0)
    if axes.get_xscale() == "log":
        plain_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
