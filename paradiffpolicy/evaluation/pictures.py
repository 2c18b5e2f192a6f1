"""Pictures of comparisons: score over latency, film strips and videos of episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..telemetry.axes import plain_ticks
from ..telemetry.caption import captioned, episode_lines
from ..telemetry.recorder import write_video
from .compare import SamplerResult
from .episodes import Episode
from .statistics import standard_error

matplotlib.use("Agg")

BORDER = 4
"""Pixels between episodes in a video."""
NONE_MS = 5.0
"""Stands for no latency on a logarithmic axis."""


def score_latency(results: Sequence[SamplerResult], title: str, control_hz: float) -> Figure:
    """Draws score over latency, both with their spread, and the end of a control period."""
    figure = Figure(figsize=(9.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    timed = sorted((result for result in results if result.latencies), key=lambda r: r.latency_ms["p50"] or 0)
    for i, result in enumerate(timed):
        middle, high = (result.latency_ms[name] or 0.0 for name in ("p50", "max"))
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
    axes.set_xlabel("plan latency, ms (median; bar: to the largest), one robot")
    axes.set_ylabel("score (mean; bar: 95 % interval)")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(x=0.1, y=0.15)
    return figure


def caption(sampler: str, episode: Episode, k: int, control_hz: float) -> list[str]:
    """Describes an episode at its frame ``k`` in three lines."""
    now = episode.moment(k)
    seconds, best_at = now.pop("at") / control_hz, now.pop("best_at") / control_hz
    return episode_lines(sampler, episode.seed, seconds, best_at=best_at, **now)


def film_strip(
    results: Sequence[SamplerResult], control_hz: float, columns: int = 6, max_rows: int = 8
) -> Figure:
    """Draws the first episode, a row per sampler, the first few of them: pictures at equal intervals, the
    same in every row, until the episode's end."""
    shown = [result for result in results if result.episodes[0].frames][:max_rows]
    longest = max(len(result.episodes[0].frames) for result in shown)
    figure = Figure(figsize=(1.9 * columns, 2.35 * len(shown)), dpi=110, layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, result in zip(grid, shown, strict=True):
        episode = result.episodes[0]
        last = len(episode.frames) - 1
        steps = [k * (longest - 1) // (columns - 1) for k in range(columns)]
        for k, axes in enumerate(row):
            if k and steps[k - 1] >= last:  # it has ended, and its last picture is shown
                axes.axis("off")
                continue
            step = min(steps[k], last)
            axes.imshow(episode.frames[step])
            axes.set(xticks=[], yticks=[])
            _, *lines = caption(result.name, episode, step, control_hz)
            axes.set_title("\n".join(lines), fontsize="small")
        row[0].set_ylabel(result.name)
    seeds = ", ".join(dict.fromkeys(str(result.episodes[0].seed) for result in shown))
    figure.suptitle(f"seed {seeds}", x=0.01, horizontalalignment="left", fontsize="medium")
    return figure


def episodes_video(sampler: str, episodes: Sequence[Episode], path: Path, fps: float) -> None:
    """Writes the pictured episodes side by side; one that ends early stays on its last picture, which says
    so."""
    shown = [episode for episode in episodes if episode.frames]

    def tile(episode: Episode, k: int) -> NDArray[np.uint8]:
        k = min(k, len(episode.frames) - 1)
        return captioned(episode.frames[k], caption(sampler, episode, k, fps))

    def frame(k: int) -> NDArray[np.uint8]:
        tiles = [tile(episode, k) for episode in shown]
        gap = np.full((tiles[0].shape[0], BORDER, 3), 255, dtype=np.uint8)
        return np.concatenate([part for each in tiles for part in (each, gap)], axis=1)[:, :-BORDER]

    write_video(path, map(frame, range(max(len(episode.frames) for episode in shown))), fps)


def realtime_figure(content: Mapping[str, Any], title: str) -> Figure:
    """Draws a report's ``cases`` and ``sweep``: score over injected latency, a line per blending, with the
    cases at their latencies; and the jumps of the action from plan to plan."""
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
        panels[1].set_ylabel("jump of the action from plan to plan")
        panels[1].legend(fontsize="x-small", loc="upper left")
    return figure
