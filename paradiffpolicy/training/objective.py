"""What a training run minimizes: the denoising loss on windows of demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from ..data.dataset import WindowDataset, batch_windows
from ..diffusion.denoiser import check_prediction, denoising_loss
from ..sampling.spec import spec_schedule
from ..types import PolicySpec
from .settings import TrainSettings


class Objective(Protocol):
    """The loss of a training step."""

    def __call__(self, network: nn.Module, step: int, bfloat16: bool) -> Tensor:
        """A scalar, to be differentiated; all that is random in it depends on the seed and the step alone.

        Args:
            network: that is trained, as ``build_network`` makes it.
            step: of the run, 0-based.
            bfloat16: multiplies in bfloat16 (autocast).
        """
        ...


MakeObjective = Callable[[WindowDataset, PolicySpec, TrainSettings], Objective]
"""``(normalised windows, spec, settings)`` to an objective."""


def seeded(settings: TrainSettings, step: int) -> torch.Generator:
    """All that is random about a step."""
    return torch.Generator().manual_seed((settings.seed << 32) + step)


class Denoising:
    """The diffusion model's loss on windows of demonstrations: see ``denoising_loss``."""

    def __init__(self, data: WindowDataset, spec: PolicySpec, settings: TrainSettings) -> None:
        self.data, self.spec, self.settings = data, spec, settings
        self.schedule = spec_schedule(spec)
        check_prediction(spec.prediction, self.schedule)

    def __call__(self, network: nn.Module, step: int, bfloat16: bool) -> Tensor:
        settings, device = self.settings, self.data.actions.device
        windows = batch_windows(len(self.data), settings.batch_size, step, settings.seed)
        observations, actions = self.data.batch(windows.to(device))
        generator = seeded(settings, step)
        t = self.schedule.draw(len(actions), generator)
        eps = torch.randn(actions.shape, generator=generator)
        condition = rearrange(observations, "b t o -> b (t o)")
        if self.spec.condition_dropout:
            kept = torch.rand(len(actions), generator=generator) >= self.spec.condition_dropout
            condition = condition * kept[:, None].to(condition)
        noise = t.to(device), eps.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return denoising_loss(network, self.schedule, self.spec.prediction, actions, condition, *noise)
