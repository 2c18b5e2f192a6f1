"""Studies: questions about samplers, policies and latencies, asked of fresh seeds until they are decided."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..provenance import about, describe
from ..tables import bar
from .asking import reward_range, study_questions, study_tasks, validation_seeds
from .building import load_policy, named_blending, sampling_policy
from .environments import env_maker, env_maker_at, env_workers, recorded_windows
from .evaluate import quiet, report_folder, show, student_hashes
from .executing import block_executor, policy_gpus
from .locating import locate_checkpoint
from .parts import PolicyConfig, TaskConfig

if TYPE_CHECKING:
    from ..evaluation.blocks import Blocks
    from ..evaluation.workers import Workers
    from ..policy import Policy
    from ..study.design import Arm
    from ..study.report import ArmFacts
    from ..study.running import ArmRun, Progressed
    from .study_schema import StudyConfig

KEPT = "blocks"
"""The folder of finished blocks, in the report's: with them a study goes on, and films its episodes."""
NOT_DECIDING = {
    "out",
    "workers",
    "executor",
    "plugins",
    "checkpoints",
    "title",
    "budget",
    "latency_plans",
    "paced_ticks",
    "videos",
    "video_size",
}
"""Settings that change no episode and no claim; the weights' hash stands for a checkpoint.  More seeds may be
added to a study at any time: its claims hold at all times."""


def study(cfg: StudyConfig) -> None:
    """Runs a study; writes its report after blocks, and prints verdicts and arms at the end."""
    with quiet("paradiffpolicy.control"):
        _study(cfg)


def _study(cfg: StudyConfig) -> None:
    from ..evaluation.blocks import Blocks
    from ..study.design import arms_of, require_margin, require_seeds
    from ..study.report import arm_table, verdict_table
    from ..study.running import Study

    seeds = require_seeds(cfg.first_seed, cfg.budget, cfg.block, validation_seeds(cfg))
    tasks = study_tasks(cfg)
    questions = study_questions(cfg)
    for question in questions:
        require_margin(question, reward_range(tasks[question.arm.task]))
    arms = arms_of(questions)
    places = {arm.place: study_place(cfg, arm, arms, tasks) for arm in arms}
    require_times(cfg, arms, places)
    settings = deciding(cfg, tasks, arms, places)
    folder = report_folder(cfg.out, Path(f"outputs/study/{Path(cfg.study).stem}"), settings, KEPT)
    blocks = Blocks(folder, settings, KEPT)
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(contextlib.closing(block_executor(cfg, policy_gpus(cfg))))
        homes = functools.cache(lambda count: stack.enter_context(contextlib.closing(env_workers(count))))
        taken = {place: measurements(cfg, each, blocks) for place, each in places.items()}
        runs = {arm: arm_run(cfg, places[arm.place], arm, homes, taken[arm.place]) for arm in arms}
        report = StudyReport(cfg, folder, places, taken)
        progressed = Study(
            questions=questions,
            runs=runs,
            seeds=seeds,
            block=cfg.block,
            error=cfg.error,
            blocks=blocks,
            executor=executor,
            on_block=report.write,
            progress=bar,
        ).run()
    files = videos(cfg, folder, progressed, runs) if cfg.videos else {}
    paths, values = report.write(progressed, files)
    tables = [verdict_table(values, values["title"]), arm_table(values, "Arms")]
    show(tables, [f"on {describe(values['machine'])}", *paths])


# ----------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class TaskPolicies:
    """A task and a policy for it.

    Attributes:
        cfg: of both.
        policies: by sampler.
        head: what ``provenance.about`` says of the checkpoint.
    """

    cfg: PolicyConfig
    policies: Mapping[str, Policy]
    head: Mapping[str, Any]

    @property
    def policy(self) -> Policy:
        """Any of the policies."""
        return next(iter(self.policies.values()))


def study_place(
    cfg: StudyConfig, arm: Arm, arms: Sequence[Arm], tasks: Mapping[str, TaskConfig]
) -> TaskPolicies:
    """The place of an arm, with the samplers of all arms there."""
    task = tasks[arm.task]
    samplers = dict.fromkeys(each.sampler for each in arms if each.place == arm.place)
    shared = {each.name: getattr(cfg, each.name) for each in fields(PolicyConfig) if hasattr(cfg, each.name)}
    shared["sampler"] = {name: cfg.sampler[name] for name in samplers}
    own = PolicyConfig(**shared, task=task, checkpoint=arm.checkpoint or task.checkpoint)
    policy = load_policy(own)
    policies = {name: sampling_policy(own, name, policy) for name in samplers}
    return TaskPolicies(own, policies, about(locate_checkpoint(own.checkpoint)))


