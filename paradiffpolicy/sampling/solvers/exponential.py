r"""Multistep exponential integrators of the probability flow, in data prediction.

In ``lambda = log(alpha / sigma)`` the flow has the solution (Lu et al. 2022, DPM-Solver++,
proposition 4.1)

    x_t = sigma_t / sigma_s x_s + sigma_t int e^lambda D(lambda) dlambda,

and a solver replaces D by a polynomial through what it has seen.  The integrals of 1, lambda and
lambda^2 against the exponential are the phi functions of ``-h``, with ``h = lambda_t - lambda_s``.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ...diffusion.schedule import NoiseSchedule, Point
from ...errors import InputError
from ..tableau import Tableau
from ..trace import LinearForm, Trace
from .one_step import flow_step

Seen = list[tuple[Point, LinearForm]]
"""Where the network has been called, and what it gave."""


def require_order(order: int, n_steps: int, highest: int = 3) -> None:
    """Raises ``InputError`` unless there are as many steps as the order needs."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise InputError(f"order={order} must be 1 to {highest}")
    if order > n_steps:
        raise InputError(f"order={order} needs at least {order} steps, got n_steps={n_steps}")


def order_at(step: int, n_steps: int, order: int, lower_order_final: bool, to_clean: bool) -> int:
    """A multistep solver's order at a step: what its history allows; falling to 1 over the last steps
    with ``lower_order_final``; 1 on a step to the clean sample, where lambda is infinite."""
    left = n_steps - step
    allowed = min(order, step + 1, left if lower_order_final else order)
    return 1 if to_clean and left == 1 else allowed


def dpm_solver_pp_2m(schedule: NoiseSchedule, grid: Tensor, lower_order_final: bool = True) -> Tableau:
    """DPM-Solver++(2M): D extrapolated linearly from the last two nodes (Lu et al. 2022,
    DPM-Solver++, algorithm 2).  Second order; one network call per step."""
    return _dpm_solver_pp(schedule, grid, 2, lower_order_final, 1.0)


def dpm_solver_pp_3m(
    schedule: NoiseSchedule, grid: Tensor, lower_order_final: bool = True, curvature: float = 1.0
) -> Tableau:
    """DPM-Solver++(3M): the parabola through the last three nodes; one network call per step.

    Third order, but for its first step, which is of first order as in every multistep solver.  The
    authors' code, and all that follow it, have half of the parabola's curvature, which leaves it of
    second order; ``curvature=0.5`` reproduces them.
    """
    return _dpm_solver_pp(schedule, grid, 3, lower_order_final, curvature)


def _dpm_solver_pp(
    schedule: NoiseSchedule, grid: Tensor, order: int, lower_order_final: bool, curvature: float
) -> Tableau:
    trace = Trace(schedule, grid.tolist())
    n = len(trace.steps)
    require_order(order, n)
    x, seen = trace.x_T, Seen()
    for i, (s, t) in enumerate(trace.steps):
        seen.append((s, trace.denoise(x, s)))
        now = order_at(i, n, order, lower_order_final, t.sigma == 0)
        x = flow_step(x, seen[-1][1], s, t)
        if now == 1:
            continue
        h = t.lam - s.lam
        # Divided differences in units of h: of two neighbours, and of three.
        (s0, D0), (s1, D1) = seen[-1], seen[-2]
        slope = h / (s0.lam - s1.lam) * (D0 - D1)
        if now == 2:
            x = x - t.alpha * math.expm1(-h) / 2 * slope
            continue
        s2, D2 = seen[-3]
        r0, r1 = (s0.lam - s1.lam) / h, (s1.lam - s2.lam) / h
        bend = 1 / (r0 + r1) * (slope - 1 / r1 * (D1 - D2))
        phi_2 = math.expm1(-h) / -h - 1
        phi_3 = (math.expm1(-h) + h) / h**2 - 0.5
        x = x - t.alpha * phi_2 * (slope + r0 * bend) - t.alpha * phi_3 * 2 * curvature * bend
    return trace.tableau(x)


def unipc(
    schedule: NoiseSchedule,
    grid: Tensor,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
) -> Tableau:
    """UniPC-p: a multistep predictor whose every result is corrected, once the network has been
    called there, without another call (Zhao et al. 2023, algorithms 5 and 6, data prediction).

    The corrector is linear in the same outputs, so UniPC is a table too.  Order p + 1 with the
    corrector; one network call per step.  ``variant``: ``bh1`` has ``B(h) = h``, ``bh2``
    ``e^h - 1``.
    """
    if variant not in ("bh1", "bh2"):
        raise InputError(f"variant={variant} must be bh1 or bh2")
    trace = Trace(schedule, grid.tolist())
    n = len(trace.steps)
    require_order(order, n)

    def residual(seen: Seen, t: Point, p: int, D_t: LinearForm | None = None) -> LinearForm:
        """The term that order p adds to ``flow_step`` from the last seen point to t, D there known or not."""
        (s, D), h = seen[-1], t.lam - seen[-1][0].lam
        others = seen[-2 : -p - 1 : -1] + ([] if D_t is None else [(t, D_t)])
        r = np.array([(point.lam - s.lam) / h for point, _ in others])
        B = -h if variant == "bh1" else math.expm1(-h)
        phi, factorial, b = math.expm1(-h) / -h - 1, 1, list[float]()
        for k in range(len(r)):
            b.append(phi * factorial / B)
            factorial *= k + 2
            phi = phi / -h - 1 / factorial
        # One unknown: 1/2, as the authors have it, is exact to the same order.
        rho = np.array([0.5]) if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, b)
        terms = [w / at * (D_k - D) for w, at, (_, D_k) in zip(rho, r, others, strict=True)]
        return -t.alpha * B * sum(terms[1:], start=terms[0])

    x, predicted, seen = trace.x_T, trace.x_T, Seen()
    p = 0
    for i, (s, t) in enumerate(trace.steps):
        D = trace.denoise(predicted, s)
        if i > 0:
            x = flow_step(x, seen[-1][1], seen[-1][0], s) + residual(seen, s, p, D)
        seen.append((s, D))
        p = order_at(i, n, order, lower_order_final, t.sigma == 0)
        predicted = flow_step(x, D, s, t)
        if p > 1:
            predicted = predicted + residual(seen, t, p)
    return trace.tableau(predicted)
