"""Reports on a run: did the loop keep its deadlines, did the planner keep up, which faults occurred."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..control.record import Record, total_faults
from ..files import write_atomically, write_json
from ..tables import pairs, quantiles, tail
from .timeline import latencies, timeline

if TYPE_CHECKING:
    from rich.table import Table


def summary(*records: Record) -> dict[str, Any]:
    """Sums runs up: times in ms, a tick's cost in µs, each as its ``quantiles``."""
    ticks = np.concatenate([record.ticks for record in records])
    plans = np.concatenate([record.plans for record in records])
    return {
        "ticks": len(ticks),
        "missed": sum(record.missed for record in records),
        "deadline_error_ms": quantiles(1e3 * (ticks["started"] - ticks["deadline"])),
        "tick_us": quantiles(1e6 * (ticks["ended"] - ticks["started"])),
        "plans": len(plans),
        "unfinished_requests": sum(record.unfinished for record in records),
        "refused_plans": int(plans["refused"].sum()),
        "plan_latency_ms": quantiles(1e3 * plans["latency"]),
        "delay_mean": float(plans["delay"].mean()) if len(plans) else None,
        "fallback_share": float(ticks["fallback_active"].mean()) if len(ticks) else None,
        "faults": total_faults(records),
    }


def summary_table(values: dict[str, Any], title: str) -> Table:
    """Tabulates what ``summary`` returns, and ``score``, if there is one."""
    delay, share = values["delay_mean"], values["fallback_share"]
    rows = {
        "ticks, of which missed": f"{values['ticks'] + values['missed']}, {values['missed']}",
        "deadline error, ms": tail(values["deadline_error_ms"], 2),
        "a tick's cost, µs": tail(values["tick_us"], 0),
        "plans, of which refused": f"{values['plans']}, {values['refused_plans']}",
        "requests without an answer": str(values["unfinished_requests"]),
        "plan latency, ms": tail(values["plan_latency_ms"], 1),
        "plans' delay, ticks, mean": "-" if delay is None else f"{delay:.2f}",
        "fallback active": "-" if share is None else f"{share:.1%}",
    }
    for name, count in values["faults"].items():
        rows[f"fault: {name.replace('_', ' ')}, ticks"] = str(count)
    if values.get("score") is not None:
        rows["score"] = f"{values['score']:.3f}"
    return pairs(title, rows)


def write_run(
    folder: Path,
    record: Record,
    report: dict[str, Any],
    title: str,
    *,
    ticks_per_step: float = 1,
    seconds: tuple[float, float] | None = None,
) -> list[Path]:
    """Writes report.json, record.npz and, if there was a tick, timeline.png and latencies.png; returns
    their paths.

    Args:
        ticks_per_step, seconds: see ``timeline``; of a run that ended before ``seconds``, the first plans
            are shown.
    """
    paths = [folder / "report.json", folder / "record.npz"]
    write_json(paths[0], report)
    record.save(paths[1])
    if not record.n_ticks:
        return paths
    ticks = record.ticks
    ran = float(ticks["deadline"][-1] - ticks["deadline"][0])
    shown = seconds if seconds and seconds[0] < ran else None
    figures = {
        "timeline.png": timeline(record, shown, ticks_per_step=ticks_per_step, title=title),
        "latencies.png": latencies(record, title),
    }
    for name, figure in figures.items():
        paths.append(folder / name)
        write_atomically(paths[-1], figure.savefig)
    return paths
