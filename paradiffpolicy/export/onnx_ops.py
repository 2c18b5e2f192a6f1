"""aten calls as ONNX nodes: one function per operation, in ``BUILDS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sampling.capture.arguments import (
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
from ..sampling.capture.tape import Call
from .onnx_graph import Build, OnnxGraph, untranslated

BUILDS: dict[Any, Build] = {}
"""From an aten overload packet to the function that builds it."""


def builds(*packets: Any) -> Callable[[Build], Build]:
    """Registers what builds these packets."""

    def register(build: Build) -> Build:
        BUILDS.update(dict.fromkeys(packets, build))
        return build

    return register


# ---------------------------------------------------------------------------------- element by element

ARITHMETIC = {
    aten.add: "Add",
    aten.sub: "Sub",
    aten.mul: "Mul",
    aten.div: "Div",
    aten.minimum: "Min",
    aten.maximum: "Max",
    aten.pow: "Pow",
}
COMPARISONS = {
    aten.eq: "Equal",
    aten.lt: "Less",
    aten.le: "LessOrEqual",
    aten.gt: "Greater",
    aten.ge: "GreaterOrEqual",
}
LOGIC = {
    aten.logical_and: "And",
    aten.logical_or: "Or",
    aten.logical_not: "Not",
    aten.bitwise_and: "And",
    aten.bitwise_or: "Or",
    aten.bitwise_not: "Not",
}
FUNCTIONS = {
    aten.neg: "Neg",
    aten.abs: "Abs",
    aten.log: "Log",
    aten.exp: "Exp",
    aten.sqrt: "Sqrt",
    aten.mish: "Mish",
    aten.sigmoid: "Sigmoid",
    aten.tanh: "Tanh",
    aten.relu: "Relu",
    aten.sin: "Sin",
    aten.cos: "Cos",
}


@builds(*ARITHMETIC)
def arithmetic(graph: OnnxGraph, call: Call) -> str:
    if call.kwargs.get("alpha", 1) != 1:
        raise untranslated(call, " with alpha")
    operands = (graph.cast(arg, call.output.dtype) for arg in call.args[:2])
    return graph.node(ARITHMETIC[call.op.overloadpacket], *operands)


@builds(*COMPARISONS)
def comparison(graph: OnnxGraph, call: Call) -> str:
    dtype = torch.result_type(*call.args[:2])
    operands = (graph.cast(arg, dtype) for arg in call.args[:2])
    return graph.node(COMPARISONS[call.op.overloadpacket], *operands)


@builds(*LOGIC)
def logic(graph: OnnxGraph, call: Call) -> str:
    if any(tensor.dtype is not torch.bool for tensor in call.inputs):
        raise untranslated(call, " of integers")
    return graph.node(LOGIC[call.op.overloadpacket], *map(graph.value, call.inputs))


@builds(*FUNCTIONS)
def function(graph: OnnxGraph, call: Call) -> str:
    return graph.node(FUNCTIONS[call.op.overloadpacket], graph.value(call.args[0]))


@builds(aten.gelu)
def gelu(graph: OnnxGraph, call: Call) -> str:
    """``x (1 + erf(x / sqrt 2)) / 2``: ONNX has had it as one operation only since a later version."""
    if call.kwargs.get("approximate", "none") != "none":
        raise untranslated(call, " but exact")
    x, dtype = graph.value(call.args[0]), call.output.dtype
    erf = graph.node("Erf", graph.node("Mul", x, graph.cast(math.sqrt(0.5), dtype)))
    share = graph.node("Mul", graph.node("Add", erf, graph.cast(1.0, dtype)), graph.cast(0.5, dtype))
    return graph.node("Mul", x, share)


@builds(aten._softmax)
def softmax(graph: OnnxGraph, call: Call) -> str:
    x, dim = call.args[:2]
    return graph.node("Softmax", graph.value(x), axis=from_zero(dim, x))


@builds(aten.alias, aten.detach, aten.clone, aten.contiguous)
def identity(graph: OnnxGraph, call: Call) -> str:
    return graph.value(call.args[0])


@builds(aten._to_copy)
def to_copy(graph: OnnxGraph, call: Call) -> str:
    return graph.cast(call.args[0], call.output.dtype)


@builds(aten.clamp)
def clamp(graph: OnnxGraph, call: Call) -> str:
    x, (low, high) = call.args[0], clamp_limits(call)
    value = graph.value(x)
    if low is not None:
        value = graph.node("Max", value, graph.cast(low, x.dtype))
    return value if high is None else graph.node("Min", value, graph.cast(high, x.dtype))


@builds(aten.where)
def where(graph: OnnxGraph, call: Call) -> str:
    condition, *choices = call.args
    return graph.node(
        "Where", graph.value(condition), *(graph.cast(each, call.output.dtype) for each in choices)
    )


# --------------------------------------------------------------------------------------------- shapes


@builds(aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze)
def view(graph: OnnxGraph, call: Call) -> str:
    return graph.reshaped(graph.value(call.args[0]), call.output.shape)


@builds(aten.expand)
def expand(graph: OnnxGraph, call: Call) -> str:
    return graph.node("Expand", graph.value(call.args[0]), graph.ints(*call.output.shape))


@builds(aten.transpose, aten.permute, aten.t)
def transpose(graph: OnnxGraph, call: Call) -> str:
    return graph.node("Transpose", graph.value(call.args[0]), perm=transposed(call))


@builds(aten.slice)
def slice_(graph: OnnxGraph, call: Call) -> str:
    dim, first, last, step = sliced(call)
    bounds = (graph.ints(value) for value in (first, last, dim, step))
    return graph.node("Slice", graph.value(call.args[0]), *bounds)


def picked(graph: OnnxGraph, x: Tensor, dim: int, index: int) -> str:
    """One index of a dimension, which goes away."""
    return graph.node("Gather", graph.value(x), graph.constant(torch.tensor(index)), axis=dim)


@builds(aten.select)
def select(graph: OnnxGraph, call: Call) -> str:
    x, dim, index = call.args
    dim = from_zero(dim, x)
    return picked(graph, x, dim, index % x.shape[dim])


@builds(aten.unbind)
def unbind(graph: OnnxGraph, call: Call) -> list[str]:
    x, dim = call.args[0], from_zero(dim_argument(call, 1), call.args[0])
    return [picked(graph, x, dim, i) for i in range(x.shape[dim])]


@builds(aten.split, aten.split_with_sizes, aten.chunk)
def split(graph: OnnxGraph, call: Call) -> list[str]:
    dim = from_zero(dim_argument(call, 2), call.args[0])
    sizes = [part.shape[dim] for part in call.outputs]
    return graph.nodes_of("Split", [graph.value(call.args[0]), graph.ints(*sizes)], len(sizes), axis=dim)


@builds(aten.cat)
def cat(graph: OnnxGraph, call: Call) -> str:
    dim = dim_argument(call, 1) % call.output.ndim
    return graph.node("Concat", *(graph.cast(part, call.output.dtype) for part in call.args[0]), axis=dim)


@builds(aten.stack)
def stack(graph: OnnxGraph, call: Call) -> str:
    dim = dim_argument(call, 1) % call.output.ndim
    parts = (graph.node("Unsqueeze", graph.value(part), graph.ints(dim)) for part in call.args[0])
    return graph.node("Concat", *parts, axis=dim)


@builds(aten.constant_pad_nd)
def constant_pad(graph: OnnxGraph, call: Call) -> str:
    x, (starts, ends) = call.args[0], paddings(call)
    filling = graph.cast(call.args[2] if len(call.args) > 2 else 0, x.dtype)
    return graph.node("Pad", graph.value(x), graph.ints(*starts, *ends), filling)


@builds(
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.empty_like,
)
def filled(graph: OnnxGraph, call: Call) -> str:
    return graph.constant(call.output)


# ------------------------------------------------------------------------------------------ reductions


REDUCTIONS = {
    aten.sum: "ReduceSum",
    aten.mean: "ReduceMean",
    aten.amax: "ReduceMax",
    aten.amin: "ReduceMin",
    aten.all: "ReduceMin",
    aten.any: "ReduceMax",
}


@builds(*REDUCTIONS)
def reduction(graph: OnnxGraph, call: Call) -> str:
    logical = call.output.dtype is torch.bool  # reductions are of numbers alone
    value = graph.cast(call.args[0], torch.int32 if logical else call.output.dtype)
    axes = graph.ints(*reduced_dims(call))
    reduced = graph.node(REDUCTIONS[call.op.overloadpacket], value, axes, keepdims=int(keeps_dims(call)))
    return graph.converted(reduced, torch.bool) if logical else reduced


@builds(aten.linalg_vector_norm)
def vector_norm(graph: OnnxGraph, call: Call) -> str:
    dims = norm_dims(call)
    if dims is None:
        raise untranslated(call, " but of order 2")
    axes = graph.ints(*dims)
    return graph.node("ReduceL2", graph.value(call.args[0]), axes, keepdims=int(keeps_dims(call)))


@builds(aten.cumsum)
def cumsum(graph: OnnxGraph, call: Call) -> str:
    x, dim = call.args[:2]
    axis = graph.constant(torch.tensor(from_zero(dim, x)))
    return graph.node("CumSum", graph.cast(x, call.output.dtype), axis)


# ---------------------------------------------------------------------------------------- by an index


@builds(aten.index_select)
def index_select(graph: OnnxGraph, call: Call) -> str:
    x, dim, index = call.args
    return graph.node("Gather", graph.value(x), graph.value(index), axis=from_zero(dim, x))


@builds(aten.gather)
def gather(graph: OnnxGraph, call: Call) -> str:
    x, dim, index = call.args
    return graph.node("GatherElements", graph.value(x), graph.value(index), axis=from_zero(dim, x))


@builds(aten.scatter)
def scatter(graph: OnnxGraph, call: Call) -> str:
    x, dim, index, source = call.args
    operands = graph.value(x), graph.value(index), graph.cast(source, x.dtype)
    return graph.node("ScatterElements", *operands, axis=from_zero(dim, x))


@builds(aten.index_copy)
def index_copy(graph: OnnxGraph, call: Call) -> str:
    x, dim, index, source = call.args
    if from_zero(dim, x):
        raise untranslated(call, " but along the first axis")
    rows = graph.node("Unsqueeze", graph.value(index), graph.ints(1))
    return graph.node("ScatterND", graph.value(x), rows, graph.cast(source, x.dtype))


# ------------------------------------------------------------------------------------ linear algebra


@builds(aten.mm, aten.bmm, aten.matmul)
def matmul(graph: OnnxGraph, call: Call) -> str:
    return graph.node("MatMul", *(graph.value(arg) for arg in call.args))


@builds(aten.linear)
def linear(graph: OnnxGraph, call: Call) -> str:
    x, weight, bias = (*call.args, None)[:3]
    product = graph.node("MatMul", graph.value(x), graph.node("Transpose", graph.value(weight), perm=[1, 0]))
    return product if bias is None else graph.node("Add", product, graph.value(bias))


@builds(aten.layer_norm)
def layer_norm(graph: OnnxGraph, call: Call) -> str:
    x, shape, weight, bias, eps = layer_norm_arguments(call)
    scale = torch.ones(shape, dtype=x.dtype) if weight is None else weight
    operands = [graph.value(x), graph.value(scale), *([] if bias is None else [graph.value(bias)])]
    return graph.node("LayerNormalization", *operands, axis=-len(shape), epsilon=eps)


# ------------------------------------------------------------------------------------------ pictures


@builds(aten.convolution)
def convolution(graph: OnnxGraph, call: Call) -> str:
    x, weight, bias, stride, padding = plain_convolution(call)
    operands = [graph.value(each) for each in (x, weight, bias) if each is not None]
    return graph.node("Conv", *operands, strides=stride, pads=[*padding, *padding])


@builds(aten.group_norm)
def group_norm(graph: OnnxGraph, call: Call) -> str:
    x, groups, weight, bias, eps = group_norm_arguments(call)
    one, zero = torch.ones(groups), torch.zeros(groups)
    value = graph.reshaped(graph.value(x), (x.shape[0], groups, -1))
    value = graph.node("InstanceNormalization", value, graph.value(one), graph.value(zero), epsilon=eps)
    value, sides = graph.reshaped(value, x.shape), (1, -1, *[1] * (x.ndim - 2))
    for kind, each in (("Mul", weight), ("Add", bias)):
        if each is not None:
            value = graph.node(kind, value, graph.reshaped(graph.value(each), sides))
    return value


@builds(aten.max_pool2d)
def max_pool(graph: OnnxGraph, call: Call) -> str:
    x, kernel, stride, padding = max_pool_arguments(call)
    pads = [*padding, *padding]
    return graph.node("MaxPool", graph.value(x), kernel_shape=kernel, strides=stride, pads=pads)
