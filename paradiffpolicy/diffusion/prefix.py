r"""Training-time real-time chunking: plans that continue actions which are committed already (Black et al.
2025, "Training-Time Action Conditioning for Efficient Real-Time Chunking", arXiv 2512.05964).

While a plan is made, the last one goes on for d steps, the delay.  In training a delay from 0 to D,
``spec.prefix_steps``, is drawn for every window: its first steps are given to the network without noise, and
the loss is of the others.  When a plan is made, the committed actions stand there::

    step      0 … first - 1    first … first + d - 1    first + d … T - 1
    action       executed            committed               planned
    input          clean               clean                  noisy

``first`` is the step for the newest observation.  Without a delay no step is clean.

The paper's network is a transformer with a timestep per step, 0 for those that are clean.  Networks here have
one timestep per row, and so are told how many steps are clean: D numbers, the first d of them 1, the others
0, stand beside every observation of the condition.  That is part of any network's interface, where input
channels for it would be another network in all its forms; it is prepared once per plan, with the rest of
the condition; and the zeros of d = 0 add nothing to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import PolicySpec
from .denoiser import BoundDenoise


def clean_steps(spec: PolicySpec, delays: Tensor) -> Tensor:
    """The steps ``[batch, T]`` bool that are given without noise, for delays ``[batch]`` int64."""
    step = torch.arange(spec.horizon, device=delays.device)
    return (step < spec.executed.start + delays[:, None]) & (delays[:, None] > 0)


def delay_numbers(spec: PolicySpec, delays: Tensor) -> Tensor:
    """Tells a network of delays ``[batch]`` int64: ``[d > 0, d > 1, …]`` beside each observation,
    ``[batch, To, D]``."""
    numbers = torch.arange(spec.prefix_steps, device=delays.device) < delays[:, None]
    return numbers.float()[:, None].expand(-1, spec.n_obs_steps, -1)


def committed_delays(spec: PolicySpec, weight: Tensor) -> Tensor:
    """The delays ``[batch]`` int64, at most D, of commitments ``[batch, T]``: executed steps of weight 1, if
    all before them have it, too."""
    leading = (weight >= 1).long().cumprod(dim=1).sum(dim=1)
    return (leading - spec.executed.start).clamp(0, spec.prefix_steps)


def with_delay(condition: Tensor, numbers: Tensor) -> Tensor:
    """Conditions ``[batch, To O]`` with ``delay_numbers`` ``[batch, To, D]``: ``[batch, To (O + D)]``."""
    observations = condition.unflatten(1, (numbers.shape[1], -1))
    return torch.cat((observations, numbers.to(condition.dtype)), dim=-1).flatten(1)


def after_prefix(denoise: BoundDenoise, actions: Tensor, clean: Tensor) -> BoundDenoise:
    """``D`` of the sample with given actions at its clean steps, of which its own x0_hat means nothing.

    Args:
        actions: ``[batch, T, A]``, normalised.
        clean: ``[batch, T]``, 1 where a step is clean, else 0.
    """

    def denoise_the_rest(x: Tensor, t: Tensor, element: Tensor) -> Tensor:
        given = clean.index_select(0, element).unsqueeze(-1) > 0
        return denoise(torch.where(given, actions.index_select(0, element), x), t, element)

    return denoise_the_rest
