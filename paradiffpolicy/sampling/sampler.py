"""A sampler is a table, a driver that walks it, and where a walk begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, nearest
from ..types import Walk
from .anderson import Anderson
from .warm_start import BEGINS, Begin, Shape, continued, fresh
from .picard import Picard, PicardPublished
from .rti import Realtime
from .reference import RK45
from .sequential import Sequential
from .sharded import Sharded
from .solvers import Solver, solver_tableau
from .speculative import Speculative
from .tableau import Tableau
from .driver import BoundDenoise, Driver, Evaluate, evaluate_active, evaluate_all


@dataclass(frozen=True)
class Sampler:
    """Turns noise into samples; holds no state between calls.

    Attributes:
        tableau: the solver.
        driver: who walks it.
        begin: the noise, and the first guess, of a walk.
    """

    tableau: Tableau
    driver: Driver
    begin: Begin = fresh

    def __call__(
        self,
        denoise: BoundDenoise,
        shape: Shape,
        generators: Sequence[torch.Generator],
        previous: Walk | None = None,
        executed_steps: int = 0,
    ) -> Walk:
        """One sample of ``shape`` per generator."""
        noise, start = self.begin(self.tableau, shape, previous, executed_steps, generators)
        return self.driver(denoise, self.tableau, noise, start)


DRIVERS: dict[str, tuple[Callable[..., Driver], Begin]] = {
    "sequential": (Sequential, fresh),
    "picard": (Picard, fresh),
    "picard_published": (PicardPublished, fresh),
    "anderson": (Anderson, fresh),
    "speculative": (Speculative, fresh),
    "realtime": (Realtime, continued),
    "rk45": (RK45, fresh),
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
    begin: str | None = None,
    executed: slice = slice(None),
    **driver_options: Any,
) -> Sampler:
    """A sampler by names: see ``SOLVERS``, ``SPACINGS``, ``DRIVERS`` and ``BEGINS``.

    Args:
        schedule: the noise schedule that the network was trained on.
        solver: a name, or a function like those.
        n_steps, spacing, denoise_to_zero, lambda_min: see ``spacing.time_grid``.
        begin: where walks begin; None: as the driver usually does.
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
    if begin is not None and begin not in BEGINS:
        raise InputError(f"unknown begin {begin!r}{nearest(begin, BEGINS)}")
    make_driver, usual_begin = DRIVERS[driver]
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
    walker: Any = make_driver(**options)
    if hasattr(walker, "check"):
        walker.check(tableau)
    if isinstance(options.get("evaluate"), Sharded):
        options["evaluate"].check(min(getattr(walker, "window", tableau.n_nodes), tableau.n_nodes))
    begins = usual_begin if begin is None else BEGINS[begin]
    if isinstance(walker, Speculative) and begins is continued:
        raise InputError(
            "begin='continued' uses the last plan's noise again, on which its guess depends; driver "
            "'speculative' needs noise that its guess doesn't know: begin='guessed' or 'fresh'"
        )
    return Sampler(tableau, walker, begins)
