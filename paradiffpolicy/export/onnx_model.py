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
    plan = OnnxGraph(BUILDS)
    for key, example in program.inputs.items():
        plan.stands_for(example, key)
    start = recorded(lambda: program.init(program.inputs))
    plan.add(start)

    initial = {key: plan.value(value) for key, value in start.result.items()}
    changed, body = iteration_graph(plan, program, start.result, initial)
    count = program.limit if program.count is None else program.count
    limits = plan.constant(torch.tensor(count)), plan.constant(torch.tensor(True))
    carried = [*limits, *(initial[key] for key in changed)]
    last = dict(zip(changed, plan.nodes_of("Loop", carried, len(changed), body=body), strict=True))
    after = {key: value.clone() for key, value in start.result.items()}
    for key, value in after.items():
        plan.stands_for(value, last.get(key, initial[key]))

    finish = recorded(lambda: program.finish(program.inputs, after))
    plan.add(finish)
    for key, value in finish.result.items():
        plan.nodes.append(helper.make_node("Identity", [plan.value(value)], [key]))
    return helper.make_model(
        helper.make_graph(plan.nodes, name, ports(program.inputs), ports(finish.result), plan.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="paradiffpolicy",
        producer_version=__version__,
    )


def iteration_graph(
    plan: OnnxGraph, program: Program, example: State, initial: dict[str, str]
) -> tuple[list[str], onnx.GraphProto]:
    """The body of the Loop, and the parts of the state that it changes; the others, whose names are in
    ``initial``, it sees from outside."""
    state = {key: value.clone() for key, value in example.items()}  # of its own, so that it has its own ids
    iteration = recorded(lambda: program.iterate(state))
    changed = [key for key in state if iteration.result[key] is not state[key]]
    body = plan.inner()
    for key, value in state.items():
        body.stands_for(value, f"state.{key}" if key in changed else initial[key])
    body.add(iteration)
    if program.count is None:
        done = recorded(lambda: {"done": program.done(iteration.result)})
        body.add(done)
        again = body.node("Not", body.value(done.result["done"]))
    else:
        again = body.node("Identity", "go_on")
    results = [body.node("Identity", body.value(iteration.result[key])) for key in changed]
    scalars = torch.tensor(0), torch.tensor(True)
    inputs = {"iteration": scalars[0], "go_on": scalars[1], **{f"state.{key}": state[key] for key in changed}}
    outputs = {again: scalars[1], **{name: state[key] for name, key in zip(results, changed, strict=True)}}
    return changed, helper.make_graph(body.nodes, "iteration", ports(inputs), ports(outputs))


def recorded(function: Callable[[], State]) -> Tape:
    """The function's calls, composite ones whole."""
    return record(function, whole=WHOLE)


def ports(values: State) -> list[Any]:
    """The declarations of inputs or outputs, by their names."""
    return [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.detach().numpy().dtype), tuple(value.shape)
        )
        for name, value in values.items()
    ]
