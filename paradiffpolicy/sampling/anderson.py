r"""Triangular Anderson acceleration of Picard's iteration (ParaTAA, Tang et al. 2024).

With ``G`` one iteration of Picard's and ``R = G(D) - D`` its residual, Anderson's method takes the
combination of the last iterations whose residual is least (Walker and Ni 2011):

    D <- G(D) - sum_k gamma_k (dD_k + dR_k)      gamma = argmin |R - sum_k gamma_k dR_k|

with dD_k and dR_k the differences between successive iterations.  It is triangular: node i's gamma is
fitted to the residuals of nodes up to i alone, since later ones don't concern it.

Safeguards.  A node is accelerated only where the fit explains half of its residual, and where the
correction is at most half as large as that; elsewhere it takes Picard's update, as a window's first
node always does, whose input is solved.  That alone leaves one solution in forty an iteration longer
than Picard's.  So both run side by side, in the same network calls, and the one that is done first
gives the sample: never more iterations than Picard, for twice the NFE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require_count, require_positive
from ..types import Noise, Solution
from .driver import NodeDenoise, Solve, State, broadcast, put, spread, take
from .picard import Picard, PicardSolve
from .tableau import Tableau


@dataclass(frozen=True)
class Anderson(Picard):
    """Accelerates Picard's iteration, beside Picard's iteration.

    Attributes:
        memory: m, differences between iterations that are combined.
        trust: a node is accelerated if the fit leaves at most this share of its residual, and if the
            correction is at most this share of it.
    """

    memory: int = 2
    trust: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(memory=self.memory)
        require_positive(trust=self.trust)

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        return AndersonSolve(self, tableau, like, warm)


class AndersonSolve(PicardSolve):
    """Picard's iterations of a batch twice as large: its second half is accelerated.

    The state remembers, for every node, the last iterations' differences (``dD``, ``dR``), its output
    before the last one (``before``), its residual there, and whether it had one (``seen``).
    """

    def __init__(self, driver: Anderson, tableau: Tableau, like: Tensor, warm: bool) -> None:
        super().__init__(driver, tableau, like, warm)
        self.memory, self.trust = driver.memory, driver.trust

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        def twice(values: Tensor, dim: int) -> Tensor:
            return torch.cat((values, values), dim=dim)

        doubled = Noise(twice(noise.x_T, 0), twice(noise.z, 1), twice(noise.u, 1))
        state = super().init(doubled, None if guess is None else twice(guess, 1))
        accelerated = state["x0_hats"].chunk(2, dim=1)[1]
        state |= {name: torch.zeros_like(accelerated) for name in ("before", "residual")}
        state |= {name: accelerated.new_zeros(self.memory, *accelerated.shape) for name in ("dD", "dR")}
        state["seen"] = torch.zeros_like(accelerated, dtype=torch.bool)
        state["plain_first"] = torch.zeros_like(state["offset"].chunk(2)[0], dtype=torch.bool)
        return state

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        batch = len(state["plain_first"])
        return super().iterate(lambda x, node, element: denoise(x, node, element % batch), state)

    def improved(
        self, state: State, index: Tensor, active: Tensor, x: Tensor, new: Tensor, moved: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        at, outputs = index.chunk(2, dim=1)[1], take(new, index)
        old = take(state["x0_hats"], index)
        plain, accelerated = outputs.chunk(2, dim=1)
        correction, kept = self._correction(
            state, at, active.chunk(2, dim=1)[1], old.chunk(2, dim=1)[1], accelerated
        )
        # A node that is solved keeps its output: no window comes back to it.
        solved = self.ahead < self.standing(index, moved, self.limits).chunk(2)[1]
        correction = torch.where(broadcast(solved, correction), 0.0, correction)
        return put(new, index, torch.cat((plain, accelerated - correction), dim=1)), moved, kept

    def _correction(
        self, state: State, at: Tensor, active: Tensor, old: Tensor, new: Tensor
    ) -> tuple[Tensor, State]:
        """The correction to take off the accelerated half's outputs, and the state to remember."""
        residual = torch.where(broadcast(active, old), new - old, 0.0)
        # A node that missed an iteration starts anew.
        again = take(state["seen"], at) & broadcast(active, old)
        kept, recent = {}, {}
        for name, now, last in (("dD", old, "before"), ("dR", residual, "residual")):
            newest = torch.where(again, now - take(state[last], at), 0.0)
            ages = [newest, *(take(age, at) for age in state[name][:-1])]
            recent[name] = torch.stack([age.flatten(2) for age in ages])  # [m, W, batch, T A]
            kept[name] = torch.stack(
                [put(old_age, at, age) for old_age, age in zip(state[name], ages, strict=True)]
            )
        kept["before"], kept["residual"] = put(state["before"], at, old), put(state["residual"], at, residual)
        kept["seen"] = put(state["seen"], at, spread(active, old))
        steps, changes = recent["dD"], recent["dR"]
        R = residual.flatten(2)
        gram = torch.einsum("kwbd,lwbd->wbkl", changes, changes).cumsum(dim=0)
        fit = torch.einsum("kwbd,wbd->wbk", changes, R).cumsum(dim=0)
        # A ridge far below the differences that matter keeps the system regular.
        ridge = 1e-8 * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + torch.finfo(gram.dtype).tiny
        regular = gram + torch.diag_embed(ridge[..., None].expand_as(fit))
        gamma = torch.linalg.solve_ex(regular, fit[..., None]).result[..., 0]
        left = R - torch.einsum("wbk,kwbd->wbd", gamma, changes)
        correction = torch.einsum("wbk,kwbd->wbd", gamma, steps + changes)
        limit = self.trust * R.norm(dim=-1)
        trusted = (left.norm(dim=-1) <= limit) & (correction.norm(dim=-1) <= limit)
        trusted = trusted & (self.ahead > 0)
        return torch.where(broadcast(trusted, old), correction.view_as(old), 0.0), kept

    def finished(self, state: State, reached: Tensor) -> State:
        """The half that is done first ends the other."""
        state = super().finished(state, reached)
        plain, accelerated = (state["offset"] >= self.n).chunk(2)
        offset = torch.where((plain | accelerated).repeat(2), self.n, state["offset"])
        first = state["plain_first"] | (plain & ~accelerated)
        return {**state, "offset": offset, "plain_first": first}

    def finish(self, noise: Noise, state: State) -> Solution:
        both = super().finish(noise, state)
        first = state["plain_first"]

        def best(values: Tensor, dim: int = 0) -> Tensor:
            plain, accelerated = values.chunk(2, dim=dim)
            shape = [1] * dim + [-1] + [1] * (values.ndim - dim - 1)
            return torch.where(first.view(shape), plain, accelerated)

        nfe = sum(both.nfe.chunk(2))
        assert isinstance(nfe, Tensor)
        return Solution(best(both.sample), best(both.x0_hats, 1), noise, best(both.iterations), nfe)
