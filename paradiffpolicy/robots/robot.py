"""The robots that a control loop drives: the protocol, and how one is built for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from ..clock import Clock
from ..types import PolicySpec

if TYPE_CHECKING:
    import gymnasium


class Robot(Protocol):
    """Something that can be observed and commanded.  No call may block: the loop's rate depends on it.

    It may also have an attribute ``observed_at``: when the newest observation was measured, in the clock's
    seconds; None, as without it: when ``observe`` returned it.
    """

    def observe(self) -> NDArray[Any] | None:
        """The newest observation ``[O]``; None if none has come since the last call."""
        ...

    def apply(self, action: NDArray[Any]) -> None:
        """Sends a command ``[A]``, which the robot follows until the next."""
        ...

    def stop(self) -> None:
        """Stops in a safe way: called when no action is safe, and at the end of a run."""
        ...


@dataclass(frozen=True)
class RobotSettings:
    """Settings from which ``ROBOTS``' functions build a robot.

    Attributes:
        spec: of the policy that drives it: O and A.
        rate_hz: of the control loop.
        clock: the control loop's.
        seed: of a simulated robot.
        make_env: makes the task's environment for a control rate in Hz; None: the task has none.
        success_key: of the environment's info; see ``environment.succeeded``.
        scoring: how a score is made of rewards, a name in ``environment.SCORINGS``.
        recorded: names in the environment's info that recordings hold.
        picture_size: of pictures, in pixels.
        address: of a robot in the network, ``HOST:PORT``.
        options: any others, for robots of the caller's own.
    """

    spec: PolicySpec
    rate_hz: float
    clock: Clock
    seed: int = 0
    make_env: Callable[[float], gymnasium.Env[Any, Any]] | None = None
    success_key: str | None = None
    scoring: str = "max"
    recorded: tuple[str, ...] = ()
    picture_size: int = 256
    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeProgress:
    """How an episode goes.

    Attributes:
        seconds: since the reset.
        reward: of the last step; NaN before the first.
        best: the largest reward so far, or NaN.
        best_at: seconds since the reset when it was reached.
        ended: whether the episode is over.
    """

    seconds: float
    reward: float
    best: float
    best_at: float
    ended: bool


@dataclass(frozen=True)
class RobotSetup:
    """A robot, and its part in a run's recordings, pictures and report.

    Attributes:
        robot: to drive.
        fields: gives values to record beside the observation vector, by name, of the last observation.
        picture: gives a picture ``[size, size, 3]``; None: there is none.
        project: maps actions ``[..., A]`` to pixels ``[..., 2]`` of the picture; None: it can't be done.
        progress: gives how the episode goes; None: there is no reward.
        finished: whether there is no more to do.
        outcome: gives the report's entries on the robot.
        close: releases its environment, socket or device.
    """

    robot: Robot
    fields: Callable[[], Mapping[str, NDArray[Any]]] = dict
    picture: Callable[[], NDArray[Any]] | None = None
    project: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    progress: Callable[[], EpisodeProgress | None] = lambda: None
    finished: Callable[[], bool] = bool
    outcome: Callable[[], dict[str, Any]] = dict
    close: Callable[[], object] = dict


BuildRobot = Callable[[RobotSettings], RobotSetup]
"""Builds a robot for a run."""
