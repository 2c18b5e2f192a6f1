"""A driver on a table with a network, captured: one call of a frozen program per plan."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InputError, require_count
from ...types import Noise, Solution
from ..driver import Driver, IterativeDriver, NodeDenoise, Solve, State, evaluate_active, evaluate_all
from ..tableau import Tableau
from .eager import Eager
from .fingerprint import fingerprint
from .program import CapturedProgram, CaptureError, CaptureFunction, Program


class Network(Protocol):
    """What a program samples with."""

    def observe(self, inputs: State) -> State:
        """Whatever a plan's conditions decide, once per plan; everything ``[batch, …]``."""
        ...

    def bound(self, observed: State) -> NodeDenoise:
        """The network for what ``observe`` gave."""
        ...


@dataclass(frozen=True)
class Backend:
    """How programs are frozen.

    Attributes:
        name: for people.
        freeze: does it.
        padded: programs are made for a few batch sizes, and batches padded to them; else for any.
        matmul: likes convolutions as matrix products.
        arithmetic_in_half: computes in bf16 or f16 by itself if told to, from float32 weights.
    """

    name: str
    capture_program: CaptureFunction
    padded: bool = True
    matmul: bool = False
    arithmetic_in_half: bool = False


EAGER = Backend("eager", Eager, padded=False)


def padded_size(batch: int) -> int:
    """The batch size to capture for: powers of two up to 8, then multiples of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def sampling_program(
    network: Network,
    solve: Solve,
    tableau: Tableau,
    inputs: State,
    identity: Callable[[], str] | None = None,
) -> Program:
    """A walk as a program: noise, guess and conditions in, the walk's tensors out."""
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
        return solve.iterate(network.bound(observed), state)

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


OBSERVED = "observed."
"""Begins the names of what the network observed, in a state."""


def capture(
    driver: Driver,
    tableau: Tableau,
    network: Network,
    backend: Backend,
    *,
    identity: Callable[[], str] | None = None,
    budget: int = 2**30,
) -> CapturedSampler:
    """A sampler whose plans are one call of a frozen program each.

    Args:
        driver: one that goes in rounds; ``evaluate_active`` becomes ``evaluate_all``, since a
            capture's shapes don't depend on data.
        tableau: the solver.
        network: observes once per plan, denoises in every round.
        backend: how to freeze.
        identity: gives what tells the network's weights and their precision from all others, for
            backends that keep programs on disk.
        budget: bytes that programs may keep; the one that was used longest ago goes first, but the
            newest always stays.

    Raises:
        CaptureError: the driver can't be captured.
    """
    require_count(budget=budget)
    if not isinstance(driver, IterativeDriver):
        raise CaptureError(
            f"driver {type(driver).__name__.lower()!r} can't be captured, since its steps depend on what it "
            "sees: capture=eager, or another driver"
        )
    evaluate = getattr(driver, "evaluate", evaluate_all)
    if backend.padded and evaluate is evaluate_active:
        driver = replace(driver, evaluate=evaluate_all)  # type: ignore[type-var]
    elif backend.padded and evaluate is not evaluate_all:
        raise CaptureError(
            f"evaluate={type(evaluate).__name__.lower()} can't be captured: capture=eager, or evaluate=all"
        )
    return CapturedSampler(driver, tableau, network, backend, identity, budget)


class CapturedSampler:
    """See ``capture``.  Programs are made at the first use of their shapes, or by ``warm_up``.

    May be used from any thread; calls wait for one another.
    """

    def __init__(
        self,
        driver: IterativeDriver,
        tableau: Tableau,
        network: Network,
        backend: Backend,
        identity: Callable[[], str] | None,
        budget: int,
    ) -> None:
        self.driver, self.tableau, self.network = driver, tableau, network
        self.backend, self.identity, self.budget = backend, identity, budget
        self._programs: OrderedDict[tuple[Any, ...], CapturedProgram] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, inputs: State, noise: Noise, guess: Tensor | None = None) -> Solution:
        """One walk.

        Args:
            inputs: the conditions, each ``[batch, …]``, as the network observes them.
            noise: everything random.
            guess: ``[N, batch, T, A]``, the first guess, or None.

        Raises:
            CaptureError: the program can't be captured.
            InputError: the shapes don't fit together.
        """
        batch = noise.x_T.shape[0]
        given = {**inputs, "x_T": noise.x_T}
        along = {}  # those whose batch is the second axis
        if self.tableau.stochastic:
            along["z"] = noise.z
        if self.driver.decides_noise:
            along["u"] = noise.u
        if guess is not None:
            along["guess"] = guess
        n = self.tableau.n_nodes
        for name, value in given.items():
            if value.shape[0] != batch:
                raise InputError(f"{name} {tuple(value.shape)} must begin with the batch, {batch}")
        for name, value in along.items():
            if tuple(value.shape[:2]) != (n, batch):
                raise InputError(f"{name} {tuple(value.shape)} must begin with nodes and batch, {(n, batch)}")
        if self.backend.padded:
            size = padded_size(batch)
            given = {name: _padded(value, 0, size) for name, value in given.items()}
            along = {name: _padded(value, 1, size) for name, value in along.items()}
        with self._lock, torch.inference_mode():
            outputs = self._program({**given, **along})({**given, **along})
            out = {name: value[:batch] for name, value in outputs.items() if name not in ("x0_hats", "z")}
            out |= {name: outputs[name][:, :batch] for name in ("x0_hats", "z") if name in outputs}
            if self.backend.padded:  # the next call writes to the same memory
                out = {name: value.clone() for name, value in out.items()}
        solved = replace(noise, z=out["z"]) if "z" in out else noise
        return Solution(out["sample"], out["x0_hats"], solved, out["iterations"], out["nfe"])

    def _program(self, inputs: State) -> CapturedProgram:
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key]
        warm = "guess" in inputs
        iterations = self.driver.on(self.tableau, inputs["x_T"], warm)
        example = {name: value.clone() for name, value in inputs.items()}
        program = sampling_program(self.network, iterations, self.tableau, example, self._identity_of(key))
        captured_program = self.backend.capture_program(program)
        self._programs[key] = captured_program
        while self.nbytes > self.budget and len(self._programs) > 1:
            self._programs.popitem(last=False)
        return captured_program

    def _identity_of(self, key: tuple[Any, ...]) -> Callable[[], str] | None:
        weights = self.identity
        return None if weights is None else lambda: fingerprint(weights(), self.driver, self.tableau, key)

    @property
    def programs(self) -> list[CapturedProgram]:
        """Those that are kept, the one used longest ago first."""
        return list(self._programs.values())

    @property
    def nbytes(self) -> int:
        """Memory that they keep."""
        return sum(captured_program.nbytes for captured_program in self.programs)


def _padded(value: Tensor, dim: int, size: int) -> Tensor:
    """Its last element again until ``size`` along ``dim``: padding must not be NaN, and not be slower."""
    missing = size - value.shape[dim]
    if not missing:
        return value
    last = value.narrow(dim, value.shape[dim] - 1, 1)
    return torch.cat((value, last.expand(*value.shape[:dim], missing, *value.shape[dim + 1 :])), dim=dim)
