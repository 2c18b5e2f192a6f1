"""A comparison as people read it: a table, a picture, videos, and report.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ..files import write_atomically
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
            f"{values['rounds_per_plan']['mean']:.1f}",
            f"{values['evaluations_per_plan']['mean']:.0f}",
            f"{result.latency_ms(50):.0f} / {result.latency_ms(99):.0f}" if result.latencies else "-",
            f"{result.missed} in {len(result.ticks)} ticks" if result.ticks else "-",
            "reference"
            if difference is None
            else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
            "" if difference is None else difference.verdict,
        )
    return view


def picture(results: Sequence[SamplerResult], title: str) -> Figure:
    """Score against latency, both with their spread, and the latency a 10 Hz tick allows."""
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for result in results:
        if not result.latencies:
            continue
        middle, low, high = (result.latency_ms(p) for p in (50, 5, 99))
        mean = float(np.mean(result.scores))
        error = standard_error(result.scores)
        mark = axes.errorbar(
            middle,
            mean,
            xerr=[[middle - low], [high - middle]],
            yerr=1.96 * (0.0 if np.isnan(error) else error),
            marker="o",
            capsize=3,
        )
        axes.annotate(
            result.name, (middle, mean), textcoords="offset points", xytext=(7, 7), color=mark[0].get_color()
        )
    axes.set_xscale("log")
    axes.set_xlabel("plan latency, ms (median; bar: p5 to p99), one robot")
    axes.set_ylabel("score (mean; bar: 95 % interval)")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(x=0.15, y=0.2)
    return figure


def video(episodes: Sequence[Episode], path: Path, fps: float) -> None:
    """The pictured episodes side by side; one that ends early stays on its last picture."""
    shown = [episode.frames for episode in episodes if episode.frames]
    length = max(map(len, shown))

    def frame(k: int) -> NDArray[np.uint8]:
        pictures = [frames[min(k, len(frames) - 1)] for frames in shown]
        height = pictures[0].shape[0]
        gap = np.full((height, BORDER, 3), 255, dtype=np.uint8)
        row = np.concatenate([part for picture in pictures for part in (picture, gap)], axis=1)[:, :-BORDER]
        # Video codecs want even sizes.
        return row[: height // 2 * 2, : row.shape[1] // 2 * 2]

    def write(temporary: Path) -> None:
        pictures: list[Any] = [frame(k) for k in range(length)]
        imageio.mimwrite(temporary, pictures, fps=fps, macro_block_size=1, codec="libx264")

    write_atomically(path, write)


def write_report(
    folder: Path, results: Sequence[SamplerResult], title: str, about: dict[str, Any], fps: float
) -> list[Path]:
    """Writes report.json, score_latency.png and a video per sampler; returns their paths."""
    paths = [folder / "report.json"]
    content = {**about, "samplers": {result.name: result.to_dict() for result in results}}
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(paths[0], lambda path: path.write_text(text))
    if any(result.latencies for result in results):
        paths.append(folder / "score_latency.png")
        figure = picture(results, title)
        write_atomically(paths[-1], lambda path: figure.savefig(path))
    for result in results:
        if any(episode.frames for episode in result.episodes):
            paths.append(folder / f"{result.name}.mp4")
            video(result.episodes, paths[-1], fps)
    return paths
