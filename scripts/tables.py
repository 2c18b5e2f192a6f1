"""Generates every table of README.md, docs/ and checkpoints/README.md, and the pages of studies, from reports
in the repository.

A table stands between two comments::

    <!-- table: NAME · report PATH SHA256 · weights PATH SHA256 -->
    <!-- end -->

The first ends in the reports that the table was made from and the weights that they are about, each with
the first twelve digits of its SHA-256.  A table is stale when a report, the weights, or a row differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import stdtrit

from paradiffpolicy.evaluation.episodes import Episode, Outcome, described, judged
from paradiffpolicy.evaluation.report import difference_cell, error_cell, mean_cell
from paradiffpolicy.evaluation.statistics import POWER, holm, paired_difference
from paradiffpolicy.study import page as study_page
from paradiffpolicy.study.report import difference, mean_of
from paradiffpolicy.tables import spread, tail

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/*.md", "checkpoints/README.md", "docs/reports/*.html")
BLOCK = re.compile(r"<!-- table: (?P<name>\w+)(?P<hashes>.*?) -->\n(?P<rows>.*?)<!-- end -->", re.DOTALL)

PUSHT, PIXELS = "checkpoints/pusht_keypoints", "checkpoints/pusht_pixels"
ROBOSUITE = ("lift", "can", "square")

Report = Mapping[str, Any]
Rows = Iterable[Mapping[str, str]]
"""A table's rows: cells by heading."""

TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Rows]]] = {}
"""Per table: the reports that it is made from, and the function that makes it."""


def table(*reports: str) -> Callable[[Callable[..., Rows]], Callable[..., Rows]]:
    """Registers a function from reports to a table, under the function's name."""

    def register(build: Callable[..., Rows]) -> Callable[..., Rows]:
        TABLES[build.__name__] = (reports, build)
        return build

    return register


# ------------------------------------------------------------------------------------------------ cells


def score(values: Report) -> str:
    """The mean of a row's score; where all are 0 or 1, which the standard error then hides, the interval."""
    return mean_cell(described(list(values["score"]["per_seed"].values())))


def success(values: Report) -> str:
    return mean_cell(described(list(successes(values).values())), percent=True)


def successes(values: Report) -> Mapping[str, float]:
    """By seed.  Reports that don't keep them are of tasks where an episode succeeds when its score is 1.

    Raises:
        ValueError: that isn't so.
    """
    if values.get("success"):
        return values["success"]["per_seed"]
    found = {seed: float(score >= 1) for seed, score in values["score"]["per_seed"].items()}
    if abs(sum(found.values()) / len(found) - values["success_rate"]) > 1e-6:
        raise ValueError("a report has neither successes by seed nor scores that say so")
    return found


MARGINS = {"score": 0.05, "success": 0.1}


def compared(
    pairs: Mapping[Any, tuple[Report, Report]], score_margin: float = MARGINS["score"]
) -> dict[Any, dict[str, Report]]:
    """All differences of one table, in score and in success, seed by seed, tested together; as reports hold
    them."""
    results = [
        Outcome(name=str(key), episodes=episodes(values), reference=episodes(reference, values))
        for key, (values, reference) in pairs.items()
    ]
    judged_results = judged(results, MARGINS | {"score": score_margin})
    return {
        key: {name: difference.to_dict() for name, difference in result.differences.items()}
        for key, result in zip(pairs, judged_results, strict=True)
    }


def episodes(values: Report, like: Report | None = None) -> list[Episode]:
    """The episodes of a row, in the order of ``like``'s seeds."""
    scores, done = values["score"]["per_seed"], successes(values)
    seeds = (like or values)["score"]["per_seed"]
    return [Episode(int(seed), scores[seed], bool(done[seed])) for seed in seeds]


def both(found: Mapping[str, Report] | None, to: str) -> dict[str, str]:
    """Both differences with their verdicts; of a row that is the reference, none."""
    parts = found or {}
    reference = "reference" if found is None else ""
    return {
        f"score against {to} [tested interval]": reference or difference_cell(parts["score"]),
        "verdict on the score": "" if reference else parts["score"]["verdict"],
        f"success against {to} [tested interval]": (
            reference or difference_cell(parts["success"], percent=True)
        ),
        "verdict on success": "" if reference else parts["success"]["verdict"],
    }


def against(
    report: Report, reference: str, names: Iterable[str], score_margin: float = MARGINS["score"]
) -> dict[str, dict[str, Report]]:
    """The samplers of a report, each compared with one of them."""
    rows = report["samplers"]
    return compared(
        {name: (rows[name], rows[reference]) for name in names if name != reference}, score_margin
    )


def latency_ms(values: Report) -> str:
    """Of plans; a report of few that has their p99, and not the largest, is shown without."""
    return tail(values, 0) if "n" in values else f"{values['p50']:.0f} (n = {values['n_plans']})"


