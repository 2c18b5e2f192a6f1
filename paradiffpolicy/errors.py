"""The one exception for input that a person can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input: its message is one line that says what, where, and the remedy.

    The console command prints the line and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an exception's message; its type's name if there is none."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def reading(what: str, remedy: str = "it is damaged, copy it again") -> Iterator[None]:
    """Turns whatever reading raises, other than ``InputError``, into one that names ``what`` and a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} can't be read ({first_line(error)}): {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, and what exists unless that is long, for the end of an error line."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return hint if close and len(known) > 12 else f"{hint} known: {', '.join(known)}"


def require_positive(**values: float) -> None:
    """Raises ``InputError`` that names the first value that is not a number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{name}={value} must be a number above 0")


def require_count(**values: int) -> None:
    """Raises ``InputError`` that names the first value that is not a whole number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value} must be a whole number above 0")
