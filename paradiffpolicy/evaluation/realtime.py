"""Rolls episodes out in real time: the world goes on while plans are computed.

A virtual clock ticks at the control rate; a plan asked for at one moment arrives a latency later, however
long it took to compute here.  All episodes run side by side, and their plans are computed in batches, which
changes only the time that it takes.  A run is repeated bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from ..clock import Clock, VirtualClock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record
from ..errors import LARGEST, InputError
from ..planning.delayed import DelayedPlanner
from ..planning.request import MakePlanner, PlanMaker, PlanReply, PlanRequest, Plans, committed_tensors
from ..planning.thread import ThreadPlanner
from ..robots.env import EnvRobot
from ..types import Plan
from .episodes import Episode
from .rollout import in_groups

MakeEnvAt = Callable[[float], "gymnasium.Env[object, object]"]
"""A control rate in Hz to an environment that takes actions at it."""


@dataclass(eq=False)
class Pending:
    """A plan to come: what was asked, and of whom; then the reply."""

    maker: PlanMaker
    request: PlanRequest
    reply: PlanReply | None = None


class Batch:
    """Plans of several planners, computed together when one of them is needed, the latest possible moment."""

    def __init__(self) -> None:
        self._waiting: list[Pending] = []

    def planner(self, latency: Callable[[], float]) -> MakePlanner:
        """A planner whose plans are computed here, and arrive after a latency."""
        return lambda policy, generator, clock: DelayedPlanner(
            partial(self.begin, PlanMaker(policy, generator, clock)), clock, latency
        )

    def begin(self, maker: PlanMaker, request: PlanRequest) -> Callable[[], PlanReply]:
        """Queues a request; the returned function gives its plan."""
        pending = Pending(maker, request)
        self._waiting.append(pending)

        def made() -> PlanReply:
            while pending.reply is None:
                self._compute()
            return pending.reply

        return made

    def _compute(self) -> None:
        """Computes in one call the requests that are warm-started from a plan shifted by equally many steps,
        and in another those that start cold; of a planner's requests the first, from whose plan the next may
        be warm-started."""
        first: dict[int, Pending] = {}
        for each in self._waiting:
            first.setdefault(id(each.maker), each)
        self._waiting = [each for each in self._waiting if first[id(each.maker)] is not each]
        groups: dict[int, list[tuple[Pending, Plan | None]]] = {}
        for each in first.values():
            previous, moved = each.maker.previous(each.request)
            groups.setdefault(-1 if previous is None else moved, []).append((each, previous))
        for moved, members in groups.items():
            requests, plans = [each.request for each, _ in members], [plan for _, plan in members if plan]
            plan = members[0][0].maker.policy.plan(
                np.stack([request.window for request in requests]),
                Plan.cat(plans) if plans else None,
                generator=[each.maker.generator for each, _ in members],
                executed_steps=max(moved, 0),
                committed=committed_tensors(requests),
            )
            for row, (each, _) in enumerate(members):
                each.reply = each.maker.made(each.request, plan.select([row]), math.nan)


def drawn_from(latencies: Sequence[float]) -> Callable[[np.random.Generator], Callable[[], float]]:
    """Draws latencies, in seconds, from measured ones; a single one is every plan's.

    Returns:
        A function from a random generator to the function that gives the next latency.

    Raises:
        InputError: there is none, or one is no time.
    """
    values = np.asarray(latencies, dtype=float)
    if not len(values) or not (values >= 0).all() or not np.isfinite(values).all():
        raise InputError(f"latencies={list(latencies)} must be seconds, at least one, none below 0")
    return lambda draw: lambda: float(draw.choice(values) if len(values) > 1 else values[0])


def realtime_rollout(
    policy: Plans,
    make_env: MakeEnvAt,
    seeds: Sequence[int],
    seconds: float,
    *,
    rate_hz: float,
    latencies: Sequence[float] = (0.0,),
    side_by_side: int | None = None,
    success_key: str | None = None,
    scoring: str = "max",
    on_ticks: Callable[[int], object] = lambda ticks: None,
    **options: Any,
) -> list[Episode]:
    """Runs one episode per seed in virtual time.

    Args:
        make_env: called once per seed.
        seconds: an episode's length.
        rate_hz: of control; the environment takes actions at it.
        latencies: seconds per plan, to draw from.
        side_by_side: episodes at a time, where an environment takes much memory; None: all.
        success_key: of the environment's info; see ``environment.succeeded``.
        scoring: how a score is made of rewards; see ``Episode``.
        on_ticks: told how many ticks of all episodes together went by, or were spared by an early end.
        options: ``blending``, ``interpolation``, ``forward`` and ``replan_every``, see ``Controller``.

    Raises:
        InputError: the policy's actions can't be given at this rate, a latency is no time, or
            ``side_by_side`` no count.
    """
    n_ticks, latency = round(seconds * rate_hz), drawn_from(latencies)
    contract = policy.spec.contract
    robot = partial(EnvRobot, control_hz=rate_hz, contract=contract, success_key=success_key, scoring=scoring)

    def started(seed: int, clock: Clock, batch: Batch) -> tuple[EnvRobot, Controller]:
        controller = Controller(
            policy,
            rate_hz,
            generator=seed,
            planner=batch.planner(latency(np.random.default_rng(seed))),
            clock=clock,
            planner_timeout=LARGEST,
            capacity=n_ticks,
            **options,
        ).start()
        return robot(make_env(rate_hz), seed, clock), controller

    episodes = []
    for group in in_groups(seeds, side_by_side):
        clock, batch = VirtualClock(), Batch()
        runs = [started(int(seed), clock, batch) for seed in group]
        _run_together(runs, n_ticks, rate_hz, clock, on_ticks)
        episodes += [
            _episode(int(seed), robot, controller.record)
            for seed, (robot, controller) in zip(group, runs, strict=True)
        ]
    return episodes


def _run_together(
    runs: Sequence[tuple[EnvRobot, Controller]],
    n_ticks: int,
    rate_hz: float,
    clock: VirtualClock,
    on_ticks: Callable[[int], object],
) -> None:
    running = list(runs)
    for tick in range(n_ticks):
        clock.sleep_until(tick / rate_hz)
        for robot, controller in running:
            controller.sense(robot.observe())
        for robot, controller in running:
            action = controller.act()
            if action is None:
                robot.stop()
            else:
                robot.apply(action)
        n_before, running = len(running), [run for run in running if not run[0].finished]
        on_ticks(len(running) + (n_before - len(running)) * (n_ticks - tick))
        if not running:
            break
    clock.sleep_until(n_ticks / rate_hz)
    for robot, _ in running:
        robot.advance()
    for robot, _ in runs:
        robot.env.close()


def _episode(seed: int, robot: EnvRobot, record: Record) -> Episode:
    return Episode(seed, robot.score, robot.success, robot.n_steps, record=record, scoring=robot.scoring)


def wall_rollout(
    policy: Plans,
    make_env: MakeEnvAt,
    seeds: Sequence[int],
    seconds: float,
    *,
    rate_hz: float,
    clock: Clock,
    side_by_side: int = 1,
    planner: MakePlanner = ThreadPlanner,
    success_key: str | None = None,
    scoring: str = "max",
    on_ticks: Callable[[int], object] = lambda ticks: None,
    **options: Any,
) -> list[Episode]:
    """Runs one episode per seed at the real rate, planning beside every loop.

    Args:
        clock: the machine's.
        side_by_side: robots at a time, each with a loop and a planner of its own.
        planner: where plans are made.

    Others as in ``realtime_rollout``.
    """

    n_ticks = round(seconds * rate_hz)

    def run(seed: int) -> Episode:
        env = make_env(rate_hz)
        with Controller(
            policy,
            rate_hz,
            generator=seed,
            planner=planner,
            clock=clock,
            capacity=n_ticks,
            **options,
        ) as controller:
            robot = EnvRobot(
                env,
                seed,
                clock,
                control_hz=rate_hz,
                contract=policy.spec.contract,
                success_key=success_key,
                scoring=scoring,
            )
            loop = ControlLoop(controller, robot, observers=[lambda tick: on_ticks(1 + tick.missed)])
            record = loop.run(n_ticks, until=lambda: robot.finished)
        robot.advance()
        env.close()
        on_ticks(n_ticks - int(record.ticks["index"][-1]) - 1)
        return _episode(seed, robot, record)

    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(run, map(int, seeds)))
