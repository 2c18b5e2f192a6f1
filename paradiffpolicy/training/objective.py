"""What a training run minimizes: the denoising loss on windows of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..data.dataset import WindowDataset
from ..diffusion.denoiser import check_prediction, denoising_loss
from ..diffusion.prefix import clean_steps, delay_numbers, with_delay
from ..models.vision import Sight
from ..sampling.spec import spec_schedule
from ..types import PolicySpec
from .settings import TrainSettings


@dataclass(frozen=True)
class Part:
    """One of ``count`` parts of a batch, as equal as whole rows allow."""

    index: int
    count: int

    def rows(self, batch: Tensor) -> Tensor:
        """Its rows of ``[batch, ...]``."""
        return batch.tensor_split(self.count)[self.index]

    def share(self, mean: Tensor, n_rows: int) -> Tensor:
        """Its share of the mean over a batch of ``n_rows``, given the mean over its own rows."""
        mine = (n_rows + self.count - 1 - self.index) // self.count
        return mean if mine == n_rows else mean * (mine / n_rows)

    def split(self, count: int) -> list[Part]:
        """Parts of the batch that together are this one."""
        return [Part(self.index * count + k, self.count * count) for k in range(count)]


WHOLE = Part(0, 1)
"""The batch itself."""


class Objective(Protocol):
    """The loss of a training step."""

    def __call__(self, network: nn.Module, step: int, bfloat16: bool, part: Part = WHOLE) -> Tensor:
        """A scalar, to be differentiated; all that is random in it depends on the seed and the step alone.

        Args:
            network: that is trained, as ``build_network`` makes it.
            step: of the run, 0-based.
            bfloat16: multiplies in bfloat16 (autocast).
            part: of the batch that is computed.  Everything random is drawn for the whole batch.

        Returns:
            The part's share of the mean loss over the batch: those of all parts add up to it.
        """
        ...


MakeObjective = Callable[[WindowDataset, PolicySpec, TrainSettings], Objective]
"""``(normalised windows, spec, settings)`` to an objective."""


def hashed(*values: int) -> int:
    """A seed that differs with each of some numbers: PyTorch's generators use its lowest 32 bits alone."""
    return int(np.random.SeedSequence(values).generate_state(1)[0])


def seeded(settings: TrainSettings, step: int) -> torch.Generator:
    """All that is random about a step."""
    return torch.Generator().manual_seed(hashed(settings.seed, step))


@contextmanager
def seeded_dropout(
    settings: TrainSettings, step: int, device: torch.device, part: Part = WHOLE
) -> Iterator[None]:
    """Within it a network's dropout depends on the seed, the step and the part of the batch alone, and not on
    what a batch is drawn with; nothing else's random numbers are touched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(hashed(settings.seed, step, part.index, part.count))
        yield


class Denoising:
    """The diffusion model's loss on windows of demonstrations: see ``denoising_loss``."""

    def __init__(self, data: WindowDataset, spec: PolicySpec, settings: TrainSettings) -> None:
        self.data, self.spec, self.settings = data, spec, settings
        self.schedule = spec_schedule(spec)
        check_prediction(spec.prediction, self.schedule)

    def __call__(self, network: nn.Module, step: int, bfloat16: bool, part: Part = WHOLE) -> Tensor:
        settings, device = self.settings, self.data.actions.device
        windows = self.data.drawn(settings.batch_size, step, settings.seed)
        n, generator = len(windows), seeded(settings, step)
        observations, actions = self.data.batch(part.rows(windows).to(device))
        t = self.schedule.draw(n, generator)
        eps = torch.randn((n, *actions.shape[1:]), generator=generator)
        condition: Any = rearrange(observations, "b t o -> b (t o)")
        kept, pixels = None, self.data.pictures(part.rows(windows))
        if self.spec.condition_dropout:
            kept = part.rows(torch.rand(n, generator=generator) >= self.spec.condition_dropout).to(condition)
            condition = condition * kept[:, None]
        if pixels is not None:
            places = part.rows(torch.rand((n, len(self.spec.contract.cameras), 2), generator=generator))
            colours = None
            if "jitter" in self.spec.encoder_options:
                colours = torch.rand((n, len(self.spec.contract.cameras), 3), generator=generator)
                colours = part.rows(colours).to(device)
            condition = Sight(observations, pixels.to(device), places.to(device), kept, colours=colours)
        drawn = [t, eps]
        if self.spec.prefix_steps:
            delays = torch.randint(self.spec.prefix_steps + 1, (n,), generator=generator)
            free = (~clean_steps(self.spec, delays)).float()
            drawn.append(free / free.mean())  # the mean over the batch's free steps, also by parts
            delay = delay_numbers(self.spec, part.rows(delays)).to(device)
            seen = isinstance(condition, Sight)
            condition = condition._replace(delay=delay) if seen else with_delay(condition, delay)
        noise = (part.rows(each).to(device) for each in drawn)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = denoising_loss(network, self.schedule, self.spec.prediction, actions, condition, *noise)
        return part.share(loss, n)
