"""A policy: observation window (and last plan) to plan.  No queue, no clock, no state inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike
from torch import Tensor

from .checkpoint import Checkpoint
from .diffusion.denoiser import Clip, Denoiser, DynamicThreshold, unbounded
from .diffusion.guidance import classifier_free, committed
from .diffusion.schedule import NoiseSchedule
from .errors import InputError
from .models.precision import TrunkForms
from .models.unet1d import ConditionalUnet1D
from .sampling.capture.backends import CaptureSettings, with_fallback
from .sampling.capture.fingerprint import fingerprint
from .sampling.capture.network import COMMITTED, DenoiserNetwork
from .sampling.capture.program import CapturedProgram, CaptureError
from .sampling.capture.sampler import EAGER, CapturedSampler, capture
from .sampling.driver import State, evaluate_active
from .sampling.reference import RK45
from .sampling.sampler import Sampler, make_sampler
from .types import Committed, Noise, Plan, PolicySpec, Solution

log = logging.getLogger(__name__)

WINDOWED_BATCH = 4
"""The largest batch whose windows ``capture=auto`` captures on a CPU."""


class InvalidObservationError(InputError):
    """An observation that no plan should be made from: wrong shape, NaN or infinity."""


class InvalidPlanError(InputError):
    """A plan that nobody should execute: the network gave NaN or infinity."""


def build_network(spec: PolicySpec) -> ConditionalUnet1D:
    """The network that a spec describes, with fresh weights.

    Raises:
        InputError: the spec's sizes don't fit together.
    """
    try:
        network = ConditionalUnet1D(
            input_dim=spec.action_dim,
            global_cond_dim=spec.n_obs_steps * spec.obs_dim,
            diffusion_step_embed_dim=spec.diffusion_step_embed_dim,
            down_dims=spec.down_dims,
            kernel_size=spec.kernel_size,
            n_groups=spec.n_groups,
            cond_predict_scale=spec.cond_predict_scale,
        )
    except ValueError as error:
        raise InputError(str(error))
    if spec.horizon % network.horizon_multiple:
        raise InputError(
            f"horizon={spec.horizon} must be a multiple of {network.horizon_multiple}, since "
            f"{len(spec.down_dims)} levels halve it {len(spec.down_dims) - 1} times"
        )
    if not 0 <= spec.condition_dropout < 1:
        raise InputError(f"condition_dropout={spec.condition_dropout} must be at least 0 and under 1")
    if spec.executed.stop > spec.horizon:
        raise InputError(
            f"n_obs_steps={spec.n_obs_steps} - 1 + n_action_steps={spec.n_action_steps} must not be over "
            f"horizon={spec.horizon}"
        )
    return network


def spec_schedule(spec: PolicySpec) -> NoiseSchedule:
    """The noise schedule that a spec describes."""
    return NoiseSchedule.named(spec.schedule, spec.n_train_steps, spec.beta_start, spec.beta_end)


def spec_sampler(spec: PolicySpec, **settings: Any) -> Sampler:
    """A sampler for the policies that a spec describes; ``settings`` as ``make_sampler`` takes them.

    Raises:
        InputError: a setting is unusable.
    """
    return make_sampler(spec_schedule(spec), executed=spec.executed, **settings)


def check_task(spec: PolicySpec, task: str, obs_dim: int, action_dim: int, control_hz: float) -> None:
    """Raises ``InputError`` unless the policy was trained for this task, these shapes and this rate."""
    if spec.task != task:
        raise InputError(
            f"the checkpoint is for task {spec.task!r}, not {task!r}: name another checkpoint or task"
        )
    if (spec.obs_dim, spec.action_dim) != (obs_dim, action_dim):
        raise InputError(
            f"the checkpoint has obs_dim={spec.obs_dim}, action_dim={spec.action_dim}, but task {task!r} has "
            f"{obs_dim}, {action_dim}"
        )
    if spec.control_hz != control_hz:
        raise InputError(
            f"the checkpoint is for {spec.control_hz:g} actions per second, but task {task!r} has "
            f"control_hz={control_hz:g}"
        )


Walker = Callable[[State, Noise, Tensor | None], Solution]
"""``(inputs, noise, guess)`` to the walk; see ``CapturedSampler.run``."""


class Policy:
    """A trained network with a sampler.

    Attributes:
        spec: shapes; ``spec.executed`` says which of a plan's steps are for execution.
        sampler: how plans are sampled; ``with_sampler`` gives the same policy another.
        guidance_scale: of classifier-free guidance; None: none.  ``with_guidance`` sets it.
        capture: how plans are captured; ``captured`` sets it.
        info: what the checkpoint says about its origin.
    """

    def __init__(self, checkpoint: Checkpoint, sampler: Sampler, device: torch.device | str = "cpu") -> None:
        """Builds the policy.

        Raises:
            InputError: the weights don't fit the checkpoint's spec.
        """
        self.spec, self.info, self.sampler = checkpoint.spec, checkpoint.info, sampler
        self.guidance_scale: float | Tensor | None = None
        self.device = torch.device(device)
        self.schedule = spec_schedule(self.spec)
        network = build_network(self.spec)
        try:
            network.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise InputError(f"the checkpoint's weights don't fit its spec ({reason}): train it again")
        self.denoiser = Denoiser(
            network.to(self.device).eval().requires_grad_(False),
            self.schedule,
            self.spec.prediction,
            unbounded if self.spec.clip is None else Clip(self.spec.clip),
        )
        self.observation_normalizer = checkpoint.observation_normalizer.to(self.device)
        self.action_normalizer = checkpoint.action_normalizer.to(self.device)
        self.capture = CaptureSettings()
        self._make()

    def _make(self) -> None:
        """What the rest of it implies."""
        network: Any = self.denoiser.network
        self._forms = TrunkForms(network, self.capture.precision, self.device)
        # Asked for by compiled programs' names alone, and the same for every sampler.
        self._weights_hash = cache(lambda: fingerprint(sorted(network.state_dict().items())))
        self._solve = self._walker()

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu", **sampler: Any) -> Policy:
        """A policy from a checkpoint folder; ``sampler`` as ``make_sampler`` takes it.

        Raises:
            InputError: the checkpoint or the sampler's settings are unusable.
        """
        checkpoint = Checkpoint.load(folder)
        return Policy(checkpoint, spec_sampler(checkpoint.spec, **sampler), device)

    def with_sampler(self, sampler: Sampler) -> Policy:
        """This policy (the same weights in memory) with another sampler."""
        return self._with(sampler=sampler)

    def captured(self, backend: str = "auto", *, precision: str = "f32", **settings: Any) -> Policy:
        """This policy with plans that are one call of a frozen program each: faster, and the same to
        rounding.  A program is made at the first plan of its shapes, or by ``warm_up``.

        Args:
            backend: ``auto``, ``cuda_graph``, ``openvino``, ``emulated`` or ``eager``.
            precision: ``f32``, ``bf16``, ``f16``, or ``int8`` weights.
            settings: see ``CaptureSettings``; ``cache=default_cache()`` keeps compiled programs for the
                next start.

        Raises:
            InputError: a setting is unknown, or can't be had on this device or with this sampler.
        """
        chosen = CaptureSettings(backend, precision, **settings)
        forms = TrunkForms(self.denoiser.network, precision, self.device)
        return self._with(capture=chosen, _forms=forms)

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> Policy:
        """Makes what the first plans of a batch need; this policy.

        Args:
            committed: for plans with something ``committed``.
        """
        window = self.middle_window(batch)
        generators = [torch.Generator().manual_seed(0) for _ in range(batch)]
        kept = None
        if committed:
            actions = torch.zeros(batch, self.spec.horizon, self.spec.action_dim, device=self.device)
            kept = Committed(self.action_normalizer.unnormalize(actions), torch.zeros_like(actions[..., 0]))
        first = self.plan(window, generator=generators, committed=kept)
        self.plan(window, first, generator=generators, committed=kept)
        return self

    def middle_window(self, batch: int = 1) -> Tensor:
        """``[batch, To, O]``, the middle of what was observed in training: to try things with."""
        window = torch.zeros(batch, self.spec.n_obs_steps, self.spec.obs_dim, device=self.device)
        return self.observation_normalizer.unnormalize(window)

    @property
    def programs(self) -> list[CapturedProgram]:
        """What has been captured: how (``rung``), and the memory that it keeps (``nbytes``)."""
        return [] if self._captured is None else self._captured.programs

    def with_guidance(self, scale: float | Tensor | None, dynamic_threshold: float | None = None) -> Policy:
        """This policy, guided: plans lean towards what the observation says (Ho and Salimans 2022).

        Args:
            scale: a number or ``[batch]``; 1 is the policy as it is, more exaggerates; None: no
                guidance.
            dynamic_threshold: a quantile, to bound plans by ``DynamicThreshold`` instead of clipping.

        Raises:
            InputError: the policy was never trained without its observation.
        """
        if scale is not None and not self.spec.condition_dropout:
            raise InputError(
                "guidance needs a policy that was trained with condition dropout, and this one wasn't: "
                "train one with policy.condition_dropout=0.1, or leave guidance_scale=null"
            )
        denoiser = self.denoiser
        if dynamic_threshold is not None:
            denoiser = replace(denoiser, threshold=DynamicThreshold(dynamic_threshold))
        return self._with(guidance_scale=scale, denoiser=denoiser)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without programs, which are made anew there."""
        made = ("_solve", "_captured", "_forms", "_weights_hash")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._make()

    def _with(self, **changes: Any) -> Policy:
        policy = object.__new__(Policy)
        policy.__dict__ = {**self.__dict__, **changes}
        policy._solve = policy._walker()
        return policy

    def _walker(self) -> Walker:
        """What walks the sampler's table, captured or not."""
        sampler, settings = self.sampler, self.capture
        self._captured: CapturedSampler | None = None
        try:
            if isinstance(sampler.driver, RK45) and settings.backend == "eager":
                return self._solve_freely
            backend = with_fallback(settings.backends(self.device))
            trunk = self._forms.trunk(matmul=backend.matmul, arithmetic_in_half=backend.arithmetic_in_half)
            network = DenoiserNetwork(self.denoiser, sampler.tableau, self.device, trunk)
            self._captured = capture(
                sampler.driver,
                sampler.tableau,
                network,
                backend,
                identity=lambda: fingerprint(
                    self._weights_hash(), self.spec, self.denoiser.threshold, settings.precision
                ),
                budget=settings.budget,
            )
            if settings.backend == "auto" and self.device.type == "cpu":
                return self._auto_walker(self._captured.run)
            return self._captured.run
        except CaptureError as error:
            if settings.backend != "auto":
                raise
            log.warning("capture: %s; not captured", error)
            return self._with(capture=CaptureSettings())._solve

    def _auto_walker(self, captured: Walker) -> Walker:
        """Captured, but for batches whose windows are at different places: there a CPU gains more from
        calling the network on active rows alone, which no capture can."""
        sampler = self.sampler
        if getattr(sampler.driver, "evaluate", None) is not evaluate_active:
            return captured
        trunk = self._forms.trunk(matmul=False, arithmetic_in_half=False)
        network = DenoiserNetwork(self.denoiser, sampler.tableau, self.device, trunk)
        eager = capture(sampler.driver, sampler.tableau, network, EAGER).run

        def solve(inputs: State, noise: Noise, guess: Tensor | None) -> Solution:
            return (captured if len(noise.x_T) <= WINDOWED_BATCH else eager)(inputs, noise, guess)

        return solve

    def _solve_freely(self, inputs: State, noise: Noise, guess: Tensor | None) -> Solution:
        """For the driver that chooses its own timesteps."""
        denoise, condition = self.denoiser.bind(inputs["condition"]), inputs["condition"]
        if "scale" in inputs:
            denoise = classifier_free(self.denoiser, condition, torch.zeros_like(condition), inputs["scale"])
        if "committed" in inputs:
            denoise = committed(denoise, *(inputs[name] for name in COMMITTED))
        return self.sampler.driver(denoise, self.sampler.tableau, noise, guess)

    @torch.inference_mode()
    def plan(
        self,
        observation_window: ArrayLike | Tensor,
        previous: Plan | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan:
        """Samples an action sequence per batch element.

        Args:
            observation_window: ``[To, O]`` or ``[batch, To, O]``, oldest first, raw units.
            previous: the last plan, if the sampler is to continue it.
            generator: source of the noise; one per batch element, or one for a batch of one.
            executed_steps: how many steps of ``previous`` have been executed since; Ta by default.
            committed: actions that the plan is to keep (``diffusion.guidance.committed``).

        Returns:
            The plan; ``plan.executed_actions`` ``[batch, Ta, A]`` are for execution.

        Raises:
            InvalidObservationError: the window has the wrong shape, or NaN or infinity in it.
            InvalidPlanError: the plan has.
            InputError: the number of generators, ``previous`` or ``committed`` doesn't fit the batch.
        """
        spec = self.spec
        window = self.checked(observation_window)
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(window):
            raise InputError(
                f"{len(window)} observation windows need as many generators, got {len(generators)}"
            )
        if previous is not None and previous.actions.shape[0] != len(window):
            raise InputError(f"{len(window)} observation windows, but {len(previous.actions)} previous plans")
        condition = rearrange(self.observation_normalizer.normalize(window), "b t o -> b (t o)")
        inputs = {"condition": condition}
        if self.guidance_scale is not None:
            scale = torch.as_tensor(self.guidance_scale, dtype=condition.dtype, device=self.device)
            inputs["scale"] = scale.expand(len(condition))
        if committed is not None:
            inputs |= dict(zip(COMMITTED, self._normalized(committed, len(window)), strict=True))
        noise, guess = self.sampler.start(
            self.sampler.tableau,
            (spec.horizon, spec.action_dim),
            None if previous is None else previous.solution,
            spec.n_action_steps if executed_steps is None else executed_steps,
            generators,
        )
        solution = self._solve(inputs, noise.to(self.device), guess)
        actions = self.action_normalizer.unnormalize(solution.sample)
        if not actions.isfinite().all():
            raise InvalidPlanError(
                "the plan has NaN or infinity: the weights, or the observation, are far off"
            )
        return Plan(actions, spec.executed, solution)

    def _normalized(self, committed: Committed, batch: int) -> tuple[Tensor, Tensor]:
        actions = committed.actions.to(self.device, torch.float32)
        weight = committed.weight.to(self.device, torch.float32)
        wanted = (batch, self.spec.horizon, self.spec.action_dim)
        if tuple(actions.shape) != wanted or tuple(weight.shape) != wanted[:2]:
            raise InputError(
                f"committed actions {tuple(actions.shape)} and their weight {tuple(weight.shape)} must be "
                f"[batch, horizon, action_dim] = {wanted} and [batch, horizon] = {wanted[:2]}"
            )
        if not actions.isfinite().all() or not ((weight >= 0) & (weight <= 1)).all():
            raise InputError("committed actions must be finite, and their weight from 0 to 1")
        return self.action_normalizer.normalize(actions), weight

    def checked(self, observation_window: ArrayLike | Tensor) -> Tensor:
        """A window as plans are made from it: float32 ``[batch, To, O]`` on the policy's device.

        Raises:
            InvalidObservationError: it has the wrong shape, or NaN or infinity in it.
        """
        if not isinstance(observation_window, Tensor):
            observation_window = torch.from_numpy(np.asarray(observation_window, dtype=np.float32))
        window = observation_window.to(self.device, torch.float32)
        if window.ndim == 2:
            window = window[None]
        wanted = (self.spec.n_obs_steps, self.spec.obs_dim)
        if window.ndim != 3 or tuple(window.shape[1:]) != wanted:
            raise InvalidObservationError(
                f"observation window {tuple(window.shape)} must be [batch, n_obs_steps={wanted[0]}, "
                f"obs_dim={wanted[1]}] for task {self.spec.task!r}"
            )
        if not window.isfinite().all():
            b, step, column = (int(i[0]) for i in torch.where(~window.isfinite()))
            raise InvalidObservationError(
                f"observation window {b} has NaN or infinity at step {step}, column {column}: "
                "check the sensor"
            )
        return window
