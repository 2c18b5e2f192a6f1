"""A policy's whole plan as one program: raw observations and noise in, actions in the robot's units out.

    condition = (observation - middle) * scale
    sample    = the sampler's, from the noise (and, warm, from the last plan's state)
    actions   = middle + sample / scale

A warm start's state is explicit: every output ``next_NAME`` is the next plan's input ``last_NAME``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration import is_auto
from ..data.normalizer import Normalizer
from ..errors import InputError, require_count
from ..models.matmul_unet1d import MakeConvolution, Taps
from ..policy import Policy
from ..sampling.capture.executor import sampling_program
from ..sampling.capture.network import DELAY, PIXELS, DenoiserNetwork
from ..sampling.capture.program import Program
from ..sampling.driver import IterativeDriver, State, evaluate_active, evaluate_all
from ..sampling.warm_start import cold_start, renoised_start, warm_start, warm_start_same_noise

LAST, NEXT = "last_", "next_"
"""Begin the names of a plan's state, in and out."""

KEPT: dict[Any, tuple[str, ...]] = {
    cold_start: (),
    warm_start: ("x0_hats",),
    renoised_start: ("sample",),
    warm_start_same_noise: ("x0_hats", "x_T", "z"),
}
"""What a start reads of the last plan."""


def state_names(policy: Policy) -> tuple[str, ...]:
    """The parts of a plan that the next one continues; empty: every plan is made from noise alone.

    Raises:
        InputError: the sampler can't be exported.
    """
    sampler = policy.sampler
    remedy = "choose another sampler, as rti, renoised, student or ddim"
    if policy.spec.relative:
        raise InputError(
            "a policy of relative actions doesn't export, since a model in float32 would round them: run it "
            "with paradiffpolicy, or serve it"
        )
    if policy.device.type != "cpu":
        raise InputError("a policy is exported from the CPU: load it with device=cpu")
    if is_auto(sampler):
        raise InputError("window=auto is measured where plans are made: export with a number, as window=20")
    if not isinstance(sampler.driver, IterativeDriver):
        raise InputError(f"driver {sampler.driver!r:.80} isn't an IterativeDriver, which exports: {remedy}")
    if getattr(sampler.driver, "evaluate", evaluate_all) not in (evaluate_all, evaluate_active):
        raise InputError(f"only evaluate=all or active exports: set it, or {remedy}")
    if sampler.start not in KEPT:
        raise InputError(f"a start of one's own doesn't export: start=cold, warm or renoised, or {remedy}")
    return tuple(name for name in KEPT[sampler.start] if name != "z" or sampler.tableau.stochastic)


def plan_program(
    policy: Policy, *, warm: bool, batch: int = 1, make_convolution: MakeConvolution | None = Taps
) -> Program:
    """The plan as pure functions, in float32.

    Inputs are ``observation`` ``[batch, To, O]``, with cameras ``pixels`` as a ``Window`` has them, the noise
    ``x_T`` ``[batch, T, A]``, of a stochastic solver ``z`` ``[N, batch, T, A]`` and of a speculative driver
    ``u`` ``[N, batch]``; warm, ``executed`` ``[1]`` int64, how many steps of the last plan have been executed
    (0 to T), and its state.  Outputs are ``actions`` ``[batch, T, A]`` and the state.

    Args:
        make_convolution: the form of convolutions; None: the network's own.

    Raises:
        InputError: the sampler can't be exported, or values are too far from zero for float32.
    """
    require_count(batch=batch)
    spec, sampler, driver = policy.spec, policy.sampler, policy.sampler.driver
    kept, tableau = state_names(policy), sampler.tableau
    if getattr(driver, "evaluate", None) is evaluate_active:
        driver = replace(driver, evaluate=evaluate_all)  # type: ignore[type-var]
    x_T = torch.zeros(batch, spec.horizon, spec.action_dim)
    z = torch.zeros(tableau.n_nodes, *x_T.shape)
    seen = policy.middle_window(batch)
    inputs = {"observation": seen.numbers.float(), "x_T": x_T}
    inputs |= {} if seen.pixels is None else {PIXELS: seen.pixels.clone()}
    inputs |= {"z": z} if tableau.stochastic else {}
    inputs |= {"u": z[:, :, 0, 0].clone()} if getattr(driver, "decides_noise", False) else {}
    if warm:
        examples = {"x0_hats": z, "sample": x_T, "x_T": x_T, "z": z}
        inputs["executed"] = torch.tensor([spec.n_action_steps])
        inputs |= {LAST + name: examples[name].clone() for name in kept}

    assert isinstance(driver, IterativeDriver)
    trunk = policy.model.trunk(
        "f32", policy.device, make_convolution=make_convolution, arithmetic_in_half=True
    )
    network = DenoiserNetwork(policy.denoiser, tableau, torch.zeros(()), trunk, policy.model.encode)
    same = unchanging(policy, batch)
    observed = Affine(policy.observation_normalizer, "the observation's number")
    acted = Affine(policy.action_normalizer, "the action's number")

    def sampled(inputs: State) -> State:
        """The inputs of sampling itself."""
        values: State = {name: inputs[name] for name in ("x_T", "z", "u", PIXELS) if name in inputs}
        if "executed" in inputs:
            values |= continued(inputs, tableau.n_nodes)
        values["condition"] = observed.normalize(inputs["observation"]).flatten(1)
        return values | same

    inner = sampling_program(network, driver.on(tableau, x_T, warm), tableau, {})

    def finish(inputs: State, state: State) -> State:
        given = sampled(inputs)
        solution = {**given, **inner.finish(given, state)}
        actions = acted.unnormalize(solution["sample"])
        # + 0: an output of its own, also where it is an input.
        return {"actions": actions, **{NEXT + name: solution[name] + 0 for name in kept}}

    return replace(inner, init=lambda inputs: inner.init(sampled(inputs)), finish=finish, inputs=inputs)


