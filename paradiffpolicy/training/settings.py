"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import LARGEST, InputError, is_number, require_count, require_positive, require_within


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; ``n_steps``, ``warmup_steps`` and ``…_every`` count optimizer steps.

    Raises:
        InputError: a value is out of range.
    """

    n_steps: int
    batch_size: int = 128
    learning_rate: float = 3e-4
    warmup_steps: int = 500
    weight_decay: float = 1e-6
    seed: int = 0
    precision: str = "auto"
    accumulate: int = 1
    log_every: int = 20
    save_every: int = 250
    evaluate_every: int = 0
    validate_every: int = 250

    def __post_init__(self) -> None:
        require_count(
            n_steps=self.n_steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            log_every=self.log_every,
            save_every=self.save_every,
            validate_every=self.validate_every,
        )
        require_positive(learning_rate=self.learning_rate)
        require_within(0, LARGEST, warmup_steps=self.warmup_steps, evaluate_every=self.evaluate_every)
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise InputError(f"weight_decay={self.weight_decay!r:.40} must be a number, not below 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be a whole number from 0 to 2^32 - 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision={self.precision} must be auto, float32 or bfloat16")

    def learning_rate_at(self, step: int) -> float:
        """Of a step, 0-based: linear warm-up, then half a cosine down to 0 at ``n_steps``."""
        warmup = min(self.warmup_steps, self.n_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.n_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
