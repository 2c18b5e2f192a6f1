"""aten calls as OpenVINO operations.

A tape of a function's calls becomes an OpenVINO graph, call by call.  Everything that doesn't come
from the function's inputs is a constant, computed when the tape was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino.opset13 as op
import torch
from openvino import Node, Output, Type
from torch import Tensor

from .program import CaptureError
from .tape import Call, Tape

aten = torch.ops.aten

TYPES = {
    torch.float32: Type.f32,
    torch.float64: Type.f64,
    torch.int64: Type.i64,
    torch.int32: Type.i32,
    torch.int8: Type.i8,
    torch.bool: Type.boolean,
}

WHOLE = frozenset({aten.linear.default, aten.layer_norm.default, aten.matmul.default})
"""Composite operations that have one of their own here."""

Value = Any
"""A node of the graph, or an output of one: ``Node | Output``."""
Translation = Callable[["Graph", Call], Any]
TRANSLATIONS: dict[Any, Translation] = {}
"""From an aten overload packet to what builds it: an output, or a list of them."""


def translates(*packets: Any) -> Callable[[Translation], Translation]:
    def register(translation: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(packets, translation))
        return translation

    return register


class Graph:
    """A growing OpenVINO graph.

    Args:
        inputs: name and example of every input; they become parameters of those names.

    Attributes:
        parameters: by name.
        nbytes: of its constants.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.parameters: dict[str, Node] = {}
        self.nbytes = 0
        self._values: dict[int, Value] = {}
        self._keep: list[Any] = []  # ids are of living tensors only; constants share their memory
        self._lengths: dict[tuple[Any, ...], Node] = {}
        for name, example in inputs.items():
            node = op.parameter(list(example.shape), TYPES[example.dtype], name=name)
            node.output(0).set_names({name})
            self.parameters[name] = node
            self.stands_for(example, node)

    def add(self, tape: Tape) -> None:
        """Builds a tape's calls.

        Raises:
            CaptureError: it has one that isn't known here.
        """
        for call in tape.calls:
            self._keep.append(call)
            inputs = list(call.inputs)
            known = [tensor for tensor in inputs if id(tensor) in self._values]
            if not known and all(tensor.dtype is not torch.int8 for tensor in inputs):
                continue  # of constants alone, hence one; 8-bit weights stay as they are
            translation = TRANSLATIONS.get(call.op.overloadpacket)
            if translation is None or call.op._schema.is_mutable:
                raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op})")
            built = translation(self, call)
            for tensor, value in zip(
                call.outputs, built if isinstance(built, list) else [built], strict=True
            ):
                self._values[id(tensor)] = value

    def value(self, tensor: Tensor) -> Value:
        """What stands for a tensor: part of the graph, or a constant."""
        if id(tensor) not in self._values:
            self.stands_for(tensor, self.constant(tensor))
        return self._values[id(tensor)]

    def output(self, tensor: Tensor) -> Output:
        """The same as an output, which some of OpenVINO's functions insist on."""
        value = self.value(tensor)
        return value.output(0) if isinstance(value, Node) else value

    def stands_for(self, tensor: Tensor, value: Value) -> None:
        """From here on ``value`` is what stands for ``tensor``."""
        self._values[id(tensor)] = value
        self._keep.append(tensor)

    def constant(self, tensor: Tensor) -> Node:
        array = tensor.detach().contiguous().numpy()
        self._keep.append(array)
        self.nbytes += array.nbytes
        return op.constant(array, dtype=TYPES[tensor.dtype], shared_memory=array.nbytes > 1024)

    def cast(self, operand: Tensor | float, dtype: torch.dtype) -> Value:
        """A tensor or a Python number in a dtype."""
        if not isinstance(operand, Tensor):
            return op.constant(np.array(operand), dtype=TYPES[dtype])
        value = self.value(operand)
        return value if operand.dtype is dtype else op.convert(value, TYPES[dtype])

    def ints(self, *values: int) -> Node:
        """A constant vector; each is made once."""
        if values not in self._lengths:
            self._lengths[values] = op.constant(np.array(values, dtype=np.int64))
        return self._lengths[values]

    def axis(self, value: int) -> Node:
        return op.constant(np.array(value, dtype=np.int64))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        return op.reshape(value, self.ints(*shape), special_zero=False)


