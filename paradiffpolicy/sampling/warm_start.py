"""Starts: the noise of a solution, and a first guess of it from the last plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..registry import Registry
from ..types import Noise, Solution, require_real
from .tableau import Tableau

Shape = tuple[int, ...]
"""Of one sample: (T, A)."""

Start = Callable[
    [Tableau, Shape, Solution | None, int, Sequence[torch.Generator]], tuple[Noise, Tensor | None]
]
"""``(tableau, shape, previous solution, executed steps, one generator per batch element)`` to the noise
and a first guess of the x0_hats ``[N, batch, T, A]``, or None."""


def cold_start(
    tableau: Tableau,
    shape: Shape,
    previous: Solution | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Noise, None]:
    """Draws new noise for every plan.  A batch element draws from its own generator, so its noise
    doesn't depend on its neighbours; an ODE solver draws x_T alone."""
    n = tableau.n_nodes
    drawn = 1 + (n if tableau.stochastic else 0)
    normal = torch.stack(
        [torch.randn(drawn, *shape, generator=g, device=g.device) for g in generators], dim=1
    )
    if not tableau.stochastic:
        return Noise.of_flow(normal[0], n), None
    u = torch.stack([torch.rand(n, generator=g, device=g.device) for g in generators], dim=1)
    return Noise(normal[0], normal[1:], u), None


def shifted(values: Tensor, steps: int, tail: Tensor) -> Tensor:
    """``values`` ``[..., T, A]`` moved ``steps`` towards the past; ``tail`` ``[..., steps, A]``
    fills the end."""
    return torch.cat((values[..., steps:, :], tail), dim=-2)


def check_continued(previous: Solution, tableau: Tableau, shape: Shape, batch: int) -> None:
    """Makes sure that a plan can go on from a solution.

    Raises:
        InputError: it is another sampler's or policy's, or has NaN or infinity.
    """
    noise, wanted = previous.noise, (tableau.n_nodes, batch, *shape)
    if not isinstance(noise, Noise):
        raise InputError("the previous plan's solution has no noise: begin with previous=None")
    require_real(sample=previous.sample, x0_hats=previous.x0_hats, x_T=noise.x_T, z=noise.z)
    parts = {
        "x0_hats": (previous.x0_hats, wanted),
        "sample": (previous.sample, wanted[1:]),
        "x_T": (noise.x_T, wanted[1:]),
        "z": (noise.z, wanted),
    }
    for name, (value, shape) in parts.items():
        if tuple(value.shape) != shape or value.dtype != torch.float32:
            raise InputError(
                f"the previous plan has {name} {tuple(value.shape)} {value.dtype}, not {shape} float32: it "
                "is another sampler's or policy's; begin with previous=None"
            )
    finite = torch.stack([value.isfinite().all() for value, _ in parts.values()]).tolist()  # waits once
    for name, usable in zip(parts, finite, strict=True):
        if not usable:
            raise InputError(f"the previous plan has NaN or infinity in {name}: begin with previous=None")


def moved_along(plans: Tensor, executed_steps: int) -> Tensor:
    """``plans`` ``[..., T, A]`` without what was executed, extended by their last step."""
    last = plans[..., -1:, :]
    return shifted(plans, executed_steps, last.expand(*last.shape[:-2], executed_steps, -1))


def warm_start(
    tableau: Tableau,
    shape: Shape,
    previous: Solution | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Noise, Tensor | None]:
    """Draws new noise and takes the last plan as a first guess of the x0_hats, if there is one."""
    noise, _ = cold_start(tableau, shape, previous, executed_steps, generators)
    if previous is None:
        return noise, None
    check_continued(previous, tableau, shape, len(generators))
    return noise, moved_along(previous.x0_hats, executed_steps)


def warm_start_same_noise(
    tableau: Tableau,
    shape: Shape,
    previous: Solution | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Noise, Tensor | None]:
    """Moves the last plan and its noise along together, so that what is left of the plan is nearly a
    fixed point already; the end of the noise is new.  A cold start if there is no last plan."""
    new_noise, _ = cold_start(
        tableau, (executed_steps, shape[-1]) if previous else shape, None, 0, generators
    )
    if previous is None:
        return new_noise, None
    check_continued(previous, tableau, shape, len(generators))
    noise = Noise(
        shifted(previous.noise.x_T, executed_steps, new_noise.x_T.to(previous.noise.x_T)),
        shifted(previous.noise.z, executed_steps, new_noise.z.to(previous.noise.z)),
        new_noise.u,
    )
    return noise, moved_along(previous.x0_hats, executed_steps)


def renoised_start(
    tableau: Tableau,
    shape: Shape,
    previous: Solution | None,
    executed_steps: int,
    generators: Sequence[torch.Generator],
) -> tuple[Noise, Tensor | None]:
    """Draws new noise and guesses that every x0_hat is the last plan's sample, moved along: with it, a node
    of DDIM or DDPM is that plan, noised to the node's level, as in RTI-DP (arXiv 2508.05396) and Falcon
    (arXiv 2503.00339).  A cold start if there is no last plan."""
    noise, guess = warm_start(tableau, shape, previous, executed_steps, generators)
    if previous is None or guess is None:
        return noise, None
    return noise, moved_along(previous.sample, executed_steps).expand_as(guess)


STARTS: Registry[Start] = Registry(
    "start",
    {
        "cold": cold_start,
        "warm": warm_start,
        "warm_same_noise": warm_start_same_noise,
        "renoised": renoised_start,
    },
)
"""Every start by name."""
