"""Distillation: a student learns to give a teacher's plan in one network call.

The teacher solves its probability flow (DDIM) from noise: a plan, and on the way there an x_t at every node
of the table.  The student learns to jump from each of those to the plan, as a consistency model does (Song
et al. 2023; for policies, Prasad et al. 2024), but from solved trajectories: its targets are the
teacher's plans themselves, not its own guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ..data.dataset import WindowDataset
from ..diffusion.denoiser import Denoiser, unbounded
from ..errors import InputError
from ..policy import Policy
from ..sampling.capture.network import PIXELS
from ..sampling.driver import Linear
from ..sampling.sampler import Sampler
from ..sampling.sequential import Sequential
from ..sampling.solvers import solver_tableau
from ..sampling.spec import spec_schedule
from ..sampling.warm_start import moved_along
from ..types import Batched, Noise, PolicySpec
from .objective import WHOLE, Part, seeded
from .settings import TrainSettings

POOL = 8
"""Batches of teacher plans that are sampled at a time, and then trained on."""
FIRST_POOL = 2**31
"""Where their noise begins, apart from the steps' own."""


def teacher_sampler(spec: PolicySpec, nodes: int) -> Sampler:
    """What a teacher's plans are sampled with: DDIM with ``nodes`` steps; renoised plans in half of them.

    Raises:
        InputError: the schedule hasn't so many timesteps, or ``nodes`` isn't even.
    """
    if nodes % 2:
        raise InputError(f"nodes={nodes} must be even: a renoised plan goes through half of them")
    tableau = solver_tableau(spec_schedule(spec), "ddim", nodes, "trailing")
    return Sampler(tableau, Sequential(nodes // 2))


def student_spec(teacher: PolicySpec, nodes: int) -> PolicySpec:
    """The teacher's spec with what a student is: it knows the teacher's nodes, and predicts v, which is the
    identity where there is no noise, and the plan where there is nothing else.

    Raises:
        InputError: the teacher was trained with delays, which a student doesn't learn.
    """
    if teacher.prefix_steps:
        raise InputError(
            f"the teacher was trained with prefix_steps={teacher.prefix_steps}, and a student doesn't learn "
            "to continue committed actions: name a teacher with prefix_steps=0"
        )
    timesteps = teacher_sampler(teacher, nodes).tableau.timesteps
    return replace(teacher, prediction="v", student_timesteps=tuple(timesteps.tolist()))


@dataclass(frozen=True, eq=False)
class Trajectories(Batched):
    """A batch of teacher plans, with the nodes on the way to them.

    Attributes:
        x: ``[N, batch, T, A]``, the inputs of the nodes.
        first: ``[batch]`` int64, the node that a plan began at; those before mean nothing.
        condition: ``[batch, G]``.
        plan: ``[batch, T, A]``.
    """

    after_nodes: ClassVar = ("x",)

    x: Tensor
    first: Tensor
    condition: Tensor
    plan: Tensor


class Distillation:
    """The squared error of a student's plans to its teacher's, from the nodes on the way to them.

    Half of a batch begins where plans are asked for: at pure noise, or at the last plan, noised to the
    middle node.  The other half begins anywhere.

    Args:
        data: normalised windows; their actions aren't used.
        spec: the student's.
        settings: of the run.
        teacher: with the sampler of ``teacher_sampler``; captured, if that is faster.
    """

    def __init__(
        self, data: WindowDataset, spec: PolicySpec, settings: TrainSettings, *, teacher: Policy
    ) -> None:
        self.data, self.settings, self.teacher = data, settings, teacher
        self.tableau, self.executed = teacher.sampler.tableau, spec.n_action_steps
        self.student = Denoiser(nn.Identity(), spec_schedule(spec), spec.prediction, unbounded)
        self._pool: tuple[int, Trajectories] | None = None

    def __call__(self, network: nn.Module, step: int, bfloat16: bool, part: Part = WHOLE) -> Tensor:
        pool, generator, n = self._pool_at(step), seeded(self.settings, step), self.tableau.n_nodes
        device, count = pool.plan.device, min(self.settings.batch_size, len(pool.plan))
        drawn = part.rows(torch.randint(len(pool.plan), (count,), generator=generator)).to(device)
        way = part.rows((2 * torch.rand(count, generator=generator) - 1).clamp(min=0)).to(device)
        first = pool.first[drawn]
        node = first + (way * (n - first)).long()
        x, condition, plan = pool.x[node, drawn], pool.condition[drawn], pool.plan[drawn]
        t = self.tableau.timesteps.to(x)[node]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = (replace(self.student, network=network).raw(x, t, condition) - plan).square().mean()
        return part.share(loss, count)

    def _pool_at(self, step: int) -> Trajectories:
        """The plans for a step: every node of them is drawn about once."""
        n = self.tableau.n_nodes
        index = step // (POOL * (n + n // 2))
        if self._pool is None or self._pool[0] != index:
            self._pool = None  # before its memory is needed again
            batches = [self.solved(index * POOL + k) for k in range(POOL)]
            self._pool = index, Trajectories.cat([each for both in batches for each in both])
        return self._pool[1]

    def solved(self, index: int) -> tuple[Trajectories, Trajectories]:
        """Teacher plans from pure noise for a batch of windows, and such as go on from them, where the plan
        will have been executed, or for the same window at an episode's start."""
        data, device = self.data, self.data.observations.device
        windows = data.drawn(self.settings.batch_size, index, self.settings.seed).to(device)
        before = (windows - self.executed).clamp(min=0)
        # Windows of one episode overlap.
        follows = (data.steps[before, -1] >= data.steps[windows, 0]) & (before < windows)
        before = torch.where(follows, before, windows)
        shape, n = (len(windows), *self.data.batch(windows[:1])[1].shape[1:]), self.tableau.n_nodes
        generator = seeded(self.settings, FIRST_POOL + index)
        noise = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
        cold = self._solved(before, Noise.of_flow(noise[0], n), None)
        moved = torch.where(follows[:, None, None], moved_along(cold.plan, self.executed), cold.plan)
        references = data.reference(before), data.reference(windows)
        if references[0] is not None and references[1] is not None:  # 0 apart for the same window
            moved = moved + (references[0] - references[1])[:, None].to(moved)
        return cold, self._solved(windows, Noise.of_flow(noise[1], n), moved.expand(n, *moved.shape))

    def _solved(self, windows: Tensor, noise: Noise, guess: Tensor | None) -> Trajectories:
        condition = rearrange(self.data.batch(windows)[0], "b t o -> b (t o)")
        inputs, pixels = {"condition": condition}, self.data.pictures(windows)
        encode = self.teacher.model.encode
        if encode is not None and pixels is not None:  # the student keeps its teacher's encoder
            inputs[PIXELS] = pixels.to(condition.device)
            with torch.no_grad():
                condition = encode(condition, inputs[PIXELS])
        solution = self.teacher.executor.run(inputs, noise, guess)
        linear = Linear(self.tableau, noise.x_T)
        x = linear.all_nodes(linear.drift(noise), solution.x0_hats)
        first = linear.n - solution.iterations
        return Trajectories(x, first, condition, solution.sample)
