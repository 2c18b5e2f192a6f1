"""Classical methods for the probability flow: Heun, Runge-Kutta, and PNDM's linear multistep.

The step to the clean sample is Euler's for all: there the derivative's formula divides by zero.
"""

from __future__ import annotations

from torch import Tensor

from ...diffusion.schedule import NoiseSchedule, Point
from ...errors import InputError
from ..tableau import Tableau
from ..trace import LinearForm, Trace
from .one_step import flow_step


def heun(schedule: NoiseSchedule, grid: Tensor) -> Tableau:
    """Heun's method in ``sigma / alpha``: an Euler step, then the mean of the slopes at both ends
    (Karras et al. 2022, algorithm 1 without churn).

    Second order; two network calls per step, one on the step to the clean sample.
    """
    trace = Trace(schedule, grid.tolist())
    x = trace.x_T
    for s, t in trace.steps:
        D = trace.denoise(x, s)
        guess = flow_step(x, D, s, t)
        if t.sigma == 0:
            x = guess
            continue
        # In y = x / alpha and n = sigma / alpha the flow is dy/dn = (y - D) / n.
        n_s, n_t = s.sigma / s.alpha, t.sigma / t.alpha
        slope = (x / s.alpha - D) / n_s + (guess / t.alpha - trace.denoise(guess, t)) / n_t
        x = t.alpha * (x / s.alpha + (n_t - n_s) / 2 * slope)
    return trace.tableau(x)


def rk4(schedule: NoiseSchedule, grid: Tensor) -> Tableau:
    """The classical Runge-Kutta method in lambda, where the flow is ``dy/dlambda = D - y`` for
    ``y = x / alpha``.

    Fourth order; four network calls per step, one on the step to the clean sample.  Stable while a
    step's lambdas are no more than 2.7 apart: it needs a ``uniform_lambda`` grid or many steps.
    """
    trace = Trace(schedule, grid.tolist())
    x = trace.x_T
    for s, t in trace.steps:
        if t.sigma == 0:
            x = flow_step(x, trace.denoise(x, s), s, t)
            continue
        h = t.lam - s.lam
        middle = schedule.at(schedule.timestep((s.lam + t.lam) / 2))
        y = x / s.alpha

        def slope(at: Point, stage: LinearForm) -> LinearForm:
            return trace.denoise(at.alpha * stage, at) - stage

        k1 = trace.denoise(x, s) - y
        k2 = slope(middle, y + h / 2 * k1)
        k3 = slope(middle, y + h / 2 * k2)
        k4 = slope(t, y + h * k3)
        x = t.alpha * (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return trace.tableau(x)


ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the newest epsilon first, for equal strides."""


def _multistep(eps: list[LinearForm]) -> LinearForm:
    weights = ADAMS_BASHFORTH[min(len(eps), 4)]
    terms = [weight * form for weight, form in zip(weights, reversed(eps), strict=False)]
    return sum(terms[1:], start=terms[0])


def _transfer(x: LinearForm, eps: LinearForm, s: Point, t: Point) -> LinearForm:
    """PNDM's phi: the flow from s to t with epsilon as it is (Liu et al. 2022, equation 11)."""
    return t.alpha / s.alpha * x + (t.sigma - t.alpha / s.alpha * s.sigma) * eps


def _epsilon(trace: Trace, x: LinearForm, at: Point) -> LinearForm:
    return (x - at.alpha * trace.denoise(x, at)) / at.sigma


def plms(schedule: NoiseSchedule, grid: Tensor) -> Tableau:
    """Pseudo linear multistep: Adams-Bashforth on epsilon in PNDM's transfer, begun with a
    pseudo-Heun step (Liu et al. 2022, S/F-PNDM; the form known from Stable Diffusion).

    Second order, on grids with equal strides; one network call per step, two on the first.
    """
    trace = Trace(schedule, grid.tolist())
    (s, t), *others = trace.steps
    first = _epsilon(trace, trace.x_T, s)
    x, eps = _transfer(trace.x_T, first, s, t), [first]
    if others:
        second = _epsilon(trace, x, t)
        x = _transfer(trace.x_T, 0.5 * (first + second), s, t)
    for s, t in others:
        eps.append(_epsilon(trace, x, s))
        x = _transfer(x, _multistep(eps), s, t)
    return trace.tableau(x)


def pndm(schedule: NoiseSchedule, grid: Tensor) -> Tableau:
    """PNDM: three pseudo Runge-Kutta steps, then pseudo linear multistep (Liu et al. 2022,
    algorithm 2, F-PNDM).

    Second order, on grids with equal strides; four network calls on each of the first three steps,
    then one per step.
    """
    trace = Trace(schedule, grid.tolist())
    if len(trace.steps) < 4:
        raise InputError(f"pndm needs at least 4 steps, got n_steps={len(trace.steps)}: plms takes fewer")
    x, eps = trace.x_T, list[LinearForm]()
    for s, t in trace.steps[:3]:
        middle = schedule.at((s.time + t.time) / 2)
        e1 = _epsilon(trace, x, s)
        e2 = _epsilon(trace, _transfer(x, e1, s, middle), middle)
        e3 = _epsilon(trace, _transfer(x, e2, s, middle), middle)
        e4 = _epsilon(trace, _transfer(x, e3, s, t), t)
        x = _transfer(x, 1 / 6 * (e1 + 2 * e2 + 2 * e3 + e4), s, t)
        eps.append(e1)
    for s, t in trace.steps[3:]:
        eps.append(_epsilon(trace, x, s))
        x = _transfer(x, _multistep(eps), s, t)
    return trace.tableau(x)
