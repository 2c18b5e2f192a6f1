"""A denoiser as a program samples with it: observed once per plan, called in every round."""

from __future__ import annotations

import torch

from ...diffusion.denoiser import Denoiser, Trunk
from ...diffusion.guidance import classifier_free, committed
from ..driver import NodeDenoise, State
from ..tableau import Tableau

COMMITTED = ("committed", "commitment")
"""Inputs of ``guidance.committed``."""


class DenoiserNetwork:
    """A ``sampler.Network`` for inputs ``condition`` ``[batch, G]``; if guided, ``scale`` ``[batch]`` of
    classifier-free guidance, zero standing for no condition; if something is committed, ``committed``
    ``[batch, T, A]``, normalised, and ``commitment`` ``[batch, T]``, its weight.

    Args:
        denoiser: with the network.
        tableau: where it will be called.
        device: where to compute, in float32.
        trunk: another form of the network's trunk; None: its own.
    """

    def __init__(
        self, denoiser: Denoiser, tableau: Tableau, device: torch.device, trunk: Trunk | None = None
    ) -> None:
        with torch.inference_mode():
            self.nodes = denoiser.at(tableau.timesteps, torch.zeros((), device=device), trunk)

    def observe(self, inputs: State) -> State:
        condition = inputs["condition"]
        observed = {"given": self.nodes.observe(condition)}
        if "scale" in inputs:
            observed["blank"] = self.nodes.observe(torch.zeros_like(condition))
            observed["scale"] = inputs["scale"]
        return observed | {name: inputs[name] for name in COMMITTED if name in inputs}

    def bound(self, observed: State) -> NodeDenoise:
        if "scale" in observed:
            denoise = classifier_free(self.nodes, observed["given"], observed["blank"], observed["scale"])
        else:
            denoise = self.nodes.bind(observed["given"])
        if "committed" in observed:
            return committed(denoise, *(observed[name] for name in COMMITTED))
        return denoise
