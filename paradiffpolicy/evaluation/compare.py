"""Compares samplers on the same seeds, while simulated time waits for every plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ..benchmarks.solvers import sequential_plan
from ..benchmarks.timing import plan_latencies
from ..clock import Clock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record
from ..policy import Policy
from ..provenance import programs
from ..robots.env import EnvRobot
from ..sampling.sequential import Sequential
from ..tables import bar
from ..types import Plan
from .blocks import Blocks
from .episodes import Episode, Outcome, judged
from .executors import BlockExecutor, BlockProgress, BlockTask, LocalExecutor, block_episodes
from .rollout import in_groups, rollout
from .workers import MakeEnv, Workers

Progress = Callable[[str, float, str], AbstractContextManager[Any]]
"""A label, a total and its unit to a progress bar; see ``tables.bar``."""

no_progress: Progress = partial(bar, shown=False)

MARGINS = {"score": 0.05, "success": 0.1}
"""Differences that still count as equivalent."""


@dataclass(frozen=True, kw_only=True)
class SamplerResult(Outcome):
    """A sampler whose every plan the simulation waits for.

    Attributes:
        plan_error: see ``plan_error``; None: the sampler is sequential.
        captured: its programs, as ``provenance.programs`` describes them.
        record: of a run at the environment's own rate on a real clock, or None.
    """

    plan_error: Mapping[str, Any] | None = None
    captured: Mapping[str, Any] = field(default_factory=dict)
    record: Record | None = None

    @property
    def missed(self) -> int:
        """Deadlines missed in that run."""
        return 0 if self.record is None else self.record.missed

    def per_plan(self, name: str) -> list[int]:
        """``iterations`` or ``nfe`` of every plan of every episode."""
        return [value for episode in self.episodes for value in getattr(episode, name)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            **self.compared(),
            "iterations_per_plan": _spread(self.per_plan("iterations")),
            "nfe_per_plan": _spread(self.per_plan("nfe")),
            "plan_error": self.plan_error,
            "plan_latency_ms": self.latency_ms,
            "deadlines": {
                "ticks": 0 if self.record is None else self.record.n_ticks,
                "missed": self.missed,
                "faults": {} if self.record is None else self.record.faults(),
            },
        }


def report_is_due(block: int, n_blocks: int) -> bool:
    """Whether results are reported after a block, 0-based: after each of the first two hundred and the last;
    between, whenever a hundredth is new, so that a million episodes aren't judged after every few."""
    done = block + 1
    return done == n_blocks or done % max(1, done // 100) == 0


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "max": float(np.max(values))}


@dataclass(eq=False, kw_only=True)
class Comparison:
    """Samplers on the same seeds, block by block; then their plans and loops are timed.

    A sampler's programs and pictures are released when its last block is done, so that the memory doesn't
    grow with the number of samplers.

    Attributes:
        policies: by the sampler's name.
        seeds, max_steps: of the episodes.
        reference: the sampler that the others are compared with; it runs first.
        clock: the machine's.
        margins: for the verdicts on ``score`` and ``success``.
        stop_early: a sampler ends after the block that decides on its score and its success; verdicts are
            then those of ``paired_difference`` with a look after every block.
        side_by_side: episodes in a block; None: all.
        n_pictured: episodes of every sampler of which there are pictures.
        latency_plans: plans of one robot that are timed, per sampler, taking turns; 0: none.
        paced_ticks: ticks of a run at the environment's own rate, per sampler; 0: none.
        blocks: keeps the episodes of finished blocks.
        on_result: called after a block, if ``report_is_due``, with the results so far, and whose it was.
        workers: where the environments of blocks live that run in this process.
        executor: where blocks run, which changes no episode.
        options: of ``rollout``.
    """

    policies: Mapping[str, Policy]
    make_env: MakeEnv
    seeds: Sequence[int]
    max_steps: int
    reference: str
    clock: Clock
    margins: Mapping[str, float] = field(default_factory=lambda: MARGINS)
    stop_early: bool = False
    side_by_side: int | None = None
    n_pictured: int = 0
    latency_plans: int = 0
    paced_ticks: int = 0
    blocks: Blocks = field(default_factory=Blocks)
    on_result: Callable[[Sequence[SamplerResult], str], object] = lambda results, name: None
    progress: Progress = no_progress
    workers: Workers | None = None
    executor: BlockExecutor = field(default_factory=LocalExecutor)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._groups = in_groups(self.seeds, self.side_by_side)
        self._ends = list(accumulate(map(len, self._groups)))
        self._rows = {name: _Row() for name in dict.fromkeys([self.reference, *self.policies])}

    def run(self) -> list[SamplerResult]:
        """Runs everything; the results."""
        n_steps = len(self._rows) * len(self.seeds) * self.max_steps
        with self.progress("episodes", n_steps, "step") as shown:
            for turns in self._rounds():
                self._run_blocks(turns, shown)
        if self.latency_plans:
            windows = [
                window for episode in self._rows[self.reference].episodes for window in episode.windows
            ]
            windows = windows[: self.latency_plans]
            with self.progress("latency", len(windows), "turn") as shown:
                for name, taken in plan_latencies(self.policies, windows, self.clock, shown.update).items():
                    row, policy = self._rows[name], self.policies[name]
                    row.latencies = taken
                    if not row.captured["how"]:  # all its blocks were kept ones
                        row.captured = programs({name: policy})[name]
        if self.paced_ticks:
            with self.progress("at the real rate", len(self._rows), "sampler") as shown:
                for name, row in self._rows.items():
                    run = (self.policies[name], self.make_env, int(self.seeds[0]), self.paced_ticks)
                    row.record = paced_run(*run, self.clock)
                    shown.update(1)
        return self.results()

    def results(self) -> list[SamplerResult]:
        """The rows that have an episode, compared."""
        against = self._rows[self.reference]
        rows = [
            SamplerResult(name=name, reference=None if row is against else against.episodes, **vars(row))
            for name, row in self._rows.items()
            if row.episodes
        ]
        looks: dict[str, Any] = {"looks": self._ends, "n_looks": len(self._groups)} if self.stop_early else {}
        return judged(rows, self.margins, **looks)

    def _rounds(self) -> Iterator[list[tuple[str, int]]]:
        """Blocks that run whatever comes of each other, and whose they are: all of a sampler; or, with
        ``stop_early``, whose decisions need all rows of the table, one of every undecided sampler."""
        blocks, running = range(len(self._groups)), list(self._rows)
        if not self.stop_early:
            for name in running:
                yield [(name, k) for k in blocks]
                self._end(name)
            return
        for k in blocks:
            yield [(name, k) for name in running]
            undecided = [r.name for r in self.results() if r.reference is not None and not r.decided]
            going_on = [self.reference, *undecided] if undecided and k + 1 < len(blocks) else []
            for name in running:
                if name not in going_on:
                    self._end(name)
            running = going_on

    def _run_blocks(self, turns: Sequence[tuple[str, int]], shown: Any) -> None:
        """Runs the blocks of a round that aren't kept; each is kept and reported in its turn."""
        options = {"max_steps": self.max_steps, **self.options}
        runs = {name: partial(rollout, self.policies[name], self.make_env, **options) for name, _ in turns}
        progress = BlockProgress(shown.update)
        here = {"workers": self.workers, "on_steps": progress.steps}

        def task(name: str, k: int) -> BlockTask:
            group = self._groups[k]
            pictured = max(0, self.n_pictured - self._ends[k] + len(group))
            on_stage = {"on_stage": lambda stage: shown.set_postfix_str(f"{name} {stage}".strip())}
            return BlockTask(runs[name], {"seeds": group, "n_pictured": pictured}, here | on_stage)

        for name, k, episodes in block_episodes(turns, task, self.blocks, self.executor):
            row = self._rows[name]
            row.episodes += episodes
            progress.block_ended(len(self._groups[k]) * self.max_steps)
            row.captured = programs({name: self.policies[name]})[name]
            if report_is_due(k, len(self._groups)):
                self.on_result(self.results(), name)

    def _end(self, name: str) -> None:
        """Measures what needs a sampler's programs and plans, and frees them; its first episode's pictures
        are for the film strip, and the reference's windows are those that plans are timed on."""
        policy, row = self.policies[name], self._rows[name]
        error = partial(plan_error, policy, row.episodes[:MOST_EPISODES])
        row.plan_error = self.blocks.values(f"plan_error of {name}", error)
        policy.release()
        for i, episode in enumerate(row.episodes):
            episode.actions = []
            if i:
                episode.frames = []
            if name != self.reference:
                episode.windows = []


