"""Labels the logarithmic axes of all pictures alike."""

from __future__ import annotations

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

LONG = 500.0
"""Ratio of an axis' end to its start, from which on it has fewer numbers."""


def plain_ticks(axis: Axis) -> None:
    """Writes 1, 2, 5, 10, … at a logarithmic axis, or 1, 10, 100, … at a long one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < LONG * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
