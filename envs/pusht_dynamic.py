"""PushT while the block, or its target, drifts now and then: a world that doesn't wait for a plan.

In static PushT nothing moves but by the pusher, so a plan that comes late is hardly worse than one that
comes at once.  Here the block is carried along for a while, as on a conveyor that is switched on and off,
after the idea of a dynamic PushT (arXiv 2603.01953); a policy sees it move, and has to follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pusht import PHYSICS_HZ, WALLS, PushTEnv, placed_t

AT_REST = np.zeros(3)


@dataclass(frozen=True)
class Drift:
    """One time of drifting.

    Attributes:
        start, stop: seconds since the reset.
        velocity: ``[3]``: x and y in px/s, and the angle's in rad/s.
    """

    start: float
    stop: float
    velocity: NDArray[np.float64]


@dataclass(frozen=True)
class DriftSchedule:
    """When, where and how fast something drifts: a Poisson process.

    Directions are uniform, and so are numbers within a range.

    Attributes:
        rate: drifts that begin per second of rest, 0 to 100; 0: none ever does.
        duration: range of a drift's seconds.
        speed: range of its speed, px/s.
        spin: largest speed of its rotation, rad/s, either way.

    Raises:
        ValueError: a number isn't finite or is out of its range, or a range's end is below its start.
    """

    rate: float = 0.2
    duration: Sequence[float] = (0.5, 1.5)
    speed: Sequence[float] = (20.0, 40.0)
    spin: float = 0.3

    def __post_init__(self) -> None:
        for name in ("duration", "speed"):
            values = getattr(self, name)
            if len(values) != 2 or not 0 <= values[0] <= values[1] < math.inf:
                raise ValueError(f"{name}={values} must be two numbers, not below 0, in their order")
        if not 0 <= self.rate <= PHYSICS_HZ:  # else a step of the physics could pass over drifts without end
            raise ValueError(f"rate={self.rate} must be a number from 0 to {PHYSICS_HZ}")
        if not 0 <= self.spin < math.inf:
            raise ValueError(f"spin={self.spin} must be a number, not below 0")

    def drifts(self, draw: np.random.Generator) -> Iterator[Drift]:
        """Draws drifts without end, in their order."""
        stop, (shortest, longest), (slowest, fastest) = 0.0, self.duration, self.speed
        while self.rate:
            start = stop + draw.exponential(1 / self.rate)
            stop = start + draw.uniform(shortest, longest)
            direction, speed = draw.uniform(0, 2 * math.pi), draw.uniform(slowest, fastest)
            spin = draw.uniform(-self.spin, self.spin)
            velocity = np.array([speed * math.cos(direction), speed * math.sin(direction), spin])
            yield Drift(start, stop, velocity)


class PushTDynamicEnv(PushTEnv):
    """Push the T, which drifts.

    As ``PushTEnv``, but:

    - now and then the block drifts, by a ``DriftSchedule`` that is drawn at the reset: it depends on the
      seed, not on actions, nor on ``control_hz``, so that all policies meet the same drifts.  Walls and the
      pusher stop the drifting block and push it, as at any time.
    - ``moved="goal"``: the target drifts in its place, and stops at the walls.  Only pictures show it.
    - the episode doesn't terminate (``terminates=False``): drifts come after a success too.  What tells
      policies apart is the mean of the rewards, the coverage over time; the largest forgives all that came
      later.

    ``info`` has ``drift`` ``[3]`` too: the velocity by which it is being moved, px/s and rad/s, as of the
    last step of the physics; zeros at rest.

    Args:
        rate, duration, speed, spin: see ``DriftSchedule``.
        moved: ``block`` or ``goal``.
        terminates: whether the episode ends at success.
        options: of ``PushTEnv``.
    """

    def __init__(
        self,
        *,
        rate: float = DriftSchedule.rate,
        duration: Sequence[float] = DriftSchedule.duration,
        speed: Sequence[float] = DriftSchedule.speed,
        spin: float = DriftSchedule.spin,
        moved: str = "block",
        terminates: bool = False,
        **options: Any,
    ) -> None:
        moves = {"block": self._move_block, "goal": self._move_goal}
        if moved not in moves:
            raise ValueError(f"{moved=} must be one of {sorted(moves)}")
        self.schedule = DriftSchedule(rate, duration, speed, spin)
        self._move = moves[moved]
        self._begin(iter(()))
        super().__init__(terminates=terminates, **options)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._begin(iter(()))
        result = super().reset(seed=seed, options=options)
        # Of their own generator: the next reset must not depend on how many were drawn.
        self._begin(self.schedule.drifts(np.random.default_rng(self.np_random.integers(2**63))))
        return result

    def _begin(self, drifts: Iterator[Drift]) -> None:
        """Starts the schedule's time."""
        self._drifts, self._drift, self._n_physics = drifts, next(drifts, None), 0
        self._velocity = AT_REST

    def _advance(self, dt: float) -> None:
        now = self._n_physics / PHYSICS_HZ
        while self._drift is not None and self._drift.stop <= now:
            self._drift = next(self._drifts, None)
        moving = self._drift is not None and self._drift.start <= now
        self._velocity = self._drift.velocity if self._drift is not None and moving else AT_REST
        if moving:
            self._move(self._velocity, dt)
        super()._advance(dt)
        self._n_physics += 1

    def _move_block(self, velocity: NDArray[np.float64], dt: float) -> None:
        """Pushes the block so that it has this velocity in the next step, if nothing is in its way: the
        space's damping leaves nothing of the velocity that it had."""
        block, (x, y, spin) = self._block, velocity.tolist()
        block.force = x * block.mass / dt, y * block.mass / dt
        block.torque = spin * block.moment / dt

    def _move_goal(self, velocity: NDArray[np.float64], dt: float) -> None:
        """Moves the target, unless it would cross a wall."""
        x, y, angle = (self._goal_pose + velocity * dt).tolist()
        moved = x, y, angle
        left, top, right, bottom = placed_t(*moved).bounds
        if min(left, top) > WALLS[1][0] and max(right, bottom) < WALLS[3][0]:
            self._place_goal(moved)

    def _info(self) -> dict[str, Any]:
        return {**super()._info(), "drift": self._velocity.copy()}
