r"""The lower bound of a plan's latency, from memory bandwidth and FLOP/s.

A network call reads every weight once and multiplies it with every row, so it takes at least

    max(weight bytes / bandwidth, rows * operations per row / matrix rate)

both rates measured in the same run, in the precision of the call: the bandwidth of as many bytes as the
weights have, since a cache that holds them is read faster than memory.  A plan's floor is the sum over its
iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..clock import Clock
from ..diffusion.denoiser import Trunk
from ..errors import InputError
from ..models.matmul_unet1d import MatmulUnet1D
from ..models.transformer import TransformerForDiffusion
from ..models.unet1d import ConditionalUnet1D

ARITHMETIC = {
    "f32": (4, torch.float32),
    "bf16": (2, torch.bfloat16),
    "f16": (2, torch.float16),
    "int8": (1, torch.float32),
}
"""Per precision: bytes of a weight, and what products are computed in."""


@dataclass(frozen=True)
class Rates:
    """The most that a device does, measured: bytes and floating-point operations per second."""

    bandwidth: float
    matrix: float


def measured_rates(
    device: torch.device,
    clock: Clock,
    nbytes: int = 2**28,
    dtype: torch.dtype = torch.float32,
    repeats: int = 9,
) -> Rates:
    """The best of a few reads of so many bytes, and of a few products of large matrices in a ``dtype``."""
    values = torch.ones(max(1, nbytes // 4), device=device)
    matrix = torch.ones(2048, 2048, device=device, dtype=dtype)

    def best(task: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(repeats):
            begun = clock.now()
            float(task())  # waits for the device
            seconds.append(clock.now() - begun)
        return min(seconds)

    read = best(values.sum)
    product = best(lambda: (matrix @ matrix)[0, 0])
    return Rates(values.nbytes / max(read, 1e-9), 2 * 2048**3 / max(product, 1e-9))


@dataclass(frozen=True)
class TrunkCost:
    """The cost of a call of a network's trunk: its weights, and operations per row."""

    weights: int
    operations: int

    def floor(self, rates: Rates, calls: float, rows: float, precision: str = "f32") -> float:
        """Seconds that ``calls`` network calls of ``rows`` rows each take at least."""
        nbytes = self.weights * ARITHMETIC[precision][0]
        return calls * max(nbytes / rates.bandwidth, rows * self.operations / rates.matrix)


BuiltIn = ConditionalUnet1D | TransformerForDiffusion


def trunk_cost(network: BuiltIn, horizon: int) -> TrunkCost:
    """The cost without taps that fall on padding, and without what a capture hoists: FiLM layers, or keys and
    values of the memory.

    Raises:
        InputError: it is another network, of which that isn't known.
    """
    if not isinstance(network, BuiltIn):
        raise InputError(f"the cost of {type(network).__name__} isn't known: measure a policy of a U-Net")
    device = next(network.parameters()).device
    with torch.inference_mode():
        time = network.time_features(torch.zeros(1, device=device))
        condition = network.condition_features(torch.zeros(1, network.global_cond_dim, device=device))
        features = network.combine(time, condition)
    if isinstance(network, ConditionalUnet1D):
        products = MatmulUnet1D(network)
        trunk: Trunk = products
        weights = sum(buffer.numel() for buffer in products.buffers())
    else:
        trunk, weights = network.trunk, network.trunk_weights
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        trunk(features.new_zeros(1, horizon, network.input_dim), features)
    return TrunkCost(weights, counter.get_total_flops())


class Floors:
    """Lower bounds of a network's calls on a device.

    Attributes:
        rates: measured so far, by precision.
    """

    def __init__(self, network: BuiltIn, horizon: int, device: torch.device, clock: Clock) -> None:
        self.cost, self.rates = trunk_cost(network, horizon), dict[str, Rates]()
        self._device, self._clock = device, clock

    def seconds(self, precision: str, calls: float, rows: float) -> float:
        """That ``calls`` network calls of ``rows`` rows each take at least."""
        if precision not in self.rates:
            size, dtype = ARITHMETIC[precision]
            self.rates[precision] = measured_rates(self._device, self._clock, self.cost.weights * size, dtype)
        return self.cost.floor(self.rates[precision], calls, rows, precision)
