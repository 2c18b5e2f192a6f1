"""No capture: the program as it stands.  The reference, and the fallback."""

from __future__ import annotations

from ..driver import State
from .program import Program


class Eager:
    """Runs a program's functions."""

    method = "eager"
    nbytes = 0

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, inputs: State) -> State:
        program = self.program
        state = program.init(inputs)
        if program.count is not None:
            for _ in range(program.count):
                state = program.iterate(state)
        else:
            while not program.done(state):
                state = program.iterate(state)
        return program.finish(inputs, state)
