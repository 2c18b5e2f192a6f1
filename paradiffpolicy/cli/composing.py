"""A command's config: its dataclass, the samplers, the task's file and the command line's overrides.

An override is read by Hydra's grammar, and verbatim where a setting is text.  Everything that is wrong
with one is said here, in one line: the setting, what was given, what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError, nearest
from ..files import exists, located, require_regular
from ..presets import presets, recipes
from ..registry import import_plugins
from .parts import TaskConfig
from .schema import SCHEMAS
from .settings import Setting, build, check, declarations, declared

LARGEST_TASK = 2**16
"""Bytes of a task's file, and values in it."""
OVERRIDE = re.compile(r"(?P<sign>~|\+{0,2})(?P<name>[^=+~\s][^=\s]*)(?:=(?P<value>.*))?", re.DOTALL)


def compose(command: str, overrides: list[str], **given: Any) -> Any:
    """The command's config, an object of its dataclass, with the overrides applied and checked.

    Args:
        given: values of settings, before the overrides.

    Raises:
        InputError: an override is malformed, or names or gives what doesn't exist or isn't allowed.
    """
    schema = SCHEMAS[command]
    known = declarations(schema)
    values = asdict(schema()) | given
    if "sampler" in known:
        values["sampler"] = presets()
    if "task" in known:
        tasks = [override.removeprefix("task=") for override in overrides if override.startswith("task=")]
        overrides = [override for override in overrides if not override.startswith("task=")]
        optional = type(None) in known["task"].types
        task = tasks[-1] if tasks else ("null" if optional else "pusht")
        values["task"] = None if optional and task == "null" else task_values(task)
    if command == "study":
        studies = [override.removeprefix("study=") for override in overrides if override.startswith("study=")]
        values = study_values(studies[-1] if studies else values["study"], values)
        overrides = [override for override in overrides if not override.startswith("study=")]
    if "recipe" in known:
        for recipe in (each.removeprefix("recipe=") for each in overrides if each.startswith("recipe=")):
            values = merged(values, recipes().get(recipe, values))
    for override in overrides:
        values = overridden(command, values, override)
    config = build(schema, resolved(values))
    import_plugins(config.plugins)
    check(config)
    return config


def overridden(command: str, values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A command's values, changed as an override says: ``NAME=VALUE``, ``+NAME=VALUE`` or ``~NAME``.

    Raises:
        InputError: it is malformed, names no setting, or gives what isn't allowed.
    """
    match = OVERRIDE.fullmatch(override)
    if match is None or (match["sign"] == "~") != (match["value"] is None):
        raise InputError(f"{override!r} is not an override: write NAME=VALUE, as seeds=10")

    def changed(node: Any, path: list[str]) -> dict[str, Any]:
        first, *rest = path
        if not isinstance(node, Mapping) or (
            first not in node and (rest or match["sign"] not in ("+", "++"))
        ):
            hint = nearest(match["name"], dotted_names(values))
            hint = hint if "did you mean" in hint else f": paradiffpolicy {command} --help lists them"
            raise InputError(f"{command} has no setting {match['name']!r}{hint}")
        if rest:
            return {**node, first: changed(node[first], rest)}
        if match["sign"] == "~":
            return {name: value for name, value in node.items() if name != first}
        setting = declared(SCHEMAS[command], match["name"])
        value = given_value(setting, match["value"])
        if value == {} and first in node and setting is not None and is_dataclass(setting.hint):
            return dict(node)  # a part has all of its settings, always
        return {**node, first: merged(node.get(first), value)}

    return changed(values, match["name"].split("."))


def given_value(setting: Setting | None, text: str) -> Any:
    """The value that an override's right side means; text, and a path, stays as it is."""
    if text == "null":
        return None
    if setting is None:
        return parsed(text)
    if setting.is_text:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] in "'\"" else text
    if setting.is_list and not text.startswith("${"):
        listed = text.startswith("[") and text.endswith("]")
        if not listed and setting.rule.path:
            return [text]
        value = parsed(text if listed else f"[{text}]")
        if isinstance(value, list):
            return value
        return [text] if setting.rule.path else text.strip("[]" * listed).split(",")
    if setting.is_text_or_dict and not text.startswith("{"):
        return text
    value = parsed(text)
    return {"name": value} if setting.is_named and isinstance(value, str) else value


