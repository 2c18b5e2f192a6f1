"""What ``--help`` prints: each setting with its help text, choices and default."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from ..registry import Registry
from .parts import SamplersConfig, TaskedConfig
from .settings import Setting, settings_of, written

INDENT = 26
"""Columns of settings' names; a longer one has its text below."""


def width() -> int:
    """Columns to print in."""
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def entry(name: str, text: str, indent: int = INDENT) -> str:
    """A name, and its text beside it."""
    lines = textwrap.wrap(text, width() - indent - 2, break_on_hyphens=False, break_long_words=False) or [""]
    first = f"  {name:<{indent - 2}}  " if len(name) <= indent - 2 else f"  {name}\n{'':{indent + 2}}"
    return f"{first}{lines[0]}" + "".join(f"\n{'':{indent + 2}}{line}" for line in lines[1:])


def settings_help(config: Any) -> str:
    """Every setting of a command, under a heading for each part."""
    blocks = []
    for heading, settings in sections(config):
        lines = [
            entry(shown(f"{setting.name}={written(setting.value)}"), described(setting, config))
            for setting in settings
        ]
        blocks.append("\n".join([*textwrap.wrap(f"{heading.strip('.')}:", width()), *lines]))
    return "\n\n".join(blocks)


def sections(config: Any) -> Iterator[tuple[str, list[Setting]]]:
    """Headings with their settings: the command's own, those of its parts, those that it shares."""
    everything = {setting.name: setting for setting in settings_of(config)}
    seen: set[str] = set()
    for cls in type(config).__mro__[:-1]:
        own = [name for name in cls.__annotations__ if name not in seen]
        seen |= set(own)
        parts = [(name, getattr(config, name)) for name in own if is_dataclass(getattr(config, name))]
        if cls is SamplersConfig:
            yield f"{cls.__doc__} They are {', '.join(config.sampler)}", []
        elif simple := [everything[name] for name in own if name in everything]:
            yield "Settings" if cls is type(config) else str(cls.__doc__), simple
        for name, part in parts:
            inner = [setting for key, setting in everything.items() if key.startswith(f"{name}.")]
            yield str(type(part).__doc__ if cls is not TaskedConfig else cls.__doc__), inner


def described(setting: Setting, config: Any) -> str:
    """The help text, and the choices unless it explains each."""
    rule, text = setting.rule, setting.rule.help
    names = () if rule.choices is None else rule.choices(config)
    if isinstance(names, Registry) and names.kind == "sampler":
        return text
    explained = all(f"{name}:" in text for name in names)
    return text if explained else f"{text} [{' | '.join(names)}]"


def shown(text: str) -> str:
    """A setting with its default, cut off where the line ends."""
    room = min(width() - 2, 86)
    return text if len(text) <= room else f"{text[: room - 1]}…"
