r"""A solver is a table of coefficients.

With every network turned into ``D(x_t) = x0_hat`` (``diffusion.denoiser``), a solver's nodes are
linear in what it has seen:

    x_i = p_i x_T + sum_{j<i} B_ij D_j + sum_{j<i} C_ij z_j          i = 0 … N

where ``D_j = D(x_j, t_j)``, ``z_j`` is standard normal noise, and ``x_N`` is the sample.  The
table is known before the first network call.  B is strictly lower triangular, so the N equations
have one solution however they are solved: a driver chooses in which order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ByValue


class StepForm(NamedTuple):
    """A table as a recurrence: ``x_{i+1} = a_i x_i + q_i x_T + sum_{j<=i} S_ij D_j + R_ij z_j``."""

    a: Tensor
    q: Tensor
    S: Tensor
    R: Tensor


@dataclass(frozen=True, eq=False)
class Tableau(ByValue):
    """A solver's coefficients, float64, at N nodes.

    Attributes:
        timesteps: ``[N]``, where the network is called; fractions allowed.
        p: ``[N + 1]``, weight of the initial noise.
        B: ``[N + 1, N]``, weights of the denoiser's outputs.
        C: ``[N + 1, N]``, weights of the step noises; zero for an ODE solver.
        variance: ``[N]``, variance of DDPM's reverse step that leaves each node's time: the unit in
            which ParaDiGMS measures convergence (Shih et al. 2023, section 3.2), also for ODE solvers.
        end: the time that the sample stands for; ``CLEAN`` unless the last step is left out.

    Raises:
        ValueError: shapes don't fit, ``p[0] != 1``, a node uses itself or a later one, or a value
            isn't finite.
    """

    timesteps: Tensor
    p: Tensor
    B: Tensor
    C: Tensor
    variance: Tensor
    end: float

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        shapes = {
            "timesteps": (self.timesteps, (n,)),
            "p": (self.p, (n + 1,)),
            "B": (self.B, (n + 1, n)),
            "C": (self.C, (n + 1, n)),
            "variance": (self.variance, (n,)),
        }
        for name, (value, shape) in shapes.items():
            if n == 0 or tuple(value.shape) != shape or value.dtype != torch.float64:
                raise ValueError(f"{name} must be float64 {shape}, got {value.dtype} {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} has values that aren't finite")
        if self.p[0] != 1:
            raise ValueError(f"node 0 is the noise itself, but {self.p[0]=}")
        if self.B.triu().any() or self.C.triu().any():
            raise ValueError("B and C must be strictly lower triangular: a node may use only earlier ones")

    @property
    def n_nodes(self) -> int:
        """N, the network calls of the sequential driver."""
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether step noises are used at all."""
        return bool(self.C.any())

    @cached_property
    def step_form(self) -> StepForm:
        """The same nodes, each from the one before; ``a`` is chosen so that x_T isn't needed again
        (``q = 0``), except where the node before holds too little of it."""
        # A step scales all that its node holds of noise alike: of x_T, or if there is none, of the z with the
        # largest weight.
        weights = torch.cat((self.p[:, None], self.C), dim=1)
        held = torch.where(self.p[:-1] == 0, self.C[:-1].abs().argmax(dim=1) + 1, 0)[:, None]
        before, after = weights[:-1].gather(1, held)[:, 0], weights[1:].gather(1, held)[:, 0]
        a = torch.where((after.abs() <= 10 * before.abs()) & (before != 0), after / before, 1.0)
        return StepForm(
            a,
            self.p[1:] - a * self.p[:-1],
            self.B[1:] - a[:, None] * self.B[:-1],
            self.C[1:] - a[:, None] * self.C[:-1],
        )