def plan_error(values: Report, *reports: Report) -> dict[str, str]:
    """The error of a row's plans; nothing if one of the table's reports is of before it was measured."""
    known = all(any(row.get("plan_error") for row in report["samplers"].values()) for report in reports)
    return {"plan error, median / worst": error_cell(values["plan_error"])} if known else {}


PRESETS = yaml.safe_load((ROOT / "configs" / "samplers.yaml").read_text())["sampler"]


def named(name: str, report: Report) -> str:
    """A sampler's name, with the settings that it had in a report and that its preset no longer has."""
    given, preset = report["samplers_config"][name], PRESETS.get(name, {})
    changed = (f"{key}={value}" for key, value in given.items() if preset.get(key, value) != value)
    return ", ".join((f"`{name}`", *changed))


def n_seeds(report: Report) -> int:
    return int(report["seeds"][1] - report["seeds"][0] + 1)


def task_n(report: Report) -> str:
    return f"{report['task'].capitalize()}, n = {n_seeds(report)}"


def number(value: float | None, form: str = "g") -> str:
    return "" if value is None else f"{value:{form}}"


def slashed(values: Iterable[float] | None, form: str) -> str:
    return " / ".join(f"{value:{form}}" for value in values or ())


# -------------------------------------------------------------------------------------------- the study


def asked(report: Report) -> Rows:
    """A row per question of a study, after one of what it compares with."""
    shown = set()
    for question in report["questions"]:
        for name in (question["reference"], question["arm"]):
            if name not in shown:
                shown.add(name)
                yield arm_row(report, name) | answer_cells(
                    None if name == question["reference"] else question
                )


def arm_row(report: Report, name: str) -> dict[str, str]:
    """What a study's arm is, and what it did on all its seeds."""
    arm = report["arms"][name]
    mean, low, high = arm["success"]["mean"], *arm["success"]["interval_95"]
    return {
        "task": arm["task"],
        "sampler": f"`{arm['sampler']}`",
        "seeds": f"{arm['score']['n']}",
        "score ± s.e.": mean_cell({**arm["score"], "interval_95": None}),
        "success [95 %]": f"{mean:.1%} [{low:.1%}, {high:.1%}]",
        "iterations": mean_of(arm["iterations"], 1),
        "NFE": mean_of(arm["nfe"], 0),
        "ms per plan": f"{arm['plan_latency_ms']['p50']:.3g}",
    }


def answer_cells(question: Report | None) -> dict[str, str]:
    """The difference to the reference, which has none itself, and the verdict."""
    if question is None:
        return {"compared": "", "difference [interval]": "reference", "verdict": ""}
    return {
        "compared": question["measure"],
        "difference [interval]": difference(question),
        "verdict": question["verdict"],
    }


@table(*(f"docs/reports/study_{task}.json" for task in ("pusht", "lift")))
def study(*reports: Report) -> Rows:
    for report in reports:
        yield from asked(report)


# ----------------------------------------------------------------------------------------------- PushT


def rewarded(name: str, report: Report) -> dict[str, str]:
    """A sampler, what it scored, and its iterations."""
    values, n = report["samplers"][name], n_seeds(report)
    return {
        "sampler": named(name, report),
        f"score ± s.e., n = {n}": score(values),
        f"success [95 %], n = {n}": success(values),
        "iterations per plan": f"{values['iterations_per_plan']['mean']:.1f}",
    }


@table(f"{PUSHT}/fresh/report.json", "docs/reports/latency.json")
def fresh(report: Report, latency: Report) -> Rows:
    captured = {row["name"]: row["ms"] for row in latency["shipped"]["plans"]}
    names = ("ddpm", "paraddpm", "speculative", "speculative_sde", "rti")
    found = against(report, "ddpm", names)
    for name in names:
        values = report["samplers"][name]
        yield {
            **rewarded(name, report),
            **plan_error(values, report),
            f"ms per plan, n = {captured['rti, auto']['n']}": f"{captured[f'{name}, auto']['p50']:.3g}",
            **both(found.get(name), "`ddpm`"),
        }


@table(f"{PUSHT}/presets/report.json", "docs/reports/latency_bf16.json")
def summary(report: Report, latency: Report) -> Rows:
    captured = {
        network: {row["name"]: row for row in latency[network]["plans"]} for network in ("shipped", "large")
    }
    names = list(report["samplers"])
    found = against(report, "ddpm", names, score_margin=0.03)  # as it was run
    for name in names:
        yield {
            **rewarded(name, report),
            **{
                f"{size}: ms per plan (times the DDPM-100 loop), n = {rows['rti, auto']['ms']['n']}": (
                    f"{rows[f'{name}, auto']['ms']['p50']:.3g} ({rows[f'{name}, auto']['speedup'][1]:.3g})"
                )
                for size, rows in (("5.4 M", captured["shipped"]), ("65.8 M", captured["large"]))
            },
            **both(found.get(name), "`ddpm`"),
        }


