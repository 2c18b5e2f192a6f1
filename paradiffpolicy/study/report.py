"""A study's report: plain values for report.json, from which the page is made; and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from ..control.record import Record
from ..evaluation.episodes import Episode, described
from ..evaluation.report import mean_cell
from ..evaluation.smoothness import pooled, smoothness
from ..evaluation.statistics import wilson
from ..tables import quantiles, table, tail
from .design import Arm, Question
from .running import Progressed
from .verdicts import Answer

FORMAT = 1
"""Of report.json."""


@dataclass(frozen=True)
class ArmFacts:
    """What a report says of an arm beside its episodes.

    Attributes:
        settings: plain values: its task, checkpoint, sampler, hashes, …
        latencies: seconds per plan of one robot; empty: not timed.
        timeline: ``lateness`` of a paced run; None: there was none.
    """

    settings: Mapping[str, Any]
    latencies: Sequence[float] = ()
    timeline: Mapping[str, Any] | None = None


def lateness(record: Record, control_hz: float) -> dict[str, Any]:
    """How late each tick's action was ready, of a run on a real clock: after the next tick's deadline, which
    the loop then misses; below 0 it is in time."""
    period_ms = 1e3 / control_hz
    late = 1e3 * (record.ticks["ended"] - record.ticks["deadline"]) - period_ms
    return {"period_ms": period_ms, "lateness_ms": late.round(3).tolist(), "missed": record.missed}


def histogram(values: Sequence[int]) -> dict[str, list[int]]:
    """Each value that occurs, and how often."""
    counts = Counter(values)
    return {"values": sorted(counts), "counts": [counts[value] for value in sorted(counts)]}


def latency_values(latencies: Sequence[float]) -> dict[str, Any] | None:
    """Milliseconds per plan: quantiles, and all of them."""
    if not latencies:
        return None
    values = 1e3 * np.asarray(latencies)
    return {**quantiles(values), "values": values.round(4).tolist()}


def smoothness_values(motions: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any] | None:
    """Jumps at joins, and smoothness; None: the world waited for the plans, and there are no records."""
    return {"jump": pooled(motions, "jump"), **smoothness(motions)} if motions else None


def arm_values(facts: ArmFacts, episodes: Sequence[Episode], captured: Mapping[str, Any]) -> dict[str, Any]:
    """An arm in report.json."""
    scores, successes = [e.score for e in episodes], [e.success for e in episodes]
    score = described(scores) if scores else {"n": 0, "mean": None, "standard_error": None}
    success = None
    if episodes and None not in successes:
        n, n_succeeded = len(episodes), sum(map(bool, successes))
        success = {"n": n, "mean": n_succeeded / n, "interval_95": list(wilson(n_succeeded, n))}
    return {
        **facts.settings,
        "score": {name: score[name] for name in ("n", "mean", "standard_error")},
        "success": success,
        "plan_latency_ms": latency_values(facts.latencies),
        "timeline": facts.timeline,
        "iterations": histogram([value for episode in episodes for value in episode.iterations]),
        "nfe": histogram([value for episode in episodes for value in episode.nfe]),
        "smoothness": smoothness_values([episode.motion for episode in episodes if episode.motion]),
        "programs": dict(captured),
        "episodes": {
            "seed": [episode.seed for episode in episodes],
            "score": [round(score, 6) for score in scores],
            "success": successes,
            "n_steps": [episode.n_steps for episode in episodes],
        },
    }


def question_values(question: Question, answer: Answer, stopped: str) -> dict[str, Any]:
    """A question in report.json."""
    return {
        "name": question.name,
        "arm": question.arm.name,
        "reference": question.reference.name,
        "measure": question.measure,
        "margin": question.margin,
        "n": answer.n,
        "mean": answer.mean,
        "interval": list(answer.interval),
        "confidence": answer.confidence,
        "claim": answer.claim,
        "verdict": answer.verdict,
        "decided": answer.decided,
        "seeds_needed": answer.seeds_needed,
        "stopped": stopped,
        "fixed_n": answer.fixed_n,
        "p_values": dict(answer.p_values),
    }


def report_values(
    head: Mapping[str, Any],
    facts: Mapping[Arm, ArmFacts],
    progressed: Progressed,
    videos: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        head: what ``provenance.about`` says, and the study's settings.
        videos: ``files`` by arm and seed, and the ``command`` that makes them.
    """
    return {
        "format": FORMAT,
        **head,
        "arms": {
            arm.name: arm_values(facts[arm], episodes, progressed.captured[arm])
            for arm, episodes in progressed.episodes.items()
        },
        "questions": [
            question_values(question, answer, progressed.stopped(question))
            for question, answer in progressed.answers.items()
        ],
        "videos": videos,
        "unfinished": [arm.name for arm in progressed.running],
    }


def verdict_table(report: Mapping[str, Any], title: str) -> Table:
    """One row per question."""
    ends = {"decided": "decided", "budget": "seeds used up", "unfinished": "goes on"}
    rows = (
        {
            "arm": each["arm"],
            "against": each["reference"],
            "verdict": f"{each['measure']}: {each['verdict']}",
            "difference [interval]": difference(each),
            "seeds": each["n"],
            "ended": ends[each["stopped"]],
        }
        for each in report["questions"]
    )
    return table(title, rows, left=("against", "verdict", "ended"))


def difference(question: Mapping[str, Any]) -> str:
    """A question's mean difference with its interval."""
    low, high = question["interval"]
    return f"{question['mean']:+.3f} [{low:+.3f}, {high:+.3f}], {100 * question['confidence']:.3g} %"


def arm_table(report: Mapping[str, Any], title: str) -> Table:
    """One row per arm."""
    rows = []
    for name, arm in report["arms"].items():
        n, success = arm["score"]["n"], arm["success"]
        latency = {key: value for key, value in (arm["plan_latency_ms"] or {}).items() if key != "values"}
        score = {**arm["score"], "interval_95": None}
        rows.append(
            {
                "arm": name,
                "seeds": n,
                "score ± s.e.": mean_cell(score) if n else "-",
                "success\n[95 %]": mean_cell(success, percent=True) if success else "unknown",
                "iterations\n/ plan": mean_of(arm["iterations"], 1),
                "NFE\n/ plan": mean_of(arm["nfe"], 0),
                "latency\nms": tail(latency, 0) if latency else "-",
            }
        )
    return table(title, rows)


def mean_of(counted: Mapping[str, Sequence[int]], digits: int) -> str:
    """The mean of a ``histogram``."""
    if not counted["values"]:
        return "-"
    return f"{np.average(counted['values'], weights=counted['counts']):.{digits}f}"
