"""Runs a study: blocks of fresh seeds, until every question is decided or the seeds are used up.

After every block all questions are judged together.  An arm goes on while a question that needs it is open.
The judgement may be looked at as often as one likes (see ``betting``), so stopping early costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from ..control.record import Record
from ..errors import InputError
from ..evaluation.blocks import Blocks
from ..evaluation.compare import Progress, no_progress, report_is_due
from ..evaluation.episodes import Episode
from ..evaluation.executors import BlockExecutor, BlockProgress, BlockTask, LocalExecutor, block_episodes
from ..evaluation.rollout import in_groups
from ..evaluation.smoothness import boundary_jumps, motion
from ..policy import Policy
from ..provenance import programs
from ..task import Contract
from .betting import BoundedMean
from .design import Arm, Question, arms_of
from .verdicts import Answer, judge


@dataclass(frozen=True)
class ArmRun:
    """How an arm's episodes are made.

    Attributes:
        policy: that plans; arms of one sampler share it.
        run: ``rollout`` or ``realtime_rollout`` but for ``make_env`` and ``seeds``.
        make_env: see there.
        rate_hz: of control.
        n_steps: an episode's length in ticks, at most.
        tells: the argument of ``run`` that is told how many ticks went by.
        here: further arguments that mean something in this process alone.
        bounds: of an episode's score; None: unknown.
    """

    policy: Policy
    run: Callable[..., list[Episode]]
    make_env: Callable[..., gymnasium.Env[Any, Any]]
    rate_hz: float
    n_steps: int
    tells: str = "on_steps"
    here: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Progressed:
    """How far a study has come.

    Attributes:
        episodes: of every arm, in the seeds' order.
        captured: the programs of every arm that ran here, as ``provenance.programs`` describes them.
        answers: about every question.
        running: arms that go on.
    """

    episodes: Mapping[Arm, Sequence[Episode]]
    captured: Mapping[Arm, Mapping[str, Any]]
    answers: Mapping[Question, Answer]
    running: Sequence[Arm]

    def stopped(self, question: Question) -> str:
        """Why a question's arms don't go on: ``decided`` or ``budget``; or ``unfinished``."""
        if self.answers[question].decided:
            return "decided"
        return "unfinished" if question.arm in self.running else "budget"


@dataclass(eq=False, kw_only=True)
class Study:
    """Arms on the same seeds, with the same noise, block by block.

    Attributes:
        questions: that are asked together.
        runs: of every arm.
        seeds: of all blocks.
        block: seeds in each.
        error: the chance of a false claim of a kind in the whole study.
        blocks: keeps the episodes of finished blocks.
        executor: where blocks run, which changes no episode.
        on_block: called after a block, if ``report_is_due``.
    """

    questions: Sequence[Question]
    runs: Mapping[Arm, ArmRun]
    seeds: Sequence[int]
    block: int
    error: float
    blocks: Blocks = field(default_factory=Blocks)
    executor: BlockExecutor = field(default_factory=LocalExecutor)
    on_block: Callable[[Progressed], object] = lambda progressed: None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self._groups = in_groups(self.seeds, self.block)
        arms = arms_of(self.questions)
        self._now = Progressed({arm: [] for arm in arms}, {arm: {} for arm in arms}, {}, arms)
        self._slim = {arm: slim(run) for arm, run in self.runs.items()}
        self._means = [BoundedMean(-width, width) for width in map(self._width, self.questions)]

    def _width(self, question: Question) -> float:
        low, high = (
            (0.0, 1.0) if question.measure == "success" else self.runs[question.arm].bounds or (0.0, 1.0)
        )
        return high - low

    def run(self) -> Progressed:
        """Runs every block that is needed.

        Raises:
            InputError: a score is out of its bounds, or success is asked about and isn't known.
        """
        largest = sum(self.runs[arm].n_steps for arm in self._now.running) * len(self.seeds)
        with self.progress("episodes", largest, "step") as shown:
            for k in range(len(self._groups)):
                self._run_block(k, shown)
                self._judge(k)
                if report_is_due(k, len(self._groups)) or not self._now.running:
                    self.on_block(self._now)
                if not self._now.running:
                    break
        return self._now

    def _run_block(self, k: int, shown: Any) -> None:
        """Adds the k-th block's episodes of every arm that goes on."""
        running = {arm.name: arm for arm in self._now.running}
        seeds, progress = self._groups[k], BlockProgress(shown.update)

        def task(name: str, k: int) -> BlockTask:
            arm = self.runs[running[name]]
            return BlockTask(
                self._slim[running[name]], {"seeds": seeds}, {arm.tells: progress.steps, **arm.here}
            )

        turns = [(name, k) for name in running]
        for name, _, episodes in block_episodes(turns, task, self.blocks, self.executor):
            arm, run = running[name], self.runs[running[name]]
            require_within_bounds(arm, episodes, run.bounds)
            progress.block_ended(len(seeds) * run.n_steps)
            shown.set_postfix_str(name)
            captured = {**self._now.captured, arm: programs({name: run.policy})[name]}
            grown = {**self._now.episodes, arm: [*self._now.episodes[arm], *episodes]}
            self._now = replace(self._now, episodes=grown, captured=captured)

    def _judge(self, k: int) -> None:
        """Judges all questions with the k-th block; frees the programs of arms that end."""
        before = self._now
        for question, mean in zip(self.questions, self._means, strict=True):
            if question not in before.answers or not before.answers[question].decided:
                pair = (question.arm, question.reference)
                values, others = (
                    measured(question, arm, before.episodes[arm][k * self.block :]) for arm in pair
                )
                mean.add([value - other for value, other in zip(values, others, strict=True)])
        margins = [question.margin for question in self.questions]
        answers = dict(zip(self.questions, judge(self._means, margins, self.error), strict=True))
        undecided = [question for question, answer in answers.items() if not answer.decided]
        going_on = arms_of(undecided) if k + 1 < len(self._groups) else []
        used = {id(self.runs[arm].policy) for arm in going_on}
        for arm in before.running:
            if id(self.runs[arm].policy) not in used:
                self.runs[arm].policy.release()
        self._now = replace(before, answers=answers, running=going_on)


