"""Times environments on one core: control steps per second, and the duration of a reset.

Environments take turns, so that a busy moment of the machine hits all of them.  robosuite's tasks have a
second row: robosuite's own ``step``, with the observations that it makes on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from rich.table import Table

from ..clock import Clock
from ..tables import spread, table
from .timing import percentiles


@dataclass
class EnvironmentRow:
    """An environment to time, and its times.

    Attributes:
        name: of it.
        reset: begins an episode with a seed.
        step: takes one control step, observation included.
        baseline: the row that it is compared with, if any.
        steps_hz: control steps per second, per turn.
        resets: seconds per reset, per turn.
    """

    name: str
    reset: Callable[[int], object]
    step: Callable[[], object]
    baseline: str | None = None
    steps_hz: list[float] = field(default_factory=list)
    resets: list[float] = field(default_factory=list)


def environment_rows(
    name: str, env: gymnasium.Env[Any, Any], robosuites_own: bool = False
) -> list[EnvironmentRow]:
    """An environment's row and, if asked for and it is robosuite's, one of robosuite's own step."""
    inner: Any = env.unwrapped
    space: Any = env.action_space
    still = None if "hold_action" in dir(inner) else np.clip(np.zeros(space.shape), space.low, space.high)

    def step() -> None:
        env.step(inner.hold_action if still is None else still)  # stays where it is; its physics go on

    row = EnvironmentRow(name, lambda seed: env.reset(seed=seed), step)
    simulation = getattr(inner, "simulation", None)
    if simulation is None or not robosuites_own:
        return [row]
    env.reset(seed=0)
    alone, action = simulation.another(), inner.command(inner.hold_action)
    row.baseline = f"{name}, robosuite's own"
    return [row, EnvironmentRow(row.baseline, lambda _: alone.reset(), lambda: alone.step(action))]


def measure(
    rows: Sequence[EnvironmentRow], turns: int, steps: int, clock: Clock, on_turn: Callable[[int], object]
) -> None:
    """Fills in the rows: in each of ``turns`` every row has a reset and ``steps`` control steps."""
    for row in rows:  # the first ones compile, and fill caches
        row.reset(0)
        row.step()
    for turn in range(turns):
        for row in rows:
            begin = clock.now()
            row.reset(turn)
            middle = clock.now()
            for _ in range(steps):
                row.step()
            row.resets.append(middle - begin)
            row.steps_hz.append(steps / (clock.now() - middle))
        on_turn(1)


def figures(rows: Sequence[EnvironmentRow]) -> dict[str, dict[str, Any]]:
    """Quartiles by name; ``times_baseline`` is a ratio within turns."""

    def quartiles(values: Any) -> list[float]:
        return [round(value, 3) for value in percentiles(values, 25, 50, 75)]

    rates = {row.name: np.array(row.steps_hz) for row in rows}
    return {
        row.name: {
            "steps_hz": quartiles(row.steps_hz),
            "reset_ms": quartiles(1e3 * np.array(row.resets)),
            "times_baseline": row.baseline and quartiles(rates[row.name] / rates[row.baseline]),
        }
        for row in rows
    }


def environments_table(values: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per environment."""
    return table(
        "One core: median and quartiles",
        (
            {
                "environment": name,
                "control steps\n/ s": spread(row["steps_hz"], digits=0),
                "reset, ms": spread(row["reset_ms"], digits=0),
                "times\nrobosuite's own step": row["times_baseline"]
                and spread(row["times_baseline"], digits=2),
            }
            for name, row in values.items()
        ),
    )
