"""Writes the folder of an exported policy."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import write_new
from ..policy import Policy
from ..sampling.capture.program import CaptureError, Program
from .plan import plan_program, state_names
from .torch_program import torch_program

try:
    import onnx
    import openvino as ov

    from ..sampling.capture.openvino_plan import OUTPUT, plan_model
    from .onnx_model import onnx_model
except ImportError as error:
    raise InputError(f"exporting needs {error.name}: pip install 'paradiffpolicy[export]'")

METADATA = "plan.json"
FORMAT = 1


def export_policy(
    policy: Policy,
    out: str | Path,
    *,
    batch: int = 1,
    torch_too: bool = False,
    about: Mapping[str, Any] | None = None,
    on_model: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Writes a policy's plans as files for other runtimes; the content of ``plan.json``.

    The folder has ``plan.xml`` with ``plan.bin`` (OpenVINO) and ``plan.onnx``, for a plan from noise alone;
    if the sampler continues the last plan, ``plan_warm.…`` for all that follow; and ``plan.json``.

    Args:
        out: the folder; must not exist.
        batch: robots per plan.
        torch_too: whether programs of torch.export are written as well, as ``plan.pt2``.
        about: more to write into ``plan.json``.
        on_model: is called after each of the models.

    Raises:
        InputError: the sampler can't be exported, ``out`` exists, or a package isn't installed.
    """
    kinds = {"plan": False, **({"plan_warm": True} if state_names(policy) else {})}
    metadata: dict[str, Any] = {**described(policy, batch), **(about or {}), "models": {}}
    files: dict[str, Callable[[Path], object]] = {}
    try:
        for name, warm in kinds.items():
            program = plan_program(policy, warm=warm, batch=batch)
            model = openvino_model(program, metadata)
            metadata["models"][name] = ports(model)
            files[f"{name}.xml"] = partial(ov.save_model, model, compress_to_fp16=False)
            files[f"{name}.onnx"] = partial(onnx.save, onnx_model(program, name))
            if torch_too:
                program = plan_program(policy, warm=warm, batch=batch, make_convolution=None)
                files[f"{name}.pt2"] = partial(torch.export.save, torch_program(program))
            on_model()
    except CaptureError as error:
        raise InputError(f"the sampler can't be exported, since it {error}: choose rti, renoised or ddim")

    def write(folder: Path) -> None:
        folder.mkdir()
        for name, save in files.items():
            save(folder / name)
        (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")

    write_new(Path(out), write)
    return metadata


def described(policy: Policy, batch: int) -> dict[str, Any]:
    """What a caller of the models must know."""
    spec = policy.spec
    names = ("task", "n_obs_steps", "n_action_steps", "horizon", "obs_dim", "action_dim", "control_hz")
    return {
        "format": FORMAT,
        **{name: getattr(spec, name) for name in names},
        "batch": batch,
        "repeating_holds_still": spec.contract.is_absolute,
        "contract": dataclasses.asdict(spec.contract),
        "sampler": repr(policy.sampler),
        "network_sha256": policy.model.digest,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "openvino", "onnx")},
    }


TOLD = ("format", "n_obs_steps", "n_action_steps", "horizon", "control_hz", "repeating_holds_still")
"""What the OpenVINO model itself says, for callers that don't read JSON."""


def openvino_model(program: Program, metadata: Mapping[str, Any]) -> Any:
    """The plan as one OpenVINO model."""
    model, _ = plan_model(program)
    for port in model.outputs:
        port.tensor.set_names({port.any_name.removeprefix(OUTPUT)})
    for name in TOLD:
        model.set_rt_info(str(metadata[name]), ["paradiffpolicy", name])
    return model


def ports(model: Any) -> dict[str, Any]:
    """Inputs and outputs of a model: name, shape, type."""

    def described(port: Any) -> dict[str, Any]:
        return {
            "name": port.any_name,
            "shape": list(port.shape),
            "type": port.element_type.to_dtype().name,
        }

    return {"inputs": list(map(described, model.inputs)), "outputs": list(map(described, model.outputs))}
