"""Times training steps beside diffusion_policy's, and beside the reading of their windows: they take turns
within one run."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.table import Table
from torch import nn

from ..clock import Clock
from ..data.dataset import WindowDataset
from ..data.pictures import mapped_bytes
from ..models.ema import ema_decay
from ..models.networks import build_network
from ..tables import quantiles, spread, table, tail
from ..training.settings import TrainSettings
from ..training.train import Trainer
from ..types import PolicySpec
from .baselines import schedule_of
from .timing import WARM_UPS, Task, interleaved, percentiles, timings

REFERENCE = "diffusion_policy's step"


def random_windows(spec: PolicySpec, count: int) -> WindowDataset:
    """Windows of a spec's sizes: what is in them takes no time."""
    draw = torch.Generator().manual_seed(0)
    n_steps = count + spec.horizon - 1
    observations, actions = (
        torch.randn(n_steps, size, generator=draw) for size in (spec.obs_dim, spec.action_dim)
    )
    steps = torch.arange(count)[:, None] + torch.arange(spec.horizon)
    sizes, pixels = [math.prod(camera.shape) for camera in spec.contract.cameras], None
    if sizes:  # written: of a file's holes the system would keep nothing
        pixels = mapped_bytes(n_steps, sum(sizes)).random_(generator=draw)
    return WindowDataset(observations, actions, steps, spec.n_obs_steps, pixels=pixels)


class ReferenceStep:
    """A training step as diffusion_policy takes it: the network in eager float32, noise by diffusers'
    ``DDPMScheduler``, AdamW, and the average in a loop over the weights."""

    def __init__(self, data: WindowDataset, spec: PolicySpec, settings: TrainSettings, device: str) -> None:
        self.network: nn.Module = build_network(spec).to(device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.95, 0.999), weight_decay=1e-6)
        self.scheduler = schedule_of("DDPMScheduler", spec)
        self.data, self.settings, self.step = data, settings, 0

    def __call__(self) -> None:
        settings, device = self.settings, self.data.actions.device
        windows = self.data.drawn(settings.batch_size, self.step, settings.seed)
        observations, actions = self.data.batch(windows.to(device))
        noise = torch.randn(actions.shape, device=device)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(actions),), device=device)
        noisy = self.scheduler.add_noise(actions, noise, t)
        output = self.network(noisy, t.float(), rearrange(observations, "b t o -> b (t o)"))
        nn.functional.mse_loss(output, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = ema_decay(self.step)
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
                average.mul_(decay).add_(weight, alpha=1 - decay)


def waiting(step: Callable[[], object], device: str) -> Task:
    """A task that ends when the device has done a step."""

    def task(_: object) -> None:
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return task


def training_rows(
    spec: PolicySpec,
    batch_size: int,
    precisions: Iterable[str],
    turns: int,
    device: str,
    clock: Clock,
    on_turn: Callable[[], object],
) -> dict[str, dict[str, Any]]:
    """``timings`` of ``REFERENCE`` and of a ``Trainer``'s step in each precision, by name."""
    data = random_windows(spec, 50 * batch_size)
    with tempfile.TemporaryDirectory() as folder:
        settings = {each: TrainSettings(turns, batch_size, precision=each) for each in precisions}
        trainers = {
            f"paradiffpolicy, {each}": Trainer(data, spec, own, Path(folder), device=device)
            for each, own in settings.items()
        }
        moved = next(iter(trainers.values())).data
        reference = ReferenceStep(moved, spec, TrainSettings(turns, batch_size), device)
        tasks = {name: waiting(trainer.update, device) for name, trainer in trainers.items()}
        tasks = {REFERENCE: waiting(reference, device), **tasks}
        seconds = interleaved(tasks, [np.zeros(0)] * turns, clock, on_turn)
    return {name: timings(each, seconds[REFERENCE]) for name, each in seconds.items()}


def reading_rows(
    spec: PolicySpec,
    settings: TrainSettings,
    device: str,
    clock: Clock,
    on_turn: Callable[[], object],
) -> dict[str, Any]:
    """Times reading a batch's windows, whose pictures are in a file that is mapped into memory and that the
    system holds there, beside whole training steps.

    Args:
        settings: of the steps; ``n_steps`` are timed.  Their windows are others than those that are read.

    Returns:
        ``step_ms`` and ``windows_ms`` as ``quantiles``; ``share``: the quartiles of what the reading is of
        the step in the same turn.
    """
    n, seed = settings.n_steps, settings.seed + 1
    data = random_windows(spec, 100 * settings.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(data, spec, replace(settings, n_steps=n + WARM_UPS), Path(folder), device=device)
        steps = count()

        def read(_: object) -> None:
            windows = data.drawn(settings.batch_size, next(steps), seed)
            trainer.data.batch(windows.to(device))
            trainer.data.pictures(windows)

        tasks: dict[str, Task] = {"step": waiting(trainer.update, device), "windows": read}
        seconds = interleaved(tasks, [np.zeros(0)] * n, clock, on_turn)
    share = np.divide(seconds["windows"], seconds["step"])
    milliseconds = {f"{name}_ms": quantiles(1e3 * np.asarray(each)) for name, each in seconds.items()}
    return {**milliseconds, "share": percentiles(share, 25, 50, 75)}


def reading_table(row: Mapping[str, Any], title: str) -> Table:
    """One row."""
    cells = {
        "step, ms p50": tail(row["step_ms"]),
        "its windows, ms p50": tail(row["windows_ms"]),
        "share, % [quartiles]": spread([100 * each for each in row["share"]]),
    }
    return table(title, [cells])


def training_table(rows: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One row per kind of step."""
    return table(
        title,
        (
            {
                "step": name,
                "ms p50": tail(row["ms"]),
                "times faster [quartiles]": spread(row["speedup"], digits=2),
            }
            for name, row in rows.items()
        ),
    )
