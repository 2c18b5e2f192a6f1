"""Every network by name.

A network of your own is a ``torch.nn.Module`` that is called as ``network(x [rows, T, A], t [rows],
condition [rows, G])`` and gives ``[rows, T, A]``, with G the flattened observation window (and, with
cameras, the features of their pictures: ``spec.condition_dim``).  Register
what builds it, in a module that every process imports (``plugins``):

    NETWORKS.register("mine", lambda spec: MyNetwork(spec.action_dim, **spec.network_options))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError, nearest, require_within
from ..registry import Registry
from ..types import PolicySpec
from .transformer import LONGEST, TransformerForDiffusion, TransformerOptions
from .unet1d import FINAL_GROUPS, ConditionalUnet1D
from .vision import ENCODERS, VisualNetwork

OWN = (ConditionalUnet1D, TransformerForDiffusion)
"""The package's own networks: their weights and settings are all that decides what they compute."""


def build_unet1d(spec: PolicySpec) -> ConditionalUnet1D:
    """The U-Net of a spec, with fresh weights.

    Raises:
        InputError: the spec's sizes don't fit together.
    """
    try:
        network = ConditionalUnet1D(
            input_dim=spec.action_dim,
            global_cond_dim=spec.condition_dim,
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
    groups = [(spec.n_groups, width, spec.horizon >> level) for level, width in enumerate(spec.down_dims)]
    for count, width, steps in [*groups, (FINAL_GROUPS, spec.down_dims[0], spec.horizon)]:
        if width // count * steps < 2:
            raise InputError(
                f"horizon={spec.horizon} and down_dims={spec.down_dims} leave one value in a group, 0 once "
                "it is normalized: a longer horizon, wider levels, or fewer groups"
            )
    return network


def build_transformer(spec: PolicySpec) -> TransformerForDiffusion:
    """The transformer of a spec, with fresh weights.

    Raises:
        InputError: an option of ``network_options`` is unknown or out of range, or the plan is too long.
    """
    known = [each.name for each in fields(TransformerOptions)]
    for name in spec.network_options:
        if name not in known:
            raise InputError(f"the transformer has no network_options.{name!s:.40}{nearest(name, known)}")
    require_within(1, LONGEST, horizon=spec.horizon, n_obs_steps=spec.n_obs_steps)
    options = TransformerOptions(**spec.network_options)
    seen = spec.condition_dim // spec.n_obs_steps
    return TransformerForDiffusion(spec.action_dim, spec.horizon, spec.n_obs_steps, seen, options)


NETWORKS: Registry[Callable[[PolicySpec], nn.Module]] = Registry(
    "network", {"unet1d": build_unet1d, "transformer": build_transformer}
)
"""Every network by name: a builder from a policy's spec."""


def build_network(spec: PolicySpec) -> nn.Module:
    """The network of a spec, with fresh weights.

    Raises:
        InputError: the network is unknown, its builder returns no module, or the spec's sizes don't fit
            together.
    """
    network = NETWORKS.named(spec.network)(spec)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"network {spec.network!r}: its builder returned {type(network).__name__}, not a torch.nn.Module"
        )
    return VisualNetwork(ENCODERS.named(spec.encoder)(spec), network) if spec.contract.cameras else network


class Undrawn(TorchFunctionMode):
    """Leaves weights as they are where they would be drawn: for that the meta device imports for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.uniform_, Tensor.normal_) else func(*args, **(kwargs or {}))


def check_weights(spec: PolicySpec, weights: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """Makes sure that weights are a spec's, before the memory for its network is taken.

    Returns:
        The network on the meta device: shapes, and no memory; None: another's, whose builder may need real
        tensors, wasn't checked.

    Raises:
        InputError: a weight is missing, unknown or of another shape; or the spec's sizes don't fit together.
    """
    own_eyes = not spec.contract.cameras or spec.encoder == "resnet18"
    if spec.network not in ("unet1d", "transformer") or not own_eyes:
        return None
    with torch.device("meta"), Undrawn():
        network = build_network(spec)
    wanted = {name: tuple(w.shape) for name, w in network.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"the checkpoint's weights don't fit its spec ({name!r:.80} is {found.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'none')}): train it again"
            )
    return network


def network_with(spec: PolicySpec, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network of a spec with a checkpoint's weights, whose memory it shares: no others are drawn first.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    network = check_weights(spec, weights)
    if network is None:
        return load_weights(spec, build_network(spec), weights)
    network.load_state_dict(weights, assign=True)
    return network


def load_weights(spec: PolicySpec, network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Gives a spec's network a checkpoint's weights; the network.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    check_weights(spec, weights)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise InputError(f"the checkpoint's weights don't fit its spec ({reason}): train it again")
    return network


def usable_network(spec: PolicySpec, network: nn.Module, device: torch.device) -> nn.Module:
    """A network on a device and in evaluation mode, after it was called once as a policy of this spec will.

    Raises:
        InputError: it is no module, it can't be called like that, or its output has another shape.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"a policy's network must be a torch.nn.Module, not {type(network).__name__}")
    network = network.to(device).eval()
    shape = (2, spec.horizon, spec.action_dim)
    if spec.contract.cameras and not isinstance(network, VisualNetwork):
        raise InputError(f"a policy with cameras needs a VisualNetwork, not {type(network).__name__}")
    condition = torch.zeros(2, spec.condition_dim, device=device)
    call = "network(x [rows, T, A], t [rows], condition [rows, G])"
    try:
        with torch.inference_mode():
            output = network(torch.zeros(shape, device=device), torch.zeros(2, device=device), condition)
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{type(network).__name__} can't be called as {call}: {line}") from error
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != shape:
        raise InputError(f"{type(network).__name__} gives {found}, expected {shape}, called as {call}")
    return network


def usable_device(device: torch.device | str) -> torch.device:
    """A device that can compute here, with its number if there are several.

    Args:
        device: PyTorch's name of one, or ``auto``: a GPU if there is one.

    Raises:
        InputError: there is none of that name.
    """
    if not isinstance(device, str | torch.device):  # PyTorch would take None for its own default
        raise InputError(f"device={device!r:.40} must be auto, or PyTorch's name of one: device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"device={device} can't be used here ({line}): device=cpu") from error
    if found.type == "meta":
        raise InputError("device=meta computes nothing: device=cpu")
    return found
