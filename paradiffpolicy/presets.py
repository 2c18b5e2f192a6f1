"""Sampler presets and training recipes by name, as the command line has them (``configs/*.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from .errors import InputError, nearest


@cache
def _content(file: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((files("paradiffpolicy.configs") / file).read_text()))


def presets() -> Mapping[str, Mapping[str, Any]]:
    """Every preset: its settings, as the config has them."""
    return dict(_content("samplers.yaml")["sampler"])


def recipes() -> Mapping[str, Mapping[str, Any]]:
    """Every recipe: settings of ``paradiffpolicy train``, by part."""
    return _content("recipes.yaml")


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as ``sampling.sampler.make_sampler`` takes them.

    >>> preset("ddim")
    {'solver': 'ddim', 'n_steps': 15, 'driver': 'sequential'}

    Raises:
        InputError: there is none of that name.
    """
    if not isinstance(name, str) or name not in presets():
        raise InputError(f"unknown sampler {name!r}{nearest(str(name), presets())}")
    return {key: value for key, value in presets()[name].items() if key != "checkpoint"}
