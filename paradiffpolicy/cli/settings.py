"""Settings: declared in dataclasses with a help text, choices and a range, and checked here alone."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import importlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LARGEST, InputError, is_number, nearest
from ..files import require_writable
from ..registry import Registry

Choices = Callable[[Any], "Mapping[str, Any] | tuple[str, ...]"]
"""The names that a setting may have, given the whole config."""

MANDATORY = "???"
"""The default of what must be given."""


@dataclass(frozen=True)
class Rule:
    """What a setting is and may be.

    Attributes:
        help: one line for the command's ``--help``.
        choices: names that it may have; None: any.
        minimum, above, maximum, below: bounds of a number, or of every number in a list or dict.
        some: whether a list, or names and values, must hold something.
        suffixes: what a path may end in; empty: anything.
        path: whether text names a file or folder, where ``~/`` is the home folder.
        writes: "file" or "folder", if the command writes there.
        named: whether a name alone stands for ``{name: NAME}``.
        check: raises ``InputError`` unless it is such a text, or names and values fit together.
    """

    help: str = ""
    choices: Choices | None = None
    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = LARGEST
    below: float = math.inf
    some: bool = False
    suffixes: tuple[str, ...] = ()
    path: bool = False
    writes: str = ""
    named: bool = False
    check: Callable[[Any], object] | None = None

    def holds(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return self.minimum <= number <= self.maximum and self.above < number < self.below

    def range(self) -> str:
        """The bounds in words."""
        low = self.minimum if self.minimum > -math.inf else self.above
        if self.maximum != Rule.maximum:
            return f" from {low:g} to {self.maximum:g}" if low > -math.inf else f", at most {self.maximum:g}"
        if self.below < math.inf:
            return f", at least {low:g} and below {self.below:g}"
        if self.above > -math.inf or self.minimum == 1:
            return f" above {self.above if self.above > -math.inf else 0:g}"
        return f", {self.minimum:g} or above" if self.minimum > -math.inf else ""


def setting(default: Any, text: str, **rule: Any) -> Any:
    """A dataclass field with its default, its help text and what else ``Rule`` takes."""
    metadata = {"rule": Rule(text, **rule)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def path_setting(default: str | None, text: str) -> Any:
    """A file or folder that the command reads."""
    return setting(default, text, path=True)


def out_setting(default: str | None, text: str, *suffixes: str, writes: str = "folder") -> Any:
    """A file or folder that the command writes."""
    return setting(default, text, path=True, suffixes=suffixes, writes=writes)


def lazily(module: str, name: str) -> Any:
    """A function, or the content of a registry, of the package that is imported when it is called."""

    def call(argument: Any, **options: Any) -> Any:
        found = getattr(importlib.import_module(f"..{module}", __package__), name)
        return found(argument, **options) if callable(found) else found

    return call


def among(*names: str) -> Choices:
    """These names."""
    return lambda config: names


UNIONS = (typing.Union, types.UnionType)


class _MisfitError(Exception):
    """A value isn't of a type that a setting may have."""


