"""Clocks, which are arguments wherever time matters, so that everything timed can be tested exactly."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Protocol


class Clock(Protocol):
    """Tells the time, and waits."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Returns at ``moment``, or at once if it has passed."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        remaining = moment - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)


class ClockOffset:
    """By how much another machine's clock is ahead of this one's, from messages that carry its time.

    A message has left before it arrives.  So one from there bounds the offset from below, one to there from
    above; of the last few of each the tightest count.  The estimate lies in the middle: it is wrong by half
    the round trip at most.

    Args:
        remembered: messages of each direction.
    """

    def __init__(self, remembered: int = 16) -> None:
        self._least: deque[float] = deque(maxlen=remembered)
        self._most: deque[float] = deque(maxlen=remembered)

    def sent(self, here: float, there: float) -> None:
        """A message left at ``here``, and was there at ``there``, by that clock."""
        self._most.append(there - here)

    def received(self, there: float, here: float) -> None:
        """A message had left at ``there``, by that clock, and was here at ``here``."""
        self._least.append(there - here)

    @property
    def seconds(self) -> float:
        """NaN before there was one message each way."""
        if not self._least or not self._most:
            return math.nan
        least, most = max(self._least), min(self._most)
        if least > most + 0.005:  # more than drift: a clock was set, and what was before doesn't count
            self._least.clear()
            self._most.clear()
            return math.nan
        return (least + most) / 2


class VirtualClock:
    """A clock whose time passes only by ``advance``, or by sleeping."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def sleep_until(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        self._now += seconds
