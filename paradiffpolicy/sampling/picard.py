r"""ParaDiGMS: a window of nodes in every network call (Shih et al. 2023).

Both forms iterate towards the one solution of the table's equations.  A window of W nodes starts at
the first node not yet solved; a round calls the network on all of them at once, and the window
slides past the nodes whose input moved less than the tolerance:

    mean (x_i_new - x_i)^2  <=  tolerance^2  variance_i            (algorithm 1 there)

Each batch element has its own window, held in a tensor on the device.  A window's first node has a
solved input, so every round solves at least one node: with tolerance to 0 the result is the
sequential one, in at most N rounds.

What a robot needs is the plan, not every node.  With ``plan_tolerance`` a batch element is done as
soon as the part of its sample that will be executed moves less than that from round to round.

``Picard`` iterates on the denoiser's outputs, ``D <- D(drift + B D)``.  B carries everything linear
at once, so errors are left only where the network is nonlinear.  ``PicardPublished`` is the paper's
form, which sums the steps' increments, and needs about twice the rounds at equal error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import require_count, require_positive
from ..types import Noise, Walk
from .tableau import Tableau
from .walk import BoundDenoise, Evaluate, Linear, broadcast, evaluate_active

Round = Callable[[Tensor, Tensor, Tensor], Tensor]
"""One network call on all windows: ``(index [W, batch], active [W, batch], unreached [batch])``,
the windows' nodes, which of them exist, and the first node that no round has reached, to
``[W - 1, batch]``, the mean square by which the inputs of the windows' nodes but the first moved."""

Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""What replaces the x0_hats of the windows' nodes: ``(index [W, batch], active [W, batch], old, new)``,
the last two ``[W, batch, T, A]`` before and after the network call."""

Done = Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]
"""Which batch elements need no more rounds: ``(passed [batch], reached [batch], sample)`` to ``[batch]``:
whose nodes are all solved, whose window has reached the end, and what gives the sample as it stands."""

RANGE = 2.0
"""Of a normalised action, from -1 to 1."""


def mean_square(x: Tensor) -> Tensor:
    """``[W, batch, T, A]`` to ``[W, batch]``."""
    return x.flatten(2).square().mean(dim=-1)


@dataclass(frozen=True)
class _Windowed:
    """Settings of a windowed driver.

    Attributes:
        window: W, nodes per round and batch element.
        tolerance: of a node, in standard deviations of DDPM's reverse step.
        evaluate: how the network is called on a window.
    """

    window: int = 20
    tolerance: float = 0.1
    evaluate: Evaluate = evaluate_active

    def __post_init__(self) -> None:
        require_count(window=self.window)
        require_positive(tolerance=self.tolerance)

    def _slide(
        self,
        n: int,
        x_T: Tensor,
        one_round: Round,
        unit: Tensor,
        done: Callable[[Tensor, Tensor], Tensor] = lambda passed, reached: passed,
    ) -> tuple[Tensor, Tensor]:
        """Rounds until every batch element is done; rounds and evaluations, ``[batch]`` each.

        A window that hangs over the end has N in ``index`` there.  ``unit`` ``[N + 1]`` are the
        variances that the nodes' movements are measured in.
        """
        batch, device = len(x_T), x_T.device
        ahead = torch.arange(min(self.window, n), device=device)[:, None]
        offset, rounds, evaluations = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
        while (active := offset + ahead < n).any():
            index = (offset + ahead).clamp(max=n)
            moved = one_round(index, active, offset + len(ahead))
            # Nodes after the first whose input stood still go with it, up to the first that moved.
            still = moved <= self.tolerance**2 * unit[index[1:]]
            rounds += active[0]
            evaluations += active.sum(dim=0)
            reached = offset + len(ahead) >= n
            offset = (offset + 1 + still.cumprod(dim=0).sum(dim=0)).clamp(max=n)
            offset = torch.where(done(offset == n, reached), n, offset)
        return rounds, evaluations


@dataclass(frozen=True)
class Picard(_Windowed):
    """The fixed point of ``D <- D(drift + B D)``, in windows.

    Nodes that no round has reached yet take the x0_hat of the farthest node that one has.

    Attributes:
        plan_tolerance: of the plan, as a share of the action range; None: only nodes count.
        executed: the steps of the sample that ``plan_tolerance`` is about.
    """

    plan_tolerance: float | None = None
    executed: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan_tolerance is not None:
            require_positive(plan_tolerance=self.plan_tolerance)

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        return self._walk(denoise, tableau, noise, start, self._done())

    def _walk(
        self,
        denoise: BoundDenoise,
        tableau: Tableau,
        noise: Noise,
        start: Tensor | None,
        done: Done,
        update: Update | None = None,
    ) -> Walk:
        linear, n, x_T = Linear(tableau, noise), tableau.n_nodes, noise.x_T
        nodes = torch.arange(n, device=x_T.device)[:, None]
        column = torch.arange(len(x_T), device=x_T.device)
        # Row N takes what a window that hangs over the end would write; no node reads it.
        x0_hats = x_T.new_zeros(n + 1, *x_T.shape)
        if start is not None:
            x0_hats[:n] = start

        def one_round(index: Tensor, active: Tensor, unreached: Tensor) -> Tensor:
            x = linear.nodes(index, x0_hats[:n])
            outputs = self.evaluate(denoise, x, linear.timesteps[index.clamp(max=n - 1)], active)
            before = x0_hats[index, column]
            x0_hats[index, column] = outputs
            if start is None:
                beyond = broadcast(nodes >= unreached, x0_hats)
                x0_hats[:n] = torch.where(beyond, outputs[-1], x0_hats[:n])
            moved = mean_square(linear.nodes(index[1:], x0_hats[:n]) - x[1:])
            if update is not None:
                x0_hats[index, column] = update(index, active, before, outputs)
                moved = moved.minimum(mean_square(linear.nodes(index[1:], x0_hats[:n]) - x[1:]))
            return moved

        # A node's unit is the noise of the step that leads to it.  (The paper takes the step that
        # leaves it; the last one has no noise, which costs a round for the last node alone.)
        unit = torch.cat((tableau.variance[:1], tableau.variance)).to(x_T)
        rounds, evaluations = self._slide(
            n,
            x_T,
            one_round,
            unit,
            lambda passed, reached: done(passed, reached, lambda: linear.node(n, x0_hats[:n])),
        )
        return Walk(linear.node(n, x0_hats[:n]), x0_hats[:n], noise, rounds, evaluations)

    def _done(self) -> Done:
        """A new walk's rule: all nodes solved, or what will be executed moved less than
        ``plan_tolerance`` in a round that saw the end."""
        if self.plan_tolerance is None:
            return lambda passed, reached, sample: passed
        limit, before = self.plan_tolerance * RANGE, None

        def done(passed: Tensor, reached: Tensor, sample: Callable[[], Tensor]) -> Tensor:
            nonlocal before
            last, before = before, sample()[:, self.executed].flatten(1)
            if last is None:
                return passed
            return passed | (reached & ((before - last).abs().amax(dim=1) <= limit))

        return done


class PicardPublished(_Windowed):
    """The paper's algorithm: ``x_{i+1} <- x_o + sum_{k=o..i} (step(x_k) - x_k)``, o the window's
    first node; nodes that no round has reached yet take the farthest one's value.

    Reproduces the paper; ignores ``start``.
    """

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        n, x_T, z = tableau.n_nodes, noise.x_T, noise.z
        a, q, S, R = (part.to(x_T) for part in tableau.step_form)
        given = (R @ z.reshape(n, -1)).view_as(z) + broadcast(q, z) * x_T
        timesteps = tableau.timesteps.to(x_T)
        nodes = torch.arange(n + 1, device=x_T.device)[:, None]
        column = torch.arange(len(x_T), device=x_T.device)
        # Row N of x0_hats and row N + 1 of x take what hangs over the end; no node reads them.
        x0_hats = x_T.new_zeros(n + 1, *x_T.shape)
        x = x_T.expand(n + 2, *x_T.shape).clone()

        def one_round(index: Tensor, active: Tensor, unreached: Tensor) -> Tensor:
            inside = index.clamp(max=n - 1)
            old = x[index, column]
            x0_hats[index, column] = self.evaluate(denoise, old, timesteps[inside], active)
            step = broadcast(a[inside], old) * old + given[inside, column]
            step = step + torch.einsum("wbn,nb...->wb...", S[inside], x0_hats[:n])
            new = old[0] + (step - old).cumsum(dim=0)
            x[index + 1, column] = new
            x[: n + 1] = torch.where(broadcast(nodes > unreached, x), new[-1], x[: n + 1])
            return mean_square(new[:-1] - old[1:])

        unit = torch.cat((tableau.variance, tableau.variance.new_zeros(1))).to(x_T)
        rounds, evaluations = self._slide(n, x_T, one_round, unit)
        return Walk(x[n], x0_hats[:n], noise, rounds, evaluations)
