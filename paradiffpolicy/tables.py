"""Tables and progress bars on the terminal, and how a benchmark ends: tables, a line of JSON, a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import plain_json, write_json
from .provenance import about, describe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

WIDTH = 150
"""Columns of text where the output isn't a terminal."""


def console() -> Console:
    """Standard output, as wide as the terminal; ``WIDTH`` columns in a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def table(title: str, rows: Iterable[Mapping[str, object]], left: Sequence[str] = ()) -> Table:
    """Builds an aligned table of plain text.

    Args:
        rows: cells by heading, which are the first row's; a line break in a heading is kept, and None is an
            empty cell.
        left: headings of columns of words, aligned to the left as the first column is; others hold
            numbers and are aligned to the right.
    """
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=escape(title) or None, title_justify="left")
    for row in rows:
        if not view.columns:
            for k, heading in enumerate(row):
                view.add_column(escape(heading), justify="left" if k == 0 or heading in left else "right")
        view.add_row(*("" if cell is None else escape(str(cell)) for cell in row.values()))
    return view


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """Builds a table of names and values, without headings."""
    view = table(title, ({"": name, " ": value} for name, value in values.items()), left=(" ",))
    view.show_header = False
    return view


def bar(label: str, total: float, unit: str = "turn", *, shown: bool = True) -> tqdm[Any]:
    """A progress bar on standard error; ``update(n)`` advances it."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=label, dynamic_ncols=True, disable=not shown)


def spread(quartiles: Sequence[float], digits: int = 1) -> str:
    """A median between its quartiles, as ``2.1 [1.9, 2.4]``."""
    low, middle, high = quartiles
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


TAIL = {"p99": (99, 1_000), "p99.9": (99.9, 10_000)}
"""Percentiles of a tail, and the number of values from which on they are stated: ten are beyond each then.
A percentile of fewer is some large value by chance; the largest of n says what it is."""


def quantiles(values: NDArray[Any] | Sequence[float]) -> dict[str, float | None]:
    """``n``, ``p50``, those of ``TAIL`` that n values support, and ``max``, of values that are finite; None
    where there is none."""
    import numpy as np

    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]

    def share(percent: float, least: int = 1) -> float | None:
        return float(np.percentile(known, percent)) if len(known) >= least else None

    return {
        "n": len(known),
        "p50": share(50),
        **{name: share(*needs) for name, needs in TAIL.items()},
        "max": share(100),
    }


def tail(values: Mapping[str, float | None], digits: int = 1) -> str:
    """``quantiles`` in words, as ``12.1, p99 14.0, max 15.2 (n = 1000)``; what isn't stated is left out."""
    known = {name: value for name, value in values.items() if name != "n" and value is not None}
    shown = (f"{name} {value:.{digits}f}".removeprefix("p50 ") for name, value in known.items())
    return f"{', '.join(shown)} (n = {values['n']})" if known else "-"


def publish(
    tables: Sequence[Table],
    content: Mapping[str, Any],
    out: str | Path | None = None,
    notes: Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
) -> None:
    """Ends a benchmark: prints its tables, notes and the machine, then ``content`` as one line of JSON.

    Args:
        content: plain values; what ``provenance.about`` says is added.
        out: a JSON file to write as well.
        checkpoint: that was measured, if one was.
    """
    content, screen = {**about(checkpoint), **content}, console()
    for view in tables:
        screen.print(view)
    for line in (*notes, f"on {describe(content['machine'])}"):
        screen.print(line, highlight=False, markup=False)
    sys.stdout.write(json.dumps(plain_json(content)) + "\n")
    if out:
        write_json(Path(out), content)
