"""The U-Net in the form that is fastest to train on a CPU: the same weights, the same function, the same
gradients to rounding.

Convolutions are matrix products per tap, as in ``matmul_unet1d``, also backward, where convolution kernels
are at their worst: a bfloat16 one with 1024 channels and 4 steps takes 160 ms, its products 13.  Between
convolutions tensors are ``[T, rows, channels]``, so that a tap's inputs and outputs lie in one piece.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .matmul_unet1d import Convolution
from .unet1d import ConditionalResidualBlock1D, ConditionalUnet1D, Conv1dBlock, Downsample1d, Upsample1d
from .vision import VisualNetwork


class Tap(NamedTuple):
    """The steps that a convolution's tap connects: of its longer side, and as many of its shorter one."""

    tap: int
    fine: slice
    coarse: slice


@cache
def taps_of(kernel: int, stride: int, padding: int, fine: int, coarse: int) -> tuple[Tap, ...]:
    """All that connect any steps, between horizons of ``fine`` and ``coarse`` steps."""
    taps = []
    for k in range(kernel):
        shift = k - padding
        first, last = max(0, -(shift // stride)), min(coarse - 1, (fine - 1 - shift) // stride)
        if first <= last:
            steps = slice(stride * first + shift, stride * last + shift + 1, stride)
            taps.append(Tap(k, steps, slice(first, last + 1, 1)))
    return tuple(taps)


class Steps:
    """A tensor ``[T, rows, C]`` as the matrix of some of its steps' rows."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.rows = x, x.shape[1]
        self.flat = x.view(-1, x.shape[2])

    def __getitem__(self, steps: slice) -> Tensor:
        if steps.step == 1:
            return self.flat.narrow(0, steps.start * self.rows, (steps.stop - steps.start) * self.rows)
        return self.x[steps].flatten(0, 1)

    def add(self, steps: slice, x: Tensor, weight: Tensor) -> None:
        """Adds ``x weight`` to some steps."""
        if steps.step == 1:
            self[steps].addmm_(x, weight)
        else:
            part = self.x[steps]
            part += torch.mm(x, weight).view(part.shape)


def summed(products: list[tuple[slice, Tensor, Tensor]], length: int, rows: int, bias: Tensor) -> Tensor:
    """``y[steps] = bias + sum x weight`` over ``(steps, x, weight)``, ``[length, rows, out]``."""
    whole = next((k for k, (_, x, _) in enumerate(products) if len(x) == length * rows), None)
    if whole is None:
        y = bias.expand(length, rows, -1).contiguous()
    else:
        _, x, weight = products.pop(whole)
        y = torch.addmm(bias, x, weight).view(length, rows, -1)
    parts = Steps(y)
    for steps, x, weight in products:
        parts.add(steps, x, weight)
    return y


class TapProducts(torch.autograd.Function):
    """A convolution over ``[T, rows, in]`` to ``[T', rows, out]``, in x's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, conv: Convolution) -> Tensor:
        x, transposed = x.contiguous(), isinstance(conv, nn.ConvTranspose1d)
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        steps, rows = len(x), x.shape[1]
        if transposed:
            length = (steps - 1) * stride - 2 * padding + kernel
            each = taps_of(kernel, stride, padding, length, steps)
            taps = [(k, inputs, outputs) for k, outputs, inputs in each]
        else:
            length = (steps + 2 * padding - kernel) // stride + 1
            taps = [(*tap,) for tap in taps_of(kernel, stride, padding, steps, length)]
        by_tap = (weight.permute(2, 1, 0) if transposed else weight.permute(2, 0, 1)).unbind()
        products = x.new_empty(kernel, *by_tap[0].shape)
        torch._foreach_copy_(products.unbind(), by_tap)  # at twice the speed of all at once
        sources = Steps(x)
        parts = [(outputs, sources[inputs], products[k].t()) for k, inputs, outputs in taps]
        y = summed(parts, length, rows, bias.to(x.dtype))
        ctx.save_for_backward(x, products)
        ctx.taps, ctx.transposed, ctx.weight = taps, transposed, weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, products = ctx.saved_tensors
        each, taps, dx = products.unbind(), ctx.taps, None
        sources, results = Steps(x), Steps(dy.contiguous())
        if ctx.needs_input_grad[0]:
            parts = [(inputs, results[outputs], each[k]) for k, inputs, outputs in taps]
            dx = summed(parts, len(x), x.shape[1], x.new_zeros(x.shape[2]))
        dw = (torch.zeros_like if len(taps) < len(each) else torch.empty_like)(ctx.weight)
        found = [torch.mm(results[outputs].t(), sources[inputs]) for _, inputs, outputs in taps]
        places = dw.permute(1, 0, 2) if ctx.transposed else dw
        torch._foreach_copy_([places.select(2, k) for k, _, _ in taps], found)
        return dx, dw, results.flat.sum(0, dtype=dw.dtype), None


class NormMish(torch.autograd.Function):
    """GroupNorm and Mish, ``[T, rows, C]`` to ``[rows, T, C]``.

    Mish is ``u w``, ``w = n / (n + 2)``, ``n = e (e + 2)``, ``e = exp u``: operations that are fast in
    bfloat16, as its own aren't.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        steps, rows, channels = h.shape
        ctx.sizes = rows, channels, steps, groups
        pixels = h.transpose(0, 1).contiguous()[:, None].permute(0, 3, 1, 2)  # channels last
        u, mean, scale = torch.native_group_norm(pixels, weight, bias, rows, channels, steps, groups, eps)
        u = u.permute(0, 2, 3, 1).squeeze(1)
        e = u.clamp(max=20).exp_()  # beyond, w is 1
        n = (e + 2).mul_(e)
        w = n.div_(n + 2)
        ctx.save_for_backward(pixels, mean, scale, weight, u, w)
        return u * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        pixels, mean, scale, weight, u, w = ctx.saved_tensors
        du = torch.sigmoid(u).mul_(u)
        du.addcmul_(du * w, w, value=-1).add_(w).mul_(dy)  # dy (w + u (1 - w^2) sigmoid(u))
        du = du[:, None].permute(0, 3, 1, 2)
        dh, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            du, pixels, mean, scale, weight, *ctx.sizes, [True, True, True]
        )
        return dh.permute(2, 3, 0, 1).squeeze(0), dweight, dbias, None, None


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    conv = cast(nn.Conv1d, conv)
    return cast(Tensor, TapProducts.apply(x, conv.weight, conv.bias, conv))


def block_output(block: nn.Module, x: Tensor) -> Tensor:
    """A ``Conv1dBlock``'s, ``[T, rows, in]`` to ``[rows, T, out]``."""
    conv, norm = (cast(Conv1dBlock, block).block[k] for k in range(2))
    norm = cast(nn.GroupNorm, norm)
    args = norm.weight, norm.bias, norm.num_groups, norm.eps
    return cast(Tensor, NormMish.apply(convolved(conv, x), *args))


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
    if isinstance(network, VisualNetwork):
        if device.type == "cpu":
            for each in network.encoder.networks:
                cast(Any, each).backbone.to(memory_format=torch.channels_last)
        return VisualNetwork(network.encoder, training_form(network.head, device, bfloat16))
    if isinstance(network, ConditionalUnet1D) and device.type == "cpu" and bfloat16:
        return TrainingUnet1D(network)
    return network