@dataclass(frozen=True)
class Setting:
    """A setting in a config: its dotted name, annotation, rule and value."""

    name: str
    hint: Any
    rule: Rule
    value: Any = None

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that its value may have."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) in UNIONS else (self.hint,)

    @property
    def is_list(self) -> bool:
        """Whether it takes nothing but a list, or null."""
        return {typing.get_origin(hint) or hint for hint in self.types} <= {list, type(None)}

    @property
    def is_text(self) -> bool:
        """Whether it takes nothing but text, or null."""
        return set(self.types) <= {str, type(None)}

    @property
    def is_text_or_dict(self) -> bool:
        """Whether it takes text, or names and values, or null."""
        kinds = {typing.get_origin(hint) or hint for hint in self.types}
        return {str, dict} <= kinds <= {str, dict, type(None)}

    @property
    def is_named(self) -> bool:
        """Whether a name alone stands for ``{name: NAME}``."""
        return self.rule.named and typing.get_origin(self.hint) is dict

    def allowed(self, config: Any = None) -> str:
        """What it may be, in words."""
        words = [word for hint in self.types for word in self._words(hint, config)]
        return ", ".join(words[:-1]) + (", or " if len(words) > 1 else "") + words[-1]

    def _words(self, hint: Any, config: Any) -> list[str]:
        kind = typing.get_origin(hint) or hint
        if kind is str and self.rule.choices is not None:
            return list(self.rule.choices(config)) or ["text"]
        if kind is list:
            inner = replace(self, hint=typing.get_args(hint)[0])
            if is_dataclass(inner.hint):
                return ["a list, as [{key: state}]"]
            some = " of at least one" if self.rule.some else ""
            return [f"a list{some}, each entry {inner.allowed(config)}"]
        ending = f" that ends in {' or '.join(self.rule.suffixes)}" if self.rule.suffixes else ""
        words = {
            bool: "true or false",
            int: f"a whole number{self.rule.range()}",
            float: f"a number{self.rule.range()}",
            str: f"a path{ending}" if self.rule.path else "text",
            type(None): "null",
        }
        return [words.get(kind, "names and values, as {name: latest}")]

    def checked(self, config: Any = None) -> Any:
        """Its value, of the annotated type.

        Args:
            config: whose choices it is one of; None: choices aren't looked at.

        Raises:
            InputError: it is of another type, out of range or none of the choices; or something in it is.
        """
        try:
            return self._as_any(config)
        except _MisfitError:
            raise InputError(f"{self.name}={written(self.value)} must be {self.allowed(config)}")

    def _as_any(self, config: Any) -> Any:
        """Its value, of the first type that it fits."""
        for hint in self.types:
            with contextlib.suppress(_MisfitError):
                return self._as(hint, config)
        raise _MisfitError

    def _as(self, hint: Any, config: Any) -> Any:
        value, kind, inner = self.value, typing.get_origin(hint) or hint, typing.get_args(hint)
        if kind in UNIONS:  # of a list's entries
            return replace(self, hint=hint)._as_any(config)
        if is_dataclass(kind) and (isinstance(value, dict) or is_dataclass(value)):
            return build(hint, value, f"{self.name}.", config)
        if kind is list and isinstance(value, list) and len(value) >= self.rule.some:
            if is_dataclass(inner[0]):
                parts = enumerate(value)
                return [
                    replace(self, name=f"{self.name}[{k}]", hint=inner[0], value=v).checked(config)
                    for k, v in parts
                ]
            return [replace(self, value=entry)._as(inner[0], config) for entry in value]
        if kind is dict and isinstance(value, dict) and len(value) >= self.rule.some:
            return self._entries(value, inner[1], config)
        if kind is str and isinstance(value, str):
            return self._text(value, config)
        number = kind in (int, float) and is_number(value) and isinstance(value, int | kind)
        if number and self.rule.holds(value):
            return kind(value)
        if kind is Any or (kind in (bool, type(None)) and isinstance(value, kind)):
            return value
        raise _MisfitError

    def _entries(self, value: Mapping[Any, Any], hint: Any, config: Any) -> dict[str, Any]:
        if hint is Any:
            self._whole(value, config)
        return {
            str(key): replace(self, name=f"{self.name}.{key}", hint=hint, value=entry).checked(config)
            for key, entry in value.items()
        }

    def _whole(self, value: Any, config: Any) -> None:
        if self.rule.check is not None and config is not None:
            try:
                self.rule.check(value)
            except InputError as error:
                line = str(error)
                raise InputError(line if line.startswith(self.name) else f"{self.name}: {line}")

    def _text(self, value: str, config: Any) -> str:
        names = None if self.rule.choices is None or config is None else self.rule.choices(config)
        if names is not None and value not in names:
            if {int, float} & set(self.types):
                raise _MisfitError
            last = self.name.split(".")[-1].removesuffix("s" * self.is_list)
            kind = names.kind if isinstance(names, Registry) else last
            raise InputError(f"{self.name}: unknown {kind} {value!r}{nearest(value, names)}")
        self._whole(value, config)
        if not self.rule.path:
            return value
        if not value or not value.endswith(self.rule.suffixes or ("",)):
            raise _MisfitError
        path = os.path.expanduser(value)  # noqa: PTH111  keeps ./ and a slash at the end
        try:
            os.lstat(path)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
                raise InputError(
                    f"{self.name}={value[:40]!r}: no file can have such a name ({error.args[-1]})"
                )
        return path


def _declarations(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass by name, with its defaults."""
    hints, found = typing.get_type_hints(cls), {}
    for entry in fields(cls):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        found[entry.name] = Setting(entry.name, hints[entry.name], entry.metadata["rule"], default)
    return found


declarations: Callable[[Any], dict[str, Setting]] = functools.cache(_declarations)


def build(cls: type, values: Any, prefix: str = "", config: Any = None) -> Any:
    """An object of a dataclass, from plain values or from another object, with every value checked.

    Raises:
        InputError: a value is missing, unknown or isn't allowed; the message has its dotted name.
    """
    values, known = values if isinstance(values, dict) else vars(values), declarations(cls)
    for key in values:
        if key not in known:
            where = f"{prefix[:-1]} has" if prefix else "there is"
            raise InputError(f"{where} no setting {key!r}{nearest(str(key), known)}")
    built = {}
    for name, each in known.items():
        value = values[name] if name in values else copy.deepcopy(each.value)
        if value == MANDATORY:
            raise InputError(f"{prefix}{name} must be given")
        built[name] = replace(each, name=prefix + name, value=value).checked(config)
    return cls(**built)


def check(config: Any) -> None:
    """Raises ``InputError`` unless every setting is one of its choices and within its bounds."""
    build(type(config), config, config=config)


def require_outputs(config: Any) -> None:
    """Raises ``InputError`` if the command couldn't write to a place that a setting names."""
    for each in settings_of(config):
        if each.rule.writes and each.value is not None:
            path = Path(each.value)
            if each.rule.writes == "file" and path.is_dir():
                raise InputError(f"{each.name}={path} is a folder: name a file")
            require_writable(**{each.name: path / "content" if each.rule.writes == "folder" else path})


def declared(hint: Any, name: str, rule: Rule | None = None) -> Setting | None:
    """The setting that a dotted name means in a config's dataclass; None: there is no such."""
    own = Setting(name, hint, rule or Rule())
    first, _, rest = name.partition(".")
    for inner in own.types:
        if is_dataclass(inner) and first in declarations(inner):
            found = declarations(inner)[first]
        elif typing.get_origin(inner) is dict or inner is Any:
            found = replace(own, hint=(*typing.get_args(inner), Any)[1] if inner is not Any else Any)
        else:
            continue
        return declared(found.hint, rest, found.rule) if rest else replace(found, name=first)
    return None


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config object, those of its parts by dotted names."""
    for name, each in declarations(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield replace(each, name=prefix + name, value=value)


def written(value: Any, inside: bool = False) -> str:
    """A value as one writes it on the command line."""
    if is_dataclass(value):
        value = {name: inner for name, inner in vars(value).items() if inner not in (None, "")}
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(written(inner, True) for inner in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(inner, True)}" for key, inner in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    plain = not inside or not isinstance(value, str) or re.fullmatch(r"[\w./:${}-]+", value)
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
