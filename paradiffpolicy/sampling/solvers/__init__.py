"""Every solver by name.

A solver is a function ``(schedule, grid, **options) -> Tableau``, where ``grid`` ``[n_steps + 1]``
are falling times, the last of them the sample's; see ``sampling.trace`` for how one is written.  One
of your own works under every driver, given itself or by a name of its choice:

    SOLVERS.register("mine", my_solver)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...diffusion.schedule import NoiseSchedule
from ...errors import InputError, nearest
from ...registry import Registry
from ..spacing import Spacing, time_grid
from ..tableau import Tableau
from .exponential import dpm_solver_pp_2m, dpm_solver_pp_3m, unipc
from .one_step import ddim, ddpm, sde_dpm_solver_pp_2m
from .runge_kutta import heun, plms, pndm, rk4
from .singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s

Solver = Callable[..., Tableau]

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        # stochastic
        "ddpm": ddpm,
        "sde_dpm_solver_pp_1": ddpm,
        "sde_dpm_solver_pp_2m": sde_dpm_solver_pp_2m,
        # the probability flow, first order (eta over 0: stochastic)
        "ddim": ddim,
        "dpm_solver_1": ddim,
        "dpm_solver_pp_1": ddim,
        "euler": ddim,
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
    },
)
"""Every solver by name.  Names that stand for the same function are the same method."""


def solver_tableau(
    schedule: NoiseSchedule,
    solver: str | Solver,
    n_steps: int,
    spacing: str | Spacing | Sequence[float] = "leading",
    denoise_to_zero: bool = True,
    lambda_min: float | None = None,
    /,
    **options: Any,
) -> Tableau:
    """The table of a solver.

    Args:
        solver: a name in ``SOLVERS``, or a function like those; ``options`` go to it.
        n_steps, spacing, denoise_to_zero, lambda_min: the grid, see ``spacing.time_grid``.

    Raises:
        InputError: a name is unknown, ``n_steps`` doesn't fit the schedule or the solver, the solver has
            no such option, refuses its value, isn't linear, returns no table, or can't begin at pure noise.
    """
    function = solver if callable(solver) else SOLVERS.named(solver)
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", type(solver).__name__)
    known = list(inspect.signature(function).parameters)[2:]
    for option in options:
        if option not in known:
            raise InputError(f"solver {name!r} has no option {option!r}{nearest(option, known)}")
    grid = time_grid(schedule, n_steps, spacing, denoise_to_zero, lambda_min)
    try:
        with np.errstate(divide="raise", invalid="raise"):
            tableau = function(schedule, grid, **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        if schedule.at(float(grid[0])).alpha == 0:
            raise InputError(
                f"solver {name!r} can't begin at timestep {float(grid[0]):g}, which is nothing but noise "
                f"({error}): choose euler, dpm_solver_pp_2m or ddpm, or leave that timestep out, as with "
                "lambda_min=-6"
            ) from error
        raise InputError(
            f"solver {name!r} gives no table ({error}): it must be linear in x, the denoiser's outputs and "
            "the noise"
        ) from error
    except InputError as error:
        raise error if function in SOLVERS.values() else InputError(f"solver {name!r}: {error}") from error
    if not isinstance(tableau, Tableau):
        raise InputError(
            f"solver {name!r} returned {type(tableau).__name__}, not a table: end it with "
            "'return trace.tableau(x)'"
        )
    return tableau
