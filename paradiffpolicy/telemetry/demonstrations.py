"""Draws demonstrations: a few episodes over time beside every dimension's histogram, and what is unusual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ..data.inspection import Finding, Inspection
from ..data.survey import Column, Episodes, matrix

matplotlib.use("Agg")

WIDTH, ROW, TOP = 16.0, 1.65, 2.0
"""Inches: of a picture, and the heights of a row of dimensions and of the summary."""
MOST_DIMENSIONS = 40
"""In a picture; actions and what has a finding come first."""
TYPICAL, UNUSUAL = ("C0", "C2", "C9"), ("C1", "C4", "C6", "C5")
"""Colors of episodes that are like the others, and of those that aren't; red is for findings."""
MOST_POINTS = 800
"""Of a trace."""
MOST_LINES = 6
"""Of findings in words."""
MARKS = {"outliers": "x", "jumps": "v", "wraps": "|", "flips": "|"}
"""Markers of findings that are at steps."""
FAR = 1e3
"""From so many of its ranges away from zero on, a dimension's axis counts from its middle."""


def demonstrations(episodes: Episodes, inspection: Inspection, title: str = "") -> Figure:
    """Draws the lengths of episodes, the findings in words, and each dimension: traces of a few episodes,
    among them some with findings, and a histogram of all, on an axis in raw units (left) and as
    ``Normalizer.fit`` makes of it (right)."""
    actions, others = _shown(inspection)
    n = len(actions) + len(others)
    # As few rows as can be, of as wide a column.
    columns = min(range(2, 6), key=lambda k: (-(-len(actions) // k) - (-len(others) // k), k))
    rows = [part[k : k + columns] for part in (actions, others) for k in range(0, len(part), columns)]
    height = ROW if len(rows) <= 5 else 0.85 * ROW
    figure = Figure(figsize=(WIDTH, TOP + height * max(2, len(rows)) + 0.3), dpi=100, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[TOP, height * max(1, len(rows))])
    top, below = parts
    shown = _episodes(inspection)
    _summary(top, inspection, shown, title, n)
    traces = {index: matrix(episodes.read(index)) for index in shown}
    grid = below.subplots(len(rows), 2 * columns, squeeze=False, width_ratios=[3.4, 1] * columns)
    for axes in grid.flat:
        axes.axis("off")
    for row, drawn in zip(grid, rows, strict=True):
        for trace, histogram, k in zip(row[::2], row[1::2], drawn, strict=False):
            trace.axis("on")
            histogram.axis("on")
            _dimension(trace, histogram, k, inspection, traces, shown)
    return figure


def is_action(column: Column) -> bool:
    """Whether a dimension is an action's."""
    return column.field in ("action", "actions")


def _shown(inspection: Inspection) -> tuple[list[int], list[int]]:
    """The dimensions that are drawn: of actions, of others."""
    found = {str(finding.column) for finding in inspection.findings}
    order = sorted(
        range(len(inspection.columns)),
        key=lambda k: (not is_action(inspection.columns[k]), str(inspection.columns[k]) not in found),
    )[:MOST_DIMENSIONS]
    parts = ([], [])  # type: tuple[list[int], list[int]]
    for k in sorted(order):
        parts[not is_action(inspection.columns[k])].append(k)
    return parts


def _episodes(inspection: Inspection) -> dict[int, str]:
    """The episodes that are drawn, with their colors: the worst of the findings', then some typical ones."""
    steps = [f for f in inspection.findings if f.kind in ("outliers", "jumps", "differs")]
    kinds = [
        [f.episodes[0] for f in steps if f.kind == kind] for kind in dict.fromkeys(f.kind for f in steps)
    ]
    worst = list(dict.fromkeys(k for each in zip_longest(*kinds) for k in each if k is not None))
    unusual = {episode for finding in steps for episode in finding.episodes}
    typical = [k for k in np.argsort(inspection.lengths, kind="stable") if k not in unusual]
    places = [int(share * (len(typical) - 1)) for share in (0.25, 0.5, 0.75)] if typical else []
    chosen = list(dict.fromkeys(int(typical[place]) for place in places))
    return dict(zip(chosen, TYPICAL, strict=False)) | dict(zip(worst, UNUSUAL, strict=False))


def _summary(figure: Any, inspection: Inspection, shown: dict[int, str], title: str, n_shown: int) -> None:
    """Draws the title, the histogram of lengths and the findings in words."""
    lengths = inspection.lengths
    figure.suptitle(title, x=0.01, ha="left", fontsize="x-large")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.6])
    n_bins = int(np.clip(2 * math.sqrt(len(lengths)), 4, 40))
    low, high = float(lengths.min()), float(lengths.max())
    left.hist(lengths, bins=n_bins, range=(low - 0.5, high + 0.5), color="0.6")
    for episode, color in shown.items():
        left.axvline(lengths[episode], color=color, linewidth=1.5)
    left.set_xlabel("steps per episode")
    left.set_ylabel("episodes")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    left.spines[["top", "right"]].set_visible(False)
    right.axis("off")
    handles = [Line2D([], [], color=color, label=f"episode {episode}") for episode, color in shown.items()]
    present = dict.fromkeys(finding.kind for finding in inspection.findings if finding.kind in MARKS)
    handles += [Line2D([], [], linestyle="", marker=MARKS[kind], color="C3", label=kind) for kind in present]
    handles.append(Line2D([], [], color="0.6", linewidth=6, label="all episodes"))
    right.legend(
        handles=handles, loc="lower left", ncols=len(handles), fontsize="small", frameon=False,
        borderaxespad=0.0, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    note = "Over the steps of an episode, in raw units (left) and as a network gets them (right)."
    right.text(0, -0.22, note, fontsize="small", color="0.35")
    lines = [_line(finding) for finding in inspection.findings]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [f"… and {len(lines) - MOST_LINES + 1} more"]
    hidden = len(inspection.columns) - n_shown
    lines += [f"{hidden} more dimensions aren't drawn"] if hidden else []
    right.text(0, 1, "\n".join(lines or ["nothing unusual was found"]), va="top", fontsize="small")


def _line(finding: Finding) -> str:
    where = "" if finding.column is None else f"{finding.column} "
    episodes = finding.episodes
    of = (
        f", episode {episodes[0]}"
        if len(episodes) == 1
        else f", {len(episodes)} episodes"
        if episodes
        else ""
    )
    return f"{where}{finding.kind}: {finding.found}{of}"


def _dimension(
    trace: Axes,
    histogram: Axes,
    k: int,
    inspection: Inspection,
    traces: dict[int, NDArray[np.float64]],
    shown: dict[int, str],
) -> None:
    """Draws a dimension's traces, and its histogram on the same axis."""
    column, own = inspection.columns[k], [f for f in inspection.findings if f.column == inspection.columns[k]]
    low, high = float(inspection.low[k]), float(inspection.high[k])
    clipped = any(finding.kind == "outliers" for finding in own)
    bottom, top = low, high
    if clipped:
        inside = inspection.sample[:, k]
        inside = inside[(inside >= inspection.bounds[0, k]) & (inside <= inspection.bounds[1, k])]
        bottom, top = float(inside.min()), float(inside.max())
    pad = 0.07 * (top - bottom) or (0.05 * abs(top) or 1.0)
    bottom, top = bottom - pad, top + pad
    for episode, values in traces.items():
        stride = max(1, len(values) // MOST_POINTS)
        line = values[::stride, k]
        trace.plot(np.arange(len(line)) * stride, line, color=shown[episode], linewidth=1.1)
    for finding in own:
        _mark(trace, finding, k, traces, (bottom, top))
    trace.set_ylim(bottom, top)
    bins = np.linspace(bottom, top, 41).tolist()
    histogram.hist(
        inspection.sample[:, k], bins=bins, orientation="horizontal", color="0.6", histtype="stepfilled"
    )  # one patch in place of forty, which take a second to lay out and draw
    histogram.set_ylim(bottom, top)
    histogram.set(xticks=[], yticks=[])
    for axes in (trace, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize="x-small", length=2)
    kinds = dict.fromkeys(finding.kind for finding in own)
    _axis(trace, str(column), (bottom + top) / 2, top - bottom, kinds)
    trace.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if high > low:
        middle, half = (low + high) / 2, (high - low) / 2

        def normalize(raw: Any) -> Any:
            return (raw - middle) / half

        def unnormalize(value: Any) -> Any:
            return middle + value * half

        normalized = histogram.secondary_yaxis("right", functions=(normalize, unnormalize))
        normalized.yaxis.set_major_locator(MaxNLocator(4) if clipped else FixedLocator([-1, 0, 1]))
        normalized.tick_params(labelsize="x-small", length=2)


def _axis(
    axes: Axes, name: str, middle: float, extent: float, kinds: Sequence[str] | dict[str, None]
) -> None:
    """Labels the axis in raw units, and says what was found in red."""
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if abs(middle) > FAR * extent:
        unit = 10.0 ** math.floor(math.log10(extent))
        middle = round(middle / unit) * unit
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value - middle:+.2g}"))
        name = f"{name} from {middle:.10g}"
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_title(name, loc="left", fontsize="small", pad=3)
    if kinds:
        axes.set_title(", ".join(kinds), loc="right", fontsize="small", pad=3, color="C3")


def _mark(
    axes: Axes,
    finding: Finding,
    k: int,
    traces: dict[int, NDArray[np.float64]],
    limits: tuple[float, float],
) -> None:
    """Marks the steps of a finding in the episodes that are drawn; what is beyond the axis, at its end."""
    if finding.kind not in MARKS:
        return
    places = [(step, traces[episode][step, k]) for episode, step in finding.places if episode in traces]
    if places:
        steps, values = np.array(places).T
        axes.plot(
            steps,
            np.clip(values, *limits),
            linestyle="",
            marker=MARKS[finding.kind],
            color="C3",
            markersize=5,
            clip_on=False,
            zorder=4,
        )
