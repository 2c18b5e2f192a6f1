"""Planning beside the control loop."""

from __future__ import annotations

from ..registry import Registry
from .inline import InlinePlanner
from .process import ProcessPlanner
from .request import MakePlanner
from .thread import ThreadPlanner

PLANNERS: Registry[MakePlanner] = Registry(
    "planner", {"inline": InlinePlanner, "thread": ThreadPlanner, "process": ProcessPlanner}
)
"""Where plans are made, by name: ``PLANNERS.register("mine", make)``, with ``make(policy, generator,
clock)``."""
