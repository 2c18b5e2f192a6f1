"""What travels between policy, control loop and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicySpec:
    """All that a policy is, but its weights: enough to rebuild it from a checkpoint.

    ``T = horizon``, ``To = n_obs_steps``, ``Ta = n_action_steps``.  A plan's step 0 lies at the
    oldest observation of the window; executed are steps ``To - 1 … To - 2 + Ta``.  ``control_hz`` are
    the demonstrations' steps per second, and so a plan's.
    ``condition_dropout`` is the share of training windows whose observation was blanked: a policy
    with some can be guided (``diffusion.guidance``).
    """

    task: str
    obs_dim: int
    action_dim: int
    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    down_dims: tuple[int, ...] = (256, 512, 1024)
    diffusion_step_embed_dim: int = 256
    kernel_size: int = 5
    n_groups: int = 8
    cond_predict_scale: bool = True
    schedule: str = "squared_cosine"
    n_train_steps: int = 100
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"
    clip: float | None = 1.0
    condition_dropout: float = 0.0
    control_hz: float = 10.0

    @property
    def executed(self) -> slice:
        """The plan's steps that a control loop executes."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)


@dataclass(frozen=True)
class Noise:
    """Everything random about a walk.

    Attributes:
        x_T: ``[batch, T, A]`` standard normal, the initial noise.
        z: ``[N, batch, T, A]`` standard normal, the step noises; zero for an ODE solver.
        u: ``[N, batch]`` uniform in [0, 1), for drivers that accept or reject.
    """

    x_T: Tensor
    z: Tensor
    u: Tensor

    def select(self, elements: Tensor) -> Noise:
        """The same for some of the batch elements."""
        return Noise(self.x_T[elements], self.z[:, elements], self.u[:, elements])

    @staticmethod
    def cat(parts: Sequence[Noise]) -> Noise:
        """Batches one after the other."""
        return Noise(
            torch.cat([part.x_T for part in parts]),
            torch.cat([part.z for part in parts], dim=1),
            torch.cat([part.u for part in parts], dim=1),
        )

    def to(self, device: torch.device) -> Noise:
        """The same on a device."""
        return Noise(*(part.to(device, non_blocking=True) for part in (self.x_T, self.z, self.u)))


@dataclass(frozen=True)
class Committed:
    """Actions that a plan is to keep, since they will be executed before it arrives, or nearly so.

    Attributes:
        actions: ``[batch, T, A]`` in the environment's units; anything finite where the weight is 0.
        weight: ``[batch, T]``: 1 keeps an action as it is, 0 leaves it free.
    """

    actions: Tensor
    weight: Tensor

    @staticmethod
    def cat(parts: Sequence[Committed]) -> Committed:
        """Batches one after the other."""
        return Committed(
            torch.cat([part.actions for part in parts]), torch.cat([part.weight for part in parts])
        )


@dataclass(frozen=True)
class Solution:
    """What a driver did to turn noise into one sample per batch element.

    Attributes:
        sample: ``[batch, T, A]``, node N of the tableau: the sample.
        x0_hats: ``[N, batch, T, A]``, the denoiser's output at every node; a warm start needs it.
        noise: what the walk began with.
        rounds: ``[batch]`` int64, network calls that had to wait for one another.
        evaluations: ``[batch]`` int64, nodes that went through the network.
    """

    sample: Tensor
    x0_hats: Tensor
    noise: Noise
    iterations: Tensor
    nfe: Tensor

    def select(self, elements: Sequence[int] | Tensor) -> Solution:
        """The same for some of the batch elements."""
        index = torch.as_tensor(elements, dtype=torch.int64, device=self.sample.device)
        return Solution(
            sample=self.sample[index],
            x0_hats=self.x0_hats[:, index],
            noise=self.noise.select(index),
            iterations=self.iterations[index],
            nfe=self.nfe[index],
        )

    @staticmethod
    def cat(parts: Sequence[Solution]) -> Solution:
        """Batches on the same table, one after the other."""
        return Solution(
            sample=torch.cat([part.sample for part in parts]),
            x0_hats=torch.cat([part.x0_hats for part in parts], dim=1),
            noise=Noise.cat([part.noise for part in parts]),
            iterations=torch.cat([part.iterations for part in parts]),
            nfe=torch.cat([part.nfe for part in parts]),
        )

    def to(self, device: torch.device) -> Solution:
        """The same on a device."""
        noise = self.noise.to(device)  # first: the copies after it are waited for, hence it too
        others = (self.sample, self.x0_hats, self.iterations, self.nfe)
        sample, x0_hats, iterations, nfe = (value.to(device) for value in others)
        return Solution(sample, x0_hats, noise, iterations, nfe)


@dataclass(frozen=True)
class Plan:
    """A batch of action sequences.

    Attributes:
        actions: ``[batch, T, A]`` in the environment's units.
        executed: which of the T steps a control loop executes.
        walk: how they were sampled, in normalised units.
        residual: ``[batch]``, by how much a last round changed the executed action that it changed most,
            in the environment's units; None: not measured.
    """

    actions: Tensor
    executed: slice
    solution: Solution
    residual: Tensor | None = None

    @property
    def executed_actions(self) -> Tensor:
        """``[batch, Ta, A]``."""
        return self.actions[:, self.executed]

    def select(self, elements: Sequence[int] | Tensor) -> Plan:
        """The same for some of the batch elements."""
        index = torch.as_tensor(elements, dtype=torch.int64, device=self.actions.device)
        residual = None if self.residual is None else self.residual[index]
        return Plan(self.actions[index], self.executed, self.solution.select(index), residual)

    @staticmethod
    def cat(parts: Sequence[Plan]) -> Plan:
        """Batches of one policy's plans, one after the other."""
        return Plan(
            torch.cat([part.actions for part in parts]),
            parts[0].executed,
            Solution.cat([part.solution for part in parts]),
        )

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        return Plan(self.actions.to(device), self.executed, self.solution.to(device))
