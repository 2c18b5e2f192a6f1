"""robosuite's environments, made once per session: each takes a second, and resets forget all that came
before (``test_stepping`` shows it)."""

from __future__ import annotations

import functools

from paradiffpolicy.envs.robosuite.env import RobosuiteEnv


@functools.cache
def shared_env(task: str, action_type: str = "absolute") -> RobosuiteEnv:
    """The session's environment; reset it before use, and leave it open."""
    return RobosuiteEnv(task, action_type)
