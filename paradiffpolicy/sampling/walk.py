"""What every driver shares: the network as it sees it, and a node's input from the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..types import Noise, Walk
from .tableau import Tableau

BoundDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x [rows, T, A], t [rows], element [rows] int64) -> x0_hat [rows, T, A]``.

A row is one node of one batch element; ``element`` says which, to find its condition.  ``t`` may be
fractional and has x's dtype.  What is written ``T, A`` here may be any shape, an image's too.
"""


class Driver(Protocol):
    """Walks a table: how many network calls, in which order, is all that drivers differ in."""

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        """Samples a batch.

        Args:
            denoise: the network, bound to the batch's conditions.
            tableau: the solver.
            noise: everything random.
            start: ``[N, batch, T, A]`` first guess of all x0_hats, or None for a cold start.
        """
        ...


class Linear:
    """The linear part of a table in the working precision.

    ``x_i = drift[i] + B[i] D`` with ``drift[i] = p_i x_T + C_i z``, computed once per plan.
    """

    def __init__(self, tableau: Tableau, noise: Noise) -> None:
        x_T, n = noise.x_T, tableau.n_nodes
        self.drift = tableau.p.to(x_T).view(-1, *[1] * x_T.ndim) * x_T
        if tableau.stochastic:
            self.drift += (tableau.C.to(x_T) @ noise.z.reshape(n, -1)).view_as(self.drift)
        self.B = tableau.B.to(x_T)
        self.timesteps = tableau.timesteps.to(x_T)

    def node(self, i: int, x0_hats: Tensor) -> Tensor:
        """Node i's input ``[batch, T, A]``; reads ``x0_hats[:i]``."""
        if i == 0:
            return self.drift[0]
        return self.drift[i] + torch.tensordot(self.B[i, :i], x0_hats[:i], dims=1)

    def nodes(self, index: Tensor, x0_hats: Tensor) -> Tensor:
        """Inputs of nodes ``index`` ``[W, batch]``, different ones per batch element:
        ``[W, batch, T, A]``; reads all ``x0_hats`` ``[N, batch, T, A]``."""
        batch = torch.arange(index.shape[1], device=index.device)
        return self.drift[index, batch] + torch.einsum("wbn,nb...->wb...", self.B[index], x0_hats)


def broadcast(mask: Tensor, like: Tensor) -> Tensor:
    """``[W, batch]`` to ``[W, batch, 1, …]``, to combine with ``like`` ``[W, batch, T, A]``."""
    return mask.view(*mask.shape, *[1] * (like.ndim - mask.ndim))


class Evaluate(Protocol):
    """Calls the network on a window of nodes; an argument of the parallel drivers."""

    def __call__(self, denoise: BoundDenoise, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        """``x`` ``[W, batch, T, A]``, ``t`` and ``active`` ``[W, batch]`` to ``[W, batch, T, A]``;
        rows that aren't active may come back as anything finite."""
        ...


def evaluate_all(denoise: BoundDenoise, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
    """Every row, active or not: no shape depends on data, so it can be captured."""
    batch = x.shape[1]
    element = torch.arange(batch, device=x.device).expand(t.shape).reshape(-1)
    return denoise(x.flatten(0, 1), t.reshape(-1), element).view_as(x)


def evaluate_active(denoise: BoundDenoise, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
    """Only the active rows: less work where work costs time, as on a CPU."""
    node, element = active.nonzero(as_tuple=True)
    x0_hats = torch.zeros_like(x)
    if len(node):
        x0_hats[node, element] = denoise(x[node, element], t[node, element], element)
    return x0_hats