def parsed(text: str) -> Any:
    """A plain value, by Hydra's grammar; what that can't read, or reads as several values, as it is."""
    try:
        override = _parser().parse_override(f"value={text}")
    except HydraException:
        return text
    return text if override.is_sweep_override() else override.value()


_parser = cache(OverridesParser.create)


def merged(old: Any, value: Any) -> Any:
    """Names and values over those that are there; nothing, as {}, in place of them."""
    if not (isinstance(old, Mapping) and isinstance(value, Mapping) and value):
        return value
    return {**old, **{name: merged(old.get(name), inner) for name, inner in value.items()}}


def resolved(values: Mapping[str, Any]) -> Any:
    """Plain values, with the values that ``${NAME}`` stands for.

    Raises:
        InputError: there is no such.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}")


def task_files() -> dict[str, Path]:
    """The shipped tasks' files, by name."""
    return config_files("task")


def config_files(kind: str) -> dict[str, Path]:
    """The shipped files of a kind, ``task`` or ``study``, by name."""
    folder = Path(str(resources.files("paradiffpolicy.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


@contextmanager
def config_file(kind: str, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The path and the values of a shipped file, or of any YAML file; what is wrong with them is said with
    the path.

    Raises:
        InputError: there is no such file, or it can't be read.
    """
    known = config_files(kind)
    path = known.get(name, Path(name).expanduser())
    if not path.is_file():
        raise InputError(f"unknown {kind} {name!r}{nearest(name, known)}; or a file, as {kind}=./mine.yaml")
    try:
        require_regular(path, LARGEST_TASK)
        require_small(yaml.safe_load(path.read_text(encoding="utf-8")))
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(values, dict):
            raise InputError("it must hold names and values, as name: reach")
        yield path, {str(key): value for key, value in values.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}")
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path} can't be read as YAML ({' '.join(str(error).split())})")


def task_values(task: str) -> dict[str, Any]:
    """A task's values: of a shipped task by name, or of any YAML file.

    A ``dataset`` or ``checkpoint`` with a relative path that isn't in the working folder is looked for beside
    the file.  Where several datasets are listed, the first that is there is the task's.

    Raises:
        InputError: there is no such task, or its file has a value that isn't allowed.
    """
    with config_file("task", task) as (path, values):
        values["dataset"] = first_there(values.get("dataset"), path.parent)
        content = asdict(build(TaskConfig, {"name": path.stem, **values}))
    for name in ("dataset", "checkpoint"):
        place = content[name]
        if place is not None and not Path(place).exists() and (path.parent / place).exists():
            content[name] = str(path.parent / place)
    return content


def study_values(study: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The study command's values, with those of a shipped study by name, or of any YAML file, over them.

    Raises:
        InputError: there is no such study, or its file has a value that isn't allowed.
    """
    with config_file("study", study) as (_, own):
        composed = merged(values, own) | {"study": study}
        return asdict(build(SCHEMAS["study"], composed))


def first_there(places: Any, folder: Path) -> Any:
    """The first of the listed paths that is there, also as seen from a folder, or else the first of them;
    what isn't a list of paths is given back."""
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        return places
    there = (place for place in places if exists(located(place)) or exists(folder / place))
    return next(there, places[0] if places else None)


def require_small(values: Any) -> None:
    """Raises ``InputError`` if YAML's aliases make more of a file than it can hold written out."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = 1 + sum(map(size, value.values() if isinstance(value, dict) else value))
        return sizes[id(value)]

    if size(values) > LARGEST_TASK:
        raise InputError(f"its aliases make {size(values):.2g} values of it: write it out")


def dotted_names(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of values, of values in them by dotted names."""
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from dotted_names(value, f"{prefix}{name}.")
