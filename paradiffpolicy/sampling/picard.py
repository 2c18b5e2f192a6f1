r"""ParaDiGMS: a window of nodes in every network call (Shih et al. 2023).

Both forms iterate towards the one solution of the table's equations.  A window of W nodes starts at
the first node not yet solved; a round calls the network on all of them at once, and the window
slides past the nodes whose input moved less than the tolerance:

    mean (x_i_new - x_i)^2  <=  tolerance^2  variance_i            (algorithm 1 there)

Each batch element has its own window, held in a tensor on the device.  A window's first node has a
solved input, so every round solves at least one node: with tolerance to 0 the result is the
sequential one, in at most N rounds.

``Picard`` iterates on the denoiser's outputs, ``D <- D(drift + B D)``.  B carries everything linear
at once, so errors are left only where the network is nonlinear.  ``PicardPublished`` is the paper's
form, which sums the steps' increments, and needs about twice the rounds at equal error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count, require_positive
from ..types import Walk
from .tableau import Tableau
from .walk import BoundDenoise, Evaluate, Linear, evaluate_active

Round = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""One network call on all windows: ``(index [W, batch], active [W, batch], unreached [batch])``,
the windows' nodes, which of them exist, and the first node that no round has reached, to ``(new,
old)``, the inputs ``[W - 1, batch, T, A]`` of the windows' nodes but the first."""


@dataclass(frozen=True)
class _Windowed:
    """Settings of a windowed driver.

    Attributes:
        window: W, nodes per round and batch element.
        tolerance: in standard deviations of DDPM's reverse step.
        evaluate: how the network is called on a window.
    """

    window: int = 20
    tolerance: float = 0.1
    evaluate: Evaluate = evaluate_active

    def __post_init__(self) -> None:
        require_count(window=self.window)
        require_positive(tolerance=self.tolerance)

    def _slide(self, tableau: Tableau, x_T: Tensor, one_round: Round) -> tuple[Tensor, Tensor]:
        """Rounds until every window has passed the end; rounds and evaluations, ``[batch]`` each.

        A window that hangs over the end has N in ``index`` there.
        """
        n, batch, device = tableau.n_nodes, len(x_T), x_T.device
        variance = torch.cat((tableau.variance, tableau.variance.new_zeros(1))).to(x_T)
        ahead = torch.arange(min(self.window, n), device=device)[:, None]
        offset, rounds, evaluations = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
        while (active := offset + ahead < n).any():
            index = (offset + ahead).clamp(max=n)
            new, old = one_round(index, active, offset + len(ahead))
            # Nodes after the first whose input stood still go with it, up to the first that moved.
            still = (new - old).square().mean(dim=(-2, -1)) <= self.tolerance**2 * variance[index[1:]]
            rounds += active[0]
            evaluations += active.sum(dim=0)
            offset = (offset + 1 + still.cumprod(dim=0).sum(dim=0)).clamp(max=n)
        return rounds, evaluations


class Picard(_Windowed):
    """The fixed point of ``D <- D(drift + B D)``, in windows.

    Nodes that no round has reached yet take the x0_hat of the farthest node that one has.
    """

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, x_T: Tensor, z: Tensor, start: Tensor | None = None
    ) -> Walk:
        linear, n = Linear(tableau, x_T, z), tableau.n_nodes
        nodes = torch.arange(n, device=x_T.device)[:, None]
        column = torch.arange(len(x_T), device=x_T.device)
        # Row N takes what a window that hangs over the end would write; no node reads it.
        x0_hats = x_T.new_zeros(n + 1, *x_T.shape)
        if start is not None:
            x0_hats[:n] = start

        def one_round(index: Tensor, active: Tensor, unreached: Tensor) -> tuple[Tensor, Tensor]:
            x = linear.nodes(index, x0_hats[:n])
            outputs = self.evaluate(denoise, x, linear.timesteps[index.clamp(max=n - 1)], active)
            x0_hats[index, column] = outputs
            if start is None:
                beyond = (nodes >= unreached)[..., None, None]
                x0_hats[:n] = torch.where(beyond, outputs[-1], x0_hats[:n])
            return linear.nodes(index[1:], x0_hats[:n]), x[1:]

        rounds, evaluations = self._slide(tableau, x_T, one_round)
        return Walk(linear.node(n, x0_hats[:n]), x0_hats[:n], x_T, z, rounds, evaluations)


class PicardPublished(_Windowed):
    """The paper's algorithm: ``x_{i+1} <- x_o + sum_{k=o..i} (step(x_k) - x_k)``, o the window's
    first node; nodes that no round has reached yet take the farthest one's value.

    Reproduces the paper; ignores ``start``.
    """

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, x_T: Tensor, z: Tensor, start: Tensor | None = None
    ) -> Walk:
        n, device = tableau.n_nodes, x_T.device
        a, S, R = (part.to(x_T) for part in tableau.step_form)
        noise = (R @ z.reshape(n, -1)).view_as(z)
        timesteps = tableau.timesteps.to(device)
        nodes = torch.arange(n + 1, device=device)[:, None]
        column = torch.arange(len(x_T), device=device)
        # Row N of x0_hats and row N + 1 of x take what hangs over the end; no node reads them.
        x0_hats = x_T.new_zeros(n + 1, *x_T.shape)
        x = x_T.expand(n + 2, *x_T.shape).clone()

        def one_round(index: Tensor, active: Tensor, unreached: Tensor) -> tuple[Tensor, Tensor]:
            inside = index.clamp(max=n - 1)
            old = x[index, column]
            x0_hats[index, column] = self.evaluate(denoise, old, timesteps[inside], active)
            step = a[inside][..., None, None] * old + noise[inside, column]
            step = step + torch.einsum("wbn,nbta->wbta", S[inside], x0_hats[:n])
            new = old[0] + (step - old).cumsum(dim=0)
            x[index + 1, column] = new
            beyond = (nodes > unreached)[..., None, None]
            x[: n + 1] = torch.where(beyond, new[-1], x[: n + 1])
            return new[:-1], old[1:]

        rounds, evaluations = self._slide(tableau, x_T, one_round)
        return Walk(x[n], x0_hats[:n], x_T, z, rounds, evaluations)
