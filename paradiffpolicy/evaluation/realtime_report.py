"""What latency costs, as people read it: a table, a picture, and report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from ..control.record import total_faults
from ..files import write_atomically
from ..telemetry.axes import plain_ticks
from .realtime import RealtimeEpisode, boundary_jumps
from .statistics import PairedDifference, paired_difference, standard_error


@dataclass(frozen=True)
class Cell:
    """Episodes under one latency at one rate.

    Attributes:
        name: of the case.
        rate_hz: of control.
        joining: of plans, by name.
        latencies: seconds per plan that were injected or measured.
        episodes: one per seed.
        reference: scores of the same seeds when the simulation waits for every plan, or None.
        margin: of score, for the verdict.
    """

    name: str
    rate_hz: float
    blending: str
    latencies: Sequence[float]
    episodes: Sequence[RealtimeEpisode]
    reference: Sequence[float] | None
    margin: float

    @property
    def scores(self) -> list[float]:
        return [episode.score for episode in self.episodes]

    @property
    def difference(self) -> PairedDifference | None:
        if self.reference is None:
            return None
        return paired_difference(self.scores, self.reference, self.margin)

    def latency_ms(self, percentile: float) -> float:
        return float(np.percentile(self.latencies, percentile)) * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        records = [episode.record for episode in self.episodes]
        ticks = np.concatenate([record.ticks for record in records])
        delay = np.concatenate([record.plans["delay"] for record in records])
        at, within = boundary_jumps(records)
        jerk = np.concatenate(
            [np.linalg.norm(np.diff(record.ticks["action"], 3, axis=0), axis=1) for record in records]
        )
        difference = self.difference
        return {
            "case": self.name,
            "rate_hz": self.rate_hz,
            "blending": self.blending,
            "latency_ms": {"p50": self.latency_ms(50), "p99": self.latency_ms(99)},
            "delay_ticks": _number(np.mean(delay) if len(delay) else math.nan),
            "score": {
                "mean": float(np.mean(self.scores)),
                "standard_error": _number(standard_error(self.scores)),
                "per_seed": {str(e.seed): round(e.score, 6) for e in self.episodes},
            },
            "success_rate": float(np.mean([episode.success for episode in self.episodes])),
            "fallback_share": float(ticks["fallback_active"].mean()),
            "missed_ticks": sum(record.missed for record in records),
            "jump_at_boundaries": {"median": _percentile(at, 50), "p95": _percentile(at, 95)},
            "change_within_plans": {"median": _percentile(within, 50), "p95": _percentile(within, 95)},
            "jerk": {"median": _percentile(jerk, 50), "p95": _percentile(jerk, 95)},
            "faults": total_faults(records),
            "difference_to_unlimited": None
            if difference is None
            else {
                "mean": difference.mean,
                "interval_95": [_number(difference.low), _number(difference.high)],
                "margin": difference.margin,
                "verdict": difference.verdict,
            },
        }


def _percentile(values: Any, percentile: float) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.percentile(values, percentile)) if len(values) else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def realtime_table(cells: Sequence[Cell], title: str) -> Table:
    """One row per cell."""
    view = Table(title=title, title_justify="left")
    view.add_column("case")
    headings = [
        "Hz",
        "blending",
        "latency ms\np50 / p99",
        "late by\nticks",
        "score ± s.e.",
        "success",
        "fallback_active",
    ]
    for heading in [
        *headings,
        "jump at joins\nmedian / p95",
        "difference to unlimited time\n[95 % interval]",
    ]:
        view.add_column(heading, justify="right")
    view.add_column("verdict")
    for cell in cells:
        values, difference = cell.to_dict(), cell.difference
        jump, late = values["jump_at_boundaries"], values["delay_ticks"]
        view.add_row(
            cell.name,
            f"{cell.rate_hz:g}",
            cell.blending,
            f"{cell.latency_ms(50):.0f} / {cell.latency_ms(99):.0f}",
            "-" if late is None else f"{late:.1f}",
            f"{values['score']['mean']:.3f} ± {standard_error(cell.scores):.3f}",
            f"{values['success_rate']:.0%}",
            f"{values['fallback_share']:.1%}",
            "-" if jump["median"] is None else f"{jump['median']:.1f} / {jump['p95']:.0f}",
            "reference"
            if difference is None
            else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
            "" if difference is None else difference.verdict,
        )
    return view


def realtime_figure(content: Mapping[str, Any], title: str) -> Figure:
    """From a report's ``cases`` and ``sweep``: score against injected latency, a line per joining, with
    the cases where they lie; and the jumps at joins."""
    cases, sweep = content["cases"], content["sweep"]
    figure = Figure(figsize=(11 if sweep else 6.5, 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2 if sweep else 1, width_ratios=(3, 2) if sweep else None, squeeze=False)[0]
    left, blendings = panels[0], list(dict.fromkeys(cell["blending"] for cell in sweep))

    def draw(cells: Sequence[Mapping[str, Any]], label: str, **style: Any) -> None:
        left.errorbar(
            [max(cell["latency_ms"]["p50"], NONE_MS) for cell in cells],
            [cell["score"]["mean"] for cell in cells],
            yerr=[1.96 * (cell["score"]["standard_error"] or 0.0) for cell in cells],
            capsize=3,
            label=label,
            **style,
        )

    for k, blending in enumerate(blendings):
        cells = sorted(
            (c for c in sweep if c["blending"] == blending), key=lambda cell: cell["latency_ms"]["p50"]
        )
        draw(cells, f"injected, {blending}", color=f"C{k}", marker=".", alpha=0.8)
        latency = [max(cell["latency_ms"]["p50"], NONE_MS) for cell in cells]
        for part, line in (("median", "-"), ("p95", ":")):
            jumps = [
                np.nan if c["jump_at_boundaries"][part] is None else c["jump_at_boundaries"][part]
                for c in cells
            ]
            panels[1].plot(latency, jumps, line, color=f"C{k}", marker=".", label=f"{blending}, {part}")
    for k, name in enumerate(dict.fromkeys(cell["case"] for cell in cases)):
        cells = [cell for cell in cases if cell["case"] == name][:1]
        draw(cells, name, color=f"C{k + len(blendings)}", marker="osD^vP*Xh<"[k % 10], ls="none")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlabel(f"plan latency, ms (median; {NONE_MS:g}: none)")
        axes.grid(visible=True, which="major", alpha=0.25)
        plain_ticks(axes.xaxis)
    left.set_ylabel("score (mean; bar: 95 % interval)")
    left.legend(fontsize="x-small", loc="lower left")
    left.set_title(title, loc="left", fontsize="medium")
    if sweep:
        panels[1].set_ylabel("jump of the action where plans join")
        panels[1].legend(fontsize="x-small", loc="upper left")
    return figure


NONE_MS = 5.0
"""What stands for no latency on a logarithmic axis."""


def write_realtime_report(
    folder: Path, cases: Sequence[Cell], sweep: Sequence[Cell], title: str, about: Mapping[str, Any]
) -> list[Path]:
    """Writes report.json and the picture; returns their paths."""
    content = {
        **about,
        "cases": [cell.to_dict() for cell in cases],
        "sweep": [cell.to_dict() for cell in sweep],
    }
    text = json.dumps(content, indent=2) + "\n"
    paths = [folder / "report.json", folder / "latency.png"]
    write_atomically(paths[0], lambda path: path.write_text(text))
    figure = realtime_figure(content, title)
    write_atomically(paths[1], lambda path: figure.savefig(path))
    return paths
