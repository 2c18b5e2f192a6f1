"""aten calls as OpenVINO operations: one function per operation, registered in ``TRANSLATIONS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import openvino.opset13 as op
import torch

from .arguments import (
    aten,
    clamp_limits,
    dim_argument,
    from_zero,
    group_norm_arguments,
    keeps_dims,
    layer_norm_arguments,
    max_pool_arguments,
    norm_dims,
    paddings,
    plain_convolution,
    reduced_dims,
    sliced,
    transposed,
)
from .openvino_graph import ModelGraph, Value, translates
from .program import CaptureError
from .tape import Call

WHOLE = frozenset(
    {
        aten.linear.default,
        aten.layer_norm.default,
        aten.matmul.default,
        aten.group_norm.default,
        aten.max_pool2d.default,
    }
)
"""Composite operations that have one of their own here."""

GELU = {"none": "erf", "tanh": "tanh"}
"""Names of its approximations."""


# ---------------------------------------------------------------------------------- element by element


def elementwise(operands: Callable[[ModelGraph, Call], Iterable[Value]], builds: dict[Any, Any]) -> None:
    """Registers operations that differ in what builds them from their operands."""
    for packet, build in builds.items():

        @translates(packet)
        def built(graph: ModelGraph, call: Call, build: Any = build) -> Value:
            return build(*operands(graph, call))


def of_output_type(graph: ModelGraph, call: Call) -> Iterable[Value]:
    if call.kwargs.get("alpha", 1) != 1:
        raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} with alpha)")
    return (graph.cast(arg, call.output.dtype) for arg in call.args[:2])


def of_common_type(graph: ModelGraph, call: Call) -> Iterable[Value]:
    dtype = torch.result_type(*call.args[:2])
    return (graph.cast(arg, dtype) for arg in call.args[:2])


def of_bools(graph: ModelGraph, call: Call) -> Iterable[Value]:
    if any(tensor.dtype is not torch.bool for tensor in call.inputs):
        raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} of integers)")
    return map(graph.value, call.inputs)


elementwise(
    of_output_type,
    {
        aten.add: op.add,
        aten.sub: op.subtract,
        aten.rsub: lambda x, y: op.subtract(y, x),
        aten.mul: op.multiply,
        aten.div: op.divide,
        aten.minimum: op.minimum,
        aten.maximum: op.maximum,
        aten.remainder: op.floor_mod,
        aten.pow: op.power,
    },
)
elementwise(
    of_common_type,
    {
        aten.eq: op.equal,
        aten.ne: op.not_equal,
        aten.lt: op.less,
        aten.le: op.less_equal,
        aten.gt: op.greater,
        aten.ge: op.greater_equal,
    },
)
elementwise(
    of_bools,
    {
        aten.logical_and: op.logical_and,
        aten.logical_or: op.logical_or,
        aten.logical_not: op.logical_not,
        aten.bitwise_and: op.logical_and,
        aten.bitwise_or: op.logical_or,
        aten.bitwise_not: op.logical_not,
    },
)
elementwise(
    lambda graph, call: [graph.value(call.args[0])],
    {
        aten.neg: op.negative,
        aten.abs: op.abs,
        aten.log: op.log,
        aten.exp: op.exp,
        aten.sqrt: op.sqrt,
        aten.mish: op.mish,
        aten.sigmoid: op.sigmoid,
        aten.tanh: op.tanh,
        aten.relu: op.relu,
        aten.sin: op.sin,
        aten.cos: op.cos,
        **dict.fromkeys((aten.alias, aten.detach, aten.clone, aten.contiguous), lambda value: value),
    },
)


@translates(aten.gelu)
def gelu(graph: ModelGraph, call: Call) -> Value:
    return op.gelu(graph.value(call.args[0]), GELU[call.kwargs.get("approximate", "none")])


@translates(aten._softmax)
def softmax(graph: ModelGraph, call: Call) -> Value:
    x, dim = call.args[:2]
    return op.softmax(graph.value(x), from_zero(dim, x))


@translates(aten._to_copy)
def to_copy(graph: ModelGraph, call: Call) -> Value:
    return graph.cast(call.args[0], call.output.dtype)


@translates(aten.clamp)
def clamp(graph: ModelGraph, call: Call) -> Value:
    x, (low, high) = call.args[0], clamp_limits(call)
    value = graph.value(x)
    if low is not None:
        value = op.maximum(value, graph.cast(low, x.dtype))
    return value if high is None else op.minimum(value, graph.cast(high, x.dtype))


@translates(aten.where)
def where(graph: ModelGraph, call: Call) -> Value:
    condition, yes, no = call.args
    dtype = call.output.dtype
    return op.select(graph.value(condition), graph.cast(yes, dtype), graph.cast(no, dtype))


# --------------------------------------------------------------------------------------------- shapes


@translates(aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze)
def view(graph: ModelGraph, call: Call) -> Value:
    return graph.reshaped(graph.value(call.args[0]), call.output.shape)


@translates(aten.expand, aten.repeat)
def expand(graph: ModelGraph, call: Call) -> Value:
    x, shape = call.args[0], tuple(call.output.shape)
    padded = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
    value = graph.value(x) if padded == tuple(x.shape) else graph.reshaped(graph.value(x), padded)
    times = [new // old for new, old in zip(shape, padded, strict=True)]
    return op.tile(value, graph.ints(*times)) if any(n != 1 for n in times) else value


@translates(aten.transpose, aten.permute, aten.t)
def transpose(graph: ModelGraph, call: Call) -> Value:
    return op.transpose(graph.value(call.args[0]), graph.ints(*transposed(call)))


@translates(aten.slice)
def slice_(graph: ModelGraph, call: Call) -> Value:
    x, (dim, first, last, step) = call.args[0], sliced(call)
    if (first, last, step) == (0, x.shape[dim], 1):
        return graph.value(x)
    return op.slice(graph.value(x), graph.ints(first), graph.ints(last), graph.ints(step), graph.ints(dim))


@translates(aten.select)
def select(graph: ModelGraph, call: Call) -> Value:
    x, dim, index = call.args
    dim = from_zero(dim, x)
    return op.gather(graph.value(x), graph.axis(index % x.shape[dim]), graph.axis(dim))


@translates(aten.split, aten.split_with_sizes, aten.chunk)
def split(graph: ModelGraph, call: Call) -> list[Value]:
    dim = from_zero(dim_argument(call, 2), call.args[0])
    sizes = [part.shape[dim] for part in call.outputs]
    parts = op.variadic_split(graph.value(call.args[0]), graph.axis(dim), graph.ints(*sizes))
    return [parts.output(i) for i in range(len(sizes))]


@translates(aten.unbind)
def unbind(graph: ModelGraph, call: Call) -> list[Value]:
    x, dim = call.args[0], from_zero(dim_argument(call, 1), call.args[0])
    return [op.gather(graph.value(x), graph.axis(i), graph.axis(dim)) for i in range(x.shape[dim])]


@translates(aten.cat)
def cat(graph: ModelGraph, call: Call) -> Value:
    return op.concat([graph.value(part) for part in call.args[0]], dim_argument(call, 1) % call.output.ndim)


@translates(aten.stack)
def stack(graph: ModelGraph, call: Call) -> Value:
    dim = dim_argument(call, 1) % call.output.ndim
    return op.concat([op.unsqueeze(graph.value(part), graph.axis(dim)) for part in call.args[0]], dim)


@translates(aten.constant_pad_nd)
def constant_pad(graph: ModelGraph, call: Call) -> Value:
    x, (starts, ends) = call.args[0], paddings(call)
    filling = graph.cast(call.args[2] if len(call.args) > 2 else 0, x.dtype)
    return op.pad(graph.value(x), graph.ints(*starts), graph.ints(*ends), "constant", filling)


@translates(
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.empty_like,
)
def filled(graph: ModelGraph, call: Call) -> Value:
    return graph.constant(call.output)


# ------------------------------------------------------------------------------------------ reductions


for packet, reduce in {
    aten.sum: op.reduce_sum,
    aten.mean: op.reduce_mean,
    aten.amax: op.reduce_max,
    aten.amin: op.reduce_min,
    aten.all: op.reduce_logical_and,
    aten.any: op.reduce_logical_or,
}.items():

    @translates(packet)
    def reduction(graph: ModelGraph, call: Call, reduce: Any = reduce) -> Value:
        value = graph.cast(call.args[0], call.output.dtype)
        return reduce(value, graph.ints(*reduced_dims(call)), keeps_dims(call))


@translates(aten.linalg_vector_norm)
def vector_norm(graph: ModelGraph, call: Call) -> Value:
    value, dims = graph.value(call.args[0]), norm_dims(call)
    if dims is None:
        raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} but of order 2)")
    return op.sqrt(op.reduce_sum(op.multiply(value, value), graph.ints(*dims), keeps_dims(call)))


@translates(aten.cumsum)
def cumsum(graph: ModelGraph, call: Call) -> Value:
    x, dim = call.args[:2]
    return op.cum_sum(graph.cast(x, call.output.dtype), graph.axis(from_zero(dim, x)))


# ---------------------------------------------------------------------------------------- by an index


@translates(aten.index_select)
def index_select(graph: ModelGraph, call: Call) -> Value:
    x, dim, index = call.args
    return op.gather(graph.value(x), graph.value(index), graph.axis(from_zero(dim, x)))


@translates(aten.gather)
def gather(graph: ModelGraph, call: Call) -> Value:
    x, dim, index = call.args
    return op.gather_elements(graph.value(x), graph.value(index), from_zero(dim, x))


@translates(aten.scatter, aten.index_copy)
def scatter(graph: ModelGraph, call: Call) -> Value:
    x, dim, index, source = call.args
    build = op.scatter_update if call.op.overloadpacket is aten.index_copy else op.scatter_elements_update
    axis = graph.axis(from_zero(dim, x))
    return build(graph.value(x), graph.value(index), graph.cast(source, x.dtype), axis)


# ------------------------------------------------------------------------------------ linear algebra


@translates(aten.mm, aten.bmm, aten.matmul)
def matmul(graph: ModelGraph, call: Call) -> Value:
    return op.matmul(*(graph.value(arg) for arg in call.args), False, False)


@translates(aten.linear)
def linear(graph: ModelGraph, call: Call) -> Value:
    x, weight, bias = (*call.args, None)[:3]
    product = op.matmul(graph.value(x), graph.value(weight), False, True)
    return product if bias is None else op.add(product, graph.value(bias))


@translates(aten.layer_norm)
def layer_norm(graph: ModelGraph, call: Call) -> Value:
    x, shape, weight, bias, eps = layer_norm_arguments(call)
    axes = graph.ints(*range(x.ndim - len(shape), x.ndim))
    value = op.mvn(graph.value(x), axes, True, eps, "INSIDE_SQRT")
    if weight is not None:
        value = op.multiply(value, graph.value(weight))
    return value if bias is None else op.add(value, graph.value(bias))


# ------------------------------------------------------------------------------------------ pictures


@translates(aten.convolution)
def convolution(graph: ModelGraph, call: Call) -> Value:
    x, weight, bias, stride, padding = plain_convolution(call)
    ones = [1] * len(stride)
    value = op.convolution(graph.value(x), graph.value(weight), stride, padding, padding, ones)
    if bias is None:
        return value
    return op.add(value, graph.reshaped(graph.value(bias), (1, -1, *ones)))


@translates(aten.group_norm)
def group_norm(graph: ModelGraph, call: Call) -> Value:
    x, groups, weight, bias, eps = group_norm_arguments(call)
    value = graph.reshaped(graph.value(x), (x.shape[0], groups, -1))
    value = graph.reshaped(op.mvn(value, graph.ints(2), True, eps, "INSIDE_SQRT"), x.shape)
    ones = (1,) * (x.ndim - 2)
    if weight is not None:
        value = op.multiply(value, graph.reshaped(graph.value(weight), (1, -1, *ones)))
    return value if bias is None else op.add(value, graph.reshaped(graph.value(bias), (1, -1, *ones)))


@translates(aten.max_pool2d)
def max_pool(graph: ModelGraph, call: Call) -> Value:
    x, kernel, stride, padding = max_pool_arguments(call)
    return op.max_pool(graph.value(x), stride, [1, 1], padding, padding, kernel).output(0)
