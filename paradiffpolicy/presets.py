"""Sampler presets by name, as the command line has them (``configs/samplers.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from .errors import InputError, nearest


@cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Every preset: its settings, as the config has them."""
    import yaml

    content = yaml.safe_load((files("paradiffpolicy.configs") / "samplers.yaml").read_text())
    return dict(content["sampler"])


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