def unchanging(policy: Policy, batch: int) -> State:
    """The inputs of sampling that all plans share: guidance's scale, and that there is no delay."""
    spec, same = policy.spec, State()
    if policy.guidance_scale is not None:
        scale = torch.as_tensor(policy.guidance_scale, dtype=torch.float32)
        same["scale"] = scale.expand(batch).clone()
    if spec.prefix_steps:
        same[DELAY] = torch.zeros(batch, spec.n_obs_steps, spec.prefix_steps)
    return same


def continued(inputs: State, n: int) -> State:
    """The first guess of all x0_hats ``[n, batch, T, A]``, and the noise that is moved along with it; as
    ``sampling.warm_start`` makes them, with the number of executed steps as a tensor."""
    horizon = inputs["x_T"].shape[-2]
    steps = torch.arange(horizon) + inputs["executed"]
    index, left = steps.clamp(max=horizon - 1), (steps < horizon)[:, None]
    moved = {
        name.removeprefix(LAST): value.index_select(value.ndim - 2, index)
        for name, value in inputs.items()
        if name.startswith(LAST)
    }
    values: State = {
        name: torch.where(left, moved[name], inputs[name]) for name in ("x_T", "z") if name in moved
    }
    guess = moved["x0_hats"] if "x0_hats" in moved else moved["sample"].expand(n, *moved["sample"].shape)
    return {**values, "guess": guess}


FAR = 2**14
"""Half ranges from zero beyond which float32 can't tell a thousandth of a half range apart."""


class Affine:
    """A normalizer in float32, which is all that some runtimes compute in.  Values far from zero are off by
    no more than twice what rounding them to float32 loses.

    Raises:
        InputError: that is too much; ``what`` names the values.
    """

    def __init__(self, normalizer: Normalizer, what: str) -> None:
        scale, reach = normalizer.scale.cpu(), normalizer.reach.cpu()
        far = (normalizer.offset.cpu().abs() > FAR) & reach.isinf()
        if far.any():
            column = int(far.nonzero()[0])
            raise InputError(
                f"{what} {column} varies little next to how far it is from zero, and exported models compute "
                "in float32: subtract a constant from it in the dataset"
            )
        self.middle, self.scale = normalizer.middle.cpu().float(), scale.float()
        self.width = (1 / scale).float()
        self.reach = None if bool(reach.isinf().all()) else reach.clamp(max=3e38).float()

    def normalize(self, raw: Tensor) -> Tensor:
        return (raw - self.middle) * self.scale

    def unnormalize(self, normalized: Tensor) -> Tensor:
        from_middle = normalized * self.width
        if self.reach is not None:
            from_middle = torch.maximum(torch.minimum(from_middle, self.reach), -self.reach)
        return self.middle + from_middle
