"""A program as graphs that a device replays, by one of three methods, for a GPU and for its emulation.

1. The number of iterations is known: everything unrolled in one graph.
2. Else, where the device has a while node: everything in one graph with a loop in it.
3. Else a graph each for the beginning, an iteration and the end.  The device writes whether it is done
   to memory that the host can read; iterations are launched ahead of what the host has read, so that the
   device never waits for the host.  The last few iterations may be more than was needed, and change
   nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..driver import State
from .program import CaptureError, Program, nbytes

log = logging.getLogger(__name__)

LAUNCH_AHEAD = 1
"""Iterations in flight beyond the one whose flag the host waits for."""

WhileLoop = Callable[
    [Callable[..., Tensor], Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]
]
"""``(again(*carried) [] bool, body(*carried), carried) -> carried``: a loop inside a graph."""


class Graph(Protocol):
    """Recorded work on fixed memory.

    Attributes:
        result: the recorded function's; every replay writes there.
        nbytes: memory that it keeps.
    """

    result: State
    nbytes: int

    def replay(self) -> None:
        """Queues the work."""
        ...


class Event(Protocol):
    """A place in the device's queue."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Waits until the device has come to it."""
        ...


class Device(Protocol):
    """Captures functions as graphs; all its methods are called while it is active.

    Attributes:
        name: for people.
        while_loop: its loop inside a graph, or why there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def while_loop(self) -> WhileLoop | str: ...

    def active(self) -> AbstractContextManager[object]:
        """Makes it the current device: streams and events belong to the one that is current when they are
        made or used."""
        ...

    def capture(self, function: Callable[[], State]) -> Graph:
        """Records ``function``'s work.  Raises ``CaptureError``, and keeps nothing then."""
        ...

    def event(self) -> Event: ...

    def host_flag(self) -> Tensor:
        """``[]`` bool that the device writes and the host reads."""
        ...


class Graphs:
    """A program, captured on a device."""

    def __init__(self, program: Program, device: Device) -> None:
        self.program, self.device = program, device
        with device.active():
            self._capture(program, device)

    def _capture(self, program: Program, device: Device) -> None:
        self.inputs = {name: value.clone() for name, value in program.inputs.items()}
        self.state: State = {}
        self.whole: Graph | None = None
        if program.count is not None:
            count = program.count
            self.method = f"{device.name}: {count} iterations unrolled in one graph"
            self.whole = device.capture(lambda: self._unrolled(count))
        elif not isinstance(device.while_loop, str):
            self.method = f"{device.name}: one graph with a while node"
            while_loop = device.while_loop
            try:
                self.whole = device.capture(lambda: self._looped(while_loop))
            except CaptureError as error:
                log.warning("capture: no while node, since it %s; a graph per iteration instead", error)
        else:
            log.info("capture: a graph per iteration, since %s", device.while_loop)
        if self.whole is not None:
            graphs = [self.whole]
        else:
            self.method = f"{device.name}: a graph per iteration"
            self.flag = device.host_flag()
            self.events = [device.event() for _ in range(LAUNCH_AHEAD + 1)]
            with torch.inference_mode():
                # The state's memory: the first graph fills it, an iteration reads it and writes it.
                state = program.init(self.inputs)
                self.state = {name: value.clone() for name, value in state.items()}
            graphs = [device.capture(part) for part in (self._init, self._iterate, self._finish)]
            self.init, self.iterate, self.finish = graphs
        self.nbytes = nbytes(self.inputs, self.state) + sum(graph.nbytes for graph in graphs)

    def _unrolled(self, count: int) -> State:
        state = self.program.init(self.inputs)
        for _ in range(count):
            state = self.program.iterate(state)
        return self.program.finish(self.inputs, state)

    def _looped(self, while_loop: WhileLoop) -> State:
        program = self.program
        state = program.init(self.inputs)
        names = sorted(state)

        def again(*carried: Tensor) -> Tensor:
            return program.done(dict(zip(names, carried, strict=True))).logical_not()

        def body(*carried: Tensor) -> tuple[Tensor, ...]:
            new = program.iterate(dict(zip(names, carried, strict=True)))
            return tuple(new[name] for name in names)

        carried = while_loop(again, body, tuple(state[name] for name in names))
        return program.finish(self.inputs, dict(zip(names, carried, strict=True)))

    def _init(self) -> State:
        self._keep(self.program.init(self.inputs))
        return {}

    def _iterate(self) -> State:
        self._keep(self.program.iterate(self.state))
        return {}

    def _keep(self, new: State) -> None:
        for name, value in new.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)
        self.flag.copy_(self.program.done(self.state), non_blocking=True)

    def _finish(self) -> State:
        return self.program.finish(self.inputs, self.state)

    def __call__(self, inputs: State) -> State:
        with self.device.active():
            return self._replay(inputs)

    def _replay(self, inputs: State) -> State:
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        if self.whole is not None:
            self.whole.replay()
            return self.whole.result
        self.init.replay()
        in_flight: deque[Event] = deque()
        for launched in range(self.program.limit):
            self.iterate.replay()
            event = self.events[launched % len(self.events)]
            event.record()
            in_flight.append(event)
            if len(in_flight) > LAUNCH_AHEAD:
                in_flight.popleft().synchronize()
                if self.flag:  # once true it stays true, so a later iteration's is as good
                    break
        self.finish.replay()
        return self.finish.result
