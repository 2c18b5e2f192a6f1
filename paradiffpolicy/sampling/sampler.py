"""A sampler is a table, a driver that solves it, and a start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion.denoiser import BoundDenoise
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, nearest
from ..registry import Registry
from ..types import Solution
from .anderson import Anderson
from .driver import Driver, Evaluate, check_driver, evaluate_active, evaluate_all
from .picard import Picard, PicardPublished
from .rti import RTI
from .sequential import Sequential
from .sharded import Sharded
from .solvers import SOLVERS, Solver, solver_tableau
from .spacing import Spacing
from .speculative import Speculative
from .tableau import Tableau
from .warm_start import STARTS, Shape, Start, cold_start, warm_start_same_noise


@dataclass(frozen=True)
class Sampler:
    """Turns noise into samples; holds no state between calls.

    Attributes:
        tableau: the solver.
        driver: solves the table's equations.
        start: the noise, and the first guess, of a solution.
        keeps_epsilon: whether the denoiser must keep the network's epsilon (``Denoiser.keeps_epsilon``).
    """

    tableau: Tableau
    driver: Driver
    start: Start = cold_start
    keeps_epsilon: bool = False

    def __repr__(self) -> str:
        noise = "stochastic" if self.tableau.stochastic else "deterministic"
        start = getattr(self.start, "__name__", type(self.start).__name__)
        return f"Sampler({self.tableau.n_nodes} nodes, {noise}, {self.driver!r}, {start})"

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


DRIVERS: Registry[Callable[..., Driver]] = Registry(
    "driver",
    {
        "sequential": Sequential,
        "picard": Picard,
        "picard_published": PicardPublished,
        "anderson": Anderson,
        "speculative": Speculative,
        "rti": RTI,
    },
)
"""Every driver's class by name."""

EVALUATES: Registry[Callable[[], Evaluate]] = Registry(
    "evaluate",
    {"active": lambda: evaluate_active, "all": lambda: evaluate_all, "sharded": Sharded},
)
"""Every way to call the network on a window, by name."""


def make_sampler(
    schedule: NoiseSchedule,
    *,
    solver: str | Solver = "ddpm",
    n_steps: int = 100,
    spacing: str | Spacing | Sequence[float] = "leading",
    denoise_to_zero: bool = True,
    lambda_min: float | None = None,
    solver_options: Mapping[str, Any] | None = None,
    driver: str | type | Driver = "sequential",
    start: str | Start | None = None,
    executed: slice = slice(None),
    keeps_epsilon: bool = False,
    **driver_options: Any,
) -> Sampler:
    """Makes a sampler of names, or of objects of one's own.

    Args:
        schedule: the noise schedule that the network was trained on.
        solver: a name in ``SOLVERS``, or a function like those.
        n_steps, spacing, denoise_to_zero, lambda_min: see ``spacing.time_grid``.
        driver: a name in ``DRIVERS``, a class like those, or a driver that is ready to be called.
        start: a name in ``STARTS``, or a function like those; None: the driver's usual one.
        executed: a sample's steps that will be executed, which a ``plan_tolerance`` is about.
        keeps_epsilon: of ``ddim``: a step's epsilon is the network's, also where x0 was bounded, as in
            diffusers' DDIM by default, and so in LeRobot; False: the one that the bounded x0 means.
        driver_options: the driver's attributes; ``evaluate`` by a name in ``EVALUATES``.

    Raises:
        InputError: a name or an option is unknown, a value is out of range, or the parts don't fit.
    """
    if isinstance(solver, str) and solver in DRIVERS and solver not in SOLVERS:
        raise InputError(f"{solver!r} is a driver, not a solver: driver={solver!r}, with a solver as 'ddim'")
    if not isinstance(schedule, NoiseSchedule):
        raise InputError(f"{schedule=!r:.40} must be a NoiseSchedule, as NoiseSchedule.named makes it")
    if solver_options is None:
        solver_options = {}
    if not isinstance(solver_options, Mapping) or not all(isinstance(name, str) for name in solver_options):
        raise InputError(f"{solver_options=} must be names and values")
    tableau = solver_tableau(
        schedule, solver, n_steps, spacing, denoise_to_zero, lambda_min, **solver_options
    )
    built = _driver(driver, executed, driver_options)
    check_driver(built, tableau)
    evaluate = getattr(built, "evaluate", None)
    if isinstance(evaluate, Sharded):
        evaluate.check(min(getattr(built, "width", tableau.n_nodes), tableau.n_nodes))
    chosen = getattr(built, "usual_start", "cold") if start is None else start
    begins = chosen if callable(chosen) else STARTS.named(chosen)
    check_start(built, begins)
    if not isinstance(keeps_epsilon, bool) or (keeps_epsilon and (solver != "ddim" or tableau.stochastic)):
        raise InputError(f"keeps_epsilon={keeps_epsilon!r:.40} must be true, with solver 'ddim', or false")
    return Sampler(tableau, built, begins, keeps_epsilon)


def check_start(built: Driver, begins: Start) -> None:
    """Makes sure that a driver's solutions can begin like that.

    Raises:
        InputError: they can't.
    """
    if isinstance(built, Sequential) and built.warm_iterations is not None and begins is cold_start:
        raise InputError(
            f"driver 'sequential' with warm_iterations={built.warm_iterations} goes on from the last plan: "
            "start='renoised' or 'warm', not 'cold'"
        )
    if isinstance(built, Speculative) and begins is warm_start_same_noise:
        raise InputError(
            "start='warm_same_noise' uses the last plan's noise again, on which its guess depends; driver "
            "'speculative' needs noise that its guess doesn't know: start='warm' or 'cold'"
        )


def _driver(driver: str | type | Driver, executed: slice, options: Mapping[str, Any]) -> Driver:
    """The driver with its options."""
    name = driver if isinstance(driver, str) else getattr(driver, "__name__", type(driver).__name__)
    if not isinstance(driver, str | type):
        for option in options:
            raise InputError(f"driver {name} is made already: it takes no option {option!r}")
        return driver
    make: Any = DRIVERS.named(driver) if isinstance(driver, str) else driver
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known or option == "executed":
            names = [each for each in known if each != "executed"]
            hint = nearest(option, names) if names else ": it has none"
            raise InputError(f"driver {name!r} has no option {option!r}{hint}")
    given = {**options, **({"executed": executed} if "executed" in known else {})}
    if "evaluate" in given and not callable(given["evaluate"]):
        given["evaluate"] = EVALUATES.named(given["evaluate"])()
    try:
        built: Driver = make(**given)
    except TypeError as error:
        raise InputError(f"driver {name!r} can't be made ({error})") from error
    return built
