"""Diffusion policies in real time: parallel-in-time sampling inside a fixed-rate control loop.

::

    import paradiffpolicy as pdp

    policy = pdp.load_policy("checkpoints/pusht_keypoints")
    plan = policy.plan(observation)           # one plan, from a vector, a window or a dict
    actions = policy.session().plan(observation)  # in a loop of your own, with warm starts
    with pdp.Controller(policy, rate_hz=10) as controller:
        action = controller.tick(observation)  # at a fixed rate, planning beside the loop

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint as Checkpoint
    from .clock import MonotonicClock as MonotonicClock
    from .control.controller import Controller as Controller
    from .control.loop import ControlLoop as ControlLoop
    from .errors import InputError as InputError
    from .export.folder import export_policy as export_policy
    from .loading import load_policy as load_policy
    from .models.networks import NETWORKS as NETWORKS
    from .planning.blending import BLENDINGS as BLENDINGS
    from .planning.interpolation import INTERPOLATIONS as INTERPOLATIONS
    from .policy import Policy as Policy
    from .robots.env import EnvRobot as EnvRobot
    from .sampling.sample import NetworkSampler as NetworkSampler
    from .sampling.sample import sample as sample
    from .sampling.sampler import DRIVERS as DRIVERS
    from .sampling.solvers import SOLVERS as SOLVERS
    from .session import Session as Session

__version__ = "0.1.0"

PUBLIC = {
    "load_policy": "loading",
    "Policy": "policy",
    "Session": "session",
    "sample": "sampling.sample",
    "NetworkSampler": "sampling.sample",
    "Controller": "control.controller",
    "ControlLoop": "control.loop",
    "EnvRobot": "robots.env",
    "Checkpoint": "checkpoint",
    "export_policy": "export.folder",
    "InputError": "errors",
    "SOLVERS": "sampling.solvers",
    "DRIVERS": "sampling.sampler",
    "NETWORKS": "models.networks",
    "BLENDINGS": "planning.blending",
    "INTERPOLATIONS": "planning.interpolation",
    "PLANNERS": "planning",
    "ROBOTS": "robots",
}
"""Public names, and the module that each is in."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
