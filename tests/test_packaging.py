"""The project's shape: packages are listed, imports point one way, a wheel works elsewhere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib

import pytest

from .conftest import ROOT, tiny_checkpoint

LAYERS = [
    ["errors", "files", "registry", "clock", "history"],
    ["types", "task", "data", "environment"],
    ["diffusion", "models"],
    ["sampling"],
    ["checkpoint"],
    ["policy", "provenance", "tables"],
    ["planning", "training"],
    ["control", "robots"],
    ["serving", "telemetry"],
    ["benchmarks"],
    ["evaluation"],
    ["collection"],
    ["cli", "__main__"],
]
"""Rooms of the house, from the ground up: each imports only from its own floor and those below."""

FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def own_files():
    package = ROOT / "paradiffpolicy"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] not in ("envs", "configs", "__init__"):
            yield parts, path


@pytest.mark.parametrize(("parts", "path"), list(own_files()), ids=lambda value: str(value))
def test_imports_point_one_way(parts, path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == len(parts) and node.module:
            room = node.module.split(".")[0]
            if room in FLOOR:
                assert FLOOR[room] <= FLOOR[parts[0]], f"{path} imports {room}"


def test_envs_know_nothing_of_the_rest():
    for path in (ROOT / "envs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), path


def test_every_package_is_listed():
    """Also the config groups: a folder that isn't listed is missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"paradiffpolicy"}
    for top in ("paradiffpolicy", "envs", "configs"):
        prefix = "" if top == "paradiffpolicy" else "paradiffpolicy."
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts:
                parts = path.parent.relative_to(ROOT).parts
                found.add(prefix + ".".join(parts))
    assert listed == {name for name in found if ".configs.configs" not in name}


def test_envs_and_configs_are_links_to_the_top_level():
    for name in ("envs", "configs"):
        link = ROOT / "paradiffpolicy" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


@pytest.mark.slow
def test_a_wheel_works_in_another_folder(tmp_path):
    """Built, unpacked, and run by itself: the code that runs is the wheel's."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    tiny_checkpoint().save(tmp_path / "tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import paradiffpolicy.envs.pusht as m; print(m.__file__)"
    # -P, and PYTHONPATH before the editable install's hook: nothing from the checkout.
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )

    assert python("-c", where).stdout.startswith(str(site))
    out = python(
        "-m",
        "paradiffpolicy",
        "evaluate",
        f"checkpoint={tmp_path / 'tiny'}",
        "samplers=[rti]",
        "reference=ddim",
        "seeds=1",
        "task.max_steps=16",
        "latency_plans=1",
        "paced_ticks=2",
        "out=report",
    ).stdout
    assert "rti" in out and (elsewhere / "report" / "rti.mp4").exists()