@dataclass(eq=False)
class _Row:
    """Fields of a ``SamplerResult``, as far as they are known."""

    episodes: list[Episode] = field(default_factory=list)
    plan_error: Mapping[str, Any] | None = None
    captured: Mapping[str, Any] = field(default_factory=dict)
    latencies: Sequence[float] = ()
    record: Record | None = None


N_CONTINUED, MOST_EPISODES = 3, 20
"""Plans of an episode, and episodes, of which the error is measured."""


def plan_error(policy: Policy, episodes: Sequence[Episode]) -> dict[str, Any] | None:
    """How far a policy's plans in episodes of ``rollout`` are from the sequential ones of its solver, of the
    same noise: the largest deviation of an executed action.

    The first plans of every episode are made again, and the second to the fourth are compared: a first one
    may start cold, at the cost of more iterations.

    Returns:
        ``n``, ``median`` and ``worst``, in the action's ``unit``; None: nothing was compared, since the
        sampler is sequential, decides on its noise itself (it is exact), or the episodes are too short.
    """
    driver = policy.sampler.driver
    if isinstance(driver, Sequential) or getattr(driver, "decides_noise", False):
        return None
    episodes = [episode for episode in episodes if len(episode.windows) > 1]
    generators = {episode.seed: torch.Generator().manual_seed(episode.seed) for episode in episodes}
    plan: Plan | None = None
    exact, errors = policy.captured("eager"), list[float]()
    for k in range(1 + N_CONTINUED):
        rows = [row for row, episode in enumerate(episodes) if k < len(episode.windows)]
        episodes = [episodes[row] for row in rows]
        if not episodes:
            break
        windows = np.stack([episode.windows[k] for episode in episodes])
        own = [generators[episode.seed] for episode in episodes]
        plan = policy.plan(windows, None if plan is None else plan.select(rows), generator=own)
        if k:
            sequential = sequential_plan(exact, windows, plan.solution.noise)
            deviation = (plan.executed_actions - sequential.executed_actions).abs()
            errors += deviation.flatten(1).amax(1).tolist()
    if not errors:
        return None
    unit = policy.spec.contract.action_unit
    return {"n": len(errors), "median": float(np.median(errors)), "worst": max(errors), "unit": unit}


def paced_run(policy: Policy, make_env: MakeEnv, seed: int, n_ticks: int, clock: Clock) -> Record:
    """Runs the control loop at the environment's own rate on a real clock, planning within its ticks."""
    env = make_env()
    try:
        spec = policy.spec
        with Controller(policy, spec.control_hz, generator=seed, planner="inline", clock=clock) as controller:
            robot = EnvRobot(env, seed, clock, control_hz=spec.control_hz, contract=spec.contract)
            return ControlLoop(controller, robot).run(n_ticks, until=lambda: robot.finished)
    finally:
        env.close()
