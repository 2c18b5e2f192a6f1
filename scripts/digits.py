"""An image model under the parallel drivers: handwritten digits, class by class, with guidance.

    .venv/bin/python scripts/digits.py              about five minutes of training, two of sampling
    .venv/bin/python scripts/digits.py out=my.png report=my.json   other places for the picture and figures

A diffusers ``UNet2DModel`` is trained on scikit-learn's 8 x 8 digits, a tenth of them without their
label, and sampled with classifier-free guidance: sequentially, by ParaDDPM, and by speculation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from einops import rearrange
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm, trange

from paradiffpolicy.diffusion.denoiser import Denoiser, denoising_loss
from paradiffpolicy.diffusion.foreign import diffusers_denoiser
from paradiffpolicy.diffusion.guidance import classifier_free
from paradiffpolicy.files import write_atomically
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.tables import publish, table
from paradiffpolicy.types import Solution

BLANK = 10
"""The label of an image without a label."""

SHAPE = (1, 8, 8)
SAMPLERS: dict[str, dict[str, Any]] = {
    "sequential DDPM": {"driver": "sequential"},
    "ParaDDPM": {"driver": "picard", "window": 50, "tolerance": 0.02},
    "speculative": {"driver": "speculative", "window": 50},
}


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` in [-1, 1] and labels ``[1797]``."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def new_denoiser(seed: int = 0) -> tuple[UNet2DModel, Denoiser]:
    """Fresh weights, and the network as a denoiser."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=BLANK + 1,
    )
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return unet, diffusers_denoiser(unet, scheduler.config)


def train(
    unet: UNet2DModel,
    denoiser: Denoiser,
    n_steps: int,
    batch_size: int = 64,
    progress: Callable[[int], Any] = trange,
) -> list[float]:
    """Trains in place; the losses."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    cool_down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    losses = []
    for _ in progress(n_steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x0, label = images[chosen], labels[chosen]
        blanked = torch.rand(batch_size, generator=generator) < 0.1
        loss = denoising_loss(
            denoiser.network,
            denoiser.schedule,
            "epsilon",
            x0,
            torch.where(blanked, BLANK, label),
            denoiser.schedule.draw(batch_size, generator),
            torch.randn(x0.shape, generator=generator),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cool_down.step()
        losses.append(float(loss.detach()))
    return losses


@torch.inference_mode()
def sample(denoiser: Denoiser, labels: Tensor, scale: float, **settings: Any) -> Solution:
    """One guided image per label, ``[n, 1, 8, 8]``; the noise depends on its place in the batch alone."""
    denoise = classifier_free(
        denoiser, labels, torch.full_like(labels, BLANK), torch.full((len(labels),), scale)
    )
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    return make_sampler(denoiser.schedule, **settings)(denoise, SHAPE, generators)


def picture(solutions: dict[str, Solution], columns: int) -> Figure:
    """A block per sampler, in it a row per class; the same noise in the same place."""
    figure = Figure(figsize=(3.2 * len(solutions), 4.6), dpi=110, layout="constrained")
    for axes, (name, solution) in zip(figure.subplots(1, len(solutions)), solutions.items(), strict=True):
        framed = torch.nn.functional.pad(solution.sample[:, 0], (1, 1, 1, 1), value=-1.0)
        axes.imshow(-rearrange(framed, "(r c) h w -> (r h) (c w)", c=columns), cmap="gray", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name}\n{solution.iterations.double().mean():.1f} iterations", fontsize="medium")
    return figure


def main(out: Path, report: Path, n_steps: int = 1500, columns: int = 6) -> None:
    unet, denoiser = new_denoiser()
    unet.train()
    losses = train(unet, denoiser, n_steps)
    unet.eval().requires_grad_(False)
    print(f"loss {sum(losses[-50:]) / 50:.4f}")
    labels = torch.arange(10).repeat_interleave(columns)
    sampling = tqdm(SAMPLERS.items(), desc="sampling", unit="sampler")
    solutions = {name: sample(denoiser, labels, 2.0, **settings) for name, settings in sampling}
    reference = solutions["sequential DDPM"].sample
    rows = [
        {
            "sampler": name,
            "iterations": float(solution.iterations.double().mean()),
            "nfe": float(solution.nfe.double().mean()),
            "largest_error": float((solution.sample - reference).abs().max()),
        }
        for name, solution in solutions.items()
    ]
    publish([table("", rows)], {"images": len(labels), "pixel_range": 2, "rows": rows}, report)
    write_atomically(out, lambda path: picture(solutions, columns).savefig(path))
    print(out)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(
        *(
            Path(given.get(name, f"outputs/digits.{kind}"))
            for name, kind in (("out", "png"), ("report", "json"))
        )
    )
