"""Generates every table of README.md, docs/ and checkpoints/README.md from reports in the repository.

A table stands between two comments::

    <!-- table: NAME · report PATH SHA256 · weights PATH SHA256 -->
    <!-- end -->

The first ends in the reports that the table was made from and the weights that they are about, each with
the first twelve digits of its SHA-256.  A table is stale when a report, the weights, or a row differ.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from paradiffpolicy.evaluation.statistics import paired_difference

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/*.md", "checkpoints/README.md")
BLOCK = re.compile(r"<!-- table: (?P<name>\w+)(?P<hashes>.*?) -->\n(?P<rows>.*?)<!-- end -->", re.DOTALL)

PUSHT = "checkpoints/pusht_keypoints"
ROBOSUITE = ("lift", "can", "square")

Report = Mapping[str, Any]
Rows = list[Sequence[str]]
"""A table: its headings, then its rows."""

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
    return f"{values['mean']:.3f} ± {values['standard_error']:.3f}"


def difference(values: Report | None, *, low: float = -1.0) -> str:
    if values is None:
        return "reference"
    return (
        f"{values['mean']:+.3f} [{max(values['interval_95'][0], low):+.3f}, {values['interval_95'][1]:+.3f}]"
    )


def compared(values: Report | None) -> tuple[str, str]:
    """The difference, and the verdict."""
    return difference(values), "" if values is None else values["verdict"]


def p50_p99(values: Report) -> str:
    return f"{values['p50']:.0f} / {values['p99']:.0f}"


def paired(values: Report, reference: Report, margin: float = 0.05) -> Report:
    """The difference of two rows of a report, seed by seed, as reports hold one."""
    a, b = (report["score"]["per_seed"] for report in (values, reference))
    found = paired_difference(list(a.values()), [b[seed] for seed in a], margin)
    return {"mean": found.mean, "interval_95": [found.low, found.high], "verdict": found.verdict}


def success_difference(values: Report, reference: Report) -> str:
    """Of PushT, where an episode succeeds when its score reaches 1."""
    reached = [
        [float(report["score"]["per_seed"][seed] >= 1) for seed in values["score"]["per_seed"]]
        for report in (values, reference)
    ]
    found = paired_difference(*reached)
    return difference({"mean": found.mean, "interval_95": [found.low, found.high]})


def n_seeds(report: Report) -> int:
    return int(report["seeds"][1] - report["seeds"][0] + 1)


def number(value: float | None, form: str = "g") -> str:
    return "" if value is None else f"{value:{form}}"


# ----------------------------------------------------------------------------------------------- PushT


@table(f"{PUSHT}/report/report.json", "docs/reports/latency.json")
def summary(report: Report, latency: Report) -> Rows:
    captured = {row["plan"]: row["shipped"] for row in latency["plans"] if row["capture"] == "captured"}
    n = n_seeds(report)
    rows: Rows = [
        (
            "sampler",
            f"score ± s.e., n = {n}",
            f"success, n = {n}",
            "iterations per plan",
            f"ms per plan, n = {latency['networks']['shipped']['plans_per_row']}",
            f"score against `ddpm` [95 %], n = {n}",
            f"success against `ddpm` [95 %], n = {n}",
        )
    ]
    reference = report["samplers"]["ddpm"]
    for name in ("ddpm", "paraddpm", "speculative", "speculative_sde", "rti"):
        values = report["samplers"][name]
        rows.append(
            (
                f"`{name}`",
                score(values["score"]),
                f"{values['success_rate']:.0%}",
                f"{values['iterations_per_plan']['mean']:.1f}",
                f"{captured[name]['p50']:.3g}",
                difference(values["difference_to_reference"]),
                "reference" if values is reference else success_difference(values, reference),
            )
        )
    return rows


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
    rows: Rows = [
        (
            "sampler",
            "what it is",
            "score ± s.e.",
            "success",
            "iterations",
            "NFE",
            "eager latency p50 / p99, ms",
            "score against `ddpm` [95 %]",
            "verdict on the score",
            "success against `ddpm` [95 %]",
        )
    ]
    reference = report["samplers"]["ddpm"]
    for name, how in HOW.items():
        values = report["samplers"][name]
        rows.append(
            (
                f"`{name}`",
                how,
                score(values["score"]),
                f"{values['success_rate']:.0%}",
                f"{values['iterations_per_plan']['mean']:.1f}",
                f"{values['nfe_per_plan']['mean']:.0f}",
                p50_p99(values["plan_latency_ms"]),
                *compared(values["difference_to_reference"]),
                "reference" if values is reference else success_difference(values, reference),
            )
        )
    return rows


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
    rows: Rows = [
        ("sampler", "score ± s.e.", "success", "latency p50, ms", "against `rti` [95 %]", "verdict")
    ]
    for name, how in FEW.items():
        values = report["samplers"][name]
        rows.append(
            (
                how,
                score(values["score"]),
                f"{values['success_rate']:.0%}",
                f"{values['plan_latency_ms']['p50']:.0f}",
                *compared(values["difference_to_reference"]),
            )
        )
    return rows


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
    rows: Rows = [
        ("sampler, precision", "score ± s.e.", "success", "eager float32", "difference [95 %]", "verdict")
    ]
    for name, (reference, how) in PRECISION.items():
        values, base = (report["samplers"][key] for key in (name, reference))
        rows.append(
            (
                how,
                score(values["score"]),
                f"{values['success_rate']:.0%}",
                f"{score(base['score'])}, {base['success_rate']:.0%}",
                *compared(paired(values, base)),
            )
        )
    return rows


@table("docs/reports/rti_200_seeds.json")
def rti_200_seeds(report: Report) -> Rows:
    rows: Rows = [
        ("solver", "nodes", "iterations", "spacing", "score ± s.e.", "against `ddpm` [95 %]", "verdict")
    ]
    for row in report["rows"]:
        name = f"{row['solver']} (`{row['preset']}`)" if row["preset"] else row["solver"]
        about = (name, str(row["nodes"]), str(row["iterations"]), f"`{row['spacing']}`")
        rows.append((*about, score(row["score"]), *compared(row["difference_to_reference"])))
    return rows


@table("docs/reports/stopping.json")
def stopping(report: Report) -> Rows:
    rows: Rows = [("driver", "iterations", "error to the sequential plan, pixels")]
    for row in report["rows"]:
        rows.append((row["driver"], f"{row['iterations']:.1f}", number(row["error_px"]) or "another sample"))
    return rows


@table("docs/reports/digits.json")
def digits(report: Report) -> Rows:
    pixel = f"{report['largest_pixel_error']:g} of a range of {report['pixel_range']}"
    return [
        ("sampler", "images", "iterations", "largest error of a pixel to the sequential sample"),
        ("`ddpm`", f"{report['images']}", "100", "reference"),
        ("`paraddpm`", f"{report['images']}", f"{report['iterations']['paraddpm']:g}", pixel),
        (
            "`speculative`",
            f"{report['images']}",
            f"{report['iterations']['speculative']:g}",
            "another sample of the same distribution",
        ),
    ]


# --------------------------------------------------------------------------------- latency, deadlines


@table("docs/reports/latency.json")
def latency_plans(report: Report) -> Rows:
    def cells(row: Report) -> tuple[str, ...]:
        low, high = row["times_ddpm_quartiles"]
        return (
            f"{row['p50']:g} / {row['p99']:g}",
            f"{row['floor']:g}",
            f"{row['times_ddpm']:.1f} [{low:.1f}, {high:.1f}]",
            f"{row['times_ddim']:.1f}",
        )

    headings = ("ms p50 / p99", "floor, ms", "times DDPM-100 [quartiles]", "times DDIM-10")
    rows: Rows = [
        (
            "plan, one robot",
            *(f"{net}: {h}" if i == 0 else h for net in ("5.4 M", "65.8 M") for i, h in enumerate(headings)),
            "memory, MB",
        )
    ]
    for row in report["plans"]:
        name = row["plan"] if row["capture"] is None else f"`{row['plan']}`, {row['capture']}"
        memory = ", ".join(f"{row[net]['memory_mb']:.0f}" for net in ("shipped", "large"))
        rows.append((name, *cells(row["shipped"]), *cells(row["large"]), memory))
    return rows


@table("docs/reports/latency.json")
def latency_calls(report: Report) -> Rows:
    def cells(row: Report) -> tuple[str, ...]:
        low, high = row["times_eager_quartiles"]
        return f"{row['p50']:g}", f"{row['floor']:g}", f"{row['times_eager']:.1f} [{low:.1f}, {high:.1f}]"

    headings = ("ms p50", "floor, ms", "times eager [quartiles]")
    rows: Rows = [
        (
            "network call",
            "rows",
            *(f"{net}: {h}" if i == 0 else h for net in ("5.4 M", "65.8 M") for i, h in enumerate(headings)),
        )
    ]
    for row in report["calls"]:
        rows.append((row["call"], str(row["rows"]), *cells(row["shipped"]), *cells(row["large"])))
    return rows


@table("docs/reports/latency.json")
def latency_first_plan(report: Report) -> Rows:
    rows: Rows = [("network", "first start, s", "later starts, from the cache of compiled models, s")]
    for name, values in report["first_plan_s"].items():
        if name != "note":
            rows.append((name, *map(number, values)))
    return rows


@table("docs/reports/control.json")
def control(report: Report) -> Rows:
    rows: Rows = [
        (
            "planner",
            "ticks",
            "over a period",
            "missed",
            "deadline error, ms p50 / p99 / p99.9 / maximum",
            "a tick, µs p50 / p99",
            "plans per s",
            "plan latency, ms p50 / p99",
        )
    ]
    for row in report["rows"]:
        rows.append(
            (
                row["planner"],
                *(str(row[key]) for key in ("ticks", "over_a_period", "missed")),
                " / ".join(f"{value:.2f}" for value in row["deadline_error_ms"]),
                " / ".join(f"{value:.0f}" for value in row["tick_us"] or ()),
                number(row["plans_per_s"]),
                " / ".join(f"{value:.1f}" for value in row["plan_latency_ms"] or ()),
            )
        )
    return rows


@table("docs/reports/serve.json")
def serve(report: Report) -> Rows:
    one, many = report["one_client"], report["many_clients"]
    over = one["over_inference_ms"]
    return [
        ("clients", "requests", "result"),
        (
            "1",
            f"{one['requests']}",
            f"a round trip takes {over['p50']} ms (p50; p99 {over['p99']}) longer than the inference in it",
        ),
        (
            f"{many['clients']}, for {many['seconds']} s",
            f"{many['answers']:,}",
            f"{many['per_second']} answers per second, {many['per_batch']} a batch, {many['errors']} errors",
        ),
    ]


# --------------------------------------------------------------------------------- what latency costs


def lived(cell: Report) -> tuple[str, ...]:
    """A cell of an evaluation in real time, after its name and rate."""
    return (
        f"{cell['latency_ms']['p50']:g}",
        number(cell["delay_ticks"], ".1f"),
        score(cell["score"]),
        f"{cell['success_rate']:.0%}",
        f"{cell['fallback_share']:.0%}",
        *compared(cell["difference_to_unlimited"]),
    )


LIVED = (
    "plan latency, ms",
    "delay, ticks",
    "score ± s.e.",
    "success",
    "fallback active",
    "score against unlimited time [95 %]",
    "verdict",
)


@table(f"{PUSHT}/realtime/report.json")
def under_latency(report: Report) -> Rows:
    rows: Rows = [("case", "control, Hz", *LIVED)]
    rows += [(cell["case"], f"{cell['rate_hz']:g}", *lived(cell)) for cell in report["cases"]]
    return rows


@table(f"{PUSHT}/realtime/wall.json")
def at_the_real_rate(report: Report) -> Rows:
    rows: Rows = [
        ("case", "score ± s.e.", "success", "missed ticks", "against unlimited time [95 %]", "verdict")
    ]
    for cell in report["cases"]:
        about = (cell["case"], score(cell["score"]), f"{cell['success_rate']:.0%}", f"{cell['missed_ticks']}")
        rows.append((*about, *compared(cell["difference_to_unlimited"])))
    return rows


@table(f"{PUSHT}/realtime/report.json")
def blendings(report: Report) -> Rows:
    rows: Rows = [
        (
            "latency, ms",
            "blending",
            "score ± s.e.",
            "jump where chunks join, px p50 / p95",
            "jerk, px p50",
            "fallback active",
        )
    ]
    for cell in sorted(report["sweep"], key=lambda cell: cell["latency_ms"]["p50"]):
        jump = cell["jump_at_boundaries"]
        if jump["median"] is None or cell["latency_ms"]["p50"] == 100:  # the same delay as 12 ms
            continue
        rows.append(
            (
                f"{cell['latency_ms']['p50']:g}",
                f"`{cell['blending']}`",
                score(cell["score"]),
                f"{jump['median']:.0f} / {jump['p95']:.0f}",
                f"{cell['jerk']['median']:.1f}",
                f"{cell['fallback_share']:.0%}",
            )
        )
    return rows


# ------------------------------------------------------------------------------------------- robosuite


@table(*(f"checkpoints/{task}/report/report.json" for task in ROBOSUITE))
def robosuite(*reports: Report) -> Rows:
    rows: Rows = [
        (
            "task",
            "sampler",
            "success ± s.e.",
            "iterations",
            "NFE",
            "plan latency p50 / p99, ms",
            "times `ddpm`",
            "against `ddpm` [95 %]",
            "verdict",
        )
    ]
    for report in reports:
        slowest = report["samplers"]["ddpm"]["plan_latency_ms"]["p50"]
        for name, values in report["samplers"].items():
            latency = values["plan_latency_ms"]
            rows.append(
                (
                    f"{report['task'].capitalize()}, n = {n_seeds(report)}",
                    f"`{name}`",
                    score(values["score"]),
                    f"{values['iterations_per_plan']['mean']:.1f}",
                    f"{values['nfe_per_plan']['mean']:.0f}",
                    p50_p99(latency),
                    f"{slowest / latency['p50']:.1f}",
                    *compared(values["difference_to_reference"]),
                )
            )
    return rows


@table(*(f"checkpoints/{task}/realtime/report.json" for task in ROBOSUITE))
def under_latency_robosuite(*reports: Report) -> Rows:
    rows: Rows = [("task", "case", *LIVED)]
    for report in reports:
        for cell in report["cases"]:
            if cell["difference_to_unlimited"]:
                task = f"{report['task'].capitalize()}, n = {n_seeds(report)}"
                rows.append((task, f"`{cell['case']}`", *lived(cell)))
    return rows


@table("docs/reports/paradigms_paper.json", *(f"checkpoints/{task}/report/report.json" for task in ROBOSUITE))
def paradigms(paper: Report, *reports: Report) -> Rows:
    rows: Rows = [
        (
            "",
            "ParaDDPM: iterations, times DDPM-100",
            "ParaDDIM: iterations",
            "ParaDPMSolver: iterations",
            "`rti`: iterations, times DDPM-100",
        ),
        (
            f"ParaDiGMS: {', '.join(paper['tasks'])}",
            f"{paper['iterations']['ParaDDPM']}; {', '.join(map(number, paper['times_ddpm']))}",
            f"{paper['iterations']['ParaDDIM']}",
            f"{paper['iterations']['ParaDPMSolver']}",
            "",
        ),
    ]
    for report in reports:
        found = report["samplers"]
        slowest = found["ddpm"]["plan_latency_ms"]["p50"]
        taken = {name: values["iterations_per_plan"]["mean"] for name, values in found.items()}

        def times(name: str) -> str:
            return f"{taken[name]:.1f}; {slowest / found[name]['plan_latency_ms']['p50']:.1f}"  # noqa: B023

        parallel = (f"{taken['paraddim']:.1f}", f"{taken['paradpm_solver_pp']:.1f}")
        about = f"here: {report['task'].capitalize()}, n = {n_seeds(report)}"
        rows.append((about, times("paraddpm"), *parallel, times("rti")))
    return rows


@table("docs/reports/environments.json")
def environments(report: Report) -> Rows:
    rows: Rows = [("task", "control steps per second, median", "times robosuite's own step")]
    for row in report["rows"]:
        rows.append((row["task"], f"{row['steps_per_second']}", f"{row['times_robosuite']}"))
    return rows


@table("docs/reports/experts.json")
def experts(report: Report) -> Rows:
    rows: Rows = [("task", "episodes that succeeded", "of", "seconds to collect them")]
    for row in report["rows"]:
        time = ", ".join(filter(None, (number(row["seconds"]), row["note"])))
        rows.append((row["task"], f"{row['succeeded']}", f"{row['tried']}", time))
    return rows


# ----------------------------------------------------------------------------------------------- pages


@cache
def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def hashes(name: str) -> str:
    """The end of a table's first comment: its reports, and the weights that they are about."""
    reports, _ = TABLES[name]
    parts = [f"report {path} {sha256(ROOT / path)}" for path in reports]
    folders = dict.fromkeys(json.loads((ROOT / path).read_text()).get("checkpoint") for path in reports)
    for folder in filter(None, folders):
        weights = json.loads((ROOT / folder / "policy.json").read_text())["weights"]["file"]
        parts.append(f"weights {folder} {sha256(ROOT / folder / weights)}")
    return "".join(f" · {part}" for part in parts)


def markdown(name: str) -> str:
    """A table's lines, made from its reports."""
    reports, build = TABLES[name]
    headings, *rows = build(*(json.loads((ROOT / path).read_text()) for path in reports))
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: a table is unknown, or its weights changed and its reports didn't: they tell of
            other weights.
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


def stale() -> list[str]:
    """The pages whose tables aren't what the reports give."""
    return [str(page.relative_to(ROOT)) for page in pages() if renewed(page.read_text()) != page.read_text()]


def main(argv: Sequence[str]) -> int:
    if set(argv) - {"--check"}:
        print(__doc__)
        return 2
    found = stale()
    for name in found:
        if argv:
            print(f"{name}: a table is stale: run scripts/tables")
        else:
            page = ROOT / name
            page.write_text(renewed(page.read_text()))
            print(f"{name}: written")
    return 1 if found and argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
