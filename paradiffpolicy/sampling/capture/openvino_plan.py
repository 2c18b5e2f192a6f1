"""A program as an OpenVINO model."""

from __future__ import annotations

from collections.abc import Callable

import openvino as ov
import openvino.opset13 as op
import torch

from ..driver import State
from .openvino_graph import ModelGraph
from .openvino_ops import WHOLE
from .program import Program
from .tape import Tape, record

OUTPUT = "output."
"""Begins the names of a model's outputs, which must differ from its inputs'."""

WARM = "warm"
"""Name of the input that chooses between a program and its warm one."""


def plan_model(program: Program) -> tuple[ov.Model, int]:
    """The whole plan, and the bytes of its constants; its ports are named as the program's inputs, and
    ``OUTPUT`` and its outputs.

    Raises:
        CaptureError: an operation isn't translated.
    """
    model, size = one_plan(program)
    if program.warm is None:
        return model, size
    warm, warm_size = one_plan(program.warm)  # most of whose constants are the same
    return either(model, warm), max(size, warm_size)


def either(cold: ov.Model, warm: ov.Model) -> ov.Model:
    """Two models with the same outputs as one, which runs the one that its input ``WARM`` says.  Constants
    that both have are packed once."""
    choice = op.parameter([], ov.Type.boolean, name=WARM)
    choice.output(0).set_names({WARM})
    branch, parameters = op.if_op(choice.output(0)), [choice]
    branch.set_then_body(warm)
    branch.set_else_body(cold)
    inputs = [{each.friendly_name: each for each in model.get_parameters()} for model in (warm, cold)]
    for name, like in (inputs[1] | inputs[0]).items():
        parameter = op.parameter(list(like.shape), like.element_type, name=name)
        parameter.output(0).set_names({name})
        parameters.append(parameter)
        branch.set_input(parameter.output(0), *(each.get(name) for each in inputs))
    outputs = [{each.output(0).any_name: each for each in model.get_results()} for model in (warm, cold)]
    results = []
    for name, result in outputs[0].items():
        results.append(op.result(branch.set_output(result, outputs[1][name])))
        results[-1].output(0).set_names({name})
    return ov.Model(results, parameters, "plan")


def one_plan(program: Program) -> tuple[ov.Model, int]:
    """The model of one program, and the bytes of its constants."""

    def recorded(function: Callable[[], State]) -> Tape:
        return record(function, whole=WHOLE)

    plan = ModelGraph(program.inputs)
    initial_tape = recorded(lambda: program.init(program.inputs))
    plan.add(initial_tape)

    # An iteration, on tensors of its own so that its graph has its own parameters.
    state = {name: value.clone() for name, value in initial_tape.result.items()}
    iteration = recorded(lambda: program.iterate(state))
    changed = [name for name in state if iteration.result[name] is not state[name]]
    body = ModelGraph(state)
    body.add(iteration)
    results = {name: op.result(body.value(iteration.result[name])) for name in changed}
    if program.count is None:
        done = recorded(lambda: {"done": program.done(iteration.result)})
        body.add(done)
        again = op.result(op.logical_not(body.value(done.result["done"])))
    else:
        again = op.result(body.constant(torch.tensor(True)))
    limit = program.limit if program.count is None else program.count

    loop = op.loop(plan.constant(torch.tensor(limit)), plan.constant(torch.tensor(True)))
    loop.set_function(ov.Model([again, *results.values()], list(body.parameters.values()), "iteration"))
    loop.set_special_body_ports([-1, 0])
    for name, parameter in body.parameters.items():
        initial = plan.output(initial_tape.result[name])
        if name in results:
            loop.set_merged_input(parameter, initial, results[name].output(0))
        else:
            loop.set_invariant_input(parameter, initial)
    after = {name: value.clone() for name, value in state.items()}
    for name, value in after.items():
        if name in results:
            plan.stands_for(value, loop.get_iter_value(results[name].output(0), -1))
        else:
            plan.stands_for(value, plan.output(initial_tape.result[name]))
    loop.validate_and_infer_types()

    finish = recorded(lambda: program.finish(program.inputs, after))
    plan.add(finish)
    outputs = []
    for name, value in finish.result.items():
        result = op.result(plan.output(value))
        result.output(0).set_names({OUTPUT + name})
        outputs.append(result)
    return ov.Model(outputs, list(plan.parameters.values()), "plan"), plan.nbytes + body.nbytes
