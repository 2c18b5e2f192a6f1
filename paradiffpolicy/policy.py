"""A policy: observation window (and last plan) to plan.  No queue, no clock, no state inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .conditioning import plan_inputs
from .data.normalizer import Normalizer
from .data.relative import ActionFrame, references
from .diffusion.denoiser import (
    Clip,
    Denoiser,
    DynamicThreshold,
    SplitNetwork,
    Threshold,
    check_prediction,
    unbounded,
)
from .diffusion.guidance import check_scale
from .diffusion.prefix import with_delay
from .diffusion.schedule import NoiseSchedule
from .errors import InputError, nearest, require_count
from .models.networks import OWN, network_with, usable_device, usable_network
from .models.precision import FINEST_TOLERANCE, Model
from .observation import Observation, Window, observation_window
from .sampling.capture.backends import CaptureSettings
from .sampling.capture.executor import EagerProgram, Executor
from .sampling.capture.fingerprint import fingerprint
from .sampling.capture.network import DELAY, PIXELS, DenoiserNetwork
from .sampling.capture.program import Backend, CapturedProgram
from .sampling.driver import Driver
from .sampling.noise import Seed, generators_for
from .sampling.picard import no_finer
from .sampling.sampler import Sampler
from .sampling.spec import check_student, spec_sampler, spec_schedule
from .sampling.warm_start import cold_start
from .session import Session
from .types import Committed, Plan, PolicySpec, check_arguments

log = logging.getLogger(__name__)


class InvalidPlanError(InputError):
    """A plan that must not be executed: the network gave NaN or infinity."""


@dataclass(frozen=True, eq=False, repr=False)
class Policy:
    """A trained network with a sampler.

    Immutable: ``with_sampler``, ``with_guidance``, ``captured`` and ``with_network`` return derived policies,
    which share the weights.  Pickled, it is rebuilt from its fields; programs are captured anew.

    Attributes:
        spec: shapes; ``spec.executed`` says which of a plan's steps are for execution.
        model: the network, and its trunk in other forms.
        observation_normalizer, action_normalizer: fitted to the demonstrations.
        sampler: how plans are sampled.
        device: where.
        guidance_scale: of classifier-free guidance, a number or ``[batch]``; None: none.
        dynamic_threshold: a quantile that bounds plans instead of clipping; None: plans are clipped.
        capture: how plans are to be captured; ``programs`` says how they were.
        info: the checkpoint's notes on its origin.
    """

    spec: PolicySpec
    model: Model
    observation_normalizer: Normalizer
    action_normalizer: Normalizer
    sampler: Sampler
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    guidance_scale: float | Tensor | None = None
    dynamic_threshold: float | None = None
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prediction(self.spec.prediction, self.schedule)
        if not isinstance(self.sampler, Sampler):
            raise InputError(f"sampler must be a Sampler, as make_sampler makes it, not {self.sampler!r:.40}")
        check_student(self.spec, self.sampler.tableau)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", **sampler: Any) -> Policy:
        """A policy from a checkpoint folder; ``sampler`` as ``make_sampler`` takes it.

        Raises:
            InputError: the checkpoint, the device or the sampler's settings are unusable.
        """
        checkpoint = Checkpoint.load(folder)
        return cls.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, **sampler), device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, sampler: Sampler, device: torch.device | str = "cpu"
    ) -> Policy:
        """A policy from a checkpoint in memory.

        Raises:
            InputError: the weights don't fit the checkpoint's spec, or the device is unusable.
        """
        where = usable_device(device)
        network = network_with(checkpoint.spec, checkpoint.weights)
        network = usable_network(checkpoint.spec, network.requires_grad_(False), where)
        return cls(
            checkpoint.spec,
            Model(network),
            checkpoint.observation_normalizer.to(where),
            checkpoint.action_normalizer.to(where),
            sampler,
            where,
            info=checkpoint.info,
        )

    @classmethod
    def from_network(
        cls,
        spec: PolicySpec,
        network: nn.Module,
        observation_normalizer: Normalizer,
        action_normalizer: Normalizer,
        device: torch.device | str = "cpu",
        **sampler: Any,
    ) -> Policy:
        """A policy of a network of one's own; ``sampler`` as ``make_sampler`` takes it.

        Args:
            spec: its sizes, schedule and prediction; the U-Net's own settings are ignored.
            network: ``(x [rows, T, A], t [rows], condition [rows, G]) -> [rows, T, A]``, G the flattened
                observation window; moved to the device and put into evaluation mode, not copied.

        Raises:
            InputError: the network can't be called like that, or a setting is unusable.
        """
        where = usable_device(device)
        network = usable_network(spec, network, where)
        normalizers = observation_normalizer.to(where), action_normalizer.to(where)
        return cls(spec, Model(network), *normalizers, spec_sampler(spec, **sampler), where)

    def with_network(self, network: nn.Module) -> Policy:
        """This policy with another network, as ``from_network`` takes it.

        Raises:
            InputError: the network can't be called as a policy's must.
        """
        return self._with(model=Model(usable_network(self.spec, network, self.device)))

    def with_sampler(self, sampler: Sampler) -> Policy:
        """This policy with another sampler."""
        return self._with(sampler=sampler)

    def with_guidance(self, scale: float | Tensor | None, dynamic_threshold: float | None = None) -> Policy:
        """This policy, guided: plans lean towards the observation (Ho and Salimans 2022).

        Args:
            scale: a number or ``[batch]``; 1 is the policy without guidance, more exaggerates; None: no
                guidance.
            dynamic_threshold: a quantile, to bound plans by ``DynamicThreshold`` instead of clipping.

        Raises:
            InputError: the policy was never trained without its observation, or a value is unusable.
        """
        if scale is not None and not self.spec.condition_dropout:
            raise InputError(
                "guidance needs a policy that was trained with condition dropout, and this one wasn't: "
                "train one with policy.condition_dropout=0.1, or leave guidance_scale=null"
            )
        if dynamic_threshold is not None and self.spec.prefix_steps:
            raise InputError(
                f"dynamic_threshold={dynamic_threshold!r:.40} measures all steps of a plan, and this policy "
                f"learnt only some (prefix_steps={self.spec.prefix_steps}): dynamic_threshold=null"
            )
        check_scale(scale)
        return self._with(guidance_scale=scale, dynamic_threshold=dynamic_threshold)

    def captured(self, backend: Any = "auto", *, precision: str = "auto", **settings: Any) -> Policy:
        """This policy with plans that are one call of a captured program each: faster, and the same to
        rounding.  A program is captured at the first plan of its shapes, or by ``warm_up``.

        Args:
            backend: ``auto``, ``cuda_graph``, ``openvino``, ``emulated``, ``eager``, or one's own.
            precision: ``f32``, ``bf16``, ``f16``, or ``int8`` weights; ``auto``: bf16 where the hardware
                multiplies it, f16 on other GPUs, else f32, as for networks without a trunk.
            settings: see ``CaptureSettings``; ``cache=default_cache()`` keeps compiled programs for the
                next start.

        Raises:
            InputError: a setting is unknown, or can't be had on this device or with this sampler.
        """
        known = [each.name for each in fields(CaptureSettings)]
        for name in settings:
            if name not in known:
                raise InputError(f"capture has no setting {name!r}{nearest(name, known)}")
        chosen = CaptureSettings(backend, precision, **settings)
        if precision == "auto" and not isinstance(self.network, SplitNetwork):
            chosen = replace(chosen, precision="f32")
        return self._with(capture=chosen.resolved(self.device))

    def _with(self, **changes: Any) -> Policy:
        derived = replace(self, **changes)
        derived.executor  # noqa: B018  raises here what can't be run
        return derived

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        network: Any = self.network
        whole: Any = self.model.whole
        millions = sum(weight.numel() for weight in whole.parameters()) / 1e6
        backend = self.capture.backend
        return (
            f"Policy({self.spec.task}, {type(network).__name__} of {millions:.1f} M weights, {self.device}, "
            f"capture={backend if isinstance(backend, str) else 'own'}, {self.capture.precision}, "
            f"{self.sampler!r})"
        )

    @property
    def network(self) -> Any:
        """The network."""
        return self.model.network

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return spec_schedule(self.spec)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The network as ``x0_hat = D(x_t, t, condition)``."""
        threshold: Threshold = unbounded if self.spec.clip is None else Clip(self.spec.clip)
        if self.dynamic_threshold is not None:
            threshold = DynamicThreshold(self.dynamic_threshold)
        keeps = self.sampler.keeps_epsilon
        return Denoiser(self.network, self.schedule, self.spec.prediction, threshold, keeps)

    @cached_property
    def driver(self) -> Driver:
        """The sampler's driver; its tolerance is one that the precision can reach."""
        finest = FINEST_TOLERANCE.get(self.capture.precision, 0.0)
        driver = no_finer(self.sampler.driver, finest)
        if driver is not self.sampler.driver:
            log.info("sampling: tolerance=%g, since %s rounds", finest, self.capture.precision)
        return driver

    @cached_property
    def executor(self) -> Executor:
        """Runs the sampler on the network."""
        precision, tableau = self.capture.precision, self.sampler.tableau
        self.model.check(precision)

        def network(backend: Backend) -> DenoiserNetwork:
            trunk = self.model.trunk(
                precision,
                self.device,
                make_convolution=backend.make_convolution,
                arithmetic_in_half=backend.arithmetic_in_half,
            )
            like = torch.zeros((), device=self.device)
            return DenoiserNetwork(self.denoiser, tableau, like, trunk, self.model.encode)

        def identity() -> str:
            bounds = self.denoiser.threshold, self.denoiser.keeps_epsilon
            return fingerprint(self.model.digest, repr(self.network), self.spec, bounds, precision)

        return Executor(
            self.driver,
            tableau,
            network,
            self.capture.backends(self.device),
            # Another's code may change under the same weights.
            identity=identity if isinstance(self.network, OWN) else None,
            warm=self.sampler.start is not cold_start,
            budget=self.capture.budget,
        )

    @property
    def programs(self) -> list[CapturedProgram | EagerProgram]:
        """How plans have been run: ``method`` (``eager`` after a fallback), and ``nbytes`` that are kept."""
        return self.executor.programs

    def release(self) -> None:
        """Drops the captured programs, with the memory that they keep; the next plan captures anew."""
        self.executor.release()

    def warm_up(self, batch: int = 1, *, committed: bool = False) -> Policy:
        """Makes everything that the first plans of a batch need; this policy.

        Args:
            committed: for plans with something ``committed``.
        """
        require_count(batch=batch)
        window = self.middle_window(batch)
        kept = None
        if committed:
            actions = torch.zeros(batch, self.spec.horizon, self.spec.action_dim, device=self.device)
            kept = Committed(self.action_normalizer.unnormalize(actions), torch.zeros_like(actions[..., 0]))
        first = self.plan(window, generator=0, committed=kept)
        self.plan(window, first, generator=0, committed=kept)
        return self

    def middle_window(self, batch: int = 1) -> Window:
        """The middle of the training observations, with black pictures: to try things with."""
        spec = self.spec
        window = torch.zeros(batch, spec.n_obs_steps, spec.obs_dim, device=self.device)
        pixels = spec.observation_dtype.itemsize - 8 * spec.obs_dim
        black = window.new_zeros((batch, spec.n_obs_steps, pixels), dtype=torch.uint8) if pixels else None
        return Window(self.observation_normalizer.unnormalize(window), black)

    @torch.inference_mode()
    def plan(
        self,
        observation: Observation | Window,
        previous: Plan | None = None,
        *,
        generator: Seed | Sequence[Seed] = 0,
        executed_steps: int | None = None,
        committed: Committed | None = None,
    ) -> Plan:
        """Samples an action sequence per batch element.

        Args:
            observation: ``[O]``, ``[To, O]`` or ``[batch, To, O]``, oldest first, in raw units, or a dict by
                field and camera name; see ``observation_window``.
            previous: the last plan, for samplers with a warm start.
            generator: seeds or generators of the noise, one per batch element; or one seed for all.
            executed_steps: how many steps of ``previous`` have been executed since; Ta by default.
            committed: actions that the plan is to keep (``diffusion.guidance.committed``).  To a policy that
                was trained with delays, the first of them, up to ``spec.prefix_steps`` executed ones, are
                given as well (``diffusion.prefix``).

        Returns:
            The plan; ``plan.executed_actions`` ``[batch, Ta, A]`` are for execution.

        Raises:
            InvalidObservationError: the window has the wrong shape, or NaN or infinity in it.
            InvalidPlanError: the plan has.
            InputError: the number of generators, ``previous`` or ``committed`` doesn't fit the batch, or
                ``executed_steps`` isn't a whole number from 0 to T.
        """
        spec = self.spec
        window = self.checked(observation)
        generators = generators_for(generator, len(window), "observation windows")
        executed = check_arguments(spec, len(window), previous, executed_steps, committed)
        inputs, frame = self._inputs(window, committed), self.action_frame(window)
        noise, guess = self.sampler.start(
            self.sampler.tableau,
            (spec.horizon, spec.action_dim),
            frame.continued(previous),
            executed,
            generators,
        )
        solution = self.executor.run(inputs, noise.to(self.device), guess)
        actions = frame.unnormalize(solution.sample)
        if not actions.isfinite().all():
            raise InvalidPlanError("the plan has NaN or infinity: weights or observation are far off")
        return Plan(actions, spec.executed, solution, reference=frame.reference)

    def action_frame(self, window: Window) -> ActionFrame:
        """How the actions of plans for checked windows are made of the network's numbers."""
        newest, spec = window.numbers[:, -1], self.spec
        reference = references(newest, spec.relative, spec.action_dim) if spec.relative else None
        return ActionFrame(self.action_normalizer, reference)

    def _inputs(self, window: Window, committed: Committed | None) -> dict[str, Tensor]:
        """The network's inputs."""
        kept = None
        if committed is not None:
            actions = self.action_frame(window).normalize(committed.actions.to(self.device))
            kept = actions, committed.weight.to(self.device, torch.float32)
        return plan_inputs(self.spec, self.observation_normalizer, window, self.guidance_scale, kept)

    @torch.inference_mode()
    def condition(self, observation: Observation | Window) -> Tensor:
        """What conditions the network, ``[batch, G]``: normalized numbers, pictures encoded, and no delay;
        raises as ``plan`` does."""
        inputs, encode = self._inputs(self.checked(observation), None), self.model.encode
        condition = inputs["condition"]
        condition = condition if encode is None else encode(condition, inputs[PIXELS])
        return with_delay(condition, inputs[DELAY]) if DELAY in inputs else condition

    def session(self, seed: int = 0) -> Session:
        """A session for a control loop of the caller's own: keeps history, last plan and noise."""
        return Session(self, seed)

    def checked(self, observation: Observation | Window) -> Window:
        """Observation windows, ready to plan from, on the policy's device; see ``observation_window``."""
        if isinstance(observation, Window):
            return observation.to(self.device)
        return observation_window(self.spec, observation).to(self.device)
