"""Measures how much of PushT's target recorded demonstrations cover, as the environment does.

python scripts/pusht_coverage.py DEMONSTRATIONS.zarr [OUT.json]      # a table of docs/train.md; a minute
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.envs.pusht import PushTEnv
from paradiffpolicy.envs.pusht_episodes import coverages
from paradiffpolicy.tables import pairs, publish


def measured(env: PushTEnv, episode: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """The coverage of an episode's last recorded state, the largest of all, and that after its last action,
    which isn't recorded: all actions are played again."""
    env.reset(options={"state": episode["state"][0]})
    for action in episode["action"]:
        env.step(action)
    covered = coverages(episode["state"])
    found = {"final": covered[-1], "largest": covered.max(), "replayed": env.coverage()}
    return {name: round(float(value), 4) for name, value in found.items()}


def main(path: str, out: str | None = None) -> None:
    """Measures every episode."""
    env, fields = PushTEnv(), ["state", "action"]
    with ReplayBuffer.open(path) as buffer:
        rows = [measured(env, buffer.episode(k, fields)) for k in range(buffer.n_episodes)]
        dataset = {"name": Path(path).name, "fingerprint": buffer.fingerprint(fields)}
    content = {"dataset": dataset, "episodes": rows}
    above = sum(row["replayed"] > 0.95 for row in rows)
    publish([pairs("", {"episodes": len(rows), "end above 95 %": above})], content, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
