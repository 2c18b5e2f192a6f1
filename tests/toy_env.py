"""An environment that starts in no time, and ways for it to fail.  Its own module, without torch, so that
a process that makes one starts quickly."""

from __future__ import annotations

import os
import signal
import sys
import threading

import gymnasium
import numpy as np
from gymnasium import spaces

from paradiffpolicy.disturbances import disturbed
from paradiffpolicy.errors import InputError


class AwkwardError(Exception):
    """Pickling makes another of it."""

    def __init__(self, text: str) -> None:
        super().__init__(f"awkward: {text}")


class ToyEnv(gymnasium.Env):
    """A random walk ``[20]``; it reuses its arrays and its info, as environments may.

    Args:
        fault: of ``step`` from the tenth on: "input", "value", "awkward", "exit", "kill", "hang".
    """

    observation_space = spaces.Box(-np.inf, np.inf, (20,))
    action_space = spaces.Box(0, 512, (2,))
    n_open = 0

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.info = {"steps": 0, "pid": os.getpid()}
        self.canvas = np.zeros((2, 2, 3), np.uint8)
        ToyEnv.n_open += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(0, 512, 20)
        # Even seeds come to an end that depends on the seed, every fourth by truncation.
        self.end, self.truncates = (5 + seed % 7 if seed % 2 == 0 else 1000), seed % 4 == 0
        self.info |= {"steps": 0, "state": self.state, "torch": "torch" in sys.modules, "open": ToyEnv.n_open}
        return self.state, self.info

    def step(self, action):
        self.info["steps"] += 1
        if self.info["steps"] >= 10:
            self.fail()
        self.state += self.np_random.normal(size=20) + action.sum() / 1000
        action[:] = 0
        self.info["open"] = ToyEnv.n_open
        over = self.info["steps"] >= self.end
        return (
            self.state,
            np.float32(self.state[0]),
            over and not self.truncates,
            over and self.truncates,
            self.info,
        )

    def fail(self):
        if self.fault == "input":
            raise InputError("the toy is broken: repair it")
        if self.fault == "value":
            raise ValueError("no such value")
        if self.fault == "awkward":
            raise AwkwardError("toy")
        if self.fault == "exit":
            sys.exit(3)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            os.write(1, b"hanging\n")
            threading.Event().wait()

    def close(self):
        ToyEnv.n_open -= 1


def disturbed_toy() -> gymnasium.Env:
    strengths = {"action_noise": 0.02, "dropped_observations": 0.3, "observation_delay": 1}
    return disturbed(ToyEnv(), strengths)


class ToyExpert:
    """A demonstrator that acts at random; it reuses its action."""

    def begin(self, env, info, rng):
        self.rng, self.action = rng, np.zeros(2)
        return info

    def act(self, env):
        self.action[:] = self.rng.uniform(0, 512, 2)
        return self.action


def picture(env: gymnasium.Env) -> np.ndarray:
    env = env.unwrapped
    env.canvas[:] = env.state[:12].reshape(2, 2, 3) % 256
    return env.canvas
