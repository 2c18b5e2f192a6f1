"""A denoiser as plans are sampled with it: observed once per plan, called in every iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...diffusion.denoiser import BoundDenoise, Denoiser, Trunk
from ...diffusion.guidance import classifier_free, committed
from ...diffusion.prefix import after_prefix, with_delay
from ..driver import NodeDenoise, State
from ..tableau import Tableau

COMMITTED = ("committed", "commitment")
"""Inputs of ``guidance.committed``."""
DELAY, CLEAN = "delay", "clean"
"""Inputs of ``diffusion.prefix``."""
PIXELS = "pixels"
"""The input with cameras' pictures."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""Conditions without pictures ``[batch, To O]``, and the pictures ``[batch, To, P]``, to conditions
``[batch, G]``."""


class PlanNetwork(Protocol):
    """The network of an executor, on one table."""

    def observe(self, inputs: State) -> State:
        """Everything that a plan's conditions decide, once per plan; each ``[batch, …]``."""
        ...

    def at_nodes(self, observed: State) -> NodeDenoise:
        """The denoiser at the table's nodes, for an observed plan."""
        ...

    def at_times(self, inputs: State) -> BoundDenoise:
        """The denoiser at any times, for drivers that choose their own."""
        ...


class DenoiserNetwork:
    """A ``PlanNetwork`` for inputs ``condition`` ``[batch, G]``; with cameras, ``[batch, To O]`` and their
    ``pixels`` ``[batch, To, P]``; if guided, ``scale`` ``[batch]`` of classifier-free guidance, zero standing
    for no condition; if something is committed, ``committed`` ``[batch, T, A]``, normalised, and
    ``commitment`` ``[batch, T]``, its weight; if the network was trained with delays, their numbers ``delay``
    ``[batch, To, D]``, and with something committed, ``clean`` ``[batch, T]``, 1 where it is given to the
    network.

    Args:
        denoiser: with the network.
        tableau: where it will be called.
        like: of the precision and on the device to compute in.
        trunk: another form of the network's trunk; None: its own.
        encode: makes conditions of pictures; None: there are none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        like: Tensor,
        trunk: Trunk | None = None,
        encode: Encode | None = None,
    ) -> None:
        self.denoiser, self.encode = denoiser, encode
        with torch.inference_mode():
            self.nodes = denoiser.at(tableau.timesteps, like, trunk)

    def observe(self, inputs: State) -> State:
        return self.observed(self.nodes, inputs)

    def at_nodes(self, observed: State) -> NodeDenoise:
        return self.bound(self.nodes, observed)

    def at_times(self, inputs: State) -> BoundDenoise:
        return self.bound(self.denoiser, self.observed(self.denoiser, inputs))

    def observed(self, denoiser: Denoiser, inputs: State) -> State:
        """What a denoiser makes of a plan's inputs."""
        condition = inputs["condition"]
        if self.encode is not None:
            condition = self.encode(condition, inputs[PIXELS])
        conditions = {"given": condition}
        if "scale" in inputs:
            conditions["blank"] = torch.zeros_like(condition)
        if DELAY in inputs:
            conditions = {name: with_delay(each, inputs[DELAY]) for name, each in conditions.items()}
        observed = {name: denoiser.observe(each) for name, each in conditions.items()}
        return observed | {name: inputs[name] for name in ("scale", *COMMITTED, CLEAN) if name in inputs}

    def bound(self, denoiser: Denoiser, observed: State) -> BoundDenoise:
        """A denoiser of an observed plan."""
        if "scale" in observed:
            denoise = classifier_free(denoiser, observed["given"], observed["blank"], observed["scale"])
        else:
            denoise = denoiser.bind(observed["given"])
        if CLEAN in observed:
            denoise = after_prefix(denoise, observed["committed"], observed[CLEAN])
        if "committed" in observed:
            return committed(denoise, *(observed[name] for name in COMMITTED))
        return denoise