@table(f"{PIXELS}/report/report.json")
def pixels(report: Report) -> Rows:
    found = against(report, "ddpm", report["samplers"])
    for name, values in report["samplers"].items():
        yield {**rewarded(name, report), **plan_error(values, report), **both(found.get(name), "`ddpm`")}


HOW = {
    "ddpm": "DDPM, 100 steps, sequential",
    "ddim": "DDIM, 15 steps, sequential",
    "dpm_solver_pp": "DPM-Solver++(2M), 15 steps, sequential",
    "paraddpm_published": "DDPM-100, `picard_published`",
    "paraddpm": "DDPM-100, `picard`",
    "paraddim_published": "DDIM-15, `picard_published`",
    "paraddim": "DDIM-15, `picard`, warm start",
    "paraddim_same_noise": "DDIM-15, `picard`, warm start with the same noise",
    "paradpm_solver_pp_published": "DPM-Solver++(2M)-15, `picard_published`",
    "paradpm_solver_pp": "DPM-Solver++(2M)-15, `picard`, warm start",
    "paradpm_solver_pp_same_noise": "DPM-Solver++(2M)-15, `picard`, warm start with the same noise",
    "speculative": "DDPM-100, `speculative`",
    "speculative_sde": "SDE-DPM-Solver++(2M)-15, `speculative`, warm start",
    "rti": "DDIM, 10 nodes, 2 iterations",
    "rt_5_1": "DDIM, 5 nodes, 1 iteration",
    "rt_5_2": "DDIM, 5 nodes, 2 iterations (`rti_5`)",
    "rt_5_3": "DDIM, 5 nodes, 3 iterations",
    "rt_10_1": "DDIM, 10 nodes, 1 iteration",
    "rt_10_3": "DDIM, 10 nodes, 3 iterations",
}
"""The samplers of the report, in words; the order of the table."""


@table(f"{PUSHT}/report/report.json")
def samplers(report: Report) -> Rows:
    found = against(report, "ddpm", HOW)
    for name, how in HOW.items():
        values = report["samplers"][name]
        yield {
            "sampler": named(name, report),
            "what it is": how,
            "score ± s.e.": score(values),
            "success [95 %]": success(values),
            "iterations": f"{values['iterations_per_plan']['mean']:.1f}",
            **plan_error(values, report),
            "NFE": f"{values['nfe_per_plan']['mean']:.0f}",
            "eager latency p50, ms": latency_ms(values["plan_latency_ms"]),
            **both(found.get(name), "`ddpm`"),
        }


FEW = {
    "rti": "`rti`: DDIM, 10 nodes, 2 iterations",
    "r5": "`rti_5`: DDIM, 5 nodes, 2 iterations",
    "d4": "DPM-Solver++(2M), 4 steps, sequential",
    "d5": "DPM-Solver++(2M), 5 steps, sequential",
    "d6": "`dpm_solver_pp_6`: DPM-Solver++(2M), 6 steps, sequential",
    "d8": "DPM-Solver++(2M), 8 steps, sequential",
    "d10": "DPM-Solver++(2M), 10 steps, sequential",
    "i5": "DDIM, 5 steps, sequential",
    "i10": "DDIM, 10 steps, sequential",
}


@table(f"{PUSHT}/captured/report.json")
def few_steps(report: Report) -> Rows:
    found = against(report, "rti", FEW)
    for name, how in FEW.items():
        values = report["samplers"][name]
        yield {
            "sampler": how,
            "score ± s.e.": score(values),
            "success [95 %]": success(values),
            "latency p50, ms": f"{values['plan_latency_ms']['p50']:.0f}",
            **both(found.get(name), "`rti`"),
        }


PRECISION = {
    "f32": ("f32_eager", "`rti`, f32, OpenVINO"),
    "bf16": ("f32_eager", "`rti`, bf16"),
    "f16": ("f32_eager", "`rti`, f16"),
    "int8": ("f32_eager", "`rti`, int8 weights, OpenVINO"),
    "ddpm_f32": ("ddpm_eager", "`ddpm`, f32, OpenVINO"),
    "ddpm_bf16": ("ddpm_eager", "`ddpm`, bf16"),
    "ddpm_int8": ("ddpm_eager", "`ddpm`, int8 weights, OpenVINO"),
}


@table(f"{PUSHT}/precision/report.json")
def precision(report: Report) -> Rows:
    rows = report["samplers"]
    found = compared({name: (rows[name], rows[reference]) for name, (reference, _) in PRECISION.items()})
    for name, (reference, how) in PRECISION.items():
        values, base = rows[name], rows[reference]
        yield {
            "sampler, precision": how,
            "score ± s.e.": score(values),
            "success [95 %]": success(values),
            "eager float32": f"{score(base)}, {success(base)}",
            **both(found[name], "eager float32"),
        }


