"""A whole plan as a program of torch.export, for PyTorch without this package."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from ..sampling.capture.program import Program
from ..sampling.driver import State

LONGEST = 16
"""Iterations that are unrolled at most: tracing takes half a second each, and loading as long."""


def torch_program(program: Program) -> torch.export.ExportedProgram:
    """The program, its iterations unrolled: a dict of inputs to a dict of outputs.

    Raises:
        InputError: their number depends on data, or is large.
    """
    count = program.count
    if count is None or count > LONGEST:
        number = "is known only as it plans" if count is None else f"is {count}, over {LONGEST}"
        raise InputError(
            f"torch.export unrolls iterations, and their number {number}: leave torch_too=false, or choose "
            "rti, renoised or ddim"
        )

    iterations = range(count)

    class UnrolledPlan(nn.Module):
        def forward(self, inputs: State) -> State:
            state = program.init(inputs)
            for _ in iterations:
                state = program.iterate(state)
            return program.finish(inputs, state)

    plan = UnrolledPlan()
    with torch.no_grad():
        plan(program.inputs)  # what is made at the first call mustn't be made while tracing
        return torch.export.export(plan, (program.inputs,), strict=False)
