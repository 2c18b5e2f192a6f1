"""Programs with their kernels fused by PyTorch's compiler.

On a GPU a network call of a few rows takes as long as its kernels take to start: some five of them per
layer, each over a few kilobytes.  TorchInductor makes one kernel of what lies between two products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import first_line
from ..driver import State
from .program import CaptureError, Program

Compiler = str | Callable[..., Any]
"""A backend of ``torch.compile``."""


def fused(program: Program, compiler: Compiler = "inductor") -> Program:
    """The same program of fewer kernels, and equal to rounding.  Takes tens of seconds; PyTorch keeps what it
    compiled for the next start.

    Raises:
        CaptureError: it can't be compiled.
    """
    with torch.inference_mode():
        before = program.init(program.inputs)
        after = program.iterate(before)
        return replace(
            program,
            init=_compiled(compiler, program.init, program.inputs),
            iterate=_compiled(compiler, program.iterate, before),
            finish=_compiled(compiler, program.finish, program.inputs, after),
        )


def _compiled(compiler: Compiler, function: Callable[..., State], *example: State) -> Callable[..., State]:
    # Traced here, since the compiler's own reading of Python depends on its version, and gives a function
    # up, silently, after it was compiled for a few shapes: a traced graph is a function of its own.
    try:
        graph = make_fx(function)(*example)
        compiled = torch.compile(graph, backend=compiler, dynamic=False, fullgraph=True)
        compiled(*example)
    except RuntimeError as error:
        raise CaptureError(f"can't be compiled ({first_line(error)})")
    return compiled