def slim(run: ArmRun) -> Callable[..., list[Episode]]:
    """``slim_episodes`` of an arm; holds nothing that can't go to another machine."""
    about = partial(moved, contract=run.policy.spec.contract, rate_hz=run.rate_hz)
    return partial(slim_episodes, run.run, about, make_env=run.make_env)


def moved(record: Record, contract: Contract, rate_hz: float) -> dict[str, list[float]]:
    """``jump``, the change of the action at every join of two plans, in its units; and ``motion``."""
    jumps, _ = boundary_jumps([record])
    return {"jump": jumps[np.isfinite(jumps)].tolist(), **motion(record, contract, rate_hz)}


def slim_episodes(
    run: Callable[..., list[Episode]], about: Callable[[Record], dict[str, list[float]]], **arguments: Any
) -> list[Episode]:
    """Episodes without their observations, actions and records: what a study keeps of a million.

    Args:
        about: gives an episode's ``motion``, of its record.
    """
    return [
        Episode(
            episode.seed,
            episode.score,
            episode.success,
            episode.n_steps,
            iterations=episode.iterations
            if episode.record is None
            else episode.record.plans["iterations"].tolist(),
            nfe=episode.nfe,
            motion={} if episode.record is None else about(episode.record),
            scoring=episode.scoring,
        )
        for episode in run(**arguments)
    ]


def require_within_bounds(arm: Arm, episodes: Sequence[Episode], bounds: tuple[float, float] | None) -> None:
    """Raises ``InputError`` that names the first episode whose score is out of bounds."""
    for episode in episodes:
        if bounds is not None and not bounds[0] <= episode.score <= bounds[1]:
            raise InputError(
                f"seed {episode.seed} of {arm.name} has a score of {episode.score:g}, which isn't in the "
                f"task's reward_range={list(bounds)}: correct it in the task's file"
            )


def measured(question: Question, arm: Arm, episodes: Sequence[Episode]) -> list[float]:
    """The values of an arm's episodes that a question is about.

    Raises:
        InputError: success isn't known.
    """
    if question.measure == "score":
        return [episode.score for episode in episodes]
    if any(episode.success is None for episode in episodes):
        raise InputError(
            f"the environment of task {arm.task!r} doesn't say whether an episode succeeded: write "
            "success_key in the task's file, or ask about the score"
        )
    return [float(bool(episode.success)) for episode in episodes]
