"""What other projects' policies with cameras have in common: a ResNet's names, the order of a condition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LAYERS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Names of a ResNet's layers, by their numbers where it is a sequence."""
UNUSED = re.compile(r"num_batches_tracked$|pos_grid$|_dummy_variable$|temperature$")
"""Ends of names of what is known without a file, or isn't needed to run a policy."""


def resnet_name(name: str) -> str:
    """A weight's name in ``ResNet18``, of its name in a sequence of the layers, as ``4.0.conv1.weight``."""
    number, _, rest = name.partition(".")
    return f"{LAYERS.get(number, number)}.{rest}"


def with_pictures_last(
    head: Mapping[str, Tensor], *, steps: int, parts: Sequence[tuple[bool, int]]
) -> dict[str, Tensor]:
    """The weights of a U-Net whose condition has, of every step, the numbers first and the pictures last.

    Args:
        head: the weights of one whose condition has another order.
        steps: To.
        parts: the other order: of a step, one part after the other, whether it is a picture's, and its size.
    """
    sizes = [size for _, size in parts]
    places = torch.arange(sum(sizes)).split(sizes)
    order = sorted(zip(parts, places, strict=True), key=lambda part: part[0][0])
    step = torch.cat([place for _, place in order])
    condition = torch.cat([k * len(step) + step for k in range(steps)])

    def moved(key: str, weight: Tensor) -> Tensor:
        if not key.endswith("cond_encoder.1.weight") or weight.ndim != 2 or weight.shape[1] < len(condition):
            return weight
        before = weight.shape[1] - len(condition)  # the timestep's
        return weight[:, torch.cat((torch.arange(before), before + condition))]

    return {key: moved(key, weight) for key, weight in head.items()}
