"""The network's trunk in another precision, or laid out anew."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.denoiser import Network, SplitNetwork, Trunk
from ..errors import InputError, nearest
from .matmul_unet1d import MakeConvolution, MatmulUnet1D, Taps, Weight, int8_where_it_pays
from .unet1d import ConditionalUnet1D
from .vision import VisualNetwork

HALF = {"bf16": torch.bfloat16, "f16": torch.float16}
PRECISIONS = ("f32", *HALF, "int8")
"""``int8`` is of weights; the arithmetic is float32's then."""

FINEST_TOLERANCE = {"bf16": 0.05}
"""Of parallel drivers, in standard deviations of DDPM's reverse step: below it, rounding alone keeps nodes
moving: with 0.002 a plan of 100 nodes took 60 iterations in place of 16.  (In f16 it took 17.)"""

CHOICES = ("auto", *PRECISIONS)
"""``auto`` is what a captured program computes in fastest."""


def check_precision(precision: str, among: Sequence[str] = PRECISIONS) -> None:
    """Raises ``InputError`` if there is none of that name."""
    if precision not in among:
        raise InputError(f"unknown precision {precision!r:.80}{nearest(precision, among)}")


def bfloat16_pays(device: torch.device) -> bool:
    """Tells whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, 40x slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def half_trunk(network: SplitNetwork, dtype: torch.dtype) -> Trunk:
    """The trunk with its weights and activations in ``dtype``; a sample goes in and comes out as it
    was."""
    half: Any = copy.deepcopy(network)
    return halved(half.to(dtype).trunk, dtype)


def halved(trunk: Trunk, dtype: torch.dtype) -> Trunk:
    """A trunk that computes in ``dtype``, called with samples of another, which come out as they went in."""
    return lambda sample, features: trunk(sample.to(dtype), features.to(dtype)).to(sample.dtype)


def rounded_trunk(network: SplitNetwork, dtype: torch.dtype) -> Trunk:
    """The same accuracy without the hardware: weights, and every layer's inputs and outputs, are rounded
    to ``dtype``, and the arithmetic between is float32's.  Not faster: it shows the accuracy of a
    precision on a device that has it."""

    def rounded(values: Any) -> Any:
        return values.to(dtype).to(values.dtype) if isinstance(values, Tensor) else values

    copied: Any = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.data = rounded(parameter.data)
    for module in copied.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda module, args: tuple(map(rounded, args)))
            module.register_forward_hook(lambda module, args, output: rounded(output))
    return lambda sample, features: copied.trunk(sample, rounded(features))


def trunk_in(
    network: SplitNetwork,
    precision: str,
    device: torch.device,
    *,
    make_convolution: MakeConvolution | None = None,
) -> Trunk:
    """A network's trunk in a precision.

    Args:
        network: as it was trained, in float32.
        precision: a name in ``PRECISIONS``.
        device: where it will run: on a CPU that doesn't multiply halves they are rounded float32.
        make_convolution: of the form with convolutions as matrix products; None: the network's own form,
            except for ``int8``, which has none but that.

    Raises:
        InputError: the precision is unknown, or the network has no such form.
    """
    check_precision(precision)
    if make_convolution or precision == "int8":
        if not isinstance(network, ConditionalUnet1D) or (precision in HALF and device.type == "cpu"):
            raise InputError(f"{type(network).__name__} has no form of matrix products in {precision}")
        weight = int8_where_it_pays(network) if precision == "int8" else Weight
        products = MatmulUnet1D(network, weight, make_convolution or Taps)
        return halved(products.to(HALF[precision]), HALF[precision]) if precision in HALF else products
    if precision == "f32":
        return network.trunk
    computes = device.type != "cpu" or (precision == "bf16" and bfloat16_pays(device))
    return (half_trunk if computes else rounded_trunk)(network, HALF[precision])


class Model:
    """A network, and its trunk in the forms that backends ask for: shared by all policies of its weights.

    A form is made when it is first run, since a compiled program from a cache never runs it, and is gone with
    the last that runs it: it is as large as the network, and some programs compile it into their own.

    Args:
        whole: the network in float32, with its encoder of pictures if it has one.

    Attributes:
        network: without the encoder.
    """

    def __init__(self, whole: Network) -> None:
        self.whole = whole
        self.network: Network = whole.head if isinstance(whole, VisualNetwork) else whole
        self._made = WeakValueDictionary[tuple[str, MakeConvolution | None, torch.device], Trunk]()

    def __reduce__(self) -> tuple[type[Model], tuple[Network]]:
        return Model, (self.whole,)

    @property
    def encode(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Makes conditions of flat observations and pictures; None: there are no cameras."""
        whole = self.whole
        if not isinstance(whole, VisualNetwork):
            return None

        def encode(flat: Tensor, pixels: Tensor) -> Tensor:
            return whole.encode(rearrange(flat, "b (t o) -> b t o", t=pixels.shape[1]), pixels)

        return encode

    @cached_property
    def digest(self) -> str:
        """A hash of the weights: the same in every process."""
        digest = hashlib.sha256()
        assert isinstance(self.whole, nn.Module)
        for name, weight in sorted(self.whole.state_dict().items()):
            digest.update(repr((name, weight.dtype, tuple(weight.shape))).encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check(self, precision: str) -> None:
        """Raises ``InputError`` if the network has no form in a precision."""
        check_precision(precision)
        if precision != "f32" and not isinstance(self.network, SplitNetwork):
            raise InputError(
                f"precision={precision} needs a network with a trunk, and {type(self.network).__name__} has "
                "none: precision=f32"
            )
        if precision == "int8" and not isinstance(self.network, ConditionalUnet1D):
            raise InputError(
                f"precision=int8 is of the U-Net alone, not of {type(self.network).__name__}: precision=bf16"
            )

    def trunk(
        self,
        precision: str,
        device: torch.device,
        *,
        make_convolution: MakeConvolution | None,
        arithmetic_in_half: bool,
    ) -> Trunk | None:
        """The trunk's form for a backend; None: the network has none but its own.

        Args:
            precision: a name in ``PRECISIONS``.
            device: where it will run.
            make_convolution: of a form with convolutions as matrix products.
            arithmetic_in_half: the backend itself computes in bf16 or f16, from float32 weights.

        Raises:
            InputError: there is no such form.
        """
        self.check(precision)
        network = self.network
        if not isinstance(network, SplitNetwork):
            return None
        if not isinstance(network, ConditionalUnet1D):
            make_convolution = None
        precision = "f32" if arithmetic_in_half and precision in HALF else precision
        form = (precision, make_convolution, device)

        @cache
        def made() -> Trunk:
            made = self._made.get(form)
            if made is None:
                made = trunk_in(network, precision, device, make_convolution=make_convolution)
                self._made[form] = made
            return made

        return lambda sample, features: made()(sample, features)
