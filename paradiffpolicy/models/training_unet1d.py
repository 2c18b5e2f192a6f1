"""The U-Net in the form that is fastest to train on a CPU: the same weights, the same function, the same
gradients to rounding.

Convolutions are matrix products per tap, as in ``matmul_unet1d``, also backward, where convolution kernels
are at their worst: a bfloat16 one with 1024 channels and 4 steps takes 160 ms, its products 13.  Between
convolutions tensors are ``[T, rows, channels]``, so that a tap's inputs and outputs lie in one piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .matmul_unet1d import Convolution
from .unet1d import ConditionalResidualBlock1D, ConditionalUnet1D, Conv1dBlock, Downsample1d, Upsample1d


class Tap(NamedTuple):
    """The steps that a convolution's tap connects: of its longer side, and as many of its shorter one."""

    tap: int
    fine: slice
    coarse: slice


def taps_of(conv: Convolution, fine: int, coarse: int) -> list[Tap]:
    """All that connect any steps, between horizons of ``fine`` and ``coarse`` steps."""
    stride, padding = conv.stride[0], int(conv.padding[0])
    taps = []
    for k in range(conv.kernel_size[0]):
        shift = k - padding
        first, last = max(0, -(shift // stride)), min(coarse - 1, (fine - 1 - shift) // stride)
        if first <= last:
            steps = slice(stride * first + shift, stride * last + shift + 1, stride)
            taps.append(Tap(k, steps, slice(first, last + 1)))
    return taps


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def summed(products: list[tuple[slice, Tensor, Tensor]], length: int, bias: Tensor) -> Tensor:
    """``y[steps] = bias + sum x weight`` over ``(steps, x, weight)``, ``[length, rows, out]``."""
    products = sorted(products, key=lambda each: -len(each[1]))
    steps, x, weight = products[0]
    if len(x) == length:
        y = torch.addmm(bias, flat(x), weight).view(length, x.shape[1], -1)
        products = products[1:]
    else:
        y = bias.expand(length, x.shape[1], -1).contiguous()
    for steps, x, weight in products:
        part = y[steps]
        if part.is_contiguous():
            flat(part).addmm_(flat(x), weight)
        else:
            part += (flat(x) @ weight).view(part.shape)
    return y


class TapProducts(torch.autograd.Function):
    """A convolution over ``[T, rows, in]`` to ``[T', rows, out]``, in x's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, conv: Convolution) -> Tensor:
        x, transposed = x.contiguous(), isinstance(conv, nn.ConvTranspose1d)
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        steps = len(x)
        if transposed:
            length = (steps - 1) * stride - 2 * padding + kernel
            taps = [Tap(k, x, y) for k, y, x in taps_of(conv, length, steps)]
        else:
            length = (steps + 2 * padding - kernel) // stride + 1
            taps = taps_of(conv, steps, length)
        by_tap = weight.permute(2, 1, 0) if transposed else weight.permute(2, 0, 1)
        products = torch.empty_like(by_tap, dtype=x.dtype, memory_format=torch.contiguous_format)
        for product, part in zip(products, by_tap, strict=True):  # each at twice the speed of all at once
            product.copy_(part)
        each = [(outputs, x[inputs], products[k].t()) for k, inputs, outputs in taps]
        y = summed(each, length, bias.to(x.dtype))
        ctx.save_for_backward(x, products)
        ctx.taps, ctx.transposed, ctx.weight = taps, transposed, weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, products = ctx.saved_tensors
        dy = dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            each = [(inputs, dy[outputs], products[k]) for k, inputs, outputs in ctx.taps]
            dx = summed(each, len(x), x.new_zeros(x.shape[-1]))
        dw = torch.zeros_like(ctx.weight)
        for k, inputs, outputs in ctx.taps:
            part = flat(dy[outputs]).t() @ flat(x[inputs])
            dw[:, :, k] = part.t() if ctx.transposed else part
        return dx, dw, flat(dy).sum(0, dtype=dw.dtype), None


class HalfMish(torch.autograd.Function):
    """Mish in half precision, in the few operations that are fast in it: ``x w``, ``w = n / (n + 2)``,
    ``n = e (e + 2)``, ``e = exp x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.clamp(max=20).exp_()  # beyond, w is 1
        n = (e + 2).mul_(e)
        w = n.div_(n + 2)
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        slope = torch.sigmoid(x).mul_(x)
        slope.addcmul_(slope * w, w, value=-1).add_(w)  # w + x (1 - w^2) sigmoid(x)
        return slope.mul_(dy)


def mish(x: Tensor) -> Tensor:
    return cast(Tensor, HalfMish.apply(x)) if x.dtype == torch.bfloat16 else nn.functional.mish(x)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    conv = cast(nn.Conv1d, conv)
    return cast(Tensor, TapProducts.apply(x, conv.weight, conv.bias, conv))


def block_output(block: nn.Module, x: Tensor) -> Tensor:
    """A ``Conv1dBlock``'s, ``[T, rows, in]`` to ``[rows, T, out]``."""
    conv, norm = (cast(Conv1dBlock, block).block[k] for k in range(2))
    norm = cast(nn.GroupNorm, norm)
    h = convolved(conv, x).transpose(0, 1).contiguous()
    pixels = h.unsqueeze(1).permute(0, 3, 1, 2)  # [rows, out, 1, T], channels last
    h = nn.functional.group_norm(pixels, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return mish(h.permute(0, 2, 3, 1).squeeze(1))


def residual_output(block: ConditionalResidualBlock1D, x: Tensor, film: Tensor) -> Tensor:
    """``[T, rows, in]`` to ``[T, rows, out]``."""
    h, film = block_output(block.blocks[0], x), film[:, None]
    if block.predict_scale:
        scale, bias = film.chunk(2, dim=-1)
        h = torch.addcmul(bias, scale, h)
    else:
        h = h + film
    h = block_output(block.blocks[1], h.transpose(0, 1))
    conv = block.residual_conv
    return (convolved(conv, x) if isinstance(conv, nn.Conv1d) else x) + h.transpose(0, 1)


class TrainingUnet1D(nn.Module):
    """``ConditionalUnet1D`` as it is trained on a CPU; in autocast's precision, if that is on."""

    def __init__(self, unet: ConditionalUnet1D) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        unet = self.unet
        half = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if half else sample.dtype
        embedding = unet.diffusion_step_encoder(timestep)
        features = nn.functional.mish(torch.cat((embedding.to(dtype), global_cond.to(dtype)), dim=-1))
        layers = [block.film_layer for block in unet.residual_blocks]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([cast(Tensor, layer.bias) for layer in layers])
        film = nn.functional.linear(features, weight.to(dtype), bias.to(dtype))
        films = iter(film.split(unet.film_sizes, dim=-1))

        def run(pair: Any, x: Tensor) -> Tensor:
            for block in pair:
                x = residual_output(block, x, next(films))
            return x

        def resampled(layer: nn.Module, x: Tensor) -> Tensor:
            return convolved(layer.conv, x) if isinstance(layer, (Downsample1d, Upsample1d)) else x

        x, skips = sample.to(dtype).transpose(0, 1), []
        for level in cast(list[nn.ModuleList], list(unet.down_modules)):
            x = run(level[:2], x)
            skips.append(x)
            x = resampled(level[2], x)
        x = run(unet.mid_modules, x)
        for level in cast(list[nn.ModuleList], list(unet.up_modules)):
            x = resampled(level[2], run(level[:2], torch.cat((x, skips.pop()), dim=-1)))
        x = block_output(unet.final_conv[0], x).transpose(0, 1)
        return convolved(unet.final_conv[1], x).transpose(0, 1)


def training_form(network: nn.Module, device: torch.device, bfloat16: bool) -> nn.Module:
    """What trains a network fastest on a device: another form of it, with its own parameters, or itself.
    (A CPU's float32 convolutions are as fast as its products.)"""
    if isinstance(network, ConditionalUnet1D) and device.type == "cpu" and bfloat16:
        return TrainingUnet1D(network)
    return network
