"""Draws noise from seeds and generators, reproducibly per batch element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..types import Noise

Seed = int | torch.Generator
"""Of one batch element's noise."""


def generators_for(
    seeds: Seed | Sequence[Seed], batch: int, of: str = "batch elements"
) -> list[torch.Generator]:
    """One generator per batch element, so that an element's noise doesn't depend on its neighbours.

    Args:
        seeds: one seed or generator per element.  A single whole number seeds them all: element 0 as that
            number alone would, the others from streams of their own.
        of: the elements' name in messages.

    Raises:
        InputError: their number doesn't fit, or one generator is to serve several elements.
    """
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool):
        seeds = int(seeds)
        streams = [np.random.SeedSequence((seeds % 2**64, b)) for b in range(1, batch)]
        seeds = [seeds, *(int(stream.generate_state(1, np.uint64)[0]) for stream in streams)]
    try:
        one = isinstance(seeds, bool | str | bytes | Mapping | Set | torch.Generator)
        given: list[Any] = [seeds] if one else list(seeds)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"generator={seeds!r} must be a whole number, a torch.Generator, or one of them per element"
        )
    if len(given) != batch:
        raise InputError(
            f"{batch} {of} need as many generators, got {len(given)}: generator=0 seeds any number of them"
        )
    for each in given:
        if isinstance(each, bool) or not isinstance(each, int | np.integer | torch.Generator):
            raise InputError(f"generator={each!r} must be a whole number or a torch.Generator")
    generators = [
        each if isinstance(each, torch.Generator) else torch.Generator().manual_seed(int(each) % 2**64)
        for each in given
    ]
    if len({id(generator) for generator in generators}) < batch:
        raise InputError(
            f"one generator serves several of {batch} {of}, which would depend on one another: give each "
            "its own, or generator=0"
        )
    return generators


def noise_for(
    n: int, batch: int, seed: int = 0, shape: tuple[int, ...] = (4, 2), dtype: torch.dtype = torch.float64
) -> Noise:
    """Noise for a table of n nodes, all from one seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n + 1, batch, *shape, generator=generator, dtype=dtype)
    return Noise(normal[0], normal[1:], torch.rand(n, batch, generator=generator, dtype=dtype))
