"""Validation: how well a policy does on episodes that it wasn't trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..data.dataset import WindowDataset
from ..diffusion.denoiser import denoising_loss
from ..observation import Window
from ..policy import Policy
from ..sampling.spec import spec_sampler

MOST_WINDOWS = 128
"""Windows, at equal intervals, that are looked at."""
BATCH = 64
SAMPLER = {"solver": "ddim", "n_steps": 8, "spacing": "trailing"}
"""Plans are compared with demonstrations: deterministic, and quick."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Errors of a policy on held-out windows, with the same noise and timesteps at every call, so that they
    are comparable over a run, and of runs with the same held-out episodes.

    Attributes:
        held_out: windows in raw units.
        device: to compute on.
    """

    held_out: WindowDataset
    device: torch.device | str = "cpu"

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float | None]:
        """Errors by name.

        ``loss`` is the training loss, without condition dropout.  ``action_error`` is the mean squared error
        of the executed steps of plans (``SAMPLER``) to the demonstrations' actions, in normalised units:
        0.01 is a tenth of half an action's range.
        """
        policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, **SAMPLER), self.device)
        stride = -(-len(self.held_out) // MOST_WINDOWS)
        batches = torch.arange(0, len(self.held_out), stride).split(BATCH)
        errors = torch.stack(
            [len(windows) * self._errors(policy, windows, k) for k, windows in enumerate(batches)]
        )
        mean = errors.sum(dim=0) / sum(map(len, batches))
        return dict(zip(("loss", "action_error"), mean.tolist(), strict=True))

    @torch.inference_mode()
    def _errors(self, policy: Policy, windows: Tensor, seed: int) -> Tensor:
        """Loss and action error of a batch of windows, float64 ``[2]``."""
        observations, actions = self.held_out.batch(windows)
        window = Window(observations, self.held_out.pictures(windows))
        target = policy.action_frame(policy.checked(window)).normalize(actions.to(policy.device))
        generator = torch.Generator().manual_seed(seed)
        t = policy.schedule.draw(len(target), generator).to(policy.device)
        eps = torch.randn(target.shape, generator=generator).to(policy.device)
        known = policy.network, policy.schedule, policy.spec.prediction
        loss = denoising_loss(*known, target, policy.condition(window), t, eps)
        plan = policy.plan(window, generator=seed)
        executed = policy.spec.executed
        error = (plan.solution.sample[:, executed] - target[:, executed]).square().mean()
        return torch.stack((loss, error)).double().cpu()