def deciding(
    cfg: StudyConfig,
    tasks: Mapping[str, TaskConfig],
    arms: Sequence[Arm],
    places: Mapping[tuple[str, str | None], TaskPolicies],
) -> dict[str, Any]:
    """All that decides the claims, as plain values: settings, tasks, weights, versions of code, packages."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in NOT_DECIDING}
    if any(arm.latency == "measured" for arm in arms):
        settings["latency_plans"] = cfg.latency_plans
    head = about(None)
    not_deciding = ("workers", "dataset", "checkpoint")
    plain_tasks = {name: asdict(task) for name, task in tasks.items()}
    return settings | {
        "tasks": {
            name: {key: value for key, value in task.items() if key not in not_deciding}
            for name, task in plain_tasks.items()
        },
        "weights_sha256": {place_name(place): each.head["weights_sha256"] for place, each in places.items()},
        "student_sha256": {place_name(place): student_hashes(each.cfg) for place, each in places.items()},
        **{name: head[name] for name in ("code_sha256", "versions")},
    }


def place_name(place: tuple[str, str | None]) -> str:
    """A place in one word."""
    return "/".join(part for part in place if part is not None)


def arm_run(
    cfg: StudyConfig,
    place: TaskPolicies,
    arm: Arm,
    homes: Callable[[int | str], Workers],
    taken: Mapping[str, Any],
) -> ArmRun:
    """How the episodes of an arm are made."""
    from ..evaluation.rollout import rollout
    from ..study.running import ArmRun

    policy, task = place.policies[arm.sampler], place.cfg.task
    if not arm.waits:
        return timed_run(cfg, policy, place.cfg, arm, taken)
    options: dict[str, Any] = {"success_key": task.success_key, "scoring": task.scoring}
    run = functools.partial(rollout, policy, max_steps=task.max_steps, **options)
    here = {"workers": homes(task.workers if cfg.workers is None else cfg.workers)}
    make_env = env_maker(place.cfg, policy.spec, **strengths(cfg, arm))
    rate_hz = policy.spec.control_hz
    return ArmRun(policy, run, make_env, rate_hz, task.max_steps, here=here, bounds=reward_range(task))


def require_times(
    cfg: StudyConfig, arms: Sequence[Arm], places: Mapping[tuple[str, str | None], TaskPolicies]
) -> None:
    """Raises ``InputError`` if a policy's actions can't be given at an arm's rate, or if latencies are to be
    measured of no plans: before hours of other arms."""
    from ..control.rate import ticks_per_step
    from ..planning.interpolation import automatic

    for arm in arms:
        spec = places[arm.place].policy.spec
        automatic(spec, ticks_per_step(arm.rate_hz or spec.control_hz, spec.control_hz))
        named_blending(cfg.blending[arm.blending or "latest"], spec)
        if arm.latency == "measured" and not cfg.latency_plans:
            raise InputError("latencies=measured need latency_plans above 0")


def timed_run(
    cfg: StudyConfig, policy: Policy, own: PolicyConfig, arm: Arm, taken: Mapping[str, Any]
) -> ArmRun:
    """How the episodes of an arm are made while simulated time goes on."""
    from ..evaluation.realtime import realtime_rollout
    from ..study.running import ArmRun

    measured = arm.latency == "measured"
    latencies = taken["latencies"][arm.sampler] if measured else [float(arm.latency) / 1e3]
    rate_hz = arm.rate_hz or policy.spec.control_hz
    run = functools.partial(
        realtime_rollout,
        policy,
        seconds=own.task.max_steps / policy.spec.control_hz,
        rate_hz=rate_hz,
        latencies=latencies,
        blending=named_blending(cfg.blending[arm.blending or "latest"], policy.spec),
        replan_every=arm.replan_every,
        success_key=own.task.success_key,
        scoring=own.task.scoring,
    )
    n_ticks = round(own.task.max_steps / policy.spec.control_hz * rate_hz)
    make_env, bounds = env_maker_at(own, policy.spec, **strengths(cfg, arm)), reward_range(own.task)
    return ArmRun(policy, run, make_env, rate_hz, n_ticks, "on_ticks", bounds=bounds)


def strengths(cfg: StudyConfig, arm: Arm) -> Mapping[str, float]:
    """The strengths of what disturbs an arm, by name."""
    return {} if arm.disturbance is None else cfg.disturbance[arm.disturbance]


def measurements(cfg: StudyConfig, place: TaskPolicies, blocks: Blocks) -> dict[str, Any]:
    """What is timed on this machine, of every sampler of a place, once per study, and kept: ``latencies`` of
    plans that take turns, and the ``timelines`` of paced runs.  Their episodes are on a validation seed."""
    from ..benchmarks.timing import plan_latencies
    from ..clock import MonotonicClock
    from ..evaluation.compare import paced_run
    from ..study.report import lateness

    clock, seed, policies = MonotonicClock(), validation_seeds(cfg)[0], place.policies
    name = f"{place.cfg.task.name} {place.cfg.checkpoint}"

    def latencies() -> dict[str, list[float]]:
        windows = recorded_windows(place.cfg, place.policy, cfg.latency_plans, seed)
        with bar(f"latency on {place.cfg.task.name}", len(windows)) as turns:
            return plan_latencies(policies, windows, clock, turns.update)

    def timelines() -> dict[str, Any]:
        make_env, found = env_maker(place.cfg, place.policy.spec), {}
        with bar("at the real rate", len(policies), "sampler") as shown:
            for sampler, policy in policies.items():
                record = paced_run(policy, make_env, seed, cfg.paced_ticks, clock)
                found[sampler] = lateness(record, policy.spec.control_hz)
                shown.update(1)
        return found

    taken: dict[str, Any] = {"latencies": {}, "timelines": {}}
    if cfg.latency_plans:
        taken["latencies"] = blocks.values(f"latencies of {cfg.latency_plans} plans, {name}", latencies)
    if cfg.paced_ticks:
        taken["timelines"] = blocks.values(f"timelines of {cfg.paced_ticks} ticks, {name}", timelines)
    for policy in policies.values():
        policy.release()
    return taken


# --------------------------------------------------------------------------------------------- report


class StudyReport:
    """Writes report.json and report.html, as far as the study has come."""

    def __init__(
        self,
        cfg: StudyConfig,
        folder: Path,
        places: Mapping[tuple[str, str | None], TaskPolicies],
        taken: Mapping[tuple[str, str | None], Mapping[str, Any]],
    ) -> None:
        self._cfg, self._folder, self._places, self._taken = cfg, folder, places, taken
        self._head = about(
            None,
            name=Path(cfg.study).stem,
            title=cfg.title or Path(cfg.study).stem,
            error=cfg.error,
            budget=cfg.budget,
            block=cfg.block,
            first_seed=cfg.first_seed,
            validation_seeds=cfg.validation_seeds,
        )

    def write(
        self, progressed: Progressed, files: Mapping[str, Mapping[str, str]] | None = None
    ) -> tuple[list[Path], dict[str, Any]]:
        """Writes both; returns their paths, and the content."""
        from ..files import write_json
        from ..study.page import write_page
        from ..study.report import report_values

        command = self._head["command"]
        if not files:
            command = re.sub(r"\s+videos=\S+", "", command) + " videos=8"
        facts = {arm: self._facts(arm) for arm in progressed.episodes}
        values = report_values(self._head, facts, progressed, {"command": command, "files": files or {}})
        paths = [self._folder / "report.json", self._folder / "report.html"]
        write_json(paths[0], values)
        write_page(values, paths[1], videos_from=self._folder)
        return paths, values

    def _facts(self, arm: Arm) -> ArmFacts:
        from ..study.report import ArmFacts

        cfg, place, taken = self._cfg, self._places[arm.place], self._taken[arm.place]
        spec, latencies = place.policy.spec, taken["latencies"].get(arm.sampler, ())
        given = {"unlimited": None, "measured": [1e3 * seconds for seconds in latencies]}
        bounds = reward_range(place.cfg.task)
        settings = {
            "task": arm.task,
            "checkpoint": str(place.cfg.checkpoint),
            "weights_sha256": place.head["weights_sha256"],
            "student_sha256": student_hashes(place.cfg).get(arm.sampler),
            "data_sha256": (place.head["data"] or {}).get("fingerprint"),
            "sampler": arm.sampler,
            "sampler_config": cfg.sampler[arm.sampler],
            "control_hz": spec.control_hz,
            "rate_hz": None if arm.waits else arm.rate_hz or spec.control_hz,
            "latency_ms": given[arm.latency] if isinstance(arm.latency, str) else [arm.latency],
            "blending": None if arm.waits else arm.blending or "latest",
            "replan_every": arm.replan_every,
            "disturbance": strengths(cfg, arm) or None,
            "scoring": place.cfg.task.scoring,
            "reward_range": None if bounds is None else list(bounds),
        }
        return ArmFacts(settings, latencies, taken["timelines"].get(arm.sampler))


def videos(
    cfg: StudyConfig, folder: Path, progressed: Progressed, runs: Mapping[Arm, ArmRun]
) -> dict[str, dict[str, str]]:
    """The paths of the videos, which are made where they aren't there."""
    from ..environment import picture
    from ..study.filming import film

    shown_in = functools.partial(picture, size=cfg.video_size)
    with bar("videos", cfg.videos * len(runs), "video") as shown:
        return film(progressed, runs, cfg.block, cfg.videos, folder, shown_in, shown.update)
