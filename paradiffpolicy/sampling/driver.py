"""Drivers solve a table's equations: how many network calls, in which order, is all that they differ in.

A driver on a table is a few pure functions of tensors (``Solve``):

    state = init(noise, guess)
    while not done(state):  state = iterate(denoise, state)
    solution = finish(state)

No shape, no branch and no index on the host depends on data, so ``sampling.capture`` can capture
them, and ``run`` here runs them eagerly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..diffusion.denoiser import BoundDenoise
from ..errors import InputError
from ..types import Noise, Solution
from .tableau import Tableau

NodeDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x [rows, T, A], node [rows] int64, element [rows] int64) -> x0_hat [rows, T, A]``: the same on a
table's nodes, so that what depends on the timestep alone can be looked up."""

State = dict[str, Tensor]
"""Tensors that an iteration changes or reads; always the same keys, shapes and dtypes."""


def on_nodes(denoise: BoundDenoise, timesteps: Tensor) -> NodeDenoise:
    """``denoise`` at a table's nodes, whose timesteps ``[N]`` are."""
    return lambda x, node, element: denoise(x, timesteps.index_select(0, node).to(x.dtype), element)


class Solve(Protocol):
    """A driver on one table, for one precision and device.

    Attributes:
        count: the number of iterations, if it is known beforehand; None: until done.
        limit: there are never more.
    """

    count: int | None
    limit: int

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        """The state before the first iteration; ``guess`` ``[N, batch, T, A]`` guesses all x0_hats."""
        ...

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        """One network call; does nothing once all are done."""
        ...

    def done(self, state: State) -> Tensor:
        """``[]`` bool: whether no batch element needs another iteration."""
        ...

    def finish(self, noise: Noise, state: State) -> Solution:
        """The solution in a state."""
        ...


class Driver(Protocol):
    """Solves a table's equations.  Any function of this signature will do; an ``IterativeDriver`` can be
    captured too."""

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, guess: Tensor | None = None
    ) -> Solution:
        """Samples a batch.

        Args:
            denoise: the network, bound to the batch's conditions.
            tableau: the solver.
            noise: everything random.
            guess: ``[N, batch, T, A]`` first guess of all x0_hats, or None for a cold start.
        """
        ...


class IterativeDriver(ABC):
    """A ``Driver`` that iterates.

    Attributes:
        decides_noise: the solution's step noises aren't the given ones, and it needs ``Noise.u``.
        usual_start: a name in ``STARTS``, unless another is chosen.
    """

    decides_noise: ClassVar[bool] = False
    usual_start: ClassVar[str] = "cold"

    @abstractmethod
    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        """Its iterations on a table, in ``like``'s precision and on its device; ``warm`` says whether
        there is a ``guess``.

        Raises:
            InputError: the driver can't solve such a table.
        """

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, guess: Tensor | None = None
    ) -> Solution:
        solve = self.on(tableau, noise.x_T, guess is not None)
        return run(solve, on_nodes(denoise, tableau.timesteps.to(noise.x_T)), noise, guess)


def run(solve: Solve, denoise: NodeDenoise, noise: Noise, guess: Tensor | None = None) -> Solution:
    """Iterates eagerly until the solution is there."""
    state = solve.init(noise, guess)
    if solve.count is not None:
        for _ in range(solve.count):
            state = solve.iterate(denoise, state)
    else:
        while not solve.done(state):
            state = solve.iterate(denoise, state)
    return solve.finish(noise, state)


def check_driver(driver: object, tableau: Tableau) -> None:
    """Makes sure that an object can drive a table.

    Raises:
        InputError: it lacks a method, or can't solve such a table.
    """
    name = type(driver).__name__
    if not callable(driver):
        raise InputError(
            f"driver {name} can't be called: give it __call__(denoise, tableau, noise, guess=None) -> "
            "Solution, or derive it from IterativeDriver"
        )
    if isinstance(driver, IterativeDriver):
        solve = driver.on(tableau, torch.zeros(()), False)
        parts = ("count", "limit", "init", "iterate", "done", "finish")
        missing = [part for part in parts if not hasattr(solve, part)]
        if missing:
            raise InputError(f"driver {name}: what its 'on' returns lacks {', '.join(missing)} (see Solve)")


