"""Every solver by name.

A solver is a function ``(schedule, grid, **options) -> Tableau``, where ``grid`` ``[n_steps + 1]``
are falling times, the last of them the sample's; see ``sampling.trace`` for how one is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...diffusion.schedule import NoiseSchedule
from ...errors import InputError, nearest
from ..spacing import time_grid
from ..tableau import Tableau
from .exponential import dpm_solver_pp_2m, dpm_solver_pp_3m, unipc
from .one_step import ddim, ddpm, sde_dpm_solver_pp_2m
from .runge_kutta import heun, plms, pndm, rk4
from .singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s

Solver = Callable[..., Tableau]

SOLVERS: dict[str, Solver] = {
    # stochastic
    "ddpm": ddpm,
    "sde_dpm_solver_pp_1": ddpm,
    "sde_dpm_solver_pp_2m": sde_dpm_solver_pp_2m,
    # the probability flow, first order (eta over 0: stochastic)
    "ddim": ddim,
    "dpm_solver_1": ddim,
    "dpm_solver_pp_1": ddim,
    # multistep: one network call per step
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "dpm_solver_pp_3m": dpm_solver_pp_3m,
    "unipc": unipc,
    "plms": plms,
    "pndm": pndm,
    # singlestep: a step takes as many points of the grid as its order
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpm_solver_pp_2s": dpm_solver_pp_2s,
    # Runge-Kutta: more than one network call per step
    "heun": heun,
    "rk4": rk4,
}


def solver_tableau(
    schedule: NoiseSchedule,
    solver: str | Solver,
    n_steps: int,
    spacing: str = "leading",
    denoise_to_zero: bool = True,
    lambda_min: float | None = None,
    **options: Any,
) -> Tableau:
    """The table of a solver.

    Args:
        solver: a name in ``SOLVERS``, or a function like those; ``options`` go to it.
        n_steps, spacing, denoise_to_zero, lambda_min: the grid, see ``spacing.time_grid``.

    Raises:
        InputError: a name is unknown, ``n_steps`` doesn't fit the schedule or the solver, or the
            solver has no such option or refuses its value.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise InputError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
        name, solver = solver, SOLVERS[solver]
    else:
        name = solver.__name__
    known = list(inspect.signature(solver).parameters)[2:]
    for option in options:
        if option not in known:
            raise InputError(f"solver {name!r} has no option {option!r}{nearest(option, known)}")
    grid: Tensor = time_grid(schedule, n_steps, spacing, denoise_to_zero, lambda_min)
    return solver(schedule, grid, **options)
