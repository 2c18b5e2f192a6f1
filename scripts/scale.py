"""Measures what grows with processes and episodes: bytes that are moved, kept and written, and their time.

python scripts/scale.py [OUT.json]      # the figures of docs/scale.md; a minute on one core
"""

from __future__ import annotations

import itertools
import pickle
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import paradiffpolicy.envs  # noqa: F401  registers them
from paradiffpolicy.data.dataset import batch_windows
from paradiffpolicy.evaluation.blocks import Blocks
from paradiffpolicy.evaluation.compare import SamplerResult
from paradiffpolicy.evaluation.episodes import Episode, judged
from paradiffpolicy.evaluation.report import write_report
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.evaluation.workers import EpisodeSettings, InlineWorkers
from paradiffpolicy.loading import load_policy
from paradiffpolicy.tables import pairs, publish

CHECKPOINT = "checkpoints/pusht_keypoints"
BLOCK = 25
make_env = partial(gymnasium.make, "paradiffpolicy/PushT-v0", obs_type="keypoints")


def seconds(call: Any, turns: int = 3) -> float:
    """The shortest of some turns."""
    taken = []
    for _ in range(turns):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


def size(value: Any) -> int:
    """Bytes of its pickle."""
    return len(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def training() -> dict[str, float]:
    """Of the shipped network: what processes exchange per step, and what an epoch's order takes."""
    policy = load_policy(CHECKPOINT, capture="eager")
    n_weights = sum(weight.numel() for weight in policy.network.parameters())
    found: dict[str, float] = {"weights": n_weights, "bytes of gradients per step": 4 * n_weights}
    for processes in (2, 64):
        found[f"bytes sent per process and step, {processes} in a ring"] = round(
            4 * n_weights * 2 * (processes - 1) / processes
        )
    for windows in (10**5, 10**6, 10**7):
        seeds = itertools.count()
        taken = seconds(lambda n=windows, seeds=seeds: batch_windows(n, 128, 0, next(seeds)))
        found[f"seconds for an epoch's order, {windows:.0e} windows"] = taken
    spec = policy.spec
    found["bytes in memory per demonstrated step"] = 8 * (spec.obs_dim + spec.action_dim + spec.horizon)
    return found


def messages() -> dict[str, float]:
    """Of one episode of PushT, by ``rti``: per plan to and from a process of environments, and as a whole."""
    policy = load_policy(CHECKPOINT, sampler="rti", capture="eager")
    workers = InlineWorkers()
    workers.begin(EpisodeSettings(make_env, 300), {0: 100_000})
    actions = {0: np.zeros((policy.spec.n_action_steps, policy.spec.action_dim))}
    sent, received = size(("execute", (actions,))), size((None, workers.execute(actions)))
    workers.close()
    (episode,) = rollout(policy, make_env, [100_000], 300)
    with tempfile.TemporaryDirectory() as folder:
        Blocks(Path(folder), {}).episodes("rti", 0, lambda: [replace(episode, seed=k) for k in range(BLOCK)])
        kept = next(Path(folder).rglob("0000-*.npz")).stat().st_size / BLOCK
    return {
        "plans": len(episode.iterations),
        "bytes of a policy": size(policy),
        "bytes per plan to an environment's process": sent,
        "bytes per plan from it": received,
        "bytes of an episode without pictures": size(episode),
        "bytes of an episode in a kept block": round(kept),
    }


def report(n: int) -> dict[str, float]:
    """Of two samplers with ``n`` made-up episodes each: what is done after every block."""
    draw = np.random.default_rng(0)

    def episodes() -> list[Episode]:
        scores = draw.uniform(0.5, 1, n).tolist()
        return [
            Episode(100_000 + k, score, bool(score > 0.95), 300, iterations=[2] * 38, nfe=[20] * 38)
            for k, score in enumerate(scores)
        ]

    reference = episodes()
    rows = [
        SamplerResult(name="ddpm", episodes=reference),
        SamplerResult(name="rti", episodes=episodes(), reference=reference),
    ]
    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            results = judged(rows, {"score": 0.05, "success": 0.1})
            write_report(Path(folder), results, "made up", {}, 10, pictures=False)

        taken = seconds(write, 2)
        written = (Path(folder) / "report.json").stat().st_size
    return {f"bytes of a report, 2 x {n} episodes": written, f"seconds to judge and write it, {n}": taken}


def main() -> None:
    torch.set_num_threads(1)
    found = {**training(), **messages()}
    for n in (100, 1000, 10_000):
        found |= report(n)
    shown = {name: f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for name, value in found.items()}
    publish([pairs("what grows", shown)], {"figures": found}, sys.argv[1] if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
