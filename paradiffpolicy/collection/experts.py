"""Scripted experts by name; own ones are registered."""

from __future__ import annotations

from collections.abc import Callable

from ..envs.robosuite import experts
from ..registry import Registry
from .demonstrators import Demonstrator

EXPERTS: Registry[Callable[[], Demonstrator]] = Registry("expert", experts.EXPERTS)
"""Every scripted expert: a function that makes one, for ``task.expert``."""
