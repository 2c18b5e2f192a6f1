"""Solvers that look no further back than one step: ancestral sampling, DDIM, and the SDE's solvers."""

from __future__ import annotations

import math

from torch import Tensor

from ...diffusion.schedule import NoiseSchedule, Point
from ...errors import InputError, is_number, nearest
from ..tableau import Tableau
from ..trace import LinearForm, Trace, forward_variance, posterior_variance


def flow_step(x: LinearForm, D: LinearForm, s: Point, t: Point) -> LinearForm:
    """The probability flow from s to t if D stayed as it is: ``x_t = alpha_t D + sigma_t eps``."""
    ratio = t.sigma / s.sigma
    return ratio * x + (t.alpha - ratio * s.alpha) * D


def ddpm(schedule: NoiseSchedule, grid: Tensor, variance: str = "fixed_small") -> Tableau:
    """Ancestral sampling: the mean of ``q(x_t | x_s, D)`` and its noise (Ho et al. 2020, equations 6
    and 7), with timesteps left out as in Nichol & Dhariwal 2021.

    First order.  With ``variance="fixed_small"``, the posterior's, it is SDE-DPM-Solver++(1);
    ``"fixed_large"`` is the forward step's beta.  The step to the clean sample adds no noise.
    """
    variances = {
        "fixed_small": posterior_variance,
        "fixed_large": forward_variance,
    }
    if variance not in variances:
        raise InputError(f"unknown variance {variance!r}{nearest(variance, variances)}")
    trace = Trace(schedule, grid.tolist())
    x = trace.x_T
    for s, t in trace.steps:
        D = trace.denoise(x, s)
        beta = forward_variance(s, t)
        x = s.alpha / t.alpha * (t.sigma / s.sigma) ** 2 * x + t.alpha * beta / s.sigma**2 * D
        if t.sigma > 0:
            x = x + math.sqrt(variances[variance](s, t)) * trace.noise()
    return trace.tableau(x)


def ddim(schedule: NoiseSchedule, grid: Tensor, eta: float = 0.0) -> Tableau:
    """``x_t = alpha_t D + sqrt(sigma_t^2 - c^2) eps + c z``, with ``eps`` from x and the (clipped) D
    and ``c = eta`` times DDPM's standard deviation (Song et al. 2021, DDIM, equation 12).

    First order.  Eta 0 is the exponential Euler step of the probability flow, which DPM-Solver-1
    and DPM-Solver++(1) are too (Lu et al. 2022); on flow matching's straight path it is Euler's step of
    the velocity.  Eta 1 is DDPM.
    """
    if not is_number(eta) or not 0 <= eta <= 1:
        raise InputError(f"eta={eta!r:.40} must lie between 0 (deterministic) and 1 (DDPM)")
    trace = Trace(schedule, grid.tolist())
    x = trace.x_T
    for s, t in trace.steps:
        D = trace.denoise(x, s)
        c = eta * math.sqrt(posterior_variance(s, t))
        ratio = math.sqrt(t.sigma**2 - c**2) / s.sigma
        x = ratio * x + (t.alpha - ratio * s.alpha) * D
        if c > 0:
            x = x + c * trace.noise()
    return trace.tableau(x)


def sde_dpm_solver_pp_2m(schedule: NoiseSchedule, grid: Tensor) -> Tableau:
    """SDE-DPM-Solver++(2M): the reverse SDE's exponential integrator in lambda, with D extrapolated
    from the last two nodes (Lu et al. 2022, DPM-Solver++, section 5).

    Second order in the drift; first order on the first step and on the step to the clean sample.
    """
    trace = Trace(schedule, grid.tolist())
    x, D, D_before = trace.x_T, None, None
    h_before = math.nan
    for s, t in trace.steps:
        D_before, D = D, trace.denoise(x, s)
        h = t.lam - s.lam
        decay, gain = t.sigma / s.sigma * math.exp(-h), -t.alpha * math.expm1(-2 * h)
        x = decay * x + gain * D
        if D_before is not None and t.sigma > 0:
            x = x + gain * h / (2 * h_before) * (D - D_before)
        if t.sigma > 0:
            x = x + t.sigma * math.sqrt(-math.expm1(-2 * h)) * trace.noise()
        h_before = h
    return trace.tableau(x)
