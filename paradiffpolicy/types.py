"""Values that travel between policy, control loop and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, nearest
from .task import Contract


@dataclass(frozen=True)
class PolicySpec:
    """Describes a policy but for its weights: enough to rebuild it from a checkpoint.

    ``T = horizon``, ``To = n_obs_steps``, ``Ta = n_action_steps``.  A plan's step 0 lies at the
    oldest observation of the window; executed are steps ``To - 1 … To - 2 + Ta``.  ``control_hz`` are
    the demonstrations' steps per second, and so a plan's.
    ``condition_dropout`` is the share of training windows whose observation was blanked: a policy
    with some can be guided (``diffusion.guidance``).  ``network`` is a name in ``NETWORKS``, whose
    builder may read ``network_options``; ``contract`` says what the observation's and the action's
    numbers are.  ``dataclasses.asdict`` and ``from_dict`` take a spec to JSON and back.
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
    network: str = "unet1d"
    network_options: dict[str, Any] = field(default_factory=dict, hash=False)
    contract: Contract = field(default_factory=Contract)

    @property
    def executed(self) -> slice:
        """The plan's steps that a control loop executes."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PolicySpec:
        """The spec that ``dataclasses.asdict`` made these values of, also by way of JSON.  Settings that
        older files lack take their defaults.

        Raises:
            InputError: a setting is unknown, missing or malformed.
        """
        known = [each.name for each in fields(PolicySpec)]
        for name in values:
            if name not in known:
                raise InputError(f"the policy's spec has an unknown setting {name!r}{nearest(name, known)}")
        given = dict(values)
        try:
            if "down_dims" in given:
                given["down_dims"] = tuple(given["down_dims"])
            if "network_options" in given:
                given["network_options"] = dict(given["network_options"])
            if not isinstance(given.get("contract", Contract()), Contract):
                given["contract"] = Contract.from_dict(given["contract"])
            return PolicySpec(**given)
        except (TypeError, ValueError) as error:
            raise InputError(f"the policy's spec is malformed ({error})")


@dataclass(frozen=True)
class Noise:
    """Everything random about a solution.

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


@dataclass(frozen=True, repr=False)
class Solution:
    """One sample per batch element, and how a driver came to it from the noise.

    Attributes:
        sample: ``[batch, T, A]``, node N of the tableau: the sample.
        x0_hats: ``[N, batch, T, A]``, the denoiser's output at every node; a warm start needs it.
        noise: x_T and the step noises that give this sample.
        iterations: ``[batch]`` int64, network calls that had to wait for one another.
        nfe: ``[batch]`` int64, network function evaluations: nodes that went through the network.
    """

    sample: Tensor
    x0_hats: Tensor
    noise: Noise
    iterations: Tensor
    nfe: Tensor

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{float(values.double().mean()):g} {name}"
            for name, values in (("iterations", self.iterations), ("NFE", self.nfe))
        )
        return f"Solution(sample {tuple(self.sample.shape)}, {len(self.x0_hats)} nodes, {counts} on average)"

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


@dataclass(frozen=True, repr=False)
class Plan:
    """A batch of action sequences.

    Attributes:
        actions: ``[batch, T, A]`` in the environment's units.
        executed: which of the T steps a control loop executes.
        solution: how they were sampled, in normalised units.
        residual: ``[batch]``, by how much a last iteration changed the executed action that it changed
            most, in the environment's units; None: not measured.
    """

    actions: Tensor
    executed: slice
    solution: Solution
    residual: Tensor | None = None

    def __repr__(self) -> str:
        executed = f"executed {self.executed.start} to {self.executed.stop - 1}"
        return f"Plan(actions {tuple(self.actions.shape)}, {executed}, {self.solution!r})"

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
