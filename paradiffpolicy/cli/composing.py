"""A command's config: its dataclass, the samplers, the task's file and the command line, composed by Hydra.

Everything that is wrong with a setting is said here, in one line: the setting, what was given, what is
allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ..errors import InputError, nearest
from ..presets import presets
from ..registry import import_plugins
from .parts import TaskConfig
from .schema import SCHEMAS
from .settings import declared, settings_of

STORE = ConfigStore.instance()


def compose(command: str, overrides: list[str]) -> Any:
    """The command's config, an object of its dataclass, with the overrides applied and checked.

    Raises:
        InputError: an override is malformed, or names or gives what doesn't exist or isn't allowed.
    """
    schema = SCHEMAS[command]
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("task=")]
    given = [as_override(schema, override) for override in overrides if not override.startswith("task=")]
    shared: dict[str, Any] = {}
    if declared(schema, "sampler"):
        shared["sampler"] = dict(presets())
    task = chosen[-1] if chosen else "pusht"
    if declared(schema, "task") and task != "null" and (chosen or command != "convert"):
        shared["task"] = task_node(task)
    STORE.store(group="shared", name="chosen", node=shared, package="_global_")
    name = "convert_for_task" if command == "convert" and shared else command.replace(" ", "_")
    with initialize(config_path=None, version_base="1.3"):
        try:
            node = hydra_compose(name, ["+shared=chosen", *given])
            OmegaConf.resolve(node)
            config: Any = OmegaConf.to_object(node)
            for setting in settings_of(config):
                if setting.rule.entries is not None:
                    for key, entry in setting.value.items():
                        setting.value[key] = typed(setting.rule.entries, entry, f"{setting.name}.{key}")
        except (HydraException, OmegaConfBaseException) as error:
            defaults = OmegaConf.merge(OmegaConf.structured(schema), shared)
            raise InputError(_error_line(command, given, error, defaults))
    import_plugins(config.plugins)
    check(config)
    return config


def check(config: Any) -> None:
    """Raises ``InputError`` unless every setting is one of its choices and within its bounds."""
    for setting in settings_of(config):
        setting.check(config)


def typed(cls: type, values: Any, name: str) -> Any:
    """An object of a dataclass from plain values.

    Raises:
        InputError: a value is missing, unknown or of another type; ``name`` says where.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except ConfigKeyError as error:
        raise InputError(_unknown(name, cls, error))
    except OmegaConfBaseException as error:
        raise InputError(f"{name}: {_setting_line(cls, error, '') or str(error).splitlines()[0]}")


def as_override(schema: type, text: str) -> str:
    """An argument as Hydra takes it: one value for a list is a list of one.

    Raises:
        InputError: it is not NAME=VALUE.
    """
    if text.startswith("~"):
        return text
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r} is not an override: write NAME=VALUE, as seeds=10")
    setting = declared(schema, name)
    if setting is not None and setting.is_list and value != "null" and not value.startswith(("[", "$")):
        return f"{name}=[{value}]"
    if name.split(".")[-1] == "blending" and setting is not None and value.isidentifier():
        return f"{name}.name={value}"
    return text


def task_files() -> dict[str, Path]:
    """The shipped tasks' files, by name."""
    folder = Path(str(resources.files("paradiffpolicy.configs"))) / "task"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def task_node(task: str) -> DictConfig:
    """A task's values: of a shipped task by name, or of any YAML file.

    A ``dataset`` or ``checkpoint`` with a relative path that isn't in the working folder is looked for beside
    the file.

    Raises:
        InputError: there is no such task, or its file has a value that isn't allowed.
    """
    known = task_files()
    path = known.get(task, Path(task).expanduser())
    if not path.is_file():
        raise InputError(f"unknown task {task!r}{nearest(task, known)}; or a file, as task=./mine.yaml")
    try:
        values = OmegaConf.load(path)
        if not isinstance(values, DictConfig):
            raise InputError(f"{path} must hold names and values, as name: reach")
        values.setdefault("name", path.stem)
        for name in ("dataset", "checkpoint"):
            place = OmegaConf.to_container(values).get(name)  # type: ignore[union-attr]
            if isinstance(place, str) and not Path(place).exists() and (path.parent / place).exists():
                values[name] = str(path.parent / place)
        node = OmegaConf.merge(OmegaConf.structured(TaskConfig), values)
    except ConfigKeyError as error:
        raise InputError(_unknown(str(path), TaskConfig, error))
    except OmegaConfBaseException as error:
        line = _setting_line(TaskConfig, error, "")
        raise InputError(f"{path}: {line or str(error).splitlines()[0]}")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} can't be read as YAML ({' '.join(str(error).split())})")
    assert isinstance(node, DictConfig)
    return node


def _error_line(command: str, overrides: list[str], error: Exception, defaults: Any) -> str:
    known = list(_names(defaults))
    for override in overrides:
        name = override.split("=")[0].lstrip("+~").split("@")[0]
        if not override.startswith("+") and name not in known:
            hint = nearest(name, known)
            hint = hint if "did you mean" in hint else f": paradiffpolicy {command} --help lists them"
            return f"{command} has no setting {name!r}{hint}"
    failed = next((override for override in overrides if override in str(error)), "")
    line = _setting_line(SCHEMAS[command], error, failed)
    return line or f"{command}: {str(error).splitlines()[0]}"


def _setting_line(schema: type, error: BaseException | None, override: str) -> str | None:
    """One line about the setting that an error of OmegaConf's is about."""
    while error is not None and not getattr(error, "full_key", None):
        error = error.__cause__
    if not isinstance(error, OmegaConfBaseException):
        return None
    name, _, given = override.lstrip("+").partition("=")
    key = str(error.full_key)
    setting = declared(schema, key)
    if setting is None and name and declared(schema, name):
        setting, key = declared(schema, name), name
    if isinstance(error, MissingMandatoryValue):
        return f"{key} must be given"
    if isinstance(error, ConfigKeyError) or setting is None:
        return str(error).splitlines()[0]
    value = given if key == name else error.value
    return f"{key}={'null' if value is None else value} must be {setting.allowed(None)}"


def _unknown(where: str, cls: type, error: ConfigKeyError) -> str:
    known = [entry.name for entry in fields(error.object_type or cls)]
    return f"{where} has no setting {error.full_key!r}{nearest(str(error.key), known)}"


def _names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in node.items_ex(resolve=False):
        yield f"{prefix}{key!s}"
        if isinstance(value, DictConfig):
            yield from _names(value, f"{prefix}{key!s}.")
