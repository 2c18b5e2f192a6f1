"""Reads checkpoints of diffusion_policy: ``.ckpt`` files of its U-Net policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..task import Contract, ObservationField
from ..types import PolicySpec
from . import diffusion_policy_images as images
from .settings import IMPORTED, Settings, scheduler_fields
from .stored_policy import StoredPolicy
from .torch_pickle import StoredTensor, TorchFile, plain

POLICY, NETWORK = "DiffusionUnetLowdimPolicy", "ConditionalUnet1D"

PUSHT = Contract(
    (
        ObservationField("keypoint", shape=(9, 2), unit="px"),
        ObservationField("state", 0, 2, shape=(5,), unit="px"),
    ),
    "position",
    ("x", "y"),
    "px",
)
"""Of its PushT task with keypoints."""


def recognises(path: Path) -> bool:
    """Whether a path may be such a checkpoint."""
    return path.suffix == ".ckpt"


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint: the averaged weights, if it was trained with them.

    Raises:
        InputError: it is damaged, or has something that isn't known here; the message names it.
    """
    file = TorchFile(path)
    try:
        content = file.content
        if not isinstance(content, dict) or not {"cfg", "state_dicts"} <= content.keys():
            raise InputError(f"{path} isn't a checkpoint of diffusion_policy: it has no cfg and state_dicts")
        cfg = Settings(plain(content["cfg"]), str(path))
        name = "ema_model" if cfg.get("training.use_ema", bool, False) else "model"
        stored = StoredPolicy(file, _tensors(content["state_dicts"], name, path))
        if policy_name(cfg) in images.POLICIES:
            spec, weights, observation = images.read_policy(cfg, stored)
        else:
            spec, observation = described(cfg), stored.normalizer("obs")
            weights = stored.weights(spec, _network(stored))
        action = stored.normalizer("action")
    finally:
        file.close()
    info = {"origin": {"project": "diffusion_policy", "file": path.name, "weights": name}}
    return Checkpoint(spec, weights, observation, action, info, torch.float32)


def policy_name(cfg: Settings) -> str:
    """The class of a config's policy.

    Raises:
        InputError: it isn't known here.
    """
    target = cfg.get("policy._target_", str)
    name, known = target.split(".")[-1], (POLICY, *images.POLICIES)
    if name not in known:
        raise cfg.refused("policy._target_", target, f"{', '.join(known)} are read")
    return name


def described(cfg: Settings) -> PolicySpec:
    """The spec that a low-dimensional policy's config means.

    Raises:
        InputError: an option of it isn't known here.
    """
    target = cfg.get("policy.model._target_", str)
    if target.split(".")[-1] != NETWORK:
        raise cfg.refused("policy.model._target_", target, f"only {NETWORK} is read")
    if cfg.get("policy.obs_as_local_cond", bool, False):
        raise cfg.refused("policy.obs_as_local_cond", True, "local conditioning isn't supported")
    if not cfg.get("policy.obs_as_global_cond", bool, False):
        raise cfg.refused("policy.obs_as_global_cond", False, "conditioning by inpainting isn't supported")
    if cfg.get("policy.model.local_cond_dim", int | None, None) is not None:
        raise cfg.refused("policy.model.local_cond_dim", "a number", "local conditioning isn't supported")
    task = cfg.get("task.name", str, IMPORTED)
    pusht = task == "pusht_lowdim" and cfg.get("task.keypoint_dim", int, 2) == 2
    alone = cfg.get("policy.pred_action_steps_only", bool, False)
    steps = cfg.get("policy.n_obs_steps", int)
    late = not cfg.get("policy.oa_step_convention", bool, False)
    return PolicySpec(
        task="pusht" if pusht else task,
        obs_dim=cfg.get("policy.obs_dim", int),
        action_dim=cfg.get("policy.action_dim", int),
        n_obs_steps=steps,
        horizon=cfg.get("policy.horizon", int),
        n_action_steps=cfg.get("policy.n_action_steps", int),
        first_executed=0 if alone else steps if late else None,
        down_dims=tuple(cfg.get("policy.model.down_dims", list)),
        diffusion_step_embed_dim=cfg.get("policy.model.diffusion_step_embed_dim", int, 256),
        kernel_size=cfg.get("policy.model.kernel_size", int, 3),
        n_groups=cfg.get("policy.model.n_groups", int, 8),
        cond_predict_scale=cfg.get("policy.model.cond_predict_scale", bool, False),
        control_hz=10.0 if pusht else 20.0,
        contract=PUSHT if pusht and cfg.get("policy.obs_dim", int) == 20 else Contract(),
        **scheduler_fields(
            cfg.part("policy.noise_scheduler"),
            cfg.get("policy.noise_scheduler._target_", str).split(".")[-1].removesuffix("Scheduler"),
            cfg.get("policy.num_inference_steps", int | None, None),
        ),
    )


def _tensors(state_dicts: Any, name: str, path: Path) -> dict[str, StoredTensor]:
    stored = state_dicts.get(name) if isinstance(state_dicts, dict) else None
    if not isinstance(stored, dict):
        raise InputError(f"{path} has no state_dicts.{name}: it isn't a checkpoint of a trained policy")
    return {key: value for key, value in stored.items() if isinstance(value, StoredTensor)}


def _network(stored: StoredPolicy) -> dict[str, str]:
    """The network's weights: their names here, and there."""
    return {key.removeprefix("model."): key for key in stored.tensors if key.startswith("model.")}
