"""A whole plan as a program of pure functions, which a backend freezes.

    state = init(inputs)
    count times, or until done(state):  state = iterate(state)
    outputs = finish(inputs, state)

What a program must be for a backend to freeze it (``emulated`` checks it, without a GPU):

- everything that changes from run to run comes in through ``inputs``;
- nothing is read back to the host, no shape and no index there depends on data, no mask selects;
- nothing is drawn at random, and nothing comes from the host once ``init`` runs;
- a state always has the same keys, shapes and dtypes;
- rounds after the last that is needed change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...errors import InputError
from ..driver import State


class CaptureError(InputError):
    """A program that a backend can't freeze, or a backend that can't be had here."""


@dataclass(frozen=True)
class Program:
    """See the module.

    Attributes:
        count: the number of rounds; None: until ``done``.
        limit: there are never more.
        inputs: an example: shapes, dtypes, device.
        identity: gives what tells this program from all others, in other processes too; None: nothing
            does.
    """

    init: Callable[[State], State]
    iterate: Callable[[State], State]
    done: Callable[[State], Tensor]
    finish: Callable[[State, State], State]
    count: int | None
    limit: int
    inputs: State
    identity: Callable[[], str] | None = None


class CapturedProgram(Protocol):
    """A program, frozen: inputs like the example's to outputs, which the next call may overwrite.

    Attributes:
        rung: how, in words.
        nbytes: memory that it keeps.
    """

    method: str
    nbytes: int

    def __call__(self, inputs: State) -> State: ...


CaptureFunction = Callable[[Program], CapturedProgram]
"""A backend.  Raises ``CaptureError``, and keeps nothing then."""


def nbytes(*states: State) -> int:
    """Memory of all their tensors, shared storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in states for t in s.values()
    }
    return sum(storages.values())
