"""A GPU capture's rules and its replay, on a CPU: proof that a program can be captured.

A capture records which kernels ran on which memory, and a replay runs the same kernels on the same
memory.  The emulation does the same: every aten call is recorded with its tensors, and a replay makes
the same calls into the same storages, without any Python of the program.  Values that a program should have
taken from its inputs but kept elsewhere come out stale, as they would on a GPU, and a loop that Python
counted is stuck in its first iteration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..driver import State
from .program import CaptureError, nbytes
from .tape import Op, Tape, record

TO_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
FROM_HOST = {"tensor", "as_tensor", "from_numpy", "asarray", "cuda", "frombuffer"}
COPIES = {"to", "type"}


class _HostCopies(TorchFunctionMode):
    """Refuses calls that cross between host and device: on a CPU they can't be told from others once
    they are aten calls."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in TO_HOST and any(isinstance(arg, Tensor) for arg in args):
            raise CaptureError(f"reads a value back to the host ({name}), which a capture can't")
        moves = name in COPIES and any(
            isinstance(value, str | torch.device) for value in (*args[1:], *kwargs.values())
        )
        if name in FROM_HOST or moves:
            raise CaptureError(f"copies from or to the host ({name}), which a capture can't: make it before")
        return func(*args, **kwargs)


def check(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ``CaptureError`` for calls that a capture refuses."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        raise CaptureError(f"draws at random ({op}), which a capture would repeat: draw it before")
    masked = any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in (args[1] if op.overloadpacket in INDEXED else ())
    )
    data_dependent = torch.Tag.dynamic_output_shape in op.tags and op.overloadpacket not in INDEXED
    if masked or data_dependent:
        raise CaptureError(f"has a shape that depends on data ({op}), which a capture can't: use torch.where")
    if torch.Tag.data_dependent_output in op.tags:
        raise CaptureError(f"reads a value back to the host ({op}), which a capture can't")
    if op.overloadpacket is torch.ops.aten.lift_fresh:
        raise CaptureError("copies a constant from the host (torch.tensor), which a capture can't")


INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def captured(function: Callable[[], State]) -> Tape:
    """Records a function under a capture's rules.

    Raises:
        CaptureError: it breaks one.
    """
    with _HostCopies():
        return record(function, check)


def replay(tape: Tape) -> None:
    """Makes the calls again, into the storages that the recording filled."""
    with torch.inference_mode():
        for call in tape.calls:
            if call.op.is_view and not call.op._schema.is_mutable:
                continue  # it looks at memory that other calls write
            if call.op.overloadpacket in ALLOCATIONS:
                continue  # what will be in it, and how much, other calls decide
            again = call.op(*call.args, **call.kwargs)
            if call.op._schema.is_mutable:
                continue
            new = [again] if isinstance(again, Tensor) else list(again)
            for old, value in zip(call.outputs, new, strict=True):
                if old.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    old.copy_(value)


class TapeGraph:
    """A tape as a ``graphs.Graph``."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.result = tape, tape.result
        outputs = [output for call in tape.calls for output in call.outputs]
        self.nbytes = nbytes({str(i): output for i, output in enumerate(outputs)})

    def replay(self) -> None:
        replay(self.tape)


class Past:
    """An event on a device that has always done everything."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class EmulatedDevice:
    """A ``graphs.Device`` on the CPU."""

    name = "emulated"
    while_loop = "the emulation has no while node"

    def active(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], State]) -> TapeGraph:
        return TapeGraph(captured(function))

    def event(self) -> Past:
        return Past()

    def host_flag(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool)
