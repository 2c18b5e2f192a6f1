"""The arguments of aten calls, the same for every translation: dimensions from zero, defaults filled in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .program import CaptureError
from .tape import Call

aten = torch.ops.aten


def from_zero(dim: int, like: Tensor) -> int:
    """A dimension, of which negative ones count from the end."""
    return dim % max(like.ndim, 1)


def dim_argument(call: Call, position: int, default: int = 0) -> int:
    """An argument ``dim``, as it was given."""
    return int(call.kwargs.get("dim", call.args[position] if len(call.args) > position else default))


def reduced_dims(call: Call) -> tuple[int, ...]:
    """Of a reduction, as its output and its argument say: all if there is none."""
    dims = call.args[1] if len(call.args) > 1 and call.args[1] is not None else range(call.args[0].ndim)
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(from_zero(dim, call.args[0]) for dim in dims) or tuple(range(call.args[0].ndim))


def keeps_dims(call: Call) -> bool:
    """Whether a reduction's dimensions stay, of length 1."""
    return bool(call.output.ndim == call.args[0].ndim)


def clamp_limits(call: Call) -> tuple[Any, Any]:
    """The least and the most of ``clamp``; None: no limit."""
    _, low, high = (*call.args, None, None)[:3]
    return call.kwargs.get("min", low), call.kwargs.get("max", high)


def transposed(call: Call) -> list[int]:
    """The order of dimensions after ``permute``, ``transpose`` or ``t``."""
    x = call.args[0]
    if call.op.overloadpacket is aten.permute:
        return [from_zero(dim, x) for dim in call.args[1]]
    order = list(range(x.ndim))
    i, j = (from_zero(dim, x) for dim in call.args[1:] or (0, 1))
    order[i], order[j] = order[j], order[i]
    return order


class Slice(NamedTuple):
    """Every ``step``-th index of a dimension, from ``first`` to before ``last``."""

    dim: int
    first: int
    last: int
    step: int


def sliced(call: Call) -> Slice:
    """What ``slice`` takes."""
    given: list[Any] = [*call.args, *(0, None, None, 1)[len(call.args) - 1 :]]
    x, dim, start, end, step = given
    first, last, _ = slice(start, end).indices(x.shape[from_zero(dim, x)])
    return Slice(from_zero(dim, x), first, last, step)


def paddings(call: Call) -> tuple[list[int], list[int]]:
    """What ``constant_pad_nd`` adds before and after each dimension."""
    x, pads = call.args[:2]
    untouched = [0] * (x.ndim - len(pads) // 2)
    return untouched + pads[-2::-2], untouched + pads[::-2]


def norm_dims(call: Call) -> list[int] | None:
    """The dimensions of ``linalg_vector_norm``; None: it isn't of order 2."""
    x = call.args[0]
    if (call.args[1] if len(call.args) > 1 else 2) != 2:
        return None
    dims = call.args[2] if len(call.args) > 2 and call.args[2] is not None else range(x.ndim)
    return [from_zero(dim, x) for dim in dims]


def layer_norm_arguments(call: Call) -> tuple[Any, ...]:
    """Input, shape, weight, bias and epsilon of ``layer_norm``."""
    return (*call.args, *(None, None, 1e-5)[len(call.args) - 2 :])[:5]


def plain_convolution(call: Call) -> tuple[Any, Any, Any, list[int], list[int]]:
    """Input, weight, bias, stride and padding of a ``convolution`` without dilation, groups or transposition.

    Raises:
        CaptureError: it has one of them.
    """
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
    if transposed or groups != 1 or set(dilation) != {1}:
        raise CaptureError(f"has a convolution that isn't translated ({call.op} with groups, or dilated)")
    return x, weight, bias, list(stride), list(padding)


def group_norm_arguments(call: Call) -> tuple[Any, ...]:
    """Input, groups, weight, bias and epsilon of ``group_norm``."""
    return (*call.args, *(None, None, 1e-5)[len(call.args) - 2 :])[:5]


def max_pool_arguments(call: Call) -> tuple[Any, list[int], list[int], list[int]]:
    """Input, kernel, stride and padding of a ``max_pool2d`` without dilation.

    Raises:
        CaptureError: it is dilated, or rounds its sizes up.
    """
    given = [*call.args, *([], [0], [1], False)[len(call.args) - 2 :]]
    x, kernel, stride, padding, dilation, rounds_up = given
    if rounds_up or set(dilation) != {1}:
        raise CaptureError(f"has a pooling that isn't translated ({call.op}, dilated or rounding up)")
    sides = [list(sizes) * (3 - len(sizes)) for sizes in (kernel, stride or kernel, padding)]
    return x, sides[0], sides[1], sides[2]
