"""A study's report for tests: its numbers are drawn at random, and have the shapes that a study's have."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np

SAMPLERS = {
    # iterations, nodes, milliseconds per plan, score, its spread
    "ddpm": (100, 100, 237.0, 0.93, 0.10),
    "ddim": (10, 10, 24.0, 0.92, 0.11),
    "dpm2m": (5, 5, 12.4, 0.91, 0.12),
    "paraddpm": (14, 196, 58.0, 0.93, 0.10),
    "rti": (3, 30, 8.1, 0.925, 0.11),
}
QUESTIONS = {
    # reference, measure, margin, mean, half the interval, claim, seeds needed, fixed n
    "rti": ("ddpm", "score", 0.03, -0.004, 0.021, "equivalent", None, 412),
    "ddim": ("ddpm", "score", 0.03, 0.006, 0.023, "equivalent", None, 350),
    "paraddpm": ("ddpm", "score", 0.03, 0.011, 0.036, "non_inferior", None, 300),
    "dpm2m": ("ddpm", "score", 0.03, -0.021, 0.034, None, 640, 1200),
    "rti 300 ms": ("rti", "success", 0.1, -0.21, 0.09, "worse", None, 90),
}


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def counted(values: np.ndarray) -> dict[str, list[int]]:
    counts = Counter(values.tolist())
    return {"values": sorted(counts), "counts": [counts[value] for value in sorted(counts)]}


def sample_arm(
    rng: np.random.Generator, task: str, sampler: str, hardness: np.ndarray, delay: float | None = None
) -> dict[str, Any]:
    """An arm of as many episodes as ``hardness`` has entries."""
    iterations, nfe, milliseconds, level, spread = SAMPLERS[sampler]
    n = len(hardness)
    level -= 0.2 * (delay is not None)
    score = np.clip(level - spread * (0.8 * hardness + 0.6 * rng.normal(size=n)), 0, 1)
    success = score > 0.85
    share = float(success.mean())
    half = 1.96 * (share * (1 - share) / n) ** 0.5
    latency = milliseconds * np.exp(0.06 * rng.normal(size=400)) * (1 + 0.8 * (rng.random(400) < 0.02))
    late = milliseconds - 100 + 4 * rng.normal(size=240) + 30 * (rng.random(240) < 0.03)
    plans = np.maximum(1, iterations + (rng.normal(size=2000) * (3 if sampler == "paraddpm" else 0)).round())
    return {
        "task": task,
        "checkpoint": f"checkpoints/{task}_keypoints",
        "weights_sha256": digest(task),
        "data_sha256": digest(task + "data"),
        "sampler": sampler,
        "sampler_config": {"solver": "ddpm", "nodes": iterations},
        "control_hz": 10,
        "rate_hz": 10 if delay else None,
        "latency_ms": [delay] if delay else None,
        "blending": "rtc" if delay else None,
        "disturbance": None,
        "reward_range": [0, 1],
        "score": {"n": n, "mean": float(score.mean()), "standard_error": float(score.std() / n**0.5)},
        "success": {"n": n, "mean": share, "interval_95": [max(0, share - half), min(1, share + half)]},
        "plan_latency_ms": {
            "n": 400,
            "p50": float(np.median(latency)),
            "p99": float(np.quantile(latency, 0.99)),
            "max": float(latency.max()),
            "values": latency.round(4).tolist(),
        },
        "timeline": {"period_ms": 100, "lateness_ms": late.round(3).tolist(), "missed": int((late > 0).sum())}
        if sampler in ("rti", "ddpm", "paraddpm") and delay is None
        else None,
        "iterations": counted(plans.astype(int)),
        "nfe": counted((plans * nfe / iterations).round().astype(int)),
        "smoothness": {
            "jump": {"median": 0.21 + 0.1 * rng.random()},
            "ldlj": {"median": -9.2},
            "sparc": {"median": -3.1},
        },
        "episodes": {
            "seed": list(range(500000, 500000 + n)),
            "score": score.round(6).tolist(),
            "success": success.tolist(),
            "n_steps": rng.integers(80, 300, size=n).tolist(),
        },
    }


def sample_question(task: str, arm: str, n: int) -> dict[str, Any]:
    reference, measure, margin, mean, half, claim, needed, fixed_n = QUESTIONS[arm]
    verdicts = {"equivalent": "equivalent within 0.03", "non_inferior": "non-inferior within 0.03"}
    return {
        "name": f"{task}/{arm} against {task}/{reference}, {measure}",
        "arm": f"{task}/{arm}",
        "reference": f"{task}/{reference}",
        "measure": measure,
        "margin": margin,
        "n": n,
        "mean": mean,
        "interval": [mean - half, mean + half],
        "confidence": 0.98,
        "claim": claim,
        "verdict": verdicts.get(str(claim), claim or f"inconclusive: about {needed} more seeds would decide"),
        "decided": claim is not None,
        "seeds_needed": needed,
        "stopped": "decided" if claim else "budget",
        "fixed_n": fixed_n,
        "p_values": {"equivalent": 0.01},
    }


def sample_report(n: int = 240, tasks: tuple[str, ...] = ("pusht", "lift"), seed: int = 0) -> dict[str, Any]:
    """A report of six arms per task on ``n`` seeds."""
    rng = np.random.default_rng(seed)
    arms: dict[str, Any] = {}
    for task in tasks:
        hardness = rng.normal(size=n)
        for sampler in SAMPLERS:
            arms[f"{task}/{sampler}"] = sample_arm(rng, task, sampler, hardness)
        arms[f"{task}/rti 300 ms"] = sample_arm(rng, task, "rti", hardness, delay=300)
    return {
        "format": 1,
        "name": "samplers",
        "title": "Fast samplers against DDPM-100",
        "date": "2026-11-27",
        "command": "paradiffpolicy study study=samplers 'tasks=[pusht,lift]' budget=1000",
        "machine": {
            "paradiffpolicy": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "cpu": "AMD EPYC 9R14",
            "cores": 2,
            "threads": 2,
            "gpu": None,
        },
        "versions": {"numpy": "2.4.6", "pymunk": "7.3.1", "openvino": "2026.4.1"},
        "code_sha256": digest("code"),
        "error": 0.05,
        "budget": 1000,
        "block": 20,
        "first_seed": 500000,
        "validation_seeds": [200000, 299999],
        "arms": arms,
        "questions": [sample_question(task, arm, n) for task in tasks for arm in QUESTIONS],
        "videos": {
            "command": "paradiffpolicy study study=samplers 'tasks=[pusht,lift]' budget=1000 videos=8",
            "files": {
                f"{tasks[0]}/{arm}": {"500003": f"videos/pusht_{arm}_500003.mp4"} for arm in ("rti", "ddpm")
            },
        },
        "unfinished": [],
    }