def from_zero(dim: int, like: Tensor) -> int:
    return dim % max(like.ndim, 1)


def reduced_dims(call: Call) -> tuple[int, ...]:
    """Of a reduction, as its output and its argument say: all if there is none."""
    dims = call.args[1] if len(call.args) > 1 and call.args[1] is not None else range(call.args[0].ndim)
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(from_zero(dim, call.args[0]) for dim in dims) or tuple(range(call.args[0].ndim))


def keeps_dims(call: Call) -> bool:
    return call.output.ndim == call.args[0].ndim


# ---------------------------------------------------------------------------------- element by element

for packet, build in {
    aten.add: op.add,
    aten.sub: op.subtract,
    aten.mul: op.multiply,
    aten.div: op.divide,
    aten.minimum: op.minimum,
    aten.maximum: op.maximum,
    aten.remainder: op.floor_mod,
    aten.pow: op.power,
}.items():

    def arithmetic(graph: Graph, call: Call, build: Any = build) -> Value:
        if call.kwargs.get("alpha", 1) != 1:
            raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} with alpha)")
        return build(*(graph.cast(arg, call.output.dtype) for arg in call.args[:2]))

    TRANSLATIONS[packet] = arithmetic


@translates(aten.rsub)
def reverse_subtract(graph: Graph, call: Call) -> Value:
    return op.subtract(*(graph.cast(arg, call.output.dtype) for arg in call.args[1::-1]))


for packet, build in {
    aten.eq: op.equal,
    aten.ne: op.not_equal,
    aten.lt: op.less,
    aten.le: op.less_equal,
    aten.gt: op.greater,
    aten.ge: op.greater_equal,
}.items():

    def comparison(graph: Graph, call: Call, build: Any = build) -> Value:
        dtype = torch.result_type(*call.args[:2])
        return build(*(graph.cast(arg, dtype) for arg in call.args[:2]))

    TRANSLATIONS[packet] = comparison

for packet, build in {
    aten.logical_and: op.logical_and,
    aten.logical_or: op.logical_or,
    aten.logical_not: op.logical_not,
    aten.bitwise_and: op.logical_and,
    aten.bitwise_or: op.logical_or,
    aten.bitwise_not: op.logical_not,
}.items():

    def logic(graph: Graph, call: Call, build: Any = build) -> Value:
        if any(tensor.dtype is not torch.bool for tensor in call.inputs):
            raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} of integers)")
        return build(*(graph.value(arg) for arg in call.inputs))

    TRANSLATIONS[packet] = logic

for packet, build in {
    aten.neg: op.negative,
    aten.abs: op.abs,
    aten.log: op.log,
    aten.exp: op.exp,
    aten.sqrt: op.sqrt,
    aten.mish: op.mish,
    aten.sigmoid: op.sigmoid,
    aten.tanh: op.tanh,
    aten.sin: op.sin,
    aten.cos: op.cos,
}.items():

    def unary(graph: Graph, call: Call, build: Any = build) -> Value:
        return build(graph.value(call.args[0]))

    TRANSLATIONS[packet] = unary

for packet in (aten.alias, aten.detach, aten.clone, aten.contiguous):
    TRANSLATIONS[packet] = lambda graph, call: graph.value(call.args[0])


@translates(aten._to_copy)
def to_copy(graph: Graph, call: Call) -> Value:
    return graph.cast(call.args[0], call.output.dtype)


@translates(aten.clamp)
def clamp(graph: Graph, call: Call) -> Value:
    x, low, high = (*call.args, None, None)[:3]
    low, high = call.kwargs.get("min", low), call.kwargs.get("max", high)
    value = graph.value(x)
    if low is not None:
        value = op.maximum(value, graph.cast(low, x.dtype))
    return value if high is None else op.minimum(value, graph.cast(high, x.dtype))


