"""Draws robomimic's tasks: their starts, and how the scripted experts finish them.

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
"""Each column's tasks, above and below; a task given twice is shown at its start and its end."""


def picture(name: str, done: bool) -> NDArray[np.uint8]:
    """The task's start, or just after the expert's success, when the hand is out of the way;
    ``[SIZE, SIZE, 3]``."""
    env = gymnasium.make(f"paradiffpolicy/{name}-v0", render_mode="rgb_array", render_size=SIZE)
    _, info = env.reset(seed=SEED)
    if done:
        expert = EXPERTS[name.lower()]()
        expert.begin(env, info, np.random.default_rng(SEED))
        any(env.step(expert.act(env))[2] for _ in range(N_STEPS))
        for _ in range(N_STEPS_AFTER):
            env.step(expert.act(env))
    drawn: NDArray[np.uint8] = env.render()  # type: ignore[assignment]
    env.close()
    return drawn


def main(path: str = "checkpoints/robosuite_tasks.png") -> None:
    figure, axes = plt.subplots(2, len(COLUMNS), figsize=(9, 4.9), layout="constrained")
    for column, (above, below) in enumerate(COLUMNS):
        same = above == below
        axes[0, column].imshow(picture(above, False))
        axes[0, column].set_title(above, fontsize=11)
        axes[1, column].imshow(picture(below, same))
        axes[1, column].set_title("done by the expert" if same else below, fontsize=9 if same else 11)
        for axis in axes[:, column]:
            axis.axis("off")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
