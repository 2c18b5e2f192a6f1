"""A growing OpenVINO graph, built call by call from the tape of a function.

Everything that doesn't come from the function's inputs is a constant, computed when the tape was made.
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

TYPES = {
    torch.float32: Type.f32,
    torch.float64: Type.f64,
    torch.int64: Type.i64,
    torch.int32: Type.i32,
    torch.int8: Type.i8,
    torch.uint8: Type.u8,
    torch.bool: Type.boolean,
}

Value = Any
"""A node of the graph, or an output of one: ``Node | Output``."""
Translation = Callable[["ModelGraph", Call], Any]
TRANSLATIONS: dict[Any, Translation] = {}
"""From an aten overload packet to the function that builds it: an output, or a list of them."""


def translates(*packets: Any) -> Callable[[Translation], Translation]:
    """Registers the translation of these packets."""

    def register(translation: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(packets, translation))
        return translation

    return register


class ModelGraph:
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
            values = built if isinstance(built, list) else [built]
            self._values |= zip(map(id, call.outputs), values, strict=True)

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor: part of the graph, or a constant."""
        if id(tensor) not in self._values:
            self.stands_for(tensor, self.constant(tensor))
        return self._values[id(tensor)]

    def output(self, tensor: Tensor) -> Output:
        """The same as an output, which some of OpenVINO's functions insist on."""
        value = self.value(tensor)
        return value.output(0) if isinstance(value, Node) else value

    def stands_for(self, tensor: Tensor, value: Value) -> None:
        """From here on ``value`` is the value of ``tensor``."""
        self._values[id(tensor)] = value
        self._keep.append(tensor)

    def constant(self, tensor: Tensor) -> Node:
        """A tensor's values; large ones share its memory."""
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
        """A constant number."""
        return op.constant(np.array(value, dtype=np.int64))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """In another shape of as many numbers."""
        return op.reshape(value, self.ints(*shape), special_zero=False)
