"""Runs plans of a driver on a table: eagerly, or as one call of a captured program each."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError, require_count
from ...provenance import return_freed_memory
from ...types import Noise, Solution
from ..driver import Driver, IterativeDriver, Solve, State, evaluate_active, evaluate_all, run
from ..tableau import Tableau
from .fingerprint import fingerprint
from .network import PlanNetwork
from .program import EAGER, Backend, CapturedProgram, CaptureError, Program

log = logging.getLogger(__name__)

OBSERVED = "observed."
"""Begins the names of the network's observations in a state."""


@dataclass(frozen=True, eq=False)
class EagerProgram:
    """An entry of ``Executor.programs``: plans that aren't captured.

    Attributes:
        network: that plans are sampled with.
        solve: the driver's iterations; None: it has none.
    """

    network: PlanNetwork
    solve: Solve | None = None
    method: ClassVar = "eager"
    nbytes: ClassVar = 0


class Executor:
    """Runs plans, by batch and device on the first of its backends that can.

    A program is captured at the first use of its shapes.  May be used from any thread; calls of captured
    programs wait for one another.

    Args:
        driver: in a captured program ``evaluate_active`` becomes ``evaluate_all``, since a capture's shapes
            don't depend on data.
        tableau: the solver.
        network: gives the network in the form that a backend likes, which may be as large as the network.
        backends: in order of preference; what one can't capture the next does, and a line in the log says
            why.  ``EAGER`` can do everything.
        identity: gives a name that no other weights or precision have, for backends that keep programs
            on disk; None: nothing is kept.
        warm: whether most plans will have a guess: programs with and without one are captured together then,
            where the backend can.
        budget: bytes that captured programs may keep; the least recently used are evicted, but the
            newest always stays.

    Raises:
        CaptureError: the driver can't be captured, and ``EAGER`` isn't among the backends.
    """

    def __init__(
        self,
        driver: Driver,
        tableau: Tableau,
        network: Callable[[Backend], PlanNetwork],
        backends: Sequence[Backend],
        *,
        identity: Callable[[], str] | None = None,
        warm: bool = False,
        budget: int = 2**30,
    ) -> None:
        require_count(budget=budget)
        self.driver, self.tableau, self.budget = driver, tableau, budget
        self.backends, obstacle = list(backends), _obstacle(driver)
        if obstacle is not None and any(backend.capture_program for backend in backends):
            self.backends = [backend for backend in self.backends if backend.capture_program is None]
            if not self.backends:
                raise CaptureError(f"{obstacle}: capture=eager")
            log.warning("capture: %s; eager instead", obstacle)
        self._arithmetic = next((b for b in self.backends if b.capture_program is None), EAGER).arithmetic
        own = type(driver).__module__.split(".")[0] == __name__.split(".")[0]
        self.identity = identity if own else None  # another's driver may change under the same name
        able = (backend.captures_warm or backend.capture_program is None for backend in self.backends)
        self._captures_warm = warm and all(able)
        self._make_network = network
        # By backend, for as long as a program needs it: some compile the weights, and need it no more.
        self._networks = weakref.WeakValueDictionary[str, PlanNetwork]()
        self._captured: OrderedDict[tuple[Any, ...], CapturedProgram | None] = OrderedDict()
        self._eager: dict[tuple[Any, ...], EagerProgram] = {}
        self._lock = threading.Lock()

    def run(self, inputs: State, noise: Noise, guess: Tensor | None = None) -> Solution:
        """Samples one batch.

        Args:
            inputs: the conditions, each ``[batch, …]``, as the network observes them.
            noise: everything random.
            guess: ``[N, batch, T, A]``, the first guess, or None.

        Raises:
            CaptureError: the program can't be captured.
            InputError: the shapes don't fit together.
        """
        given, along = self._checked(inputs, noise, guess)
        with torch.inference_mode():
            if self.backends[0].capture_program is not None:
                with self._lock:
                    outputs = self._run_captured(given, along)
                if outputs is not None:
                    return _solution(outputs, noise)
            return self._run_eagerly(inputs, noise, guess)

    def _run_captured(self, given: State, along: State) -> State | None:
        """The outputs of captured programs, a call for every piece of the batch; None: no backend can capture
        them, but eagerly it goes."""
        batch = len(given["x_T"])
        pieces = -(-batch // (self.backends[0].largest_batch or batch))
        size = -(-batch // pieces)  # pieces of one size share a program
        outputs = []
        for first in range(0, batch, size):
            piece = {name: _piece(value, 0, first, size) for name, value in given.items()}
            piece |= {name: _piece(value, 1, first, size) for name, value in along.items()}
            program = self._program(piece)
            if program is None:
                return None
            outputs.append(_unpadded(program(piece), min(size, batch - first)))
        if len(outputs) == 1:
            return outputs[0]
        return {name: torch.cat([each[name] for each in outputs], _axis(name)) for name in outputs[0]}

    def _checked(self, inputs: State, noise: Noise, guess: Tensor | None) -> tuple[State, State]:
        """A program's inputs: those that begin with the batch, and those that begin with the nodes."""
        given, along = {**inputs, "x_T": noise.x_T}, {}
        if self.tableau.stochastic:
            along["z"] = noise.z
        if getattr(self.driver, "decides_noise", False):
            along["u"] = noise.u
        if guess is not None:
            along["guess"] = guess
        n, batch = self.tableau.n_nodes, len(noise.x_T)
        for name, value in given.items():
            if value.shape[0] != batch:
                raise InputError(f"{name} {tuple(value.shape)} must begin with the batch, {batch}")
        for name, value in along.items():
            if tuple(value.shape[:2]) != (n, batch):
                raise InputError(f"{name} {tuple(value.shape)} must begin with nodes and batch, {(n, batch)}")
        return given, along

    def _run_eagerly(self, inputs: State, noise: Noise, guess: Tensor | None) -> Solution:
        with self._arithmetic():
            return self._eagerly(inputs, noise, guess)

    def _eagerly(self, inputs: State, noise: Noise, guess: Tensor | None) -> Solution:
        like, warm = noise.x_T, guess is not None
        key = (like.shape[1:], like.dtype, like.device, warm)
        if key not in self._eager:
            driver = self.driver
            self._eager[key] = EagerProgram(
                self._network(EAGER),
                driver.on(self.tableau, like, warm) if isinstance(driver, IterativeDriver) else None,
            )
        network, solve = self._eager[key].network, self._eager[key].solve
        if solve is None:
            return self.driver(network.at_times(inputs), self.tableau, noise, guess)
        return run(solve, network.at_nodes(network.observe(inputs)), noise, guess)

    def _program(self, inputs: State) -> CapturedProgram | None:
        """The captured program for such inputs; None: no backend can, but eagerly it goes."""
        if self._captures_warm:
            n, x_T = self.tableau.n_nodes, inputs["x_T"]
            inputs = {**inputs, "guess": x_T.new_zeros(n, *x_T.shape)}
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        captured = self._capture(inputs, key)
        return_freed_memory()
        self._captured[key] = captured
        if captured is not None and captured.nbytes > self.budget:
            megabytes = [round(nbytes / 1e6, 1) for nbytes in (captured.nbytes, self.budget)]
            log.warning(
                "capture: one program keeps %s MB, over the budget of %s MB; it stays, alone: "
                "raise budget, or plan for fewer robots at a time",
                *megabytes,
            )
        while self.nbytes > self.budget and len(self._captured) > 1:
            self._captured.popitem(last=False)
        return captured

    def _capture(self, inputs: State, key: tuple[Any, ...]) -> CapturedProgram | None:
        driver, weights = self.driver, self.identity
        assert isinstance(driver, IterativeDriver)
        if getattr(driver, "evaluate", None) is evaluate_active:
            driver = replace(driver, evaluate=evaluate_all)  # type: ignore[type-var]
        both = self._captures_warm
        identity = (
            None if weights is None else lambda: fingerprint(weights(), driver, self.tableau, key, both)
        )

        def program_of(network: PlanNetwork, inputs: State) -> Program:
            example = {name: value.clone() for name, value in inputs.items()}
            solve = driver.on(self.tableau, inputs["x_T"], "guess" in inputs)
            return sampling_program(network, solve, self.tableau, example, identity)

        for backend in self.backends:
            if backend.capture_program is None:
                return None
            program = program_of(self._network(backend), inputs)
            if both:
                cold = {name: value for name, value in inputs.items() if name != "guess"}
                program = replace(program_of(self._network(backend), cold), warm=program)
            try:
                return backend.capture_program(program)
            except CaptureError as error:
                if backend is self.backends[-1]:
                    raise
                log.warning("capture: %s: the plan %s; trying the next backend", backend.name, error)
        return None

    def _network(self, backend: Backend) -> PlanNetwork:
        network = self._networks.get(backend.name)
        if network is None:
            network = self._networks[backend.name] = self._make_network(backend)
        return network

    def release(self) -> None:
        """Drops the captured programs, with the memory that they keep; the next plan captures anew."""
        with self._lock:
            self._captured.clear()

    @property
    def programs(self) -> list[CapturedProgram | EagerProgram]:
        """How plans have been run: the captured programs that are kept, the least recently used first, and
        an entry with the method ``eager`` for plans that weren't captured."""
        captured = [program for program in self._captured.values() if program is not None]
        return [*captured, *self._eager.values()]

    @property
    def nbytes(self) -> int:
        """Memory that captured programs keep."""
        return sum(program.nbytes for program in self.programs)


def _obstacle(driver: Driver) -> str | None:
    """Why a driver can't be captured; None: it can."""
    if not isinstance(driver, IterativeDriver):
        name = getattr(driver, "__name__", type(driver).__name__)
        return f"driver {name} can't be captured, since it isn't an IterativeDriver"
    evaluate = getattr(driver, "evaluate", evaluate_all)
    if evaluate is evaluate_all or (evaluate is evaluate_active and is_dataclass(driver)):
        return None
    name = getattr(evaluate, "__name__", type(evaluate).__name__).lower()
    return f"evaluate={name} can't be captured (evaluate=all can)"


def padded_size(batch: int) -> int:
    """The batch size to capture for: powers of two up to 8, then multiples of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def _piece(value: Tensor, dim: int, first: int, size: int) -> Tensor:
    """Elements ``first … first + size - 1`` along ``dim``, and the last again until the size to capture for:
    padding must not be NaN, and not be slower."""
    value = value.narrow(dim, first, min(size, value.shape[dim] - first))
    missing = padded_size(size) - value.shape[dim]
    if not missing:
        return value
    last = value.narrow(dim, value.shape[dim] - 1, 1)
    return torch.cat((value, last.expand(*value.shape[:dim], missing, *value.shape[dim + 1 :])), dim=dim)


def _axis(output: str) -> int:
    """Where an output has the batch."""
    return 1 if output in ("x0_hats", "z") else 0


def _unpadded(outputs: State, batch: int) -> State:
    """A program's outputs without the padding, in memory of their own: the next call overwrites them."""
    return {name: value.narrow(_axis(name), 0, batch).clone() for name, value in outputs.items()}


def _solution(out: State, noise: Noise) -> Solution:
    decided = replace(noise, z=out["z"]) if "z" in out else noise
    return Solution(out["sample"], out["x0_hats"], decided, out["iterations"], out["nfe"])


def sampling_program(
    network: PlanNetwork,
    solve: Solve,
    tableau: Tableau,
    inputs: State,
    identity: Callable[[], str] | None = None,
) -> Program:
    """Sampling as a program: noise, guess and conditions in, the solution's tensors out."""
    n = tableau.n_nodes

    def noise(inputs: State) -> Noise:
        x_T = inputs["x_T"]
        zero = x_T.new_zeros(())
        z, u = inputs.get("z"), inputs.get("u")
        return Noise(
            x_T,
            zero.expand(n, *x_T.shape) if z is None else z,
            zero.expand(n, x_T.shape[0]) if u is None else u,
        )

    def init(inputs: State) -> State:
        observed = {OBSERVED + name: value for name, value in network.observe(inputs).items()}
        return {**observed, **solve.init(noise(inputs), inputs.get("guess"))}

    def iterate(state: State) -> State:
        observed = {key.removeprefix(OBSERVED): v for key, v in state.items() if key.startswith(OBSERVED)}
        return solve.iterate(network.at_nodes(observed), state)

    def finish(inputs: State, state: State) -> State:
        solution = solve.finish(noise(inputs), state)
        outputs = {
            "sample": solution.sample,
            "x0_hats": solution.x0_hats,
            "iterations": solution.iterations,
            "nfe": solution.nfe,
        }
        return {**outputs, "z": solution.noise.z} if "u" in inputs else outputs

    return Program(init, iterate, solve.done, finish, solve.count, solve.limit, inputs, identity)
