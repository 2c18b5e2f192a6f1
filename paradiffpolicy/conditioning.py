"""A plan's inputs to the network: the observation, and what the plan is asked to keep, as it takes them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .data.normalizer import Normalizer
from .diffusion.prefix import clean_steps, committed_delays, delay_numbers
from .errors import LARGEST, InputError
from .observation import InvalidObservationError, Window
from .sampling.capture.network import CLEAN, COMMITTED, DELAY, PIXELS
from .types import PolicySpec


def plan_inputs(
    spec: PolicySpec,
    normalizer: Normalizer,
    window: Window,
    scale: float | Tensor | None = None,
    committed: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The inputs of ``DenoiserNetwork`` for a batch of windows.

    Args:
        normalizer: of observations.
        scale: of guidance, a number or ``[batch]``; None: there is none.
        committed: actions ``[batch, T, A]``, normalized, and their weight ``[batch, T]``.

    Raises:
        InvalidObservationError: a number is too far from the training data.
        InputError: the scales don't fit the batch.
    """
    normalized = normalizer.normalize(window.numbers)
    far = normalized.abs() > LARGEST
    if far.any():
        b, step, column = (int(i[0]) for i in torch.where(far))
        raise InvalidObservationError(
            f"observation window {b} is too far from the training data at step {step}, column {column} "
            f"({float(normalized[b, step, column]):.0e} of their half range): check the sensor"
        )
    condition = rearrange(normalized, "b t o -> b (t o)")
    inputs = {"condition": condition}
    if window.pixels is not None:
        inputs[PIXELS] = window.pixels
    if scale is not None:
        scales = torch.as_tensor(scale, dtype=condition.dtype, device=condition.device)
        if scales.ndim and scales.shape not in ((1,), condition.shape[:1]):
            raise InputError(f"{len(scales)} guidance scales for a batch of {len(condition)}")
        inputs["scale"] = scales.expand(len(condition))
    if committed is not None:
        inputs |= dict(zip(COMMITTED, committed, strict=True))
    if spec.prefix_steps:
        delays = torch.zeros(len(condition), dtype=torch.int64, device=condition.device)
        if committed is not None:
            delays = committed_delays(spec, committed[1])
            inputs[CLEAN] = clean_steps(spec, delays).float()
        inputs[DELAY] = delay_numbers(spec, delays)
    return inputs
