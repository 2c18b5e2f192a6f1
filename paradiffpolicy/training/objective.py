"""What a training run minimizes: the denoising loss on windows of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..data.dataset import WindowDataset, batch_windows
from ..diffusion.denoiser import denoising_loss
from ..models.vision import VisualNetwork
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


@contextmanager
def seeded_dropout(settings: TrainSettings, step: int, device: torch.device) -> Iterator[None]:
    """Within it a network's dropout depends on the seed and the step alone, and not on what a batch is drawn
    with; nothing else's random numbers are touched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, step)).generate_state(1)[0]))
        yield


class Denoising:
    """The diffusion model's loss on windows of demonstrations: see ``denoising_loss``."""

    def __init__(self, data: WindowDataset, spec: PolicySpec, settings: TrainSettings) -> None:
        self.data, self.spec, self.settings = data, spec, settings
        self.schedule = spec_schedule(spec)

    def __call__(self, network: nn.Module, step: int, bfloat16: bool) -> Tensor:
        settings, device = self.settings, self.data.actions.device
        windows = batch_windows(len(self.data), settings.batch_size, step, settings.seed)
        observations, actions = self.data.batch(windows.to(device))
        generator = seeded(settings, step)
        t = self.schedule.draw(len(actions), generator)
        eps = torch.randn(actions.shape, generator=generator)
        kept = None
        if self.spec.condition_dropout:
            kept = torch.rand(len(actions), generator=generator) >= self.spec.condition_dropout
        noise, pixels = (t.to(device), eps.to(device)), self.data.pictures(windows)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            if pixels is None:
                condition = rearrange(observations, "b t o -> b (t o)")
            else:
                assert isinstance(network, VisualNetwork)
                crops = network.encoder.draw_crops(len(windows), generator)
                condition = network.encode(observations, pixels.to(device), crops)
            if kept is not None:
                condition = condition * kept[:, None].to(condition)
            return denoising_loss(network, self.schedule, self.spec.prediction, actions, condition, *noise)
