r"""Speculation that is exact in law: no tolerance, and still many nodes per network call.

A step of a stochastic solver draws ``x_{i+1} ~ N(m_i, s_i^2)``, where m_i needs the network at x_i.
A round proposes a window of nodes with guessed outputs, as in Picard's iteration, calls the network
on all of them at once, and then couples each step's proposal ``N(m'_i, s_i^2)`` with the law
``N(m_i, s_i^2)`` that it should have had.  With ``delta = (m' - m) / s`` (Bou-Rabee, Eberle and
Zimmer 2020, section 2.3, the reflection-maximal coupling):

    log u <= -z delta - |delta|^2 / 2   the proposal stands: it is m + s (z + delta)
    otherwise                           the step becomes m + s (z - 2 (e z) e),  e = delta / |delta|

Either way the step has exactly its own law, given all before it, and no coupling rejects less
often.  The first rejection ends the round there.  This is autospeculation (Hu et al. 2025,
"Diffusion models are secretly exchangeable") with a window and with Picard's guesses.

Both outcomes are the step with another noise in place of z.  So the walk is the table's, with noise
that is decided as the window slides, and that noise is standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, require_count
from ..types import Noise, Walk
from .tableau import Tableau
from .walk import BoundDenoise, Evaluate, Linear, broadcast, evaluate_active


def reflection_coupling(z: Tensor, delta: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """Noise for a step whose mean was guessed wrong by ``delta`` standard deviations.

    Args:
        z: ``[W, batch, T, A]``, the noise that the guess was made with.
        delta: the same shape; (guessed mean - mean) / standard deviation.
        log_u: ``[W, batch]``, logarithms of uniform numbers.

    Returns:
        Whether the guess stands ``[W, batch]``, and the noise that makes the step what it becomes,
        ``[W, batch, T, A]``: standard normal, and ``z + delta`` as often as that is possible.
    """
    size = delta.flatten(2).norm(dim=-1)
    stands = log_u <= -(z * delta).flatten(2).sum(dim=-1) - size**2 / 2
    e = delta / broadcast(size.clamp(min=torch.finfo(size.dtype).tiny), delta)
    along = broadcast((z * e).flatten(2).sum(dim=-1), delta)
    return stands, torch.where(broadcast(stands, delta), z + delta, z - 2 * along * e)


@dataclass(frozen=True)
class Speculative:
    """Samples with exactly the sequential driver's law, for solvers that add noise on every step.

    The sample is another one than the sequential driver's from the same noise.  ``Walk.noise`` has
    the step noises as they were decided: walked sequentially, they give this very sample.  A
    ``start`` may be any guess that doesn't depend on the noise.

    Attributes:
        window: nodes per round and batch element.
        evaluate: how the network is called on a window.
    """

    window: int = 20
    evaluate: Evaluate = evaluate_active

    def __post_init__(self) -> None:
        require_count(window=self.window)

    @staticmethod
    def check(tableau: Tableau) -> None:
        """Raises ``InputError`` unless each of the table's steps but the last adds its own noise."""
        steps = tableau.step_form
        own = steps.R.diagonal()
        alone = bool((steps.R - own.diag()).abs().max() <= 1e-9 * own.abs().max())
        if not alone or not (own[:-1] > 0).all() or steps.q.any():
            raise InputError(
                "driver 'speculative' needs a solver that adds noise on every step, as ddpm or "
                "sde_dpm_solver_pp_2m does: choose one of those, or driver 'picard'"
            )

    def __call__(
        self, denoise: BoundDenoise, tableau: Tableau, noise: Noise, start: Tensor | None = None
    ) -> Walk:
        self.check(tableau)
        n, x_T, batch, device = tableau.n_nodes, noise.x_T, len(noise.x_T), noise.x_T.device
        steps = tableau.step_form
        scale = steps.R.diagonal().to(x_T)
        # Row N takes what a window that hangs over the end would write.
        weights = (steps.S / torch.where(scale > 0, scale, 1.0).double()[:, None]).to(x_T)
        z = torch.cat((noise.z, torch.zeros_like(noise.z[:1])))
        log_u = noise.u.log()
        x0_hats = x_T.new_zeros(n + 1, *x_T.shape)
        if start is not None:
            x0_hats[:n] = start
        nodes = torch.arange(n, device=device)[:, None]
        column = torch.arange(batch, device=device)
        ahead = torch.arange(min(self.window, n), device=device)[:, None]
        offset, rounds, evaluations = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
        while (active := offset + ahead < n).any():
            index = (offset + ahead).clamp(max=n)
            inside = index.clamp(max=n - 1)
            linear = Linear(tableau, Noise(x_T, z[:n], noise.u))
            x = linear.nodes(index, x0_hats[:n])
            outputs = self.evaluate(denoise, x, linear.timesteps[inside], active)
            wrong = torch.zeros_like(x0_hats)  # by how much the proposals' means were guessed wrong
            wrong[index, column] = x0_hats[index, column] - outputs
            delta = torch.einsum("wbn,nb...->wb...", weights[inside], wrong[:n])
            proposed = z[index, column]
            stands, decided = reflection_coupling(proposed, delta, log_u[inside, column])
            certain = scale[inside] == 0  # without noise the mean is the law
            # The steps that stand up to the first that doesn't, and that one, are decided.
            standing = (stands | certain).cumprod(dim=0)
            up_to = torch.cat((torch.ones_like(standing[:1]), standing[:-1])).bool() & active
            keep = broadcast(up_to & ~certain, delta)
            z[index, column] = torch.where(keep, decided, proposed)
            x0_hats[index, column] = outputs
            if start is None:
                beyond = broadcast(nodes >= offset + len(ahead), x0_hats)
                x0_hats[:n] = torch.where(beyond, outputs[-1], x0_hats[:n])
            rounds += active[0]
            evaluations += active.sum(dim=0)
            offset = offset + up_to.sum(dim=0)
        walked = Noise(x_T, z[:n], noise.u)
        return Walk(Linear(tableau, walked).node(n, x0_hats[:n]), x0_hats[:n], walked, rounds, evaluations)
