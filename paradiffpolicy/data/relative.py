"""Relative actions: some numbers of an action are planned as differences to what was observed.

::

    relative[k] = action[k] - reference        reference: a column of the window's newest observation

So a plan means the same wherever the robot is, as in UMI (Chi et al. 2024, arXiv 2402.10329).  Networks,
normalizers and samplers know relative actions alone; stores, plans and everything that takes plans know
absolute ones.  Differences are computed in float64: positions may be far from zero, next to how much they
vary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..types import Plan, Relative, Solution, require_real
from .normalizer import Normalizer


def references(newest: Tensor, relative: Relative, action_dim: int) -> Tensor:
    """The references ``[..., A]`` float64 of the newest observations ``[..., O]``, in raw units; 0 for
    numbers of an action that are absolute."""
    values = torch.zeros(*newest.shape[:-1], action_dim, dtype=torch.float64, device=newest.device)
    for dimension, column in relative:
        values[..., dimension] = newest[..., column]
    return values


@dataclass(frozen=True, eq=False)
class ActionFrame:
    """Maps the actions of a batch of plans to a network's numbers and back.

    Attributes:
        normalizer: of what the network is trained on.
        reference: ``[batch, A]`` float64, what is subtracted before; None: actions are absolute.
    """

    normalizer: Normalizer
    reference: Tensor | None

    def normalize(self, actions: Tensor) -> Tensor:
        """Absolute actions ``[batch, T, A]`` to float32 numbers of the network."""
        if self.reference is not None:
            actions = actions.double() - self.reference[:, None]
        return self.normalizer.normalize(actions)

    def unnormalize(self, sample: Tensor) -> Tensor:
        """Numbers of the network ``[batch, T, A]`` to absolute actions; float64 if there is a reference."""
        actions = self.normalizer.unnormalize(sample)
        return actions if self.reference is None else actions.double() + self.reference[:, None]

    def continued(self, previous: Plan | None) -> Solution | None:
        """The last plan's solution as numbers of this frame: the same absolute actions, where the reference
        has moved since.

        Raises:
            InputError: the plan's actions aren't relative to as many numbers: it is another policy's.
        """
        if previous is None:
            return None
        solution, before = previous.solution, previous.reference
        if self.reference is None and before is None:
            return solution
        if self.reference is None or before is None:
            kinds = ["absolute" if each is None else "relative" for each in (before, self.reference)]
            raise InputError(
                f"the previous plan is {kinds[0]}, the policy {kinds[1]}: begin with previous=None"
            )
        sample, x0_hats = solution.sample, solution.x0_hats
        require_real(**{"previous.reference": before, "sample": sample, "x0_hats": x0_hats})
        shapes = [tuple(shape) for shape in (before.shape, sample.shape[::2], x0_hats.shape[1::2])]
        if any(shape != tuple(self.reference.shape) for shape in shapes) or not before.isfinite().all():
            raise InputError(
                f"the previous plan's reference {shapes[0]}, sample and x0_hats aren't of as many finite "
                f"numbers as the plan's, {tuple(self.reference.shape)}: begin with previous=None"
            )
        moved = (before.to(self.reference) - self.reference) * self.normalizer.scale
        shift = moved.to(sample)[:, None]
        return replace(solution, sample=sample + shift, x0_hats=x0_hats + shift)
