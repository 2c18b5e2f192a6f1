"""Reports of comparisons: tables, report.json, pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..files import write_atomically, write_json
from ..tables import table, tail
from .compare import RealtimeResult, SamplerResult
from .episodes import Outcome
from .pictures import episodes_video, film_strip, realtime_figure, score_latency
from .statistics import standard_error


def _score_cells(result: Outcome) -> dict[str, str]:
    return {
        "score ± s.e.": f"{np.mean(result.scores):.3f} ± {standard_error(result.scores):.3f}",
        "success": f"{result.success_rate:.0%}",
    }


def _difference_cells(result: Outcome, to: str) -> dict[str, str]:
    found = result.difference
    return {
        f"difference to {to}\n[95 % interval]": (
            "reference" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        ),
        "verdict": "" if found is None else found.verdict,
    }


def sampler_table(results: Sequence[SamplerResult], title: str) -> Table:
    """One row per sampler."""
    rows = (
        {
            "sampler": result.name,
            **_score_cells(result),
            "iterations\n/ plan": f"{np.mean(result.per_plan('iterations')):.1f}",
            "NFE\n/ plan": f"{np.mean(result.per_plan('nfe')):.0f}",
            "latency\nms": tail(result.latency_ms, 0),
            "deadlines\nmissed": f"{result.missed} in {result.record.n_ticks} ticks"
            if result.record
            else "-",
            **_difference_cells(result, "reference"),
        }
        for result in results
    )
    return table(title, rows, left=("verdict",))


def realtime_table(results: Sequence[RealtimeResult], title: str) -> Table:
    """One row per case and rate."""
    rows = []
    for result in results:
        values = result.to_dict()
        jump, delay = values["jump_at_boundaries"], values["delay_ticks"]
        jumps = (f"{jump[name]:.1f}" for name in ("median", "p95") if jump[name] is not None)
        rows.append(
            {
                "case": result.name,
                "Hz": f"{result.rate_hz:g}",
                "blending": result.blending,
                "latency\nms": tail(result.latency_ms, 0),
                "delay\nticks": "-" if delay is None else f"{delay:.1f}",
                **_score_cells(result),
                "fallback\nactive": f"{values['fallback_share']:.1%}",
                "jump at boundaries\nmedian / p95": " / ".join(jumps) or "-",
                **_difference_cells(result, "unlimited time"),
            }
        )
    return table(title, rows, left=("blending", "verdict"))


def write_report(
    folder: Path,
    results: Sequence[SamplerResult],
    title: str,
    about: Mapping[str, Any],
    control_hz: float,
    unfinished: Sequence[str] = (),
) -> list[Path]:
    """Writes report.json and the pictures; returns their paths.

    Args:
        about: what else report.json holds.
        unfinished: samplers that are still to run.
    """
    paths = [folder / "report.json"]
    samplers = {result.name: result.to_dict() for result in results}
    write_json(paths[0], {**about, "unfinished": list(unfinished), "samplers": samplers})
    figures = {}
    if any(result.latencies for result in results):
        figures["score_latency.png"] = score_latency(results, title, control_hz)
    if any(result.episodes[0].frames for result in results):
        figures["rollout.png"] = film_strip(results, control_hz)
    for name, figure in figures.items():
        paths.append(folder / name)
        write_atomically(paths[-1], figure.savefig)
    return paths


def write_episodes(folder: Path, result: SamplerResult, control_hz: float) -> list[Path]:
    """Writes a sampler's video, if its episodes have pictures; returns its path."""
    if not any(episode.frames for episode in result.episodes):
        return []
    path = folder / f"{result.name}.mp4"
    episodes_video(result.name, result.episodes, path, control_hz)
    return [path]


def write_results(
    folder: Path,
    results: Sequence[RealtimeResult],
    sweep: Sequence[RealtimeResult],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes report.json; returns its content."""
    content = {
        **about,
        "cases": [result.to_dict() for result in results],
        "sweep": [result.to_dict() for result in sweep],
    }
    write_json(folder / "report.json", content)
    return content


def write_realtime_report(
    folder: Path,
    results: Sequence[RealtimeResult],
    sweep: Sequence[RealtimeResult],
    title: str,
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes report.json and the picture; returns their paths."""
    figure = realtime_figure(write_results(folder, results, sweep, about), title)
    paths = [folder / "report.json", folder / "latency.png"]
    write_atomically(paths[1], figure.savefig)
    return paths
