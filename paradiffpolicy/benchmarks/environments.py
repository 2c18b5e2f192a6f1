"""How many control steps per second an environment takes on one core, and what a reset costs.

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


@dataclass
class Row:
    """An environment's figures.

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


def env_row(name: str, env: gymnasium.Env[Any, Any], baseline: str | None = None) -> Row:
    """An environment that is told to stay where it is: its physics go on as ever."""

    def reset(seed: int) -> None:
        env.reset(seed=seed)

    def step() -> None:
        env.step(env.unwrapped.hold_action)  # type: ignore[attr-defined]

    return Row(name, reset, step, baseline)


def robosuite_row(name: str, robosuite_env: Any, action: Any) -> Row:
    """robosuite by itself; ``action`` as its controllers take it."""

    def reset(_: int) -> None:
        robosuite_env.reset()

    return Row(name, reset, lambda: robosuite_env.step(action))


def measure(
    rows: Sequence[Row], turns: int, steps: int, clock: Clock, on_turn: Callable[[int], object]
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


def figures(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Medians and quartiles by name; ``times_baseline`` is a ratio within turns."""
    by_name = {row.name: row for row in rows}
    return {row.name: _figures(row, by_name) for row in rows}


def _figures(row: Row, by_name: Mapping[str, Row]) -> dict[str, Any]:
    def spread(values: Any) -> list[float]:
        return [round(float(v), 3) for v in np.percentile(values, [25, 50, 75])]

    ratio = None
    if row.baseline is not None:
        ratio = spread(np.array(row.steps_hz) / np.array(by_name[row.baseline].steps_hz))
    return {
        "steps_hz": spread(row.steps_hz),
        "reset_ms": spread(1e3 * np.array(row.resets)),
        "times_baseline": ratio,
    }


def environments_table(values: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per environment."""
    view = Table(title="One core: median and quartiles", title_justify="left")
    view.add_column("environment")
    for heading in ("control steps\n/ s", "reset, ms", "times\nrobosuite's own step"):
        view.add_column(heading, justify="right")

    def text(spread: Sequence[float] | None, digits: int) -> str:
        if spread is None:
            return ""
        low, middle, high = (f"{value:.{digits}f}" for value in spread)
        return f"{middle} [{low}, {high}]"

    for name, row in values.items():
        view.add_row(name, text(row["steps_hz"], 0), text(row["reset_ms"], 0), text(row["times_baseline"], 2))
    return view
