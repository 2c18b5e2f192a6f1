"""Settings: declared in dataclasses with a help text, choices and a range, and checked here alone."""

from __future__ import annotations

import copy
import importlib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ..errors import InputError, nearest
from ..registry import Registry

Choices = Callable[[Any], "Mapping[str, Any] | tuple[str, ...]"]
"""The names that a setting may have, given the whole config."""


@dataclass(frozen=True)
class Rule:
    """What a setting is and may be.

    Attributes:
        help: one line for the command's ``--help``.
        choices: names that it may have; None: any.
        minimum, above, maximum, below: bounds of a number, or of every number in a list or dict.
        kind: ``int`` or ``float`` where the annotation, for being ``Any``, doesn't say.
        entries: the dataclass of a dict's values.
    """

    help: str = ""
    choices: Choices | None = None
    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf
    kind: type | None = None
    entries: type | None = None

    def holds(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        inside = self.minimum <= number <= self.maximum and self.above < number < self.below
        return math.isfinite(number) and inside


def setting(default: Any, text: str, **rule: Any) -> Any:
    """A dataclass field with its default, its help text and what else ``Rule`` takes."""
    metadata = {"rule": Rule(text, **rule)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def listed(module: str, name: str) -> Choices:
    """The choices in a registry (or a tuple of names) of the package, imported when they are asked for."""

    def names(config: Any) -> Any:
        return getattr(importlib.import_module(f"..{module}", __package__), name)

    return names


def among(*names: str) -> Choices:
    """These names."""
    return lambda config: names


@dataclass(frozen=True)
class Setting:
    """A setting in a config: its dotted name, annotation, rule and value."""

    name: str
    hint: Any
    rule: Rule
    value: Any = None

    @property
    def optional(self) -> bool:
        """Whether it may be null."""
        return type(None) in typing.get_args(self.hint)

    @property
    def types(self) -> tuple[Any, ...]:
        """The types of its values, or of the values in its list."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        found = typing.get_args(self.hint) if union else (self.hint,)
        found = tuple(entry for entry in found if entry is not type(None))
        inner = [typing.get_args(entry)[-1] if typing.get_args(entry) else entry for entry in found]
        return (*inner, self.rule.kind) if self.rule.kind else tuple(inner)

    @property
    def is_list(self) -> bool:
        """Whether it takes a list."""
        hints = (self.hint, *typing.get_args(self.hint))
        return any(typing.get_origin(hint) is list for hint in hints)

    def allowed(self, config: Any) -> str:
        """What it may be, in words."""
        rule, words = self.rule, []
        if int in self.types or float in self.types:
            whole = "a number" if float in self.types else "a whole number"
            words.append(whole + _range(rule))
        elif bool in self.types:
            words.append("true or false")
        if rule.choices is not None:
            words += list(rule.choices(config))
        elif str in self.types:
            words.append("text")
        entry = self.name.endswith("]")
        if not words:
            words.append(
                "a list, as [{key: state}]" if self.is_list else "names and values, as {name: latest}"
            )
        elif self.is_list and not entry:
            words[0] = f"a list, each entry {words[0]}"
        words += ["null"] if self.optional and not entry else []
        return ", ".join(words[:-1]) + (", or " if len(words) > 1 else "") + words[-1]

    def check(self, config: Any) -> None:
        """Raises ``InputError`` unless its value, or each in its list or dict, is one of the choices and
        within the bounds."""
        numeric = int in self.types or float in self.types
        for value in _leaves(self.value):
            if isinstance(value, int | float) and not isinstance(value, bool):
                whole = float in self.types or isinstance(value, int)
                good = not numeric or (whole and self.rule.holds(value))
            elif isinstance(value, str) and self.rule.choices is not None:
                names = self.rule.choices(config)
                good = value in names
                if not good and not numeric:
                    last = self.name.split(".")[-1]
                    kind = (
                        names.kind if isinstance(names, Registry) else last.removesuffix("s" * self.is_list)
                    )
                    raise InputError(f"{self.name}: unknown {kind} {value!r}{nearest(value, names)}")
            else:
                good = value is None or self.rule.kind is None
            if not good:
                raise InputError(f"{self.name}={written(self.value)} must be {self.allowed(config)}")


def _range(rule: Rule) -> str:
    low = rule.minimum if rule.minimum > -math.inf else rule.above
    if rule.maximum < 2**53:
        return f" from {low:g} to {rule.maximum:g}"
    if rule.below < math.inf:
        return f", at least {low:g} and below {rule.below:g}"
    if rule.above > -math.inf or rule.minimum == 1:
        return " above 0"
    return f", {rule.minimum:g} or above" if rule.minimum > -math.inf else ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry)
    else:
        yield value


def declared(cls: type, name: str) -> Setting | None:
    """The setting that a dotted name means in a config's dataclass; None: there is no such."""
    first, _, rest = name.partition(".")
    first = first.partition("[")[0]
    found = next((entry for entry in fields(cls) if entry.name == first), None)
    if found is None:
        return None
    own = Setting(name, typing.get_type_hints(cls)[first], found.metadata.get("rule", Rule()))
    inner = next((entry for entry in own.types if is_dataclass(entry)), None)
    return declared(inner, rest) if rest and isinstance(inner, type) else own


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config object, those of its parts by dotted names."""
    hints = typing.get_type_hints(type(config))
    for entry in fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{name}.")
            continue
        yield Setting(name, hints[entry.name], entry.metadata.get("rule", Rule()), value)
        parts = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [])
        )
        for key, part in parts:
            if is_dataclass(part):
                yield from settings_of(
                    part, f"{name}.{key}." if isinstance(value, dict) else f"{name}[{key}]."
                )


def written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        value = {name: inner for name, inner in value.items() if inner not in (None, "")}
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
