"""A whole plan as a program of pure functions, which a backend captures.

    state = init(inputs)
    count times, or until done(state):  state = iterate(state)
    outputs = finish(inputs, state)

A backend can capture a program if (``emulated`` checks it, without a GPU):

- everything that changes from run to run comes in through ``inputs``;
- nothing is read back to the host, no shape and no index there depends on data, no mask selects;
- nothing is drawn at random, and nothing comes from the host once ``init`` runs;
- a state always has the same keys, shapes and dtypes;
- iterations after the last that is needed change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...errors import InputError
from ...models.matmul_unet1d import MakeConvolution
from ..driver import State


class CaptureError(InputError):
    """A program that a backend can't capture, or a backend that can't be had here."""


@dataclass(frozen=True)
class Program:
    """A plan as pure functions of tensors; see the module.

    Attributes:
        count: the number of iterations; None: until ``done``.
        limit: there are never more.
        inputs: an example: shapes, dtypes, device.
        identity: gives a name that no other program has, in other processes too; None: nothing does.
        warm: the same plan from a first guess, an input more, to be captured with this one; None: it isn't
            wanted.
    """

    init: Callable[[State], State]
    iterate: Callable[[State], State]
    done: Callable[[State], Tensor]
    finish: Callable[[State, State], State]
    count: int | None
    limit: int
    inputs: State
    identity: Callable[[], str] | None = None
    warm: Program | None = None


class CapturedProgram(Protocol):
    """A captured program: inputs like the example's (or its warm one's) to outputs, which the next call may
    overwrite.

    Attributes:
        method: how it runs, in words.
        nbytes: memory that it keeps.
    """

    method: str
    nbytes: int

    def __call__(self, inputs: State) -> State: ...


CaptureFunction = Callable[[Program], CapturedProgram]
"""Captures a program.  Raises ``CaptureError``, and keeps nothing then."""


@dataclass(frozen=True)
class Backend:
    """How plans are run.

    Attributes:
        name: for people.
        capture_program: captures, for a few batch sizes, to which batches are padded; None: nothing is
            captured, plans are run eagerly.
        make_convolution: the form of convolutions that it likes; None: the network's own.
        arithmetic_in_half: computes in bf16 or f16 by itself if told to, from float32 weights.
        largest_batch: of one call; larger ones are run in pieces.  None: it takes any.
        captures_warm: captures a program together with its ``warm`` one: packed weights are there once.
        fastest: the precision that its programs compute in fastest.
        arithmetic: switches the device's arithmetic for plans that aren't captured.
    """

    name: str
    capture_program: CaptureFunction | None
    make_convolution: MakeConvolution | None = None
    arithmetic_in_half: bool = False
    largest_batch: int | None = None
    captures_warm: bool = False
    fastest: str = "f32"
    arithmetic: Callable[[], AbstractContextManager[object]] = nullcontext


EAGER = Backend("eager", None)


def nbytes(*states: State) -> int:
    """Memory of all their tensors, shared storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in states for t in s.values()
    }
    return sum(storages.values())
