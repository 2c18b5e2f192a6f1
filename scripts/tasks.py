"""The picture of robomimic's tasks: how they begin, and how the scripted experts leave them.

python scripts/tasks.py [checkpoints/robosuite_tasks.png]
"""

from __future__ import annotations

import sys

import gymnasium
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import paradiffpolicy.envs  # noqa: F401  registers them
from paradiffpolicy.envs.robosuite.experts import EXPERTS

SIZE, SEED, N_STEPS, N_STEPS_AFTER = 256, 3, 400, 12
COLUMNS = (("Lift", "Lift"), ("Can", "Can"), ("Square", "Square"), ("Transport", "ToolHang"))
"""The tasks above and below; the same one twice: its start and its end."""


def start(name: str) -> NDArray[np.uint8]:
    """``[SIZE, SIZE, 3]``."""
    env = gymnasium.make(f"paradiffpolicy/{name}-v0", render_mode="rgb_array", render_size=SIZE)
    env.reset(seed=SEED)
    picture: NDArray[np.uint8] = env.render()  # type: ignore[assignment]
    env.close()
    return picture


def end(name: str) -> NDArray[np.uint8]:
    """A moment after the expert has succeeded, when the hand is out of the way, ``[SIZE, SIZE, 3]``."""
    env = gymnasium.make(f"paradiffpolicy/{name}-v0", render_mode="rgb_array", render_size=SIZE)
    expert = EXPERTS[name.lower()]()
    _, info = env.reset(seed=SEED)
    expert.begin(env, info, np.random.default_rng(SEED))
    done = any(env.step(expert.act(env))[2] for _ in range(N_STEPS))
    for _ in range(N_STEPS_AFTER if done else 0):
        env.step(expert.act(env))
    picture: NDArray[np.uint8] = env.render()  # type: ignore[assignment]
    env.close()
    return picture


def main(path: str = "checkpoints/robosuite_tasks.png") -> None:
    figure, axes = plt.subplots(2, len(COLUMNS), figsize=(9, 4.9), layout="constrained")
    for column, (above, below) in enumerate(COLUMNS):
        same = above == below
        axes[0, column].imshow(start(above))
        axes[0, column].set_title(above, fontsize=11)
        axes[1, column].imshow(end(below) if same else start(below))
        axes[1, column].set_title("done by the expert" if same else below, fontsize=9 if same else 11)
        for axis in axes[:, column]:
            axis.axis("off")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