@translates(aten.where)
def where(graph: Graph, call: Call) -> Value:
    condition, yes, no = call.args
    dtype = call.output.dtype
    return op.select(graph.value(condition), graph.cast(yes, dtype), graph.cast(no, dtype))


# --------------------------------------------------------------------------------------------- shapes


@translates(aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze)
def view(graph: Graph, call: Call) -> Value:
    return graph.reshaped(graph.value(call.args[0]), call.output.shape)


@translates(aten.expand, aten.repeat)
def expand(graph: Graph, call: Call) -> Value:
    x, shape = call.args[0], tuple(call.output.shape)
    padded = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
    value = graph.value(x) if padded == tuple(x.shape) else graph.reshaped(graph.value(x), padded)
    times = [new // old for new, old in zip(shape, padded, strict=True)]
    return op.tile(value, graph.ints(*times)) if any(n != 1 for n in times) else value


@translates(aten.transpose, aten.permute, aten.t)
def transpose(graph: Graph, call: Call) -> Value:
    x = call.args[0]
    order = list(range(x.ndim))
    if call.op.overloadpacket is aten.permute:
        order = [from_zero(dim, x) for dim in call.args[1]]
    else:
        dims = call.args[1:] or (0, 1)
        i, j = from_zero(dims[0], x), from_zero(dims[1], x)
        order[i], order[j] = order[j], order[i]
    return op.transpose(graph.value(x), graph.ints(*order))


@translates(aten.slice)
def slice_(graph: Graph, call: Call) -> Value:
    given: list[Any] = [*call.args, *(0, None, None, 1)[len(call.args) - 1 :]]
    x, dim, start, end, step = given
    dim, length = from_zero(dim, x), x.shape[from_zero(dim, x)]
    first, last, _ = slice(start, end).indices(length)
    if (first, last, step) == (0, length, 1):
        return graph.value(x)
    return op.slice(graph.value(x), graph.ints(first), graph.ints(last), graph.ints(step), graph.ints(dim))


@translates(aten.select)
def select(graph: Graph, call: Call) -> Value:
    x, dim, index = call.args
    dim = from_zero(dim, x)
    return op.gather(graph.value(x), graph.axis(index % x.shape[dim]), graph.axis(dim))


@translates(aten.split, aten.split_with_sizes, aten.chunk)
def split(graph: Graph, call: Call) -> list[Value]:
    dim = from_zero(dim_argument(call, 2), call.args[0])
    sizes = [part.shape[dim] for part in call.outputs]
    parts = op.variadic_split(graph.value(call.args[0]), graph.axis(dim), graph.ints(*sizes))
    return [parts.output(i) for i in range(len(sizes))]


@translates(aten.unbind)
def unbind(graph: Graph, call: Call) -> list[Value]:
    x, dim = call.args[0], from_zero(dim_argument(call, 1), call.args[0])
    return [op.gather(graph.value(x), graph.axis(i), graph.axis(dim)) for i in range(x.shape[dim])]


def dim_argument(call: Call, position: int, default: int = 0) -> int:
    return int(call.kwargs.get("dim", call.args[position] if len(call.args) > position else default))


@translates(aten.cat)
def cat(graph: Graph, call: Call) -> Value:
    return op.concat([graph.value(part) for part in call.args[0]], dim_argument(call, 1) % call.output.ndim)


@translates(aten.stack)
def stack(graph: Graph, call: Call) -> Value:
    dim = dim_argument(call, 1) % call.output.ndim
    return op.concat([op.unsqueeze(graph.value(part), graph.axis(dim)) for part in call.args[0]], dim)


@translates(aten.constant_pad_nd)
def constant_pad(graph: Graph, call: Call) -> Value:
    x, pads = call.args[:2]
    untouched = [0] * (x.ndim - len(pads) // 2)
    starts, ends = untouched + pads[-2::-2], untouched + pads[::-2]
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
def filled(graph: Graph, call: Call) -> Value:
    return graph.constant(call.output)


# ------------------------------------------------------------------------------------------ reductions


@translates(aten.sum)
def sum_(graph: Graph, call: Call) -> Value:
    value = graph.cast(call.args[0], call.output.dtype)
    return op.reduce_sum(value, graph.ints(*reduced_dims(call)), keeps_dims(call))


@translates(aten.mean)
def mean(graph: Graph, call: Call) -> Value:
    return op.reduce_mean(graph.value(call.args[0]), graph.ints(*reduced_dims(call)), keeps_dims(call))


@translates(aten.amax, aten.amin)
def extreme(graph: Graph, call: Call) -> Value:
    build = op.reduce_max if call.op.overloadpacket is aten.amax else op.reduce_min
    return build(graph.value(call.args[0]), graph.ints(*reduced_dims(call)), keeps_dims(call))


@translates(aten.all, aten.any)
def logical(graph: Graph, call: Call) -> Value:
    build = op.reduce_logical_and if call.op.overloadpacket is aten.all else op.reduce_logical_or
    return build(graph.value(call.args[0]), graph.ints(*reduced_dims(call)), keeps_dims(call))


@translates(aten.linalg_vector_norm)
def vector_norm(graph: Graph, call: Call) -> Value:
    x = call.args[0]
    if (call.args[1] if len(call.args) > 1 else 2) != 2:
        raise CaptureError(f"has an operation that isn't translated to OpenVINO ({call.op} but of order 2)")
    dims = call.args[2] if len(call.args) > 2 and call.args[2] is not None else range(x.ndim)
    axes = graph.ints(*(from_zero(dim, x) for dim in dims))
    return op.sqrt(op.reduce_sum(op.multiply(graph.value(x), graph.value(x)), axes, keeps_dims(call)))


@translates(aten.cumsum)
def cumsum(graph: Graph, call: Call) -> Value:
    x, dim = call.args[:2]
    return op.cum_sum(graph.cast(x, call.output.dtype), graph.axis(from_zero(dim, x)))


# ---------------------------------------------------------------------------------------- by an index


@translates(aten.index_select)
def index_select(graph: Graph, call: Call) -> Value:
    x, dim, index = call.args
    return op.gather(graph.value(x), graph.value(index), graph.axis(from_zero(dim, x)))


@translates(aten.gather)
def gather(graph: Graph, call: Call) -> Value:
    x, dim, index = call.args
    return op.gather_elements(graph.value(x), graph.value(index), from_zero(dim, x))


@translates(aten.scatter)
def scatter(graph: Graph, call: Call) -> Value:
    x, dim, index, source = call.args
    values = graph.cast(source, x.dtype)
    return op.scatter_elements_update(
        graph.value(x), graph.value(index), values, graph.axis(from_zero(dim, x))
    )


@translates(aten.index_copy)
def index_copy(graph: Graph, call: Call) -> Value:
    x, dim, index, source = call.args
    axis = graph.axis(from_zero(dim, x))
    return op.scatter_update(graph.value(x), graph.value(index), graph.value(source), axis)


# ------------------------------------------------------------------------------------ linear algebra


@translates(aten.mm, aten.bmm, aten.matmul)
def matmul(graph: Graph, call: Call) -> Value:
    return op.matmul(*(graph.value(arg) for arg in call.args), False, False)


@translates(aten.linear)
def linear(graph: Graph, call: Call) -> Value:
    x, weight, bias = (*call.args, None)[:3]
    product = op.matmul(graph.value(x), graph.value(weight), False, True)
    return product if bias is None else op.add(product, graph.value(bias))


@translates(aten.layer_norm)
def layer_norm(graph: Graph, call: Call) -> Value:
    x, shape, weight, bias, eps = (*call.args, *(None, None, 1e-5)[len(call.args) - 2 :])[:5]
    axes = graph.ints(*range(x.ndim - len(shape), x.ndim))
    value = op.mvn(graph.value(x), axes, True, eps, "INSIDE_SQRT")
    if weight is not None:
        value = op.multiply(value, graph.value(weight))
    return value if bias is None else op.add(value, graph.value(bias))
