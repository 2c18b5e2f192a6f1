"""Rolls episodes out in real time: the world goes on while plans are computed.

A virtual clock ticks at the control rate; a plan asked for at one moment arrives a latency later, however
long it took to compute here.  All episodes run side by side, and their plans are computed in batches, which
changes only the time that it takes.  A run is repeated bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from ..clock import Clock, VirtualClock
from ..control.controller import Controller
from ..control.loop import ControlLoop
from ..control.record import Record
from ..errors import InputError
from ..planning.blending import Blending, Latest
from ..planning.delayed import DelayedPlanner
from ..planning.request import MakePlanner, PlanMaker, PlanReply, PlanRequest, Plans, committed_tensors
from ..planning.thread import ThreadPlanner
from ..robots.env import EnvRobot
from ..types import Plan
from .episodes import Episode
from .rollout import in_groups

MakeEnvAt = Callable[[float], "gymnasium.Env[object, object]"]
"""A control rate in Hz to an environment that takes actions at it."""


class Batch:
    """Plans of several planners, computed together when one of them is needed, the latest possible moment."""

    def __init__(self) -> None:
        self._waiting: list[tuple[PlanMaker, PlanRequest]] = []
        self._made: dict[int, PlanReply] = {}

    def begin(self, maker: PlanMaker, request: PlanRequest) -> Callable[[], PlanReply]:
        """Queues a request; the returned function gives its plan."""
        self._waiting.append((maker, request))

        def made() -> PlanReply:
            while id(request) not in self._made:
                self._compute()
            return self._made.pop(id(request))

        return made

    def _compute(self) -> None:
        """Computes in one call the requests that are warm-started from a plan shifted by equally many steps,
        and in another those that start cold; of a planner's requests the first, from whose plan the next may
        be warm-started."""
        groups: dict[int, list[tuple[PlanMaker, PlanRequest, Plan | None]]] = {}
        later, seen = [], set()
        for maker, request in self._waiting:
            if id(maker) in seen:
                later.append((maker, request))
                continue
            seen.add(id(maker))
            previous, moved = maker.previous(request)
            groups.setdefault(-1 if previous is None else moved, []).append((maker, request, previous))
        self._waiting = later
        for moved, members in groups.items():
            plans = [previous for _, _, previous in members if previous is not None]
            plan = members[0][0].policy.plan(
                np.stack([request.window for _, request, _ in members]),
                Plan.cat(plans) if plans else None,
                generator=[maker.generator for maker, _, _ in members],
                executed_steps=max(moved, 0),
                committed=committed_tensors([request for _, request, _ in members]),
            )
            for row, (maker, request, _) in enumerate(members):
                self._made[id(request)] = maker.made(request, plan.select([row]), math.nan)


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

    def begin(draw: np.random.Generator) -> Callable[[], float]:
        return lambda: float(draw.choice(values)) if len(values) > 1 else float(values[0])

    return begin


def realtime_rollout(
    policy: Plans,
    make_env: MakeEnvAt,
    seeds: Sequence[int],
    seconds: float,
    *,
    rate_hz: float,
    latencies: Sequence[float] = (0.0,),
    blending: Blending = Latest,
    replan_every: int | None = None,
    side_by_side: int | None = None,
    success_key: str | None = None,
    on_ticks: Callable[[int], object] = lambda ticks: None,
) -> list[Episode]:
    """Runs one episode per seed in virtual time.

    Args:
        make_env: called once per seed.
        seconds: an episode's length.
        rate_hz: of control; the environment takes actions at it.
        latencies: seconds per plan, to draw from.
        blending, replan_every: see ``Controller``.
        side_by_side: episodes at a time, where an environment takes much memory; None: all.
        success_key: of the environment's info; see ``environment.succeeded``.
        on_ticks: told how many ticks of all episodes together went by, or were spared by an early end.

    Raises:
        InputError: the rate isn't a multiple of the policy's, a latency is no time, or ``side_by_side``
            no count.
    """
    n_ticks, latency = round(seconds * rate_hz), drawn_from(latencies)
    robot = partial(EnvRobot, control_hz=rate_hz, success_key=success_key)
    return [
        episode
        for group in in_groups(seeds, side_by_side)
        for episode in _run_together(
            policy, make_env, robot, group, n_ticks, rate_hz, latency, blending, replan_every, on_ticks
        )
    ]


def _run_together(
    policy: Plans,
    make_env: MakeEnvAt,
    make_robot: Callable[..., EnvRobot],
    seeds: Sequence[int],
    n_ticks: int,
    rate_hz: float,
    latency: Callable[[np.random.Generator], Callable[[], float]],
    blending: Blending,
    replan_every: int | None,
    on_ticks: Callable[[int], object],
) -> list[Episode]:
    clock, batch = VirtualClock(), Batch()
    robots, controllers = [], []
    for seed in seeds:

        def planner(
            policy: Plans, generator: torch.Generator, clock: Clock, seed: int = seed
        ) -> DelayedPlanner:
            maker = PlanMaker(policy, generator, clock)
            return DelayedPlanner(partial(batch.begin, maker), clock, latency(np.random.default_rng(seed)))

        controller = Controller(
            policy,
            rate_hz,
            generator=torch.Generator().manual_seed(int(seed)),
            planner=planner,
            blending=blending,
            clock=clock,
            replan_every=replan_every,
            planner_timeout=math.inf,
            capacity=n_ticks,
        )
        controllers.append(controller.start())
        robots.append(make_robot(make_env(rate_hz), int(seed), clock))
    running = list(range(len(seeds)))
    for tick in range(n_ticks):
        clock.sleep_until(tick / rate_hz)
        for i in running:
            controllers[i].sense(robots[i].observe())
        for i in running:
            action = controllers[i].act()
            if action is None:
                robots[i].stop()
            else:
                robots[i].apply(action)
        ended = [i for i in running if robots[i].finished]
        running = [i for i in running if not robots[i].finished]
        on_ticks(len(running) + len(ended) * (n_ticks - tick))
        if not running:
            break
    clock.sleep_until(n_ticks / rate_hz)
    for i in running:
        robots[i].advance()
    for robot in robots:
        robot.env.close()
    return [
        _episode(int(seed), robot, controller.record)
        for seed, robot, controller in zip(seeds, robots, controllers, strict=True)
    ]


def _episode(seed: int, robot: EnvRobot, record: Record) -> Episode:
    return Episode(seed, robot.score, robot.success, robot.n_steps, record=record)


def boundary_jumps(records: Sequence[Record]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Changes of the action from tick to tick (Euclidean, in its units): ``(between, within plans)``."""
    at, within = [], []
    for record in records:
        change = np.linalg.norm(np.diff(record.ticks["action"], axis=0), axis=1)
        acting = ~record.ticks["fallback_active"]
        joins, steady = record.joins()[1:], acting[1:] & acting[:-1]
        at.append(change[joins])
        within.append(change[steady & ~joins])
    return np.concatenate(at), np.concatenate(within)


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
    blending: Blending = Latest,
    replan_every: int | None = None,
    success_key: str | None = None,
    on_ticks: Callable[[int], object] = lambda ticks: None,
) -> list[Episode]:
    """Runs one episode per seed at the real rate, planning beside every loop.

    Args:
        clock: the machine's.
        side_by_side: robots at a time, each with a loop and a planner of its own.
        planner: where plans are made.

    Others as in ``realtime_rollout``.
    """

    def run(seed: int) -> Episode:
        generator = torch.Generator().manual_seed(seed)
        env = make_env(rate_hz)
        with Controller(
            policy,
            rate_hz,
            generator=generator,
            planner=planner,
            blending=blending,
            clock=clock,
            replan_every=replan_every,
            capacity=round(seconds * rate_hz),
        ) as controller:
            robot = EnvRobot(env, seed, clock, control_hz=rate_hz, success_key=success_key)
            loop = ControlLoop(controller, robot, observers=[lambda tick: on_ticks(1 + tick.missed)])
            record = loop.run(round(seconds * rate_hz), until=lambda: robot.finished)
        robot.advance()
        env.close()
        on_ticks(round(seconds * rate_hz) - int(record.ticks["index"][-1]) - 1)
        return _episode(seed, robot, record)

    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(run, map(int, seeds)))
