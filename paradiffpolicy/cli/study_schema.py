"""The settings of ``study``: questions, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parts import (
    BLENDING,
    DISTURBANCES,
    VALIDATION_SEED,
    MachineConfig,
    SamplersConfig,
    sampler_names,
    seed_setting,
)
from .settings import among, lazily, out_setting, path_setting, setting

REPORT_SEED = 500_000
"""The first seed of studies."""
NONE = "none"
"""No disturbance."""


def named_in(kind: str, *others: str) -> Any:
    """The names that a setting of the whole config gives, and others."""
    return lambda config: () if config is None else (*others, *getattr(config, kind))


MEASURES = among("score", "success")
LATENCIES = among("unlimited", "measured")
TEXT = {
    "tasks": "tasks: names, or files as ./mine.yaml",
    "checkpoints": "policies' folders; []: each task's",
    "samplers": "samplers, the reference among them",
    "latencies": "per plan: milliseconds; unlimited: the world waits; measured: as timed here",
    "rates_hz": "control rates where the world doesn't wait; []: the policy's",
    "blendings": "blendings of plans, where the world doesn't wait",
    "replan_every": "steps from plan to plan, where the world doesn't wait; []: n_action_steps",
    "disturbances": "disturbances, of those that 'disturbance' names; none: none",
    "reference": "what is compared with: a sampler, or settings of arms as {latency: unlimited}",
    "measure": "what is compared: score or success",
    "margin": "difference that still counts as equal",
}


def of_question(name: str, default: Any, **rule: Any) -> Any:
    """A setting of a question; null there is the study's."""
    return setting(default, TEXT[name] + ("; null: the study's" if default is None else ""), **rule)


@dataclass
class QuestionConfig:
    """Questions about every combination of settings."""

    tasks: list[str] | None = of_question("tasks", None, some=True)
    checkpoints: list[str] | None = of_question("checkpoints", None, path=True)
    samplers: list[str] | None = of_question("samplers", None, choices=sampler_names, some=True)
    latencies: list[float | str] | None = of_question(
        "latencies", None, choices=LATENCIES, minimum=0, maximum=1e6, some=True
    )
    rates_hz: list[float] | None = of_question("rates_hz", None, above=0)
    blendings: list[str] | None = of_question("blendings", None, choices=named_in("blending"), some=True)
    replan_every: list[int] | None = of_question("replan_every", None, minimum=0)
    disturbances: list[str] | None = of_question(
        "disturbances", None, choices=named_in("disturbance", NONE), some=True
    )
    reference: dict[str, Any] | str | None = of_question("reference", None)
    measure: str | None = of_question("measure", None, choices=MEASURES)
    margin: float | None = of_question("margin", None, minimum=0)


@dataclass
class StudyConfig(SamplersConfig, MachineConfig):
    """Asks whether samplers, checkpoints or latencies do as well as a reference, on fresh seeds, block by
    block until that is decided. Writes report.json and report.html.

    Examples:
      paradiffpolicy study
          the shipped study 'quick': rti and paraddpm against DDPM on PushT
      paradiffpolicy study 'samplers=[ddim,rti]' reference=ddim margin=0.05
          others
      paradiffpolicy study study=samplers budget=200 videos=4
          a shipped study with less, and videos where samplers differ
    """

    study: str = path_setting("quick", "a study: a shipped one's name, or a file as ./mine.yaml")
    title: str = setting("", "title of the report")
    tasks: list[str] = of_question("tasks", ["pusht"], some=True)
    checkpoints: list[str] = of_question("checkpoints", [], path=True)
    samplers: list[str] = of_question("samplers", ["ddpm", "rti"], choices=sampler_names, some=True)
    latencies: list[float | str] = of_question(
        "latencies", ["unlimited"], choices=LATENCIES, minimum=0, maximum=1e6, some=True
    )
    rates_hz: list[float] = of_question("rates_hz", [], above=0)
    blendings: list[str] = of_question("blendings", ["latest"], choices=named_in("blending"), some=True)
    replan_every: list[int] = of_question("replan_every", [], minimum=0)
    disturbances: list[str] = of_question(
        "disturbances", [NONE], choices=named_in("disturbance", NONE), some=True
    )
    reference: dict[str, Any] | str = of_question("reference", "ddpm")
    measure: str = of_question("measure", "score", choices=MEASURES)
    margin: float = of_question("margin", 0.03, minimum=0)
    questions: dict[str, QuestionConfig] = setting(
        {}, "questions by name, each with some of the settings above; {}: one question of those"
    )
    blending: dict[str, dict[str, Any]] = setting(
        {name: {"name": name} for name in ("latest", "rtc", "temporal_ensemble", "prefix")},
        "blendings and their options by name",
        check=BLENDING,
        some=True,
    )
    disturbance: dict[str, dict[str, Any]] = setting(
        {}, "disturbances and their strengths by name, as {late: {observation_delay: 2}}", check=DISTURBANCES
    )
    max_steps: int | None = setting(None, "control steps per episode; null: the task's", minimum=1)
    budget: int = setting(1000, "seeds of an arm, at most", minimum=1)
    block: int = setting(20, "seeds that run side by side, after which all questions are judged", minimum=1)
    error: float = setting(0.05, "chance that a study ever makes a false claim of a kind", above=0, below=0.5)
    first_seed: int = seed_setting("seed of the first episode", REPORT_SEED)
    validation_seeds: list[int] = setting(
        [VALIDATION_SEED, 299_999], "[first, last] of the seeds that settings are chosen on", minimum=0
    )
    workers: int | str | None = setting(
        None,
        "processes for environments; auto: one per core; null: the task's",
        minimum=1,
        choices=among("auto"),
    )
    executor: str = setting(
        "local", "where blocks of episodes run", choices=lazily("evaluation.executors", "EXECUTORS")
    )
    latency_plans: int = setting(20, "timed plans per sampler, for one robot; 0: none", minimum=0)
    paced_ticks: int = setting(40, "control ticks on the real clock, per sampler; 0: none", minimum=0)
    videos: int = setting(0, "videos per arm, of seeds where arms differ, then of failures", minimum=0)
    video_size: int = setting(192, "pixels of a video's picture", minimum=1, maximum=4096)
    out: str | None = out_setting(None, "folder of the report; null: outputs/study/NAME/DATE-TIME")
