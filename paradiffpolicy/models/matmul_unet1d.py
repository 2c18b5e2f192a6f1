r"""The U-Net's trunk with every convolution as matrix products.

A convolution over a horizon of 4 to 16 steps is a poor fit for convolution kernels, and a matrix product
per tap k (``Taps``, for CPUs), or one of all taps together (``Windows``, for GPUs), is a good one:

    y[o] = b + sum_k  W_k x[s o + k - p]        o = 0 … T' - 1

Taps leave out what falls on the padding: with kernel 5 that is 30 % of the work where T = 4.  Windows
multiply it too, but are one kernel in place of five.  Activations are ``[T, rows, channels]``, so that a
tap's inputs and outputs lie in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .unet1d import ConditionalResidualBlock1D, ConditionalUnet1D, Conv1dBlock, Downsample1d, Upsample1d

MakeWeight = Callable[[Tensor], nn.Module]
"""From a weight ``[out, in]`` to what multiplies by it, ``[…, in]`` to ``[…, out]``."""

Convolution = nn.Conv1d | nn.ConvTranspose1d
MakeConvolution = Callable[[Convolution, MakeWeight], nn.Module]
"""From a convolution to its product form, ``[T, rows, in]`` to ``[T', rows, out]``."""


class Weight(nn.Module):
    """``x W^T`` in the weight's own precision."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Int8Weight(nn.Module):
    """``x W^T`` with W rounded to 8 bits, a scale per output channel: a quarter of the memory
    traffic, which is what a call with few rows waits for."""

    quantized: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self.register_buffer("quantized", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantized.to(x.dtype) * self.scale)


def int8_where_it_pays(unet: nn.Module) -> MakeWeight:
    """8 bits for weights that are at least a 128th of the network each, which together are most of it;
    the smaller ones meet more rows per call and aren't what it waits for."""
    least = sum(parameter.numel() for parameter in unet.parameters()) / 128

    def make_weight(weight: Tensor) -> nn.Module:
        return (Int8Weight if weight.numel() >= least else Weight)(weight)

    return make_weight


def placed(part: Tensor, first: int, length: int) -> Tensor:
    """``part`` ``[n, rows, C]`` at steps ``first …`` of a horizon of ``length``, zero elsewhere."""
    after = length - first - part.shape[0]
    return nn.functional.pad(part, (0, 0, 0, 0, first, after)) if first or after else part


class Taps(nn.Module):
    """A convolution as a product per tap: a ``MakeConvolution``."""

    bias: Tensor

    def __init__(self, conv: Convolution, make_weight: MakeWeight) -> None:
        super().__init__()
        self.transposed = isinstance(conv, nn.ConvTranspose1d)
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        weight = conv.weight.detach()
        taps = (weight.transpose(0, 1) if self.transposed else weight).unbind(dim=2)
        self.taps = nn.ModuleList(make_weight(tap) for tap in taps)
        self.register_buffer("bias", cast(Tensor, conv.bias).detach())

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[0]
        if not self.transposed:
            steps = (length + 2 * self.padding - self.kernel) // self.stride + 1
            return self._sum(x, [(k, k - self.padding) for k in range(self.kernel)], self.stride, steps)
        # Output s m + r takes input m - d from every tap with k - p = r + s d.
        phases = []
        for r in range(self.stride):
            taps = range((r + self.padding) % self.stride, self.kernel, self.stride)
            shifts = [(k, (r + self.padding - k) // self.stride) for k in taps]
            phases.append(self._sum(x, shifts, 1, length))
        return torch.stack(phases, dim=1).flatten(0, 1)

    def _sum(self, x: Tensor, shifts: list[tuple[int, int]], stride: int, steps: int) -> Tensor:
        """``y[o] = b + sum W_k x[stride o + shift]`` over ``(k, shift)``, for ``steps`` outputs."""
        y = None
        for k, shift in sorted(shifts, key=lambda tap: abs(tap[1])):  # whole ones first
            first = max(0, -(shift // stride))
            last = min(steps - 1, (x.shape[0] - 1 - shift) // stride)
            if first > last:
                continue
            inputs = x[stride * first + shift : stride * last + shift + 1 : stride]
            part = placed(self.taps[k](inputs), first, steps)
            y = part if y is None else y + part
        assert y is not None
        return y + self.bias


class Windows(nn.Module):
    """A convolution as one product, of the inputs that each output sees: a ``MakeConvolution``."""

    bias: Tensor

    def __init__(self, conv: Convolution, make_weight: MakeWeight) -> None:
        super().__init__()
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        weight = conv.weight.detach()
        if isinstance(conv, nn.ConvTranspose1d):
            # Outputs s m … s m + s - 1 together see inputs m - d, from every tap with k - p = r + s d.
            steps = [(r, k, (r + padding - k) // stride) for r in range(stride) for k in range(kernel)]
            steps = [(r, k, d) for r, k, d in steps if (r + padding - k) % stride == 0]
            self.first, self.last = (limit(d for _, _, d in steps) for limit in (min, max))
            windows = weight.new_zeros(stride, weight.shape[1], self.last - self.first + 1, weight.shape[0])
            for r, k, d in steps:
                windows[r, :, d - self.first] = weight[:, :, k].T
            self.stride, self.phases, weight = 1, stride, windows.flatten(0, 1)
        else:
            self.first, self.last = -padding, kernel - 1 - padding
            self.stride, self.phases, weight = stride, 1, weight.transpose(1, 2)
        self.product = make_weight(weight.flatten(1))
        self.register_buffer("bias", cast(Tensor, conv.bias).detach().repeat(self.phases))

    def forward(self, x: Tensor) -> Tensor:
        before, after = max(0, -self.first), max(0, self.last)
        reach = x.shape[0] + before + after - (self.last - self.first)
        if before or after:
            x = nn.functional.pad(x, (0, 0, 0, 0, before, after))
        steps = [x[k : k + reach : self.stride] for k in range(self.last - self.first + 1)]
        y = self.product(torch.cat(steps, dim=-1) if len(steps) > 1 else steps[0]) + self.bias
        return y if self.phases == 1 else torch.stack(y.chunk(self.phases, dim=-1), dim=1).flatten(0, 1)


class Norm(nn.Module):
    """GroupNorm over ``[T, rows, C]``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        steps, rows, channels = x.shape
        each = channels // self.groups
        grouped = x.view(steps, rows * self.groups, each).transpose(0, 1)
        flat = grouped.reshape(rows * self.groups, steps * each)
        normed = nn.functional.layer_norm(flat, (steps * each,), eps=self.eps)
        back = normed.view(rows * self.groups, steps, each).transpose(0, 1)
        return back.reshape(steps, rows, channels) * self.weight + self.bias


Make = Callable[[Convolution], nn.Module]


class ConvBlock(nn.Module):
    """``Conv1dBlock``."""

    def __init__(self, block: Conv1dBlock, make: Make) -> None:
        super().__init__()
        conv, norm = cast(nn.Conv1d, block.block[0]), cast(nn.GroupNorm, block.block[1])
        self.conv, self.norm = make(conv), Norm(norm)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.mish(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """``ConditionalResidualBlock1D``; ``film`` ``[rows, film]``."""

    def __init__(self, block: ConditionalResidualBlock1D, make: Make) -> None:
        super().__init__()
        first, second = (cast(Conv1dBlock, part) for part in block.blocks)
        self.first, self.second = ConvBlock(first, make), ConvBlock(second, make)
        self.predict_scale = block.predict_scale
        conv = block.residual_conv
        self.residual = make(conv) if isinstance(conv, nn.Conv1d) else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        h = self.first(x)
        if self.predict_scale:
            scale, bias = film.chunk(2, dim=-1)
            h = scale * h + bias
        else:
            h = h + film
        return self.second(h) + self.residual(x)


class MatmulUnet1D(nn.Module):
    """``ConditionalUnet1D.trunk``, to rounding, with its weights laid out anew.

    Args:
        unet: where the weights are from; a copy of them is kept.
        make_weight: their precision.
        make_convolution: ``Taps`` or ``Windows``.
    """

    def __init__(
        self,
        unet: ConditionalUnet1D,
        make_weight: MakeWeight = Weight,
        make_convolution: MakeConvolution = Taps,
    ) -> None:
        super().__init__()
        self.film_sizes = unet.film_sizes

        def make(conv: Convolution) -> nn.Module:
            return make_convolution(conv, make_weight)

        blocks = [ResidualBlock(block, make) for block in unet.residual_blocks]
        down, up = 2 * len(unet.down_modules), 2 * len(unet.up_modules)
        self.down, self.up = nn.ModuleList(blocks[:down]), nn.ModuleList(blocks[len(blocks) - up :])
        self.middle = nn.ModuleList(blocks[down : len(blocks) - up])

        def resampled(level: nn.Module) -> nn.Module:
            sampling = cast(nn.ModuleList, level)[2]
            scales = isinstance(sampling, (Downsample1d, Upsample1d))
            return make(cast(nn.Conv1d, sampling.conv)) if scales else nn.Identity()

        self.downsample = nn.ModuleList(map(resampled, unet.down_modules))
        self.upsample = nn.ModuleList(map(resampled, unet.up_modules))
        self.final = ConvBlock(cast(Conv1dBlock, unet.final_conv[0]), make)
        self.output = make(cast(nn.Conv1d, unet.final_conv[1]))

    def forward(self, sample: Tensor, film: Tensor) -> Tensor:
        """``sample`` ``[rows, T, A]``, ``film`` ``[rows, F]`` to ``[rows, T, A]``."""
        films = iter(film.split(self.film_sizes, dim=-1))
        x, skips = sample.transpose(0, 1), []
        for level, downsample in enumerate(self.downsample):
            for block in self.down[2 * level : 2 * level + 2]:
                x = block(x, next(films))
            skips.append(x)
            x = downsample(x)
        for block in self.middle:
            x = block(x, next(films))
        for level, upsample in enumerate(self.upsample):
            x = torch.cat((x, skips.pop()), dim=-1)
            for block in self.up[2 * level : 2 * level + 2]:
                x = block(x, next(films))
            x = upsample(x)
        return self.output(self.final(x)).transpose(0, 1)
