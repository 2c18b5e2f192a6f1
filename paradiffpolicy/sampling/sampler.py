"""A sampler is a table, a driver that walks it, and where a walk begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, nearest
from ..types import Walk
from .picard import Picard, PicardPublished
from .realtime import Realtime, warm_start
from .sequential import Sequential
from .solvers import solver_tableau
from .tableau import Tableau
from .walk import BoundDenoise, Driver

Shape = tuple[int, int]
"""(T, A) of one sample."""

Begin = Callable[
    [Tableau, Shape, Walk | None, int, Sequence[torch.Generator]], tuple[Tensor, Tensor, Tensor | None]
]
"""``(tableau, shape, previous walk, executed steps, one generator per batch element)`` to
``(x_T [batch, T, A], z [N, batch, T, A], start [N, batch, T, A] or None)``."""


def fresh(
    tableau: Tableau,
    shape: Shape,
    previous: Walk | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, None]:
    """New noise for every plan.  A batch element draws from its own generator, so what it gets
    doesn't depend on its neighbours; step noises are drawn only if the solver uses them."""
    n = tableau.n_nodes
    drawn = 1 + (n if tableau.stochastic else 0)
    noise = torch.stack([torch.randn(drawn, *shape, generator=g, device=g.device) for g in generators], dim=1)
    z = noise[1:] if tableau.stochastic else noise.new_zeros(()).expand(n, *noise.shape[1:])
    return noise[0], z, None


def continued(
    tableau: Tableau,
    shape: Shape,
    previous: Walk | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the last plan, moved along by what was executed; fresh if there is none."""
    if previous is None:
        return fresh(tableau, shape, previous, executed_steps, generators)
    return warm_start(previous, executed_steps, generators)


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
        x_T, z, start = self.begin(self.tableau, shape, previous, executed_steps, generators)
        return self.driver(denoise, self.tableau, x_T, z, start)


DRIVERS: dict[str, tuple[Callable[..., Driver], Begin]] = {
    "sequential": (Sequential, fresh),
    "picard": (Picard, fresh),
    "picard_published": (PicardPublished, fresh),
    "realtime": (Realtime, continued),
}
"""Every driver by name, with where its walks begin."""


def make_sampler(
    schedule: NoiseSchedule,
    *,
    solver: str = "ddpm",
    n_steps: int = 100,
    spacing: str = "leading",
    solver_options: Mapping[str, Any] | None = None,
    driver: str = "sequential",
    **driver_options: Any,
) -> Sampler:
    """A sampler by names: see ``SOLVERS``, ``SPACINGS`` and ``DRIVERS``.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
    """
    tableau = solver_tableau(schedule, solver, n_steps, spacing, **(solver_options or {}))
    if driver not in DRIVERS:
        raise InputError(f"unknown driver {driver!r}{nearest(driver, DRIVERS)}")
    make_driver, begin = DRIVERS[driver]
    known = inspect.signature(make_driver).parameters
    for option in driver_options:
        if option not in known:
            raise InputError(f"driver {driver!r} has no option {option!r}{nearest(option, known)}")
    return Sampler(tableau, make_driver(**driver_options), begin)
