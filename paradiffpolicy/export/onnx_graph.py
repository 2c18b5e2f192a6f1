"""A growing ONNX graph, built call by call from the tape of a function.

Everything that doesn't come from the function's inputs is a constant, computed when the tape was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from ..sampling.capture.program import CaptureError
from ..sampling.capture.tape import Call, Tape

Build = Callable[["OnnxGraph", Call], "str | list[str]"]
"""Adds a call's nodes; the names of its outputs."""


class OnnxGraph:
    """A growing ONNX graph.

    Args:
        builds: what translates a call, by its aten overload packet.

    Attributes:
        nodes: in order.
        initializers: constants, shared with the graphs within.
    """

    def __init__(self, builds: Mapping[Any, Build], outer: OnnxGraph | None = None) -> None:
        self.builds, self.nodes = builds, list[onnx.NodeProto]()
        self.initializers: list[onnx.TensorProto] = [] if outer is None else outer.initializers
        self._numbers: Iterator[int] = itertools.count() if outer is None else outer._numbers
        self._constants: dict[Any, str] = {} if outer is None else outer._constants
        self._keep: list[Any] = [] if outer is None else outer._keep  # ids are of living tensors only
        self._values: dict[int, str] = {}

    def inner(self) -> Self:
        """A graph within, which sees this one's constants."""
        return type(self)(self.builds, self)

    def add(self, tape: Tape) -> None:
        """Builds a tape's calls.

        Raises:
            CaptureError: it has one that isn't known.
        """
        for call in tape.calls:
            self._keep.append(call)
            if not any(id(tensor) in self._values for tensor in call.inputs):
                continue  # of constants alone, hence one
            build = self.builds.get(call.op.overloadpacket)
            if build is None or call.op._schema.is_mutable:
                raise untranslated(call)
            built = build(self, call)
            names = built if isinstance(built, list) else [built]
            self._values |= zip(map(id, call.outputs), names, strict=True)

    def value(self, tensor: Tensor) -> str:
        """The name of a tensor's value: part of the graph, or a constant."""
        if id(tensor) not in self._values:
            self.stands_for(tensor, self.constant(tensor))
        return self._values[id(tensor)]

    def stands_for(self, tensor: Tensor, name: str) -> None:
        """From here on ``name`` is the value of ``tensor``."""
        self._values[id(tensor)] = name
        self._keep.append(tensor)

    def constant(self, tensor: Tensor) -> str:
        """A tensor's values, which are made once; equal small ones, as shapes, too."""
        array = tensor.detach().contiguous().numpy()
        key = (array.dtype, array.shape, array.tobytes()) if array.nbytes <= 256 else id(tensor)
        if key not in self._constants:
            self._constants[key] = f"constant.{next(self._numbers)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
            self._keep.append(tensor)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant vector."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def cast(self, operand: Tensor | float, dtype: torch.dtype) -> str:
        """A tensor or a Python number in a dtype."""
        if not isinstance(operand, Tensor):
            return self.constant(torch.tensor(operand, dtype=dtype))
        value = self.value(operand)
        return value if operand.dtype is dtype else self.converted(value, dtype)

    def converted(self, value: str, dtype: torch.dtype) -> str:
        """A value in a dtype."""
        kind = helper.np_dtype_to_tensor_dtype(torch.zeros((), dtype=dtype).numpy().dtype)
        return self.node("Cast", value, to=kind)

    def reshaped(self, value: str, shape: Sequence[int]) -> str:
        """In another shape of as many numbers."""
        return self.node("Reshape", value, self.ints(*shape), allowzero=1)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; its name."""
        return self.nodes_of(kind, inputs, 1, **attributes)[0]

    def nodes_of(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs; their names."""
        names = [f"{kind}.{next(self._numbers)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names


def untranslated(call: Call, why: str = "") -> CaptureError:
    """An operation that isn't known here."""
    return CaptureError(f"has an operation that isn't translated to ONNX ({call.op}{why})")
