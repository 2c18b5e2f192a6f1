r"""Singlestep DPM-Solvers: a step of order k takes k points of the grid, and forgets what came before.

The noise-predicting solvers are written for ``M = eps``, the data-predicting ones for ``M = D``.
They have the same form,

    x_t = decay x_s - scale (e^w - 1) M_s - …        with w = h or -h,

(Lu et al. 2022: DPM-Solver, algorithms 1 and 2; DPM-Solver++, algorithm 1), with the stages placed
on the grid instead of at fixed fractions of the step; on a ``uniform_lambda`` grid the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ...diffusion.schedule import NoiseSchedule, Point
from ..tableau import Tableau
from ..trace import LinearForm, Trace
from .exponential import require_order
from .one_step import flow_step


@dataclass(frozen=True)
class _Prediction:
    """The parts in which the formulas differ: M from x and D; decay and scale of a step; w's sign."""

    M: Callable[[LinearForm, LinearForm, Point], LinearForm]
    decay: Callable[[Point, Point], float]
    scale: Callable[[Point], float]
    sign: float


_NOISE = _Prediction(
    M=lambda x, D, s: (x - s.alpha * D) / s.sigma,
    decay=lambda s, t: t.alpha / s.alpha,
    scale=lambda t: t.sigma,
    sign=1.0,
)
_DATA = _Prediction(
    M=lambda x, D, s: D,
    decay=lambda s, t: t.sigma / s.sigma,
    scale=lambda t: t.alpha,
    sign=-1.0,
)


def dpm_solver_2(schedule: NoiseSchedule, grid: Tensor, lower_order_final: bool = True) -> Tableau:
    """DPM-Solver-2 (singlestep, noise prediction).  Second order in ``n_steps / 2`` steps."""
    return _singlestep(schedule, grid, 2, _NOISE, lower_order_final)


def dpm_solver_3(schedule: NoiseSchedule, grid: Tensor, lower_order_final: bool = True) -> Tableau:
    """DPM-Solver-3 (singlestep, noise prediction).  Third order in ``n_steps / 3`` steps."""
    return _singlestep(schedule, grid, 3, _NOISE, lower_order_final)


def dpm_solver_pp_2s(schedule: NoiseSchedule, grid: Tensor, lower_order_final: bool = True) -> Tableau:
    """DPM-Solver++(2S) (singlestep, data prediction).  Second order in ``n_steps / 2`` steps."""
    return _singlestep(schedule, grid, 2, _DATA, lower_order_final)


def group_orders(n_steps: int, order: int, lower_order_final: bool, to_clean: bool) -> list[int]:
    """The orders of the steps, which add up to ``n_steps``.

    With ``lower_order_final`` the last step has order 1, and those before it what is left over.  A
    step to the clean sample, where lambda is infinite, has order 1 in any case.
    """
    if lower_order_final:
        full, rest = divmod(n_steps - 1, order)
        tail = [1] if rest == 0 else [2] if (order, rest) == (3, 1) else [rest, 1]
    else:
        full, rest = divmod(n_steps, order)
        tail = [rest] * (rest > 0)
    groups = [order] * full + tail
    if to_clean and groups[-1] > 1:
        groups[-1:] = [groups[-1] - 1, 1]
    return groups


def _singlestep(
    schedule: NoiseSchedule, grid: Tensor, order: int, kind: _Prediction, lower_order_final: bool
) -> Tableau:
    trace = Trace(schedule, grid.tolist())
    n = len(trace.steps)
    require_order(order, n)
    x, first = trace.x_T, 0
    for size in group_orders(n, order, lower_order_final, trace.points[-1].sigma == 0):
        s, *stages = trace.points[first : first + size + 1]
        D = trace.denoise(x, s)
        at, Ms, stage = [s], [kind.M(x, D, s)], flow_step(x, D, s, stages[0])
        for t, following in pairwise(stages):
            at.append(t)
            Ms.append(kind.M(stage, trace.denoise(stage, t), t))
            stage = _step(x, at, Ms, following, kind)
        x, first = stage, first + size
    return trace.tableau(x)


def _step(x: LinearForm, at: list[Point], Ms: list[LinearForm], t: Point, kind: _Prediction) -> LinearForm:
    """From ``at[0]`` to t with two or three values of M; the third order takes the outer two."""
    s, last = at[0], at[-1]
    h = t.lam - s.lam
    w = kind.sign * h
    slope = h / (last.lam - s.lam) * (Ms[-1] - Ms[0])
    phi = math.expm1(w) / 2 if len(Ms) == 2 else math.expm1(w) / w - 1
    return kind.decay(s, t) * x - kind.scale(t) * math.expm1(w) * Ms[0] - kind.scale(t) * phi * slope
