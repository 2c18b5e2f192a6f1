"""State rolled forward: a plan is made for the tick at which it will begin to act (VLASH, arXiv 2512.01031).

While a plan is made, the robot goes on with actions that are committed.  So its state when the plan begins is
known ahead, where actions are absolute positions: a position is the action that was commanded one tick
before::

    tick        k    k+1  k+2  k+3                 the plan is asked for at k, expected at k+3
    commanded   a0   a1   a2   .                   by the plan before
    state       s0   a0   a1   a2                  observed, then expected
    new plan                   begins              from the window of k+3, as expected

Everything else in the window, as objects and pictures, stays as it was observed.  A plan that arrives before
its tick waits for it; of one that arrives later, steps are skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..history import History
from ..task import NUMBERS, Relative
from ..types import PolicySpec
from .blending import Blender
from .request import PlanReply

DELAYS = 8
"""How many plans' delays are remembered; the longest is expected of the next plan."""

REMEMBERED = 1024
"""Ticks whose commands are remembered, for observations that are older than their tick."""


def moved_pairs(spec: PolicySpec, named: Mapping[str, str]) -> Relative:
    """Which number of an action moves which column of the observation, by names: ``{x: state.0}``.

    Raises:
        InputError: a state isn't the last action, there is no such number, or one is moved twice.
    """
    contract = spec.contract
    if not isinstance(named, Mapping):
        raise InputError(f"forward={named!r:.60} must name numbers, as {{x: state.0}}")
    if not named:
        return ()
    if not contract.is_absolute:
        raise InputError(
            f"forward={dict(named)!r:.60}: the contract says that actions are of the kind "
            f"{contract.action_kind}, and only a position or pose is the state that follows: leave it empty"
        )
    if not contract.observation or None in [field.size for field in contract.observation]:
        raise InputError(
            f"forward={dict(named)!r:.60}: the policy's contract doesn't name the observation's fields and "
            "their shapes: leave it empty"
        )
    pairs = contract.relative_pairs(named, "forward")
    if any(number >= spec.action_dim for number, _ in pairs):
        raise InputError(f"forward={dict(named)!r:.60}: an action has {spec.action_dim} numbers")
    if len({column for _, column in pairs}) < len(pairs):
        raise InputError(f"forward={dict(named)!r:.60} moves a number of the observation twice")
    return pairs


class Forward:
    """Moves windows forward, and keeps a plan until its tick.

    Args:
        spec: of the policy.
        named: the observation's numbers that are moved, by the action's: ``{x: state.0}``; {}: none are, so
            every plan begins at its observation's tick.

    Attributes:
        delays: of the last plans, in ticks from their observations to their arrivals.
        waiting: a plan that has arrived before its tick, or None.
        ahead: by how many ticks the last request's window was moved.
    """

    def __init__(self, spec: PolicySpec, named: Mapping[str, str]) -> None:
        pairs = moved_pairs(spec, named)
        self._numbers, self._columns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.delays: deque[int] = deque(maxlen=DELAYS)
        self._command = np.zeros(spec.action_dim)
        self._commanded: deque[tuple[int, NDArray[np.float64]]] = deque(maxlen=REMEMBERED)
        self.clear()

    def __bool__(self) -> bool:
        return bool(self._columns)

    @property
    def delay(self) -> int:
        """The next plan's expected delay, in ticks."""
        return max(self.delays, default=0)

    def clear(self) -> None:
        """Forgets commands, and the plan that waits, but no delays."""
        self._commanded.clear()
        self.waiting: PlanReply | None = None
        self.ahead = 0

    def commanded(self, tick: int, action: NDArray[np.float64] | None) -> None:
        """Notes the command of a tick; None: the robot was stopped."""
        if self and action is not None:
            self._commanded.append((tick, action))

    def window(
        self, history: History, blender: Blender, observed: int, now: int, last: float
    ) -> tuple[NDArray[Any], int]:
        """The window ``[To, O]`` of the tick at which the plan will begin, and that tick: as many after
        ``observed`` as the expected delay, or fewer if the blender's plans end before.

        Args:
            history: its newest observation is of the tick ``observed``.
            blender: gives the commands from the tick ``now`` on.
            last: the tick until which they may be acted on.
        """
        window, self.ahead = history.window(), 0
        if not self:
            return window, observed
        numbers = window[NUMBERS] if window.dtype.names else window
        ahead, vector = history.numbers(), numbers[-1].copy()
        for tick in range(observed, observed + self.delay):
            command = self._command_at(tick, now, blender, last)
            if command is None:
                break
            vector[self._columns] = command[self._numbers]
            self.ahead += 1
            ahead.push(vector, observed + self.ahead)
        numbers[:, self._columns] = ahead.window()[:, self._columns]
        return window, observed + self.ahead

    def _command_at(self, tick: int, now: int, blender: Blender, last: float) -> NDArray[np.float64] | None:
        """The command of a tick; a tick that was left out has that of the one before it."""
        if tick < now:
            return next((command for at, command in reversed(self._commanded) if at <= tick), None)
        acts = tick <= last and blender.act(tick, self._command) >= 0
        return self._command if acts else None

    def due(self, tick: int) -> PlanReply | None:
        """The plan that waits, handed out once when its tick has come."""
        if self.waiting is None or self.waiting.tick > tick:
            return None
        plan, self.waiting = self.waiting, None
        return plan
