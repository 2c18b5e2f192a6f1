"""Which of a plan's steps are due: those that come after what was executed while it was made.

::

    tick          k   k+1  k+2  k+3  k+4        a plan made for k arrives at k+3
    executed      a   a    a    .               the old plan acted: the new one's first 3 ticks are left out
    stood still   .   .    .    .               nothing did: it begins with its first action
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from .request import PlanReply


class Progress:
    """Counts the ticks in which plans were executed."""

    def __init__(self) -> None:
        self._tick = 0
        # From a tick on a plan was executed, or none was; and how many ticks of plans there were before.
        self._spans = deque([(0, 0, False)], maxlen=1024)

    def go_on(self, tick: int, acting: bool) -> None:
        """Counts up to ``tick``: as executed if a plan was ``acting``, since it goes on by the clock."""
        if acting != self._spans[-1][2]:
            self._spans.append((self._tick, self.executed_at(self._tick), acting))
        self._tick = tick

    def executed_at(self, tick: int) -> int:
        """In how many ticks before ``tick`` plans were executed."""
        spans = (span for span in reversed(self._spans) if span[0] <= tick)
        start, executed, acting = next(spans, self._spans[0])
        return executed + max(0, tick - start) * acting

    def expected_at(self, tick: int) -> int:
        """In how many ticks before ``tick`` plans will have been executed, if one is from now on."""
        return self.executed_at(min(tick, self._tick)) + max(0, tick - self._tick)

    def placed(self, reply: PlanReply, ahead: int = 0) -> PlanReply:
        """The reply, put off by the ticks ``ahead`` that its window was moved, and by those since then in
        which no plan was executed."""
        begin = reply.tick + ahead
        executed = self.executed_at(self._tick) - self.executed_at(begin)
        waited = max(0, self._tick - begin - executed)
        return replace(reply, tick=begin + waited, waited=waited)
