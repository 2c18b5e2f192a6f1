"""Fallbacks: the actions of a controller when no plan gives one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..task import Contract
from .record import Fault

Fallback = Callable[[NDArray[np.float64] | None, Fault], NDArray[np.float64] | None]
"""``(the last safe action [A] or None, faults)`` to the action that replaces a plan's; None: nothing is safe,
so stop the robot.  Called once per tick for as long as it is needed."""


def hold_last(last: NDArray[np.float64] | None, faults: Fault) -> NDArray[np.float64] | None:
    """Repeats the last safe action: holds still where actions are absolute.  Deltas and velocities go on."""
    return last


def stop(last: NDArray[np.float64] | None, faults: Fault) -> None:
    """Stops the robot."""


def default_fallback(contract: Contract) -> Fallback:
    """``hold_last`` where the contract says that repeating an action holds still, else ``stop``."""
    return hold_last if contract.is_absolute else stop
