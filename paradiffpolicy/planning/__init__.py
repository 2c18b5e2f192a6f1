"""Planning beside the control loop."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

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


def planner_beside(name: str, loop_cores: Sequence[int] | None) -> MakePlanner:
    """A planner by name.  One in a process leaves the cores that the loop is bound to alone, if there are
    others: what it computes there would drive the loop's code and data from the core's caches."""
    make = PLANNERS.named(name)
    if make is not ProcessPlanner or not loop_cores or not hasattr(os, "sched_getaffinity"):
        return make
    others = sorted(os.sched_getaffinity(0) - set(loop_cores))
    return functools.partial(ProcessPlanner, cores=others) if others else make
