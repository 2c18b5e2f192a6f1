"""A sampler is a table, a driver that walks it, and where a walk begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, nearest
from ..types import Solution
from .anderson import Anderson
from .driver import BoundDenoise, Driver, Evaluate, evaluate_active, evaluate_all
from .picard import Picard, PicardPublished
from .reference import RK45
from .rti import RTI
from .sequential import Sequential
from .sharded import Sharded
from .solvers import Solver, solver_tableau
from .speculative import Speculative
from .tableau import Tableau
from .warm_start import STARTS, Shape, Start, cold_start, warm_start_same_noise


@dataclass(frozen=True)
class Sampler:
    """Turns noise into samples; holds no state between calls.

    Attributes:
        tableau: the solver.
        driver: who walks it.
        start: the noise, and the first guess, of a walk.
    """

    tableau: Tableau
    driver: Driver
    start: Start = cold_start

    def __call__(
        self,
        denoise: BoundDenoise,
        shape: Shape,
        generators: Sequence[torch.Generator],
        previous: Solution | None = None,
        executed_steps: int = 0,
    ) -> Solution:
        """One sample of ``shape`` per generator."""
        noise, guess = self.start(self.tableau, shape, previous, executed_steps, generators)
        return self.driver(denoise, self.tableau, noise, guess)


DRIVERS: dict[str, tuple[Callable[..., Driver], Start]] = {
    "sequential": (Sequential, cold_start),
    "picard": (Picard, cold_start),
    "picard_published": (PicardPublished, cold_start),
    "anderson": (Anderson, cold_start),
    "speculative": (Speculative, cold_start),
    "rti": (RTI, warm_start_same_noise),
    "rk45": (RK45, cold_start),
}
"""Every driver by name, with where its walks begin unless told otherwise."""

EVALUATES: dict[str, Callable[[], Evaluate]] = {
    "active": lambda: evaluate_active,
    "all": lambda: evaluate_all,
    "sharded": Sharded,
}
"""Every way to call the network on a window, by name."""


def make_sampler(
    schedule: NoiseSchedule,
    *,
    solver: str | Solver = "ddpm",
    n_steps: int = 100,
    spacing: str = "leading",
    denoise_to_zero: bool = True,
    lambda_min: float | None = None,
    solver_options: Mapping[str, Any] | None = None,
    driver: str = "sequential",
    start: str | None = None,
    executed: slice = slice(None),
    **driver_options: Any,
) -> Sampler:
    """A sampler by names: see ``SOLVERS``, ``SPACINGS``, ``DRIVERS`` and ``BEGINS``.

    Args:
        schedule: the noise schedule that the network was trained on.
        solver: a name, or a function like those.
        n_steps, spacing, denoise_to_zero, lambda_min: see ``spacing.time_grid``.
        start: where walks begin; None: as the driver usually does.
        executed: a sample's steps that will be executed, which a ``plan_tolerance`` is about.
        driver_options: the driver's attributes; ``evaluate`` by a name in ``EVALUATES``.

    Raises:
        InputError: a name or an option is unknown, a value is out of range, or the parts don't fit.
    """
    tableau = solver_tableau(
        schedule, solver, n_steps, spacing, denoise_to_zero, lambda_min, **(solver_options or {})
    )
    if driver not in DRIVERS:
        raise InputError(f"unknown driver {driver!r}{nearest(driver, DRIVERS)}")
    if start is not None and start not in STARTS:
        raise InputError(f"unknown start {start!r}{nearest(start, STARTS)}")
    make_driver, usual_start = DRIVERS[driver]
    given = {"schedule": schedule, "executed": executed}
    known = inspect.signature(make_driver).parameters
    for option in driver_options:
        if option not in known or option in given:
            names = [name for name in known if name not in given]
            raise InputError(f"driver {driver!r} has no option {option!r}{nearest(option, names)}")
    options = {**driver_options, **{name: value for name, value in given.items() if name in known}}
    if isinstance(options.get("evaluate"), str):
        name = options["evaluate"]
        if name not in EVALUATES:
            raise InputError(f"unknown evaluate {name!r}{nearest(name, EVALUATES)}")
        options["evaluate"] = EVALUATES[name]()
    built: Any = make_driver(**options)
    if hasattr(built, "check"):
        built.check(tableau)
    if isinstance(options.get("evaluate"), Sharded):
        options["evaluate"].check(min(getattr(built, "window", tableau.n_nodes), tableau.n_nodes))
    starts = usual_start if start is None else STARTS[start]
    if isinstance(built, Speculative) and starts is warm_start_same_noise:
        raise InputError(
            "start='warm_same_noise' uses the last plan's noise again, on which its guess depends; driver "
            "'speculative' needs noise that its guess doesn't know: start='warm' or 'cold'"
        )
    return Sampler(tableau, built, starts)
