"""Plans as files for other runtimes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import require_absent
from .building import named_sampler, student_policy, task_checkpoint

if TYPE_CHECKING:
    from ..policy import Policy
    from .schema import ExportConfig


def export(cfg: ExportConfig) -> None:
    """A policy and its sampler as OpenVINO and ONNX models, in a new folder."""
    require_absent(Path(cfg.out))
    from ..export.folder import export_policy
    from ..export.plan import state_names
    from ..tables import bar

    policy = exported_policy(cfg)
    try:
        n_models = 1 + bool(state_names(policy))
    except InputError as error:
        raise InputError(f"sampler.{cfg.sampler_name}: {error}")
    about = {"sampler_name": cfg.sampler_name, "sampler_settings": cfg.sampler[cfg.sampler_name]}
    with bar("exporting", n_models, "model") as done:
        metadata = export_policy(
            policy, cfg.out, batch=cfg.batch, torch_too=cfg.torch_too, about=about, on_model=done.update
        )
    for name, model in metadata["models"].items():
        inputs = ", ".join(f"{port['name']} {port['shape']}" for port in model["inputs"])
        print(f"{cfg.out}/{name}: {inputs} -> actions {model['outputs'][0]['shape']}")


def exported_policy(cfg: ExportConfig) -> Policy:
    """The checkpoint's policy, or its student, with the sampler."""
    from ..policy import Policy
    from ..sampling.spec import spec_sampler

    checkpoint = task_checkpoint(cfg.checkpoint, cfg.task)
    if cfg.n_action_steps is not None:
        checkpoint = checkpoint.with_spec(n_action_steps=cfg.n_action_steps)
    own = cfg.sampler.get(cfg.sampler_name, {}).get("checkpoint")
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec))
    if own is not None and not policy.spec.student_timesteps:
        policy = student_policy(cfg, cfg.sampler_name, policy, own)
    policy = replace(policy, sampler=named_sampler(cfg, cfg.sampler_name, policy.spec))
    return policy.with_guidance(cfg.guidance_scale)
