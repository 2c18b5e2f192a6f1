"""The project's shape: packages are listed, imports point one way."""

from __future__ import annotations

import ast
import tomllib

import pytest

from .conftest import ROOT

LAYERS = [
    ["errors", "files", "registry", "clock", "history", "process"],
    [
        *("types", "task", "data", "presets", "tables", "provenance"),
        *("environment", "recorded_env", "disturbances", "envs"),
    ],
    ["diffusion", "models"],
    ["sampling"],
    ["checkpoint"],
    ["interchange"],
    ["observation"],
    ["conditioning"],
    ["policy", "session"],
    ["calibration"],
    ["loading"],
    ["planning", "training", "export"],
    ["control", "robots"],
    ["serving", "telemetry"],
    ["benchmarks"],
    ["evaluation"],
    ["study"],
    ["collection"],
    ["cli", "__main__"],
]
"""Rooms of the house, from the ground up: each imports only from its own floor and those below."""

FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
NO_ENVIRONMENTS = ("data", "diffusion", "models", "sampling", "checkpoint", "policy", "training", "serving")
"""Rooms that never import an environment."""


def own_modules():
    """``(dotted name, path)`` of every module, environments included."""
    for top, prefix in (("paradiffpolicy", ()), ("envs", ("envs",))):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / top).with_suffix("").parts)
            if prefix or parts[0] not in ("envs", "configs", "checkpoints", "__init__"):
                yield parts, path


def imported(parts: tuple[str, ...], tree: ast.AST) -> set[str]:
    """Dotted names within the package that a module imports: relative and absolute, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("paradiffpolicy", *parts)[: len(parts) + 1 - node.level] if node.level else ()
            where = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {f"{where}.{alias.name}" for alias in node.names}
    return {name.removeprefix("paradiffpolicy.") for name in names if name.startswith("paradiffpolicy.")}


MODULES = dict(own_modules())


@pytest.mark.parametrize("parts", MODULES, ids=".".join)
def test_imports_point_one_way(parts):
    room = parts[0]
    assert room in FLOOR, f"{room} has no floor: add it to LAYERS"
    for name in imported(parts, ast.parse(MODULES[parts].read_text())):
        other = name.split(".")[0]
        if other in FLOOR:
            assert FLOOR[other] <= FLOOR[room], f"{'.'.join(parts)} imports {name}"
        assert not (other == "envs" and room in NO_ENVIRONMENTS), f"{'.'.join(parts)} imports {name}"
        assert room != "envs" or other == "envs", f"{'.'.join(parts)} imports {name}"


def test_the_test_of_imports_sees_all_of_them():
    code = """
from ..errors import InputError
import paradiffpolicy.cli.main
def late():
    from ... import policy
    from paradiffpolicy.envs import pusht
"""
    found = imported(("data", "formats", "store"), ast.parse(code))
    assert found == {"data.errors.InputError", "cli.main", "policy", "envs.pusht"}


def test_no_class_name_means_two_things():
    names: dict[str, list[str]] = {}
    for parts, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(".".join(parts))
    assert {name: where for name, where in names.items() if len(where) > 1} == {}


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
    assert listed == found | {"paradiffpolicy.checkpoints"}


def test_what_stands_at_the_top_level_is_linked_from_the_package():
    for name in ("envs", "configs", "checkpoints"):
        link = ROOT / "paradiffpolicy" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
