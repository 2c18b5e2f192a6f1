"""Reports of comparisons: tables, report.json, pictures and videos."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..errors import InputError, reading
from ..files import require_regular, write_atomically, write_json
from ..tables import table, tail
from .cases import RealtimeResult
from .compare import SamplerResult
from .episodes import Outcome
from .pictures import episodes_video, film_strip, realtime_figure, score_latency


def mean_cell(values: Mapping[str, Any], *, percent: bool = False) -> str:
    """``described`` values in words: a mean with its standard error, or a proportion with its interval; one
    value has neither."""
    if values["n"] == 1:
        return f"{values['mean']:{'.0%' if percent else '.3f'}} (n = 1)"
    if values["interval_95"]:
        low, high = values["interval_95"]
        return f"{values['mean']:.0%} [{low:.0%}, {high:.0%}]"
    return f"{values['mean']:.3f} ± {values['standard_error']:.3f}"


def difference_cell(values: Mapping[str, Any] | None, *, percent: bool = False) -> str:
    """A ``PairedDifference`` of a report in words: its mean, the interval that was tested, its confidence."""
    if values is None:
        return ""
    form, (low, high) = "+.0%" if percent else "+.3f", values["interval"]
    mean = f"{values['mean']:{form}}"
    if low is None or math.isnan(low):
        return f"{mean} (n = {values['n']})"
    return f"{mean} [{low:{form}}, {high:{form}}], {100 * values['confidence']:.3g} %"


def error_cell(values: Mapping[str, Any] | None) -> str:
    """A ``plan_error`` in words."""
    if values is None:
        return "-"
    both = f"{values['median']:.2g} / {values['worst']:.2g} {values['unit']}".rstrip()
    return f"{both} (n = {values['n']})"


def _cells(result: Outcome) -> dict[str, str]:
    values = result.compared()
    scoring = "" if result.scoring == "max" else f"\n({result.scoring} reward)"
    return {
        "seeds": str(len(result.episodes)),
        f"score ± s.e.{scoring}": mean_cell(values["score"]),
        "success\n[95 %]": mean_cell(values["success"], percent=True) if values["success"] else "unknown",
    }


def difference_table(results: Sequence[Outcome], title: str) -> Table:
    """One row per result that is compared: its differences in score and in success, with both verdicts."""
    rows = []
    for result in results:
        values = result.compared()
        score, success = (values[f"{of}difference_to_{result.against}"] for of in ("", "success_"))
        if score is not None:
            rows.append(
                {
                    "": result.row_name,
                    "score [interval tested]": difference_cell(score),
                    "verdict on the score": score["verdict"],
                    "success [interval tested]": difference_cell(success, percent=True),
                    "verdict on success": success["verdict"] if success else "success is unknown",
                }
            )
    return table(title, rows, left=("verdict on the score", "verdict on success"))


LARGEST_REPORT = 2**28
"""Bytes of a report that are read at most."""


def reported_rewards(path: Path, weights_sha256: str) -> dict[str, Any]:
    """What a report.json of ``evaluate`` says about the samplers of a policy with these weights: its seeds,
    its reference, and every other sampler's differences to that.

    Raises:
        InputError: it can't be read, isn't such a report, or is of other weights or of disturbed episodes.
    """
    remedy = "name a report.json that 'paradiffpolicy evaluate' wrote for this checkpoint"
    require_regular(path, LARGEST_REPORT)
    with reading(str(path), remedy):
        report = json.loads(path.read_bytes())
    try:
        about = {name: report[name] for name in ("weights_sha256", "reference", "seeds")}
        parts = ("difference_to_reference", "success_difference_to_reference")
        samplers = {
            name: {part: values[part] for part in parts}
            for name, values in report["samplers"].items()
            if name != report["reference"]
        }
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no report of samplers: {remedy}")
    if about["weights_sha256"] != weights_sha256:
        raise InputError(f"{path} is of other weights: {remedy}")
    if report.get("disturbances"):
        raise InputError(f"{path} is of disturbed episodes: {remedy} without disturbances")
    return {**about, "samplers": samplers}


def rewards_table(rewards: Mapping[str, Any], names: Sequence[str]) -> Table:
    """One row per sampler that ``reported_rewards`` knows: verdicts on its score and its success."""
    first, last = rewards["seeds"]
    return table(
        f"reward against {rewards['reference']}, seeds {first} to {last}",
        (
            {
                "sampler": name,
                "score [interval tested]": difference_cell(values["difference_to_reference"]),
                "verdict on the score": values["difference_to_reference"]["verdict"],
                "verdict on success": (values["success_difference_to_reference"] or {"verdict": ""})[
                    "verdict"
                ],
            }
            for name, values in rewards["samplers"].items()
            if name in names
        ),
        left=("verdict on the score", "verdict on success"),
    )


def sampler_table(results: Sequence[SamplerResult], title: str) -> Table:
    """One row per sampler."""
    rows = (
        {
            "sampler": result.name,
            **_cells(result),
            "iterations\n/ plan": f"{np.mean(result.per_plan('iterations')):.1f}",
            "NFE\n/ plan": f"{np.mean(result.per_plan('nfe')):.0f}",
            "plan error\nmedian / worst": error_cell(result.plan_error),
            "latency\nms": tail(result.latency_ms, 0),
            "deadlines\nmissed": f"{result.missed} in {result.record.n_ticks} ticks"
            if result.record
            else "-",
        }
        for result in results
    )
    return table(title, rows)


def _given_or_tail(values: Mapping[str, float | None]) -> str:
    """Milliseconds: one value stands for all, since it was given."""
    return f"{values['p50']:g}" if values["n"] == 1 else tail(values, 0)


def realtime_table(results: Sequence[RealtimeResult], title: str) -> Table:
    """One row per case and rate."""
    rows = []
    for result in results:
        values = result.to_dict()
        jump, delay = values["jump_at_boundaries"], values["delay_ticks"]
        jumps = (f"{jump[name]:.1f}" for name in ("median", "p95") if jump[name] is not None)
        smooth = (values["smoothness"][name]["median"] for name in ("ldlj", "sparc"))
        rows.append(
            {
                "case": result.name,
                "Hz": f"{result.rate_hz:g}",
                "blending": result.blending,
                "latency\nms": _given_or_tail(result.latency_ms),
                "delay\nticks": "-" if delay is None else f"{delay:.1f}",
                **_cells(result),
                "requests\nunfinished": f"{values['unfinished_requests']} of {values['requests']}",
                "fallback\nactive": f"{values['fallback_share']:.1%}",
                "jump at boundaries\nmedian / p95": " / ".join(jumps) or "-",
                "smoothness\nLDLJ / SPARC": " / ".join("-" if s is None else f"{s:.1f}" for s in smooth),
            }
        )
    return table(title, rows, left=("blending",))


def write_report(
    folder: Path,
    results: Sequence[SamplerResult],
    title: str,
    about: Mapping[str, Any],
    control_hz: float,
    *,
    pictures: bool = True,
) -> list[Path]:
    """Writes report.json and the pictures; returns their paths.

    Args:
        about: what else report.json holds.
        pictures: False: only report.json.
    """
    paths = [folder / "report.json"]
    write_json(paths[0], {**about, "samplers": {result.name: result.to_dict() for result in results}})
    figures = {}
    if any(result.latencies for result in results):
        figures["score_latency.png"] = score_latency(results, title, control_hz)
    if any(result.episodes[0].frames for result in results):
        figures["rollout.png"] = film_strip(results, control_hz)
    for name, figure in figures.items() if pictures else ():
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


def write_realtime_report(
    folder: Path,
    cases: Sequence[RealtimeResult],
    sweep: Sequence[RealtimeResult],
    title: str,
    about: Mapping[str, Any],
    *,
    pictures: bool = True,
) -> list[Path]:
    """Writes report.json and the picture; returns their paths.

    Args:
        about: what else report.json holds.
        pictures: False: only report.json.
    """
    paths = [folder / "report.json"]
    results = {"cases": [case.to_dict() for case in cases], "sweep": [cell.to_dict() for cell in sweep]}
    write_json(paths[0], {**about, **results})
    if pictures:
        paths.append(folder / "latency.png")
        write_atomically(paths[1], realtime_figure(results, title).savefig)
    return paths
