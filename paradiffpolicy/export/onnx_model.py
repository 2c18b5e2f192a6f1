"""A whole plan as one ONNX model: the iterations are the body of a Loop, and the weights are there once.

The same tape as OpenVINO's, another table of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import helper

from .. import __version__
from ..sampling.capture.openvino_ops import WHOLE
from ..sampling.capture.program import Program
from ..sampling.capture.tape import Tape, record
from ..sampling.driver import State
from .onnx_graph import OnnxGraph
from .onnx_ops import BUILDS

OPSET, IR_VERSION = 18, 8
"""Of ONNX 1.13 and ONNX Runtime 1.14: what has the operations Mish and ReduceMean over given axes."""


def onnx_model(program: Program, name: str) -> onnx.ModelProto:
    """The program's model; inputs and outputs are named as the program's.

    Raises:
        CaptureError: an operation isn't translated.
    """

    def recorded(function: Callable[[], State]) -> Tape:
        return record(function, whole=WHOLE)

    plan = OnnxGraph(BUILDS)
    for key, example in program.inputs.items():
        plan.stands_for(example, key)
    start = recorded(lambda: program.init(program.inputs))
    plan.add(start)

    # An iteration, on tensors of its own; what it only reads it sees from outside.
    state = {key: value.clone() for key, value in start.result.items()}
    iteration = recorded(lambda: program.iterate(state))
    changed = [key for key in state if iteration.result[key] is not state[key]]
    body = plan.inner()
    for key, value in state.items():
        body.stands_for(value, f"state.{key}" if key in changed else plan.value(start.result[key]))
    body.add(iteration)
    if program.count is None:
        done = recorded(lambda: {"done": program.done(iteration.result)})
        body.add(done)
        again = body.node("Not", body.value(done.result["done"]))
    else:
        again = body.node("Identity", "go_on")
    results = [body.node("Identity", body.value(iteration.result[key])) for key in changed]
    boolean, count = (), program.limit if program.count is None else program.count
    loop_body = helper.make_graph(
        body.nodes,
        "iteration",
        [
            helper.make_tensor_value_info("iteration", onnx.TensorProto.INT64, ()),
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, boolean),
            *(value_info(f"state.{key}", state[key]) for key in changed),
        ],
        [
            helper.make_tensor_value_info(again, onnx.TensorProto.BOOL, boolean),
            *(value_info(name, state[key]) for name, key in zip(results, changed, strict=True)),
        ],
    )
    initial = [plan.value(start.result[key]) for key in changed]
    limits = plan.constant(torch.tensor(count)), plan.constant(torch.tensor(True))
    last = plan.nodes_of("Loop", [*limits, *initial], len(changed), body=loop_body)
    after = {key: value.clone() for key, value in state.items()}
    for key, value in after.items():
        plan.stands_for(value, last[changed.index(key)] if key in changed else plan.value(start.result[key]))

    finish = recorded(lambda: program.finish(program.inputs, after))
    plan.add(finish)
    for key, value in finish.result.items():
        plan.nodes.append(helper.make_node("Identity", [plan.value(value)], [key]))
    graph = helper.make_graph(
        plan.nodes,
        name,
        [value_info(key, value) for key, value in program.inputs.items()],
        [value_info(key, value) for key, value in finish.result.items()],
        plan.initializers,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="paradiffpolicy",
        producer_version=__version__,
    )


def value_info(name: str, value: torch.Tensor) -> Any:
    """The declaration of an input or output."""
    kind = helper.np_dtype_to_tensor_dtype(value.detach().numpy().dtype)
    return helper.make_tensor_value_info(name, kind, tuple(value.shape))
