"""The one exception for input that a person can correct."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsIndex, TypeGuard


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


def nearest(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, and what exists unless that is long, for the end of an error line."""
    name, known = str(name), sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return hint if close and len(known) > 12 else f"{hint} known: {', '.join(known)}"


LARGEST = 10**10
"""Beyond it a setting's number is a mistake."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, which true and false aren't, NaN isn't and infinity isn't."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[SupportsIndex]:
    """Whether it is a whole number, as of Python, numpy or torch; true and false aren't."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", ""))


def require_positive(**values: float) -> None:
    """Raises ``InputError`` that names the first value that is not a number above zero."""
    _require(int | float, "a number above 0", values)


def require_within(low: int, high: int, **values: Any) -> None:
    """Raises ``InputError`` that names the first value that is not a whole number within bounds."""
    for name, value in values.items():
        if not (is_whole(value) and low <= operator.index(value) <= high):
            raise InputError(f"{name}={value!r} must be a whole number from {low} to {high}")


def require_count(**values: int) -> None:
    """Raises ``InputError`` that names the first value that is not a whole number above zero."""
    _require(int, "a whole number above 0", values)


def _require(kind: Any, words: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not is_number(value) or not isinstance(value, kind) or not 0 < value <= LARGEST:
            most = f", at most {LARGEST:g}" if is_number(value) and value > LARGEST else ""
            raise InputError(f"{name}={value} must be {words}{most}")
