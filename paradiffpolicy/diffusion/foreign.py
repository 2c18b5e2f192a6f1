"""diffusers' image networks under our drivers.

A ``UNet2DModel`` or ``UNet2DConditionModel`` and its scheduler's config become a ``Denoiser`` on
images ``[batch, C, H, W]``:

    denoiser = diffusers_denoiser(pipeline.unet, pipeline.scheduler.config)
    sampler = make_sampler(denoiser.schedule, solver="ddim", n_steps=50, driver="picard", window=25)
    solution = sampler(denoiser.bind(labels), (3, 32, 32), generators)

diffusers itself isn't needed: a network with the same ``config`` and call signature will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import Clip, Denoiser, DynamicThreshold, Threshold, unbounded
from .schedule import DiscreteSchedule, NoiseSchedule


def diffusers_denoiser(unet: Any, scheduler: Mapping[str, Any]) -> Denoiser:
    """The network as ``x0_hat = D(x_t, t, condition)``.

    The condition ``[batch, …]`` is the encoder hidden states ``[batch, S, C]`` for a
    ``UNet2DConditionModel``, class labels ``[batch]`` if the network has class embeddings, and anything
    at all if it is unconditional.  Of a network that predicts its variance
    too, the mean's half is taken.

    Args:
        unet: the network, in evaluation mode.
        scheduler: the config of the scheduler that it was trained with.

    Raises:
        InputError: the config asks for a schedule or a prediction that isn't known here.
    """
    config = unet.config

    def network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if config.get("cross_attention_dim") is not None and "encoder_hid_dim" in config:
            output = unet(x, t, encoder_hidden_states=condition).sample
        elif config.get("num_class_embeds") is not None:
            output = unet(x, t, class_labels=condition).sample
        else:
            output = unet(x, t).sample
        return output[:, : x.shape[1]]

    prediction = scheduler.get("prediction_type", "epsilon")
    return Denoiser(network, _schedule(scheduler), prediction, _threshold(scheduler))


def _schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    if scheduler.get("rescale_betas_zero_snr"):
        raise InputError("rescale_betas_zero_snr ends in pure noise, where x0 can't be told from epsilon")
    betas = scheduler.get("trained_betas")
    if betas is not None:
        return DiscreteSchedule.from_betas(torch.as_tensor(betas, dtype=torch.float64))
    return NoiseSchedule.named(
        scheduler.get("beta_schedule", "linear"),
        scheduler["num_train_timesteps"],
        scheduler.get("beta_start", 1e-4),
        scheduler.get("beta_end", 0.02),
    )


def _threshold(scheduler: Mapping[str, Any]) -> Threshold:
    if scheduler.get("thresholding"):
        return DynamicThreshold(
            scheduler.get("dynamic_thresholding_ratio", 0.995), scheduler.get("sample_max_value", 1.0)
        )
    return Clip(scheduler.get("clip_sample_range", 1.0)) if scheduler.get("clip_sample") else unbounded
