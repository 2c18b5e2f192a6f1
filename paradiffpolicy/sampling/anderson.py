r"""Triangular Anderson acceleration of Picard's iteration (ParaTAA, Tang et al. 2024).

With ``G`` one round and ``R = G(D) - D`` its residual, Anderson's method takes the combination of
the last rounds whose residual is least (Walker and Ni 2011):

    D <- G(D) - sum_k gamma_k (dD_k + dR_k)      gamma = argmin |R - sum_k gamma_k dR_k|

with dD_k and dR_k the differences between successive rounds.  It is triangular: node i's gamma is
fitted to the residuals of nodes up to i alone, since later ones don't concern it.

Safeguards.  A node is accelerated only where the fit explains half of its residual, and where the
correction is at most half as large as that; elsewhere it takes Picard's update, as a window's first
node always does, whose input is solved.  That alone leaves one walk in forty a round longer than
Picard's.  So both iterations run side by side, in the same network calls, and whichever is done first
gives the sample: never more rounds than Picard, for twice the evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count, require_positive
from ..types import Noise, Walk
from .picard import Picard
from .tableau import Tableau
from .walk import BoundDenoise, broadcast


@dataclass(frozen=True)
class Anderson(Picard):
    """Picard's iteration, accelerated, beside Picard's iteration.

    Attributes:
        memory: m, differences between rounds that are combined.
        trust: a node is accelerated if the fit leaves at most this share of its residual, and if the
            correction is at most this share of it.
    """

    memory: int = 2
    trust: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(memory=self.memory)
        require_positive(trust=self.trust)

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        batch, device = len(noise.x_T), noise.x_T.device
        twice = torch.arange(2 * batch, device=device) % batch  # Picard's, then the accelerated ones
        either = self._done()
        x0_hats = noise.x_T.new_zeros(tableau.n_nodes + 1, 2 * batch, *noise.x_T.shape[1:])
        plain_first = torch.zeros(batch, dtype=torch.bool, device=device)

        def done(passed: Tensor, reached: Tensor, sample: Callable[[], Tensor]) -> Tensor:
            plain, accelerated = either(passed, reached, sample).chunk(2)
            plain_first.logical_or_(plain & ~accelerated)
            return (plain | accelerated).repeat(2)

        walk = self._walk(
            lambda x, t, element: denoise(x, t, element % batch),
            tableau,
            noise.select(twice),
            None if start is None else start[:, twice],
            done,
            _Acceleration(self.memory, self.trust, x0_hats, batch),
        )
        plain_evaluations, evaluations = walk.evaluations.chunk(2)
        best = walk.select(torch.arange(batch, device=device) + batch * ~plain_first)
        return Walk(best.sample, best.x0_hats, noise, best.rounds, plain_evaluations + evaluations)


class _Acceleration:
    """An ``Update`` for one walk: keeps, for every node, the last rounds' differences.

    Args:
        memory, trust: see ``Anderson``.
        x0_hats: ``[N + 1, batch, T, A]`` or the like, for their shape.
        first: the batch element from which on to accelerate.
    """

    def __init__(self, memory: int, trust: float, x0_hats: Tensor, first: int) -> None:
        self.trust, self.first = trust, first
        # What the node's last round began with, its residual there, and whether it had one.
        self.before, self.residual = torch.zeros_like(x0_hats), torch.zeros_like(x0_hats)
        self.seen = torch.zeros(x0_hats.shape[:2], dtype=torch.bool, device=x0_hats.device)
        self.dD, self.dR = (x0_hats.new_zeros(memory, *x0_hats.shape) for _ in range(2))

    def __call__(self, index: Tensor, active: Tensor, old: Tensor, new: Tensor) -> Tensor:
        chosen = slice(self.first, None)
        at = (index[:, chosen], torch.arange(index.shape[1], device=index.device)[chosen])
        mixed = new.clone()
        mixed[:, chosen] -= self._correction(at, active[:, chosen], old[:, chosen], new[:, chosen])
        return mixed

    def _correction(self, at: tuple[Tensor, Tensor], active: Tensor, old: Tensor, new: Tensor) -> Tensor:
        R = torch.where(broadcast(active, old), new - old, 0.0)
        again = broadcast(self.seen[at] & active, old)  # a node that missed a round starts anew
        for kept, now, last in ((self.dD, old, self.before), (self.dR, R, self.residual)):
            newest = torch.where(again, now - last[at], 0.0)[None]
            kept[:, *at] = torch.cat((newest, kept[:-1, *at]))
        self.before[at], self.residual[at], self.seen[at] = old, R, active
        steps, changes = self.dD[:, *at].flatten(3), self.dR[:, *at].flatten(3)  # [m, W, batch, T A]
        R = R.flatten(2)
        gram = torch.einsum("kwbd,lwbd->wbkl", changes, changes).cumsum(dim=0)
        fit = torch.einsum("kwbd,wbd->wbk", changes, R).cumsum(dim=0)
        # A ridge far below the differences that matter keeps the system regular.
        ridge = 1e-8 * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + torch.finfo(gram.dtype).tiny
        gamma = torch.linalg.solve(gram + torch.diag_embed(ridge[..., None].expand_as(fit)), fit)
        left = R - torch.einsum("wbk,kwbd->wbd", gamma, changes)
        correction = torch.einsum("wbk,kwbd->wbd", gamma, steps + changes)
        limit = self.trust * R.norm(dim=-1)
        trusted = (left.norm(dim=-1) <= limit) & (correction.norm(dim=-1) <= limit)
        trusted[0] = False
        return torch.where(broadcast(trusted, old), correction.view_as(old), 0.0)