class Linear:
    """The linear part of a table in the working precision: ``x_i = drift[i] + B[i] D`` with
    ``drift[i] = p_i x_T + C_i z``."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        self.n, self.stochastic = tableau.n_nodes, tableau.stochastic
        self.p, self.B, self.C = tableau.p.to(like), tableau.B.to(like), tableau.C.to(like)

    def drift(self, noise: Noise) -> Tensor:
        """``[N + 1, batch, T, A]``, once per plan."""
        x_T = noise.x_T
        drift = self.p.view(-1, *[1] * x_T.ndim) * x_T
        if self.stochastic:
            drift = drift + (self.C @ noise.z.reshape(self.n, -1)).view_as(drift)
        return drift

    def all_nodes(self, drift: Tensor, x0_hats: Tensor) -> Tensor:
        """Inputs of all nodes, ``[N, batch, T, A]``."""
        return drift[: self.n] + (self.B[: self.n] @ x0_hats.flatten(1)).view_as(x0_hats)

    def sample(self, drift: Tensor, x0_hats: Tensor) -> Tensor:
        """Node N, ``[batch, T, A]``."""
        return drift[self.n] + (self.B[self.n :] @ x0_hats.flatten(1)).view_as(drift[0])

    def nodes(self, index: Tensor, drift: Tensor, x0_hats: Tensor) -> Tensor:
        """Inputs of nodes ``index`` ``[W, batch]``, different ones per batch element:
        ``[W, batch, T, A]``; reads all ``x0_hats`` ``[N, batch, T, A]``."""
        return take(drift, index) + combined(self.B, index, x0_hats)


def combined(weights: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Row ``index`` ``[W, batch]`` of ``weights`` ``[…, N]`` times ``values`` ``[N, batch, T, A]``,
    for each batch element: ``[W, batch, T, A]``."""
    rows = weights.index_select(0, index.flatten()).view(*index.shape, -1)
    each = rows.transpose(0, 1) @ values.flatten(2).transpose(0, 1)  # [batch, W, T A]
    return each.transpose(0, 1).reshape(*index.shape, *values.shape[2:])


def spread(index: Tensor, like: Tensor) -> Tensor:
    """``[W, batch]`` to ``[W, batch, T, A]``, as gather and scatter want it."""
    return broadcast(index, like).expand(*index.shape, *like.shape[2:])


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values`` ``[N, batch, T, A]`` at ``index`` ``[W, batch]``: ``[W, batch, T, A]``."""
    return values.gather(0, spread(index, values))


def put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """``values`` with ``new`` ``[W, batch, T, A]`` at ``index``; of several at one place, any."""
    return values.scatter(0, spread(index, values), new)


def broadcast(mask: Tensor, like: Tensor) -> Tensor:
    """``[W, batch]`` to ``[W, batch, 1, …]``, to combine with ``like`` ``[W, batch, T, A]``."""
    return mask.view(*mask.shape, *[1] * (like.ndim - mask.ndim))


def leading(flags: Tensor) -> Tensor:
    """How many of the first of ``flags`` ``[W, batch]`` are true, before one isn't: ``[batch]`` int64."""
    return (flags.logical_not().cumsum(dim=0) == 0).sum(dim=0)


def zero_counts(like: Tensor) -> Tensor:
    """``[batch]`` int64, for ``like`` ``[batch, …]``."""
    return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)


class Evaluate(Protocol):
    """Calls the network on a window of nodes; an option of the parallel drivers."""

    def __call__(self, denoise: NodeDenoise, x: Tensor, node: Tensor, active: Tensor) -> Tensor:
        """``x`` ``[W, batch, T, A]``, ``node`` and ``active`` ``[W, batch]`` to ``[W, batch, T, A]``;
        rows that aren't active may come back as anything finite."""
        ...


def evaluate_all(denoise: NodeDenoise, x: Tensor, node: Tensor, active: Tensor) -> Tensor:
    """Every row, active or not: no shape depends on data, so it can be captured."""
    element = torch.arange(x.shape[1], device=x.device).expand(node.shape).reshape(-1)
    return denoise(x.flatten(0, 1), node.reshape(-1), element).view_as(x)


def evaluate_active(denoise: NodeDenoise, x: Tensor, node: Tensor, active: Tensor) -> Tensor:
    """Only the active rows: less work where work costs time, as on a CPU."""
    window, element = active.nonzero(as_tuple=True)
    x0_hats = torch.zeros_like(x)
    if len(window):
        x0_hats[window, element] = denoise(x[window, element], node[window, element], element)
    return x0_hats
