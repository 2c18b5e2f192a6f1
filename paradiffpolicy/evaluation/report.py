"""A comparison as people read it: a table, a picture, videos, and report.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ..files import write_atomically
from ..telemetry.axes import plain_ticks
from ..telemetry.recorder import write_video
from .compare import SamplerResult
from .rollout import Episode
from .statistics import standard_error

matplotlib.use("Agg")

BORDER = 4
"""Pixels between episodes in a video."""


def table(results: Sequence[SamplerResult], title: str) -> Table:
    """One row per sampler."""
    view = Table(title=title, title_justify="left")
    view.add_column("sampler")
    headings = ["score ± s.e.", "success", "rounds\n/ plan", "evals\n/ plan", "latency ms\np50 / p99"]
    for heading in [*headings, "deadlines\nmissed", "difference to reference\n[95 % interval]"]:
        view.add_column(heading, justify="right")
    view.add_column("verdict")
    for result in results:
        values = result.to_dict()
        difference = result.difference
        view.add_row(
            result.name,
            f"{values['score']['mean']:.3f} ± {standard_error(result.scores):.3f}",
            f"{values['success_rate']:.0%}",
            f"{values['iterations_per_plan']['mean']:.1f}",
            f"{values['nfe_per_plan']['mean']:.0f}",
            f"{result.latency_ms(50):.0f} / {result.latency_ms(99):.0f}" if result.latencies else "-",
            f"{result.missed} in {result.record.n_ticks} ticks" if result.record else "-",
            "reference"
            if difference is None
            else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
            "" if difference is None else difference.verdict,
        )
    return view


def score_latency(results: Sequence[SamplerResult], title: str, control_hz: float) -> Figure:
    """Score against latency, both with their spread, and where a control period ends."""
    figure = Figure(figsize=(9.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    timed = sorted((result for result in results if result.latencies), key=lambda r: r.latency_ms(50))
    for i, result in enumerate(timed):
        middle, high = result.latency_ms(50), result.latency_ms(99)
        error = standard_error(result.scores)
        axes.errorbar(
            middle,
            float(np.mean(result.scores)),
            xerr=[[0.0], [high - middle]],
            yerr=1.96 * (0.0 if np.isnan(error) else error),
            marker="osD^v"[i // 10 % 5],
            capsize=3,
            color=f"C{i % 10}",
            label=result.name,
        )
    if timed:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", title="by latency")
    axes.axvline(1e3 / control_hz, color="gray", linestyle=":")
    axes.text(
        1e3 / control_hz, 0.02, f" one period at {control_hz:g} Hz", transform=axes.get_xaxis_transform()
    )
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_xlabel("plan latency, ms (median; bar: to p99), one robot")
    axes.set_ylabel("score (mean; bar: 95 % interval)")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(x=0.1, y=0.15)
    return figure


def film_strip(
    results: Sequence[SamplerResult], control_hz: float, columns: int = 6, max_rows: int = 8
) -> Figure:
    """The first episode, a row per sampler, the first few of them: pictures at equal intervals, the
    same in every row."""
    shown = [result for result in results if result.episodes[0].frames][:max_rows]
    longest = max(len(result.episodes[0].frames) for result in shown)
    figure = Figure(figsize=(1.7 * columns, 1.85 * len(shown)), dpi=110, layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, result in zip(grid, shown, strict=True):
        episode = result.episodes[0]
        for k, axes in enumerate(row):
            step = k * (longest - 1) // (columns - 1)
            ended = step >= len(episode.frames) - 1
            axes.imshow(episode.frames[min(step, len(episode.frames) - 1)])
            axes.set(xticks=[], yticks=[])
            when = (
                f"{episode.n_steps / control_hz:.1f} s, score {episode.score:.2f}"
                if ended
                else f"{step / control_hz:.1f} s"
            )
            axes.set_title(when, fontsize="small")
        row[0].set_ylabel(result.name)
    return figure


def video(episodes: Sequence[Episode], path: Path, fps: float) -> None:
    """The pictured episodes side by side; one that ends early stays on its last picture."""
    shown = [episode.frames for episode in episodes if episode.frames]
    length = max(map(len, shown))

    def frame(k: int) -> NDArray[np.uint8]:
        pictures = [frames[min(k, len(frames) - 1)] for frames in shown]
        height = pictures[0].shape[0]
        gap = np.full((height, BORDER, 3), 255, dtype=np.uint8)
        return np.concatenate([part for picture in pictures for part in (picture, gap)], axis=1)[:, :-BORDER]

    write_video(path, [frame(k) for k in range(length)], fps)


def write_report(
    folder: Path, results: Sequence[SamplerResult], title: str, about: dict[str, Any], control_hz: float
) -> list[Path]:
    """Writes report.json, the pictures and a video per sampler; returns their paths."""
    paths = [folder / "report.json"]
    content = {**about, "samplers": {result.name: result.to_dict() for result in results}}
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(paths[0], lambda path: path.write_text(text))
    if any(result.latencies for result in results):
        paths.append(folder / "score_latency.png")
        figure = score_latency(results, title, control_hz)
        write_atomically(paths[-1], lambda path: figure.savefig(path))
    if any(result.episodes[0].frames for result in results):
        paths.append(folder / "rollout.png")
        strip = film_strip(results, control_hz)
        write_atomically(paths[-1], lambda path: strip.savefig(path))
    for result in results:
        if any(episode.frames for episode in result.episodes):
            paths.append(folder / f"{result.name}.mp4")
            video(result.episodes, paths[-1], control_hz)
    return paths
