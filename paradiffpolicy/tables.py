"""Tables and progress bars on the terminal, and how a benchmark ends: tables, a line of JSON, a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import plain_json, write_json
from .provenance import describe, machine

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

WIDTH = 150
"""Columns of text where the output isn't a terminal."""


def console() -> Console:
    """Standard output, as wide as the terminal; ``WIDTH`` columns in a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[str] = ()
) -> Table:
    """Builds an aligned table of plain text.

    Args:
        headings: one per column; a line break in one is kept.
        rows: of as many cells each; None is an empty cell.
        left: headings of columns of words, aligned to the left as the first column is; others hold
            numbers and are aligned to the right.
    """
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=escape(title) or None, title_justify="left")
    for k, heading in enumerate(headings):
        view.add_column(escape(heading), justify="left" if k == 0 or heading in left else "right")
    for row in rows:
        view.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    return view


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """Builds a table of names and values, without headings."""
    view = table(title, ("", " "), values.items(), left=(" ",))
    view.show_header = False
    return view


def bar(label: str, total: float, unit: str = "turn", *, shown: bool = True) -> tqdm[Any]:
    """A progress bar on standard error; ``update(n)`` advances it."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=label, dynamic_ncols=True, disable=not shown)


def spread(low: float, middle: float, high: float, digits: int = 1) -> str:
    """A median with its quartiles, as ``2.1 [1.9, 2.4]``."""
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def publish(
    tables: Sequence[Table],
    content: Mapping[str, Any],
    out: str | Path | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Ends a benchmark: prints its tables, notes and the machine, then ``content`` as one line of JSON.

    Args:
        content: plain values; ``machine`` is added.
        out: a JSON file to write as well.
    """
    here, screen = machine(), console()
    for view in tables:
        screen.print(view)
    for line in (*notes, f"on {describe(here)}"):
        screen.print(line, highlight=False, markup=False)
    content = {"machine": here, **content}
    sys.stdout.write(json.dumps(plain_json(content)) + "\n")
    if out:
        write_json(Path(out), content)
