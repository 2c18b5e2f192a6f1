r"""Speculation that is exact in distribution: no tolerance, and still many nodes per network call.

A step of a stochastic solver draws ``x_{i+1} ~ N(m_i, s_i^2)``, where m_i needs the network at x_i.
An iteration proposes a window of nodes with guessed outputs, as in Picard's iteration, calls the network
on all of them at once, and then couples each step's proposal ``N(m'_i, s_i^2)`` with the
distribution ``N(m_i, s_i^2)`` that it should have had.  With ``delta = (m' - m) / s`` (Bou-Rabee, Eberle and
Zimmer 2020, section 2.3, the reflection-maximal coupling):

    log u <= -z delta - |delta|^2 / 2   the proposal stands: it is m + s (z + delta)
    otherwise                           the step becomes m + s (z - 2 (e z) e),  e = delta / |delta|

Either way the step has exactly its own distribution, given all before it, and no coupling rejects
less often.  The first rejection ends the iteration there.  This is autospeculation (Hu et al. 2025,
"Diffusion models are secretly exchangeable") with a window and with Picard's guesses, or with ``draft``'s.

Block verification (Sun et al. 2024; Soen et al. 2026 for diffusion) decides a whole window at once and
rejects later.  But the noise that it looked at must be drawn anew after a rejection, while here steps
after it keep their noise, and with it good guesses.  That costs as much as it gains.

Both outcomes are the step with another noise in place of z.  So the solution is the table's, with
noise that is decided as the window slides, and that noise is standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError, is_number
from ..types import Noise, Solution
from .draft import Draft
from .driver import NodeDenoise, Solve, State, broadcast, combined, leading, put, take
from .picard import Windowed, WindowedSolve
from .tableau import Tableau


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
class Speculative(Windowed):
    """Samples with exactly the sequential driver's distribution, for solvers that add noise on every step.

    The sample is another one than the sequential driver's from the same noise.  ``Solution.noise`` has
    the step noises as they were decided: the sequential driver gives this very sample from them.  A
    ``guess`` may be any guess that doesn't depend on the noise.

    Attributes:
        spread: by how much drafts think that plans vary, as the variance of a normalised plan's last step
            (see ``draft``); the distribution doesn't depend on it, only the iterations do.
    """

    decides_noise: ClassVar[bool] = True

    spread: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.spread) or not 0 <= self.spread <= 1:
            raise InputError(f"spread={self.spread!r:.40} must be 0 to 1")

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        steps = tableau.step_form
        own = steps.R.diagonal()
        alone = bool((steps.R - own.diag()).abs().max() <= 1e-9 * own.abs().max())
        if not alone or not (own[:-1] > 0).all() or steps.q.any():
            raise InputError(
                "driver 'speculative' needs a solver that adds noise on every step, as ddpm or "
                "sde_dpm_solver_pp_2m does: choose one of those, or driver 'picard'"
            )
        return SpeculativeSolve(self, tableau, like, warm)


class SpeculativeSolve(WindowedSolve):
    """Every iteration decides the noise of the windows' steps up to the first rejection.  The state is in the
    basis of the drafts."""

    def __init__(self, driver: Speculative, tableau: Tableau, like: Tensor, warm: bool) -> None:
        super().__init__(driver, tableau, like, warm)
        steps = tableau.step_form
        own = steps.R.diagonal()
        self.scale = own.to(like)
        self.weights = (steps.S / torch.where(own > 0, own, 1.0)[:, None]).to(like)
        self.draft = Draft(tableau, like, driver.spread)

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        # Row N takes what a window that hangs over the end would write.
        z = self.draft.turned(torch.cat((noise.z, torch.zeros_like(noise.z[:1]))))
        return {
            "x_T": self.draft.turned(noise.x_T[None]),
            "z": z,
            "log_u": noise.u.log(),
            "means": torch.zeros_like(z)
            if guess is None
            else self.draft.turned(torch.cat((guess, guess[:1]))),
            **self.windows(noise.x_T),
        }

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        n, z, means = self.n, state["z"], state["means"]
        index, inside, active = self.index(state)
        x = self.draft.nodes(inside, state["x_T"], z[:n], means[:n])
        guessed = self.draft.output(inside, x, take(means, index))
        outputs = self.draft.turned(self.evaluate(denoise, self.draft.back(x), inside, active))
        # By how much the proposals' means were guessed wrong, in standard deviations.
        wrong = put(torch.zeros_like(means), index, guessed - outputs)
        delta = combined(self.weights, inside, wrong[:n])
        proposed = take(z, index)
        stands, decided = reflection_coupling(proposed, delta, state["log_u"].gather(0, inside))
        certain = self.scale.index_select(0, inside.flatten()).view(inside.shape) == 0  # no noise is added
        # The steps that stand up to the first that doesn't, and that one, are decided.
        up_to = (self.ahead <= leading(stands | certain)) & active
        keep = broadcast(up_to & ~certain, delta)
        return {
            **state,
            "z": put(z, index, torch.where(keep, decided, proposed)),
            "means": self.filled(means, index, self.draft.mean(inside, x, outputs)),
            **self.moved_on(state, active, up_to.sum(dim=0)),
        }

    def finish(self, noise: Noise, state: State) -> Solution:
        z, means = state["z"][: self.n], state["means"][: self.n]
        index = self.nodes[: self.n].expand(-1, z.shape[1])
        x0_hats = self.draft.output(index, self.draft.nodes(index, state["x_T"], z, means), means)
        solved = Noise(noise.x_T, self.draft.back(z), noise.u)
        x0_hats = self.draft.back(x0_hats)
        sample = self.linear.sample(self.linear.drift(solved), x0_hats)
        return Solution(sample, x0_hats, solved, state["iterations"], state["nfe"])
