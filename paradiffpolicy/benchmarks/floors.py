r"""The lower bound of a plan's latency, from memory bandwidth and FLOP/s.

A network call reads every weight once and multiplies it with every row, so it takes at least

    max(weight bytes / bandwidth, rows * operations per row / matrix rate)

both rates measured in the same run; a plan's floor is the sum over its iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..clock import Clock
from ..models.matmul_unet1d import MatmulUnet1D
from ..models.unet1d import ConditionalUnet1D


@dataclass(frozen=True)
class Rates:
    """The most that a device does, measured: bytes and floating-point operations per second."""

    bandwidth: float
    matrix: float


def measured_rates(device: torch.device, clock: Clock, repeats: int = 7) -> Rates:
    """The best of a few reads of a quarter of a gigabyte, and of a few products of large matrices."""
    values, matrix = torch.ones(2**26, device=device), torch.ones(2048, 2048, device=device)

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
    """The cost of a call of a network's trunk: bytes of float32 weights, and operations per row."""

    nbytes: int
    operations: int

    def floor(self, rates: Rates, calls: float, rows: float) -> float:
        """Seconds that ``calls`` network calls of ``rows`` rows each take at least."""
        return calls * max(self.nbytes / rates.bandwidth, rows * self.operations / rates.matrix)


def trunk_cost(network: ConditionalUnet1D, horizon: int) -> TrunkCost:
    """The cost without taps that fall on padding, and without FiLM layers, which a capture hoists."""
    trunk = MatmulUnet1D(network)
    film = torch.zeros(1, sum(network.film_sizes), device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        trunk(film.new_zeros(1, horizon, network.input_dim), film)
    return TrunkCost(sum(buffer.nbytes for buffer in trunk.buffers()), counter.get_total_flops())