@table("docs/reports/rti_200_seeds.json")
def rti_200_seeds(report: Report) -> Rows:
    """Of scores by seed only the means, their errors and the differences' intervals were kept."""
    n = n_seeds(report)
    spread = np.tile([-1.0, 1.0], n // 2) * math.sqrt(n - 1)  # of standard error 1
    differences = []
    for row in report["rows"]:
        kept = row["difference_to_reference"]
        low, high = kept["interval_95"]
        error = (high - low) / 2 / float(stdtrit(n - 1, 0.975))
        differences.append(paired_difference(kept["mean"] + error * spread, 0 * spread, kept["margin"]))
    for row, found in zip(report["rows"], holm(differences), strict=True):
        mean = row["score"]
        yield {
            "solver": f"{row['solver']} (`{row['preset']}`)" if row["preset"] else row["solver"],
            "nodes": str(row["nodes"]),
            "iterations": str(row["iterations"]),
            "spacing": f"`{row['spacing']}`",
            "score ± s.e.": f"{mean['mean']:.3f} ± {mean['standard_error']:.3f}",
            "score against `ddpm` [tested interval]": difference_cell(found.to_dict()),
            "verdict on the score": found.verdict,
            "success": "not kept",
        }


@table("docs/reports/stopping_ddpm.json", "docs/reports/stopping_ode.json")
def stopping(*reports: Report) -> Rows:
    for report in reports:
        for row in report["rows"]:
            settings = report["drivers"][row["driver"]]
            names = [name for name in ("tolerance", "plan_tolerance") if settings.get(name) is not None]
            errors = row["error"], row["worst_error"]
            if settings["driver"] == "sequential":
                continue
            yield {
                "solver": f"`{row['solver']}`, {row['n_steps']} steps",
                "driver": ", ".join(
                    (f"`{settings['driver']}`", *(f"{name} {settings[name]:g}" for name in names))
                ),
                "iterations": f"{row['iterations']:.1f}",
                "NFE": f"{row['nfe']:.0f}",
                f"error to the sequential plan, px: median / worst of {report['windows']}": (
                    "another sample" if settings["driver"] == "speculative" else slashed(errors, ".2g")
                ),
            }


@table("docs/reports/digits.json")
def digits(report: Report) -> Rows:
    for row in report["rows"]:
        errors = {
            "sequential DDPM": "reference",
            "speculative": "another sample of the same distribution",
        }
        error = f"{row['largest_error'] or 0:.2g} of a range of {report['pixel_range']}"
        yield {
            "sampler": row["sampler"],
            "images": f"{report['images']}",
            "iterations": f"{row['iterations']:.4g}",
            "largest error of a pixel to the sequential sample": errors.get(row["sampler"], error),
        }


@table("docs/reports/betting.json")
def betting(report: Report) -> Rows:
    def seeds(values: Report) -> str:
        median = values["median"]
        return f"{number(median, '.0f') or 'none'} ({values['decided'] * 100:.0f} %)"

    for row in report["rows"]:
        score, betting, fixed = row["measure"] == "score", row["betting"], row["fixed_n"]
        more = betting["mean"] - fixed if betting["decided"] >= POWER else None
        yield {
            "measure, margin": f"{row['measure']}, {row['margin']:g}",
            "spread": f"s.d. {row['spread']:g}"
            if score
            else f"{row['spread'] * 100:g} % of the seeds differ",
            "true difference": f"{row['difference']:g}",
            "fixed number": f"{fixed:,}",
            "betting: median (decided)": seeds(betting),
            "betting, mean: more than fixed": number(more, "+.0f"),
            "`stop_early`: median (decided)": seeds(row["shares"]),
        }


# --------------------------------------------------------------------------------- latency, deadlines

NETWORKS = ("shipped", "large")


def by_network(
    report: Report, kind: str, cells: Callable[[Report], Mapping[str, str]]
) -> Iterator[tuple[Report, dict[str, str]]]:
    """The rows of a kind, each with its cells for both networks; the first heading of each names it."""
    for rows in zip(*(report[network][kind] for network in NETWORKS), strict=True):
        found: dict[str, str] = {}
        for network, row in zip(NETWORKS, rows, strict=True):
            (first, cell), *others = cells(row).items()
            found[f"{report[network]['parameters'] / 1e6:.1f} M: {first}"] = cell
            # Markdown's headings may be equal, a dict's keys may not.
            found |= {heading + " " * (network == "large"): value for heading, value in others}
        yield rows, found


def times(speedup: Sequence[float]) -> str:
    return spread((speedup[0], speedup[1], speedup[2]))


def significant(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@table("docs/reports/latency.json")
def latency_plans(report: Report) -> Rows:
    def cells(row: Report) -> dict[str, str]:
        return {
            "ms p50": significant(row["ms"]["p50"]),
            "floor, ms": significant(row["floor"]),
            "times DDPM-100 [quartiles]": times(row["speedup"]),
            "times DDIM-10": f"{row['speedup_ddim']:.1f}",
        }

    for rows, shown in by_network(report, "plans", cells):
        sampler, _, capture = rows[0]["name"].partition(", ")
        yield {
            "plan, one robot": f"`{sampler}`, {capture.replace('auto', 'captured')}" if capture else sampler,
            **shown,
            "memory, MB": ", ".join(f"{row['memory']:.0f}" for row in rows),
        }


@table("docs/reports/latency_pixels.json")
def latency_pixels(report: Report) -> Rows:
    for row in report["shipped"]["plans"]:
        sampler, _, capture = row["name"].partition(", ")
        if capture == "auto" or not capture:
            yield {
                "plan, one robot": f"`{sampler}`, captured" if capture else sampler,
                f"ms p50, n = {row['ms']['n']}": significant(row["ms"]["p50"]),
                "iterations": f"{row['iterations']:.1f}",
                "times DDPM-100 [quartiles]": times(row["speedup"]),
            }


@table("docs/reports/latency_bf16.json")
def latency_bf16(report: Report) -> Rows:
    return latency_plans(report)


@table("docs/reports/latency_amx.json")
def latency_amx(report: Report) -> Rows:
    return (row for row in latency_plans(report) if "eager" not in row["plan, one robot"])


@table(f"{PUSHT}/bf16/report.json", f"{PUSHT}/fresh/report.json")
def rewards_bf16(report: Report, exact: Report) -> Rows:
    names = list(report["samplers"])
    both = {name: (report["samplers"][name], exact["samplers"][name]) for name in names}
    scores = [[values["score"]["per_seed"] for values in both[name]] for name in names]
    differences = [
        paired_difference([half[seed] for seed in full], list(full.values()), 0.03) for half, full in scores
    ]
    for name, found in zip(names, holm(differences), strict=True):
        half, full = both[name]
        yield {
            "sampler": f"`{name}`",
            "bf16: score ± s.e.": score(half),
            "success [95 %]": success(half),
            "f32: score ± s.e.": score(full),
            "success, f32 [95 %]": success(full),
            "score against f32 [tested interval]": difference_cell(found.to_dict()),
            "verdict on the score": found.verdict,
        }


@table("docs/reports/h100.json")
def h100(report: Report) -> Rows:
    def plain(sampler: str) -> str:
        return sampler if sampler.startswith("diffusers") else f"`{sampler}`, captured"

    columns = {
        f"{network}, {kind}": {row["name"]: row for row in rows}
        for kind in ("f32", "bf16, fused")
        for network, rows in report[kind].items()
    }
    for name in columns["5.4 M, f32"]:
        cells = {
            heading: f"{significant(row['ms'])} ms, {times(row['speedup'])} (n = {row['n']})"
            for heading, rows in columns.items()
            if (row := rows.get(name))
        }
        yield {"plan, one robot": plain(name), **dict.fromkeys(columns, ""), **cells}


@table("docs/reports/latency.json")
def latency_calls(report: Report) -> Rows:
    def cells(row: Report) -> dict[str, str]:
        return {
            "ms p50": significant(row["ms"]["p50"]),
            "floor, ms": significant(row["floor"]),
            "times eager [quartiles]": times(row["speedup"]),
        }

    for rows, shown in by_network(report, "calls", cells):
        yield {"network call": rows[0]["name"], "rows": str(rows[0]["batch"]), **shown}


@table("docs/reports/first_plan.json")
def latency_first_plan(report: Report) -> Rows:
    for name, (first, later) in report["first_plan_s"].items():
        yield {
            "network": name,
            "first start, s": number(first),
            "later starts, from the cache of compiled models, s": number(later),
        }


@table("docs/reports/control.json")
def control(report: Report) -> Rows:
    for row in report["rows"]:
        beside = row["plan_latency_ms"]["p50"] is not None
        yield {
            "planner": row["planner"],
            "ticks": str(row["ticks"]),
            "over a period": str(row["over_a_period"]),
            "missed": str(row["missed"]),
            "deadline error, ms p50 / p99 / maximum": slashed(stated(row["deadline_error_ms"]), ".2f"),
            "a tick, µs p50 / p99": slashed(stated(row["tick_us"])[:2], ".0f") if beside else "",
            "plans per s": f"{row['plans_per_second']:.0f}" if beside else "",
            "plan latency, ms p50 / p99": slashed(stated(row["plan_latency_ms"])[:2], ".1f"),
        }


def stated(values: Report) -> list[float]:
    """The median, the p99 and the largest, as far as they are stated."""
    return [values[name] for name in ("p50", "p99", "max") if values.get(name) is not None]


@table("docs/reports/serve.json")
def serve(report: Report) -> Rows:
    one, many = report["one_client"], report["many_clients"]
    between = f"{one['between_ms']['p50']:.1f} ms"
    yield {
        "clients": "1",
        "requests": f"{one['requests']}",
        "result": f"a round trip takes {between} (p50) longer than the inference in it",
    }
    yield {
        "clients": f"{many['clients']}, for {many['seconds']:.0f} s",
        "requests": f"{many['answers']:,}",
        "result": (
            f"{many['per_second']:.0f} answers per second, {many['batch']:.1f} a batch, "
            f"{many['errors']} errors"
        ),
    }


@table("docs/reports/serve_hostile.json")
def hostile(report: Report) -> Rows:
    for name, crowd in {
        "alone": report["many_clients"],
        "beside hostile ones": report["beside_hostile"],
    }.items():
        yield {
            f"{crowd['clients']} clients, {crowd['rate_hz']:g} Hz each": name,
            "seconds": f"{crowd['seconds']:.0f}",
            "answers": f"{crowd['answers']:,}",
            "errors": f"{crowd['errors']}",
            "round trip, ms": tail(crowd["round_trip_ms"]),
            "server's memory grew by, MB": f"{crowd['growth']:.1f}",
        }


# --------------------------------------------------------------------------------- what latency costs


def lived(cells: Mapping[Any, Report], references: Mapping[str, Report]) -> dict[Any, dict[str, str]]:
    """The cells of an evaluation in real time, after their names and rates; each is compared with the same
    sampler when the world waits.

    Args:
        references: the latter's cells, by the cells' keys.
    """
    found = compared({key: (cell, references[key]) for key, cell in cells.items() if key in references})
    return {
        key: {
            "plan latency, ms": f"{cell['latency_ms']['p50']:g}",
            "delay, ticks": number(cell["delay_ticks"], ".1f"),
            "score ± s.e.": score(cell),
            "success [95 %]": success(cell),
            "fallback active": f"{cell['fallback_share']:.0%}",
            **both(found.get(key), "unlimited time"),
        }
        for key, cell in cells.items()
    }


def cells_of(report: Report) -> tuple[dict[Any, Report], dict[Any, Report]]:
    """The cells of a report by case and rate, and what each is compared with."""
    cells = {(cell["case"], cell["rate_hz"]): cell for cell in report["cases"]}
    unlimited = {name.split(",")[0]: cell for (name, _), cell in cells.items() if "unlimited" in name}
    samplers = {name: case["sampler"] for name, case in report["realtime"]["cases"].items()}
    return cells, {key: unlimited[samplers[key[0]]] for key in cells if key[0] in samplers}


@table(f"{PUSHT}/realtime/report.json")
def under_latency(report: Report) -> Rows:
    for (case, rate), row in lived(*cells_of(report)).items():
        yield {"case": case, "control, Hz": f"{rate:g}", **row}


@table(f"{PUSHT}/realtime/wall.json")
def at_the_real_rate(report: Report) -> Rows:
    cells, references = cells_of(report)
    found = compared({key: (cells[key], reference) for key, reference in references.items()})
    for key, cell in cells.items():
        yield {
            "case": cell["case"],
            "score ± s.e.": score(cell),
            "success [95 %]": success(cell),
            "missed ticks": f"{cell['missed_ticks']}",
            **both(found.get(key), "unlimited time"),
        }


@table(f"{PUSHT}/realtime/report.json")
def blendings(report: Report) -> Rows:
    for cell in sorted(report["sweep"], key=lambda cell: cell["latency_ms"]["p50"]):
        jump = cell["jump_at_boundaries"]
        if jump["median"] is None or cell["latency_ms"]["p50"] == 100:  # the same delay as 12 ms
            continue
        yield {
            "latency, ms": f"{cell['latency_ms']['p50']:g}",
            "blending": f"`{cell['blending']}`",
            "score ± s.e.": score(cell),
            "jump where chunks join, px p50 / p95": slashed((jump["median"], jump["p95"]), ".0f"),
            "jerk, px p50": f"{cell['jerk']['median']:.1f}",
            "fallback active": f"{cell['fallback_share']:.0%}",
        }


@table(*(f"docs/reports/latency_{name}.json" for name in ("static", "static_mean", "drifting")))
def where_latency_costs(*reports: Report) -> Rows:
    for largest, mean, drifting in zip(*(report["sweep"] for report in reports), strict=True):
        smooth = [drifting["smoothness"][name]["median"] for name in ("ldlj", "sparc")]
        yield {
            "latency, ms": f"{drifting['latency_ms']['p50']:g}",
            "PushT, largest reward": score(largest),
            "PushT, mean reward": score(mean),
            "drifting PushT, mean reward": score(drifting),
            "its difference to unlimited time [tested interval]": difference_cell(
                drifting["difference_to_unlimited"]
            ),
            "its smoothness, LDLJ / SPARC": slashed(smooth, ".1f"),
        }


# ------------------------------------------------------------------------------------------- robosuite


@table(*(f"checkpoints/{task}/report/report.json" for task in ROBOSUITE))
def robosuite(*reports: Report) -> Rows:
    rows = {
        (task_n(report), name): values for report in reports for name, values in report["samplers"].items()
    }
    names = {(task_n(report), name): named(name, report) for report in reports for name in report["samplers"]}
    pairs = {key: (values, rows[key[0], "ddpm"]) for key, values in rows.items() if key[1] != "ddpm"}
    found = compared(pairs, MARGINS["success"])
    for (task, name), values in rows.items():
        latency, slowest = (of["plan_latency_ms"] for of in (values, rows[task, "ddpm"]))
        verdicts = both(found.get((task, name)), "`ddpm`")
        yield {
            "task": task,
            "sampler": names[task, name],
            "success [95 %]": success(values),
            "iterations": f"{values['iterations_per_plan']['mean']:.1f}",
            **plan_error(values, *reports),
            "NFE": f"{values['nfe_per_plan']['mean']:.0f}",
            "plan latency p50, ms": latency_ms(latency),
            "times `ddpm`": f"{slowest['p50'] / latency['p50']:.1f}",
            **{heading: cell for heading, cell in verdicts.items() if "score" not in heading},
        }


@table(*(f"checkpoints/{task}/realtime/report.json" for task in ROBOSUITE))
def under_latency_robosuite(*reports: Report) -> Rows:
    cells: dict[Any, Report] = {}
    references: dict[Any, Report] = {}
    for report in reports:
        own, unlimited = cells_of(report)
        cells |= {(task_n(report), *key): cell for key, cell in own.items() if key in unlimited}
        references |= {(task_n(report), *key): cell for key, cell in unlimited.items()}
    for (task, case, _), row in lived(cells, references).items():
        shown = {heading: cell for heading, cell in row.items() if "score" not in heading}
        yield {"task": task, "case": f"`{case}`", **shown}


@table("docs/reports/paradigms_paper.json", *(f"checkpoints/{task}/report/report.json" for task in ROBOSUITE))
def paradigms(paper: Report, *reports: Report) -> Rows:
    headings = (
        "",
        "ParaDDPM: iterations, times DDPM-100",
        "ParaDDIM: iterations",
        "ParaDPMSolver: iterations",
        "`rti`: iterations, times DDPM-100",
    )
    theirs = paper["iterations"]
    yield dict(
        zip(
            headings,
            (
                f"ParaDiGMS: {', '.join(paper['tasks'])}",
                f"{theirs['ParaDDPM']}; {', '.join(map(number, paper['times_ddpm']))}",
                f"{theirs['ParaDDIM']}",
                f"{theirs['ParaDPMSolver']}",
                "",
            ),
            strict=True,
        )
    )
    for report in reports:
        taken = {name: f"{v['iterations_per_plan']['mean']:.1f}" for name, v in report["samplers"].items()}
        latency = {name: v["plan_latency_ms"]["p50"] for name, v in report["samplers"].items()}
        timed = {name: f"{taken[name]}; {latency['ddpm'] / ms:.1f}" for name, ms in latency.items()}
        ours = (timed["paraddpm"], taken["paraddim"], taken["paradpm_solver_pp"], timed["rti"])
        yield dict(zip(headings, (f"here: {task_n(report)}", *ours), strict=True))


@table("docs/reports/environments.json")
def environments(report: Report) -> Rows:
    for name, row in report["environments"].items():
        if row["times_baseline"]:
            yield {
                "task": name.removesuffix("-v0"),
                "control steps per second, median": f"{row['steps_hz'][1]:.0f}",
                "times robosuite's own step": f"{row['times_baseline'][1]:.1f}",
            }


@table("docs/reports/train.json")
def training(report: Report) -> Rows:
    for name, network in report.items():
        for step, row in network["steps"].items() if name in ("shipped", "large") else ():
            yield {
                "channels, windows per step": f"{network['down_dims']}, {network['batch_size']}",
                "step": step,
                "ms p50": tail(row["ms"]),
                "times faster [quartiles]": spread(row["speedup"], digits=2),
            }


@table("docs/reports/latency_pushed.json")
def pushed_cube(report: Report) -> Rows:
    unlimited, *_ = report["cases"]
    for cell in (unlimited, *report["sweep"]):
        yield {
            "latency, ms": f"{cell['latency_ms']['p50']:g}",
            "delay, ticks": number(cell["delay_ticks"], ".1f"),
            "success [95 %]": success(cell),
            "fallback active": f"{cell['fallback_share']:.0%}",
            "success against unlimited time [tested interval]": difference_cell(
                cell["success_difference_to_unlimited"], percent=True
            ),
        }


@table("docs/reports/experts.json")
def experts(report: Report) -> Rows:
    for row in report["rows"]:
        yield {
            "task": row["task"],
            "episodes that succeeded": f"{row['succeeded']}",
            "of": f"{row['tried']}",
            "seconds to collect them": ", ".join(filter(None, (number(row["seconds"]), row["note"]))),
        }


@table("docs/reports/pusht_coverage.json", f"{PUSHT}/fresh/report.json")
def pusht_coverage(demonstrations: Report, report: Report) -> Rows:
    rows = demonstrations["episodes"]
    found = {
        "demonstrations, last recorded state": [row["final"] for row in rows],
        "demonstrations, largest of the recorded": [row["largest"] for row in rows],
        "demonstrations, after the last action": [row["replayed"] for row in rows],
    }
    for name in ("ddpm", "rti"):  # a score is the largest coverage over 0.95, at most 1
        scores = report["samplers"][name]["score"]["per_seed"].values()
        found[f"`{name}`, largest"] = [0.95 * value for value in scores]
    for name, values in found.items():
        covered = np.array(values)
        # Rounded: reports state scores to six digits.
        shares = {
            f"at least {least:.0%}": f"{np.mean(covered >= least - 1e-6):.1%}"
            for least in (0.8, 0.85, 0.9, 0.93, 0.95)
        }
        yield {"coverage": name, "n": f"{len(covered)}", "median": f"{np.median(covered):.3f}", **shares}


# ----------------------------------------------------------------------------------------------- pages


@cache
def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def hashes(name: str) -> str:
    """The end of a table's first comment: its reports, and the weights that they are about."""
    reports, _ = TABLES[name]
    parts, weights = [f"report {path} {sha256(ROOT / path)}" for path in reports], dict[str, None]()
    for path in reports:
        report = json.loads((ROOT / path).read_text())
        for part in (report, *report.get("arms", {}).values()):  # a study's arms are of several policies
            folder = part.get("checkpoint")
            if folder is not None:
                file = json.loads((ROOT / folder / "policy.json").read_text())["weights"]["file"]
                own = sha256(ROOT / folder / file)
                if part.get("weights_sha256", own)[: len(own)] != own:
                    raise ValueError(f"{path} is of other weights than {folder} has now: make it again")
                weights[f"weights {folder} {own}"] = None
    return "".join(f" · {part}" for part in (*parts, *weights))


def markdown(name: str) -> str:
    """A table's lines, made from its reports."""
    reports, build = TABLES[name]
    rows = list(build(*(json.loads((ROOT / path).read_text()) for path in reports)))
    headings = [heading.strip() for heading in rows[0]]
    lines = [headings, ["---"] * len(headings), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: a table is unknown, or its reports tell of other weights: by the hash that they hold, or
            where they are too old to hold one, by the table's, which changed when they didn't.
    """

    def block(match: re.Match[str]) -> str:
        name, old = match["name"], match["hashes"]
        if name not in TABLES:
            raise ValueError(f"table {name!r} is unknown: scripts/tables.py has {', '.join(TABLES)}")
        new = hashes(name)
        kinds = {kind: re.findall(rf" · {kind} (\S+ \S+)", old) for kind in ("report", "weights")}
        if kinds["weights"] and old != new:
            same = [part for part in kinds["report"] if f"report {part}" in new]
            other = [part for part in kinds["weights"] if f"weights {part}" not in new]
            if other and len(same) == len(kinds["report"]):
                raise ValueError(f"table {name!r}: the weights changed ({other[0]}): evaluate them again")
        return f"<!-- table: {name}{new} -->\n{markdown(name)}<!-- end -->"

    return BLOCK.sub(block, text)


def pages() -> Iterator[Path]:
    for pattern in PAGES:
        yield from sorted(ROOT.glob(pattern))


def due(page: Path) -> str:
    """What a page should be."""
    if page.suffix == ".html":
        return study_page.render(study_page.shown(json.loads(page.with_suffix(".json").read_text())))
    return renewed(page.read_text())


def stale() -> list[str]:
    """The pages that aren't what the reports give."""
    return [str(page.relative_to(ROOT)) for page in pages() if due(page) != page.read_text()]


def main(argv: Sequence[str]) -> int:
    if set(argv) - {"--check"}:
        print(__doc__)
        return 2
    found = stale()
    for name in found:
        if argv:
            print(f"{name} is stale: run scripts/tables")
        else:
            page = ROOT / name
            page.write_text(due(page))
            print(f"{name}: written")
    return 1 if found and argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
