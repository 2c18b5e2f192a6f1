"""Simulates how many seeds a verdict takes: by betting, by shares of the level, and with a fixed number.

python scripts/betting_savings.py [OUT.json]      # the table of docs/evaluate.md; a minute on one core
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paradiffpolicy.evaluation.statistics import DECISIONS, LEVEL, look_share, paired_difference
from paradiffpolicy.study.betting import log_capitals, log_mixture
from paradiffpolicy.study.verdicts import TESTS, fixed_size
from paradiffpolicy.tables import publish, table

EXPERIMENTS, BUDGET, BLOCK = 200, 1000, 20
STARTS = range(0, BUDGET, BLOCK)
MARGINS = {"score": 0.03, "success": 0.05}
SPREADS = {"score": (0.05, 0.1, 0.15), "success": (0.05, 0.1, 0.2, 0.3)}
"""Of the differences in score, the standard deviation; of those in success, the share that isn't 0."""

Floats = NDArray[np.float64]


def cases() -> Iterator[tuple[str, float, float]]:
    """Measure, spread, true difference."""
    for measure, margin in MARGINS.items():
        for spread in SPREADS[measure]:
            for mean in (0.0, -2 * margin):
                if measure == "score" or abs(mean) <= spread:
                    yield measure, spread, mean


def drawn(measure: str, spread: float, mean: float) -> tuple[Floats, Floats]:
    """Values of a sampler and of its reference, ``[experiments, seeds]``."""
    draw, shape = np.random.default_rng(0), (EXPERIMENTS, BUDGET)
    if measure == "score":
        return np.clip(draw.normal(mean, spread, shape), -1, 1), np.zeros(shape)
    u = draw.random(shape)
    won, lost = u < (spread + mean) / 2, u >= 1 - (spread - mean) / 2
    both = draw.random(shape) < 0.5
    return np.where(won, 1.0, np.where(lost, 0.0, both)), np.where(lost, 1.0, np.where(won, 0.0, both))


def by_betting(differences: Floats, margin: float) -> list[float]:
    """Seeds after which a claim on -margin is shown; infinite: not within the budget."""
    decided = np.zeros((EXPERIMENTS, len(STARTS)), dtype=bool)
    for claim in ("non_inferior", "worse"):
        ((bound, side),) = TESTS[claim]
        origin = -1.0 if side == "above" else 1.0
        ratios = (differences - origin) / (bound * margin - origin)
        decided |= log_mixture(log_capitals(ratios, STARTS)) >= -math.log(LEVEL)
    return [(int(row.argmax()) + 1.0) * BLOCK if row.any() else math.inf for row in decided]


def by_shares(values: Floats, reference: Floats, margin: float) -> list[float]:
    """As ``evaluate stop_early=true`` stops."""

    def ends() -> Iterator[float]:
        for own, other in zip(values, reference, strict=True):
            for look, end in enumerate(range(BLOCK, BUDGET + 1, BLOCK), 1):
                p = paired_difference(own[:end].tolist(), other[:end].tolist(), margin).p_values
                if min(p[claim] for claim in DECISIONS) < LEVEL * look_share(look, len(STARTS)):
                    yield end
                    break
            else:
                yield math.inf

    return list(ends())


def summary(ends: list[float]) -> dict[str, float | None]:
    """The median, the mean (of what is spent: at most the budget), and the share that is decided."""
    median = float(np.median(ends))
    return {
        "median": median if math.isfinite(median) else None,
        "mean": float(np.minimum(ends, BUDGET).mean()),
        "decided": float(np.isfinite(ends).mean()),
    }


def measured(measure: str, spread: float, mean: float) -> dict[str, Any]:
    margin = MARGINS[measure]
    values, reference = drawn(measure, spread, mean)
    deviation = spread if measure == "score" else math.sqrt(spread - mean**2)
    fixed, betting = fixed_size(abs(mean + margin), deviation, LEVEL), by_betting(values - reference, margin)
    return {
        "measure": measure,
        "margin": margin,
        "spread": spread,
        "difference": mean,
        "fixed_n": fixed,
        "betting": summary(betting),
        "shares": summary(by_shares(values, reference, margin)),
    }


def main() -> None:
    rows = [measured(*case) for case in cases()]
    shown = (
        {
            **{name: row[name] for name in ("measure", "spread", "difference", "fixed_n")},
            **{f"{name} {key}": row[name][key] for name in ("betting", "shares") for key in row[name]},
        }
        for row in rows
    )
    content = {"experiments": EXPERIMENTS, "budget": BUDGET, "block": BLOCK, "error": LEVEL, "rows": rows}
    publish([table("seeds to a verdict", shown)], content, sys.argv[1] if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
