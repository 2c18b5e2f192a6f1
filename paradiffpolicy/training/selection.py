"""Weights of demonstrations, and where they are cut, by name; users register their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data.selection import Trim

WEIGHTS: Registry[Callable[..., Any]] = Registry("weights", {})
"""Each is a ``data.selection.Weigh`` that may take options by name; the command line adds its tasks'."""
TRIMS: Registry[Trim] = Registry("trim", {})
"""Each says how many steps of an episode are kept; the command line adds its tasks'."""
