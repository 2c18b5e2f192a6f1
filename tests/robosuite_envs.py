"""robosuite's environments, made once per session: each takes a second, and resets forget all that came
before (``test_stepping`` shows it)."""

from __future__ import annotations

import functools
import gc
import os
import sys

import numpy as np

from paradiffpolicy.envs.robosuite.camera import MissingGLError
from paradiffpolicy.envs.robosuite.env import RobosuiteEnv


@functools.cache
def shared_env(task: str, action_type: str = "absolute") -> RobosuiteEnv:
    """The session's environment; reset it before use, and leave it open."""
    gc.freeze()  # robosuite collects garbage when one is closed: not among what the session has imported
    return RobosuiteEnv(task, action_type)


def deltas(env, n, seed=0):
    """Random actions ``[n, A]``."""
    return np.random.default_rng(seed).uniform(-1, 1, (n, env.action_space.shape[0]))


def episode_and_picture():
    """States after a few random actions in Lift; what was loaded of OpenGL until then; why a picture can't be
    drawn with each of the variables for it; and a picture without them, if it can be drawn.

    Another process imports only this module for it.
    """
    env = shared_env("lift", "delta")
    env.reset(seed=7)
    for action in deltas(env, 15):
        *_, info = env.step(action)
    loaded, reasons = sorted({"OpenGL", "mujoco.egl", "mujoco.osmesa"} & set(sys.modules)), {}
    for name in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", ""):
        try:
            picture = env.picture(96)
            break
        except MissingGLError as error:
            reasons[name], picture = str(error), None
        os.environ.pop(name, None)
    return info["states"], loaded, reasons, picture
