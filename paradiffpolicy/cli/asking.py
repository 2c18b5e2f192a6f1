"""A study's questions from its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .composing import task_values
from .parts import TaskConfig
from .settings import build
from .study_schema import NONE, QuestionConfig

if TYPE_CHECKING:
    from ..study.design import Question
    from .study_schema import StudyConfig


def study_tasks(cfg: StudyConfig) -> dict[str, TaskConfig]:
    """Every task of the study by its name.

    Raises:
        InputError: there is no such task, or two have one name.
    """
    named: dict[str, tuple[str, TaskConfig]] = {}
    for place in dict.fromkeys(task for each in asked(cfg).values() for task in each.tasks or []):
        task: TaskConfig = build(TaskConfig, task_values(place), config=None)
        if cfg.max_steps is not None:
            task.max_steps = cfg.max_steps
        if task.name in named:
            raise InputError(
                f"tasks {named[task.name][0]} and {place} have one name, {task.name!r}: write name: in one"
            )
        named[task.name] = place, task
    return {name: task for name, (_, task) in named.items()}


def asked(cfg: StudyConfig) -> dict[str, QuestionConfig]:
    """The questions by name, each with all of its settings."""
    names = [each.name for each in fields(QuestionConfig)]
    usual = {name: getattr(cfg, name) for name in names}
    given = {key: vars(each) for key, each in cfg.questions.items()} or {Path(cfg.study).stem: {}}
    return {
        key: QuestionConfig(**usual | {name: value for name, value in own.items() if value is not None})
        for key, own in given.items()
    }


def study_questions(cfg: StudyConfig) -> list[Question]:
    """All that the study asks.

    Raises:
        InputError: a reference isn't in its question, or a question is asked twice.
    """
    from ..study.design import product

    found: dict[str, Question] = {}
    for key, each in asked(cfg).items():
        axes: dict[str, Sequence[Any]] = {
            "task": [str(task_values(place)["name"]) for place in each.tasks or []],
            "checkpoint": each.checkpoints or [None],
            "sampler": each.samplers or [],
            "latency": each.latencies or [],
            "rate_hz": each.rates_hz or [None],
            "blending": [plain(name) for name in each.blendings or []],
            "replan_every": each.replan_every or [None],
            "disturbance": [plain(name) for name in each.disturbances or []],
        }
        given = each.reference
        reference = {"sampler": given} if isinstance(given, str) else dict(given or {})
        reference = {name: plain(value) for name, value in reference.items()}
        for question in product(axes, reference, str(each.measure), each.margin or 0.0, f"question {key}"):
            if question.name in found:
                raise InputError(f"question {key}: {question.name!r} is asked twice: leave one out")
            found[question.name] = question
    return list(found.values())


def plain(value: Any) -> Any:
    """None for what is the usual: no disturbance, and the blending ``latest``."""
    return None if value in (NONE, "latest") else value


def reward_range(task: TaskConfig) -> tuple[float, float] | None:
    """The bounds of a task's rewards; None: unknown.

    Raises:
        InputError: they are none.
    """
    if task.reward_range is None:
        return None
    if len(task.reward_range) != 2 or not task.reward_range[0] < task.reward_range[1]:
        raise InputError(
            f"reward_range={task.reward_range} of task {task.name!r} must be [low, high], as [0, 1]"
        )
    low, high = task.reward_range
    return low, high


def validation_seeds(cfg: StudyConfig) -> tuple[int, int]:
    """The first and the last seed that settings are chosen on.

    Raises:
        InputError: they are none.
    """
    given = cfg.validation_seeds
    if len(given) != 2 or given[0] > given[1]:
        raise InputError(f"validation_seeds={given} must be [first, last], as [200000, 299999]")
    return given[0], given[1]
