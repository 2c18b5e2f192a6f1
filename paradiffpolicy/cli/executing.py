"""Where a command's blocks of episodes run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .building import EXTRAS, require_extra

if TYPE_CHECKING:
    from ..evaluation.executors import BlockExecutor
    from .schema import CollectConfig, EvaluateConfig
    from .study_schema import StudyConfig

    Config = EvaluateConfig | CollectConfig | StudyConfig


def block_executor(cfg: Config, gpus: float = 0.0) -> BlockExecutor:
    """The executor that the config names, with the workers that it asks for.

    Args:
        gpus: of each worker.

    Raises:
        InputError: what it needs isn't installed, or it has no room for the workers.
    """
    from ..evaluation.executors import EXECUTORS, Resources

    if cfg.executor in EXTRAS:
        require_extra(cfg.executor)
    workers = None if isinstance(cfg.workers, str) else cfg.workers
    return EXECUTORS.named(cfg.executor)(Resources(workers, cfg.threads or 1, gpus))


def policy_gpus(cfg: Config) -> float:
    """How many GPUs a worker takes that computes plans on the config's device."""
    from ..models.networks import usable_device

    return float(usable_device(cfg.device).type == "cuda")
