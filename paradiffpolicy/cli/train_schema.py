"""Settings of the commands that train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..presets import recipes
from .parts import (
    AUGMENTATIONS,
    TRIMS,
    VALIDATION_SEED,
    WEIGHTS,
    MachineConfig,
    NetworkConfig,
    SamplersConfig,
    TaskedConfig,
    TrainingConfig,
    sampler_setting,
    seed_setting,
    workers_setting,
)
from .settings import out_setting, path_setting, setting


@dataclass
class TrainEvaluationConfig:
    """Closed-loop evaluation of the averaged weights."""

    seeds: int = setting(50, "episodes; 0: none, and no environment is needed", minimum=0)
    first_seed: int = seed_setting("seed of the first episode, apart from a report's", VALIDATION_SEED)
    sampler: str = sampler_setting("ddpm")
    workers: int | str = workers_setting()


@dataclass
class DataConfig(SamplersConfig, MachineConfig, TaskedConfig):
    """The data, and how it is trained on."""

    dataset: str | None = path_setting("${task.dataset}", "demonstrations, of any known format")
    augmentation: str | None = setting(
        "${task.augmentation}",
        "how the dataset is augmented; null: not at all",
        choices=AUGMENTATIONS,
    )
    weights: str | None = setting(
        "${task.weights}", "how much each demonstration counts; null: all alike", choices=WEIGHTS
    )
    weights_options: dict[str, Any] = setting(
        "${task.weights_options}", "options of the weights, as {threshold: 0.9}"
    )
    trim: str | None = setting("${task.trim}", "where demonstrations are cut; null: nowhere", choices=TRIMS)
    training: TrainingConfig = setting(TrainingConfig, "optimization")
    evaluation: TrainEvaluationConfig = setting(TrainEvaluationConfig, "closed-loop evaluation")


@dataclass
class TrainConfig(DataConfig):
    """Trains a diffusion policy on demonstrations. The same command resumes a run that was stopped.

    Examples:
      paradiffpolicy train
          PushT on the human demonstrations
      paradiffpolicy train dataset=my.zarr run=outputs/train/mine
          your own demonstrations
      paradiffpolicy train recipe=quick
          PushT in minutes: settings for a short run
    """

    init: str | None = path_setting(None, "a checkpoint to start from; null: new weights")
    run: str = out_setting("outputs/train/${task.name}", "folder for resuming, curves, the newest checkpoint")
    checkpoint: str | None = out_setting(None, "a second place for the finished checkpoint")
    policy: NetworkConfig = setting(NetworkConfig, "the policy that is trained")
    validation: float = setting(
        0.0, "share of the episodes that is held out, to validate with; 0: none", minimum=0, maximum=0.5
    )
    recipe: str | None = setting(
        None, "settings that go together, over the defaults; null: the defaults", choices=lambda _: recipes()
    )


@dataclass
class DistillConfig(DataConfig):
    """Distils a policy: a student learns to give its plans in one network call. The same command resumes a
    run that was stopped. The student is sampled by the samplers student and student_warm.

    Examples:
      paradiffpolicy distill
          the shipped PushT policy, on the observations of its demonstrations
      paradiffpolicy distill task=lift dataset=outputs/collect/lift.zarr
          another, on observations that 'collect' wrote
      paradiffpolicy distill training.n_steps=20000 init=checkpoints/pusht_keypoints/student
          more, from a student that is there
    """

    checkpoint: str | None = path_setting("${task.checkpoint}", "the teacher's folder")
    init: str | None = path_setting(None, "a student to start from; null: the teacher's weights")
    run: str = out_setting("outputs/distill/${task.name}", "folder for resuming, curves, the newest student")
    student: str | None = out_setting(
        None, "a second place for the finished student, as checkpoints/mine/student, where samplers find it"
    )
    nodes: int = setting(20, "DDIM steps of the teacher's plans, an even number", minimum=2)
    evaluation: TrainEvaluationConfig = setting(
        partial(TrainEvaluationConfig, sampler="student"), "closed-loop evaluation"
    )
