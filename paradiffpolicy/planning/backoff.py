"""How long to wait before a planner is started again."""

from __future__ import annotations


class BackOff:
    """Seconds before the next start: none, then twice as long each time, until one has made a plan."""

    FIRST, LONGEST = 0.5, 30.0

    def __init__(self) -> None:
        self._next = 0.0

    def next(self) -> float:
        """The seconds before a start."""
        now, self._next = self._next, min(max(self.FIRST, 2 * self._next), self.LONGEST)
        return now

    def succeeded(self) -> None:
        """The next start is at once."""
        self._next = 0.0
