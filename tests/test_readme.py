"""The README is true: its code runs, its file tree is the repository's, its numbers are the report's."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from .conftest import ROOT, SHIPPED

README = (ROOT / "README.md").read_text()
REPORT = json.loads((SHIPPED / "report" / "report.json").read_text())
ROBOMIMIC = {"lift": 0.98, "can": 0.9, "square": 0.7}
"""Success that sequential DDPM must have."""
REALTIME = json.loads((SHIPPED / "realtime" / "report.json").read_text())


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_code_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_the_file_tree_names_every_file():
    tree = README.split("## The files")[1]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for path in tracked:
        name = path.rsplit("/", 1)[-1]
        if name == "__init__.py" or name.endswith((".safetensors", ".png")):
            continue
        assert name.removesuffix(".yaml").removesuffix(".py") in tree, f"{path} is not in the README's tree"


def assert_scored(values, row):
    """A row has the report's score and rounds, and the comparison if there is one."""
    assert f"| {values['iterations_per_plan']['mean']:.1f} |" in row
    assert_compared(values["score"], values["difference_to_reference"], row)


def assert_lived(cell, row):
    """A row has the report's score where the world didn't wait, and the comparison if there is one."""
    assert f"| {cell['fallback_share']:.0%} |" in row
    assert_compared(cell["score"], cell["difference_to_unlimited"], row)


def assert_compared(score, difference, row):
    assert f"| {score['mean']:.3f} ± {score['standard_error']:.3f} |" in row
    if difference:
        low, high = difference["interval_95"]
        assert f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]" in row
        assert difference["verdict"] in row


@pytest.mark.parametrize("name", REPORT["samplers"])
def test_the_table_is_the_report(name):
    values = REPORT["samplers"][name]
    (row,) = re.findall(rf"^\| `{name}` .*±.*$", README, flags=re.M)
    assert_scored(values, row)


@pytest.mark.parametrize("task", ROBOMIMIC)
def test_the_tables_of_robomimics_tasks_are_the_reports(task):
    report = json.loads((ROOT / "checkpoints" / task / "report" / "report.json").read_text())
    n_seeds = report["seeds"][1] - report["seeds"][0] + 1
    for name, values in report["samplers"].items():
        (row,) = re.findall(rf"^\| {task.capitalize()}, {n_seeds} seeds \| `{name}` .*$", README, flags=re.M)
        latency = values["plan_latency_ms"]
        assert f"| {latency['p50']:.0f} / {latency['p99']:.0f} |" in row
        assert_scored(values, row)


@pytest.mark.parametrize("task", ROBOMIMIC)
def test_the_table_of_latencies_of_robomimics_tasks_is_the_reports(task):
    report = json.loads((ROOT / "checkpoints" / task / "realtime" / "report.json").read_text())
    for cell in report["cases"]:
        if cell["difference_to_unlimited"]:
            (row,) = re.findall(rf"^\| {task.capitalize()} \| `{cell['case']}` \|.*$", README, flags=re.M)
            assert f"| {cell['latency_ms']['p50']:.0f} | {cell['delay_ticks']:.0f} |" in row
            assert_lived(cell, row)


@pytest.mark.parametrize(("task", "wanted"), ROBOMIMIC.items())
def test_the_shipped_policies_of_robomimics_tasks_are_what_the_project_promises(task, wanted):
    """At most 12 MB; success of sequential DDPM over at least 50 fresh seeds."""
    folder = ROOT / "checkpoints" / task
    assert sum(f.stat().st_size for f in folder.glob("weights-*")) <= 12e6
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["seeds"][1] - report["seeds"][0] + 1 >= 50
    assert report["samplers"]["ddpm"]["score"]["mean"] >= wanted


@pytest.mark.parametrize(
    "cell", REALTIME["cases"], ids=lambda cell: f"{cell['case']}, {cell['rate_hz']:g} Hz"
)
def test_the_table_of_latencies_is_the_report(cell):
    (row,) = re.findall(rf"^\| {cell['case']} \| {cell['rate_hz']:g} \|.*$", README, flags=re.M)
    assert_lived(cell, row)


def test_the_shipped_policy_is_what_the_project_promises():
    """At most 12 MB; sequential DDPM at least 0.92 over 50 seeds; ParaDDPM and speculation equivalent
    within 0.05; rounds per plan; by the report that lies beside the weights."""
    assert sum(f.stat().st_size for f in SHIPPED.glob("weights-*")) <= 12e6
    samplers = REPORT["samplers"]
    assert REPORT["seeds"][1] - REPORT["seeds"][0] + 1 >= 50
    assert samplers["ddpm"]["score"]["mean"] >= 0.92
    for name in ("paraddpm", "speculative"):
        assert samplers[name]["difference_to_reference"]["verdict"] == "equivalent within 0.05"
    for name, iterations in {
        "paraddpm": 10,
        "speculative": 10,
        "paraddim": 5,
        "paradpm_solver_pp": 5,
    }.items():
        assert samplers[name]["iterations_per_plan"]["mean"] <= iterations
