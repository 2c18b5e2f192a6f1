"""Named choices (solvers, drivers, networks, …) that users extend without editing the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from .errors import InputError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to choices of one kind.

    ::

        SOLVERS.register("mine", my_solver)     # then solver="mine" works wherever solvers are named

    Args:
        kind: what it holds, for error messages, as ``solver``.
        choices: the package's own.
    """

    def __init__(self, kind: str, choices: Mapping[str, T]) -> None:
        self.kind, self._choices = kind, dict(choices)

    def register(self, name: str, choice: T) -> T:
        """Adds a choice; returns it.

        Raises:
            InputError: the name is taken by another choice.
        """
        if self._choices.get(name, choice) is not choice:
            raise InputError(f"{self.kind} {name!r} exists already: choose another name")
        self._choices[name] = choice
        return choice

    def named(self, name: object) -> T:
        """The choice of that name.

        Raises:
            InputError: there is none; the message names the nearest.
        """
        if not isinstance(name, str) or name not in self._choices:
            raise InputError(f"unknown {self.kind} {name!r:.80}{nearest(name, self._choices)}")
        return self._choices[name]

    def resolve(self, given: str | T) -> T:
        """The choice of that name, or the caller's own choice, a callable, as it is.

        Raises:
            InputError: the name is unknown, or what is given is neither.
        """
        if isinstance(given, str):
            return self.named(given)
        if not callable(given):
            raise InputError(f"{self.kind}={given!r} must be one of {', '.join(self)}, or a callable")
        return given

    def __getitem__(self, name: str) -> T:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)


def find_modules_here() -> None:
    """Lets modules of the current folder be imported."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def import_plugins(modules: list[str]) -> None:
    """Imports users' modules, which register their choices; modules in the current folder are found.

    Raises:
        InputError: a module can't be imported.
    """
    find_modules_here()
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:
            raise InputError(f"plugins: {module} can't be imported ({error}): a module's name, as my_module")
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"plugins: {module} can't be imported ({reason}): correct it") from error
