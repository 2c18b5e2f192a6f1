"""Reads checkpoints of diffusion_policy: ``.ckpt`` files of its U-Net policies, and of its low-dimensional
transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..models.transformer import DERIVED, TransformerOptions
from ..task import Contract, ObservationField
from ..types import PolicySpec
from . import diffusion_policy_images as images
from .hub import HubFiles
from .settings import IMPORTED, Settings, scheduler_fields
from .stored_policy import StoredPolicy
from .torch_pickle import LARGEST_FILE, StoredTensor, TorchFile, plain

MOST_NAMED = 10
"""Files of a repository that a message names."""

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


def fetch(files: HubFiles) -> Path | None:
    """Downloads a repository's ``.ckpt`` file: the one that is named, or the only one; None if it has none.

    Raises:
        InputError: it has several, not the one that is named, or it is too large.
    """
    name, found = files.name, sorted(file for file in files.sizes if file.endswith(".ckpt"))
    if name.file is not None:
        return files.fetch(name.file, LARGEST_FILE)
    if len(found) > 1:
        first = replace(name, file=found[0])
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise InputError(
            f"{name} has {len(found)} .ckpt files ({', '.join(found[:MOST_NAMED])}{more}): "
            f"name one of them, as {first}"
        )
    return files.fetch(found[0], LARGEST_FILE) if found else None


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
            weights = stored.weights(spec, _network(stored, spec))
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
    name, known = target.split(".")[-1], (*POLICIES, *images.POLICIES)
    if name not in known:
        raise cfg.refused("policy._target_", target, f"{', '.join(known)} are read")
    return name


def described(cfg: Settings) -> PolicySpec:
    """The spec that a low-dimensional policy's config means.

    Raises:
        InputError: an option of it isn't known here.
    """
    network, network_fields = POLICIES[policy_name(cfg)]
    target = cfg.get("policy.model._target_", str)
    if target.split(".")[-1] != network:
        raise cfg.refused("policy.model._target_", target, f"only {network} is read")
    task = cfg.get("task.name", str, IMPORTED)
    pusht = task == "pusht_lowdim" and cfg.get("task.keypoint_dim", int, 2) == 2
    return PolicySpec(
        task="pusht" if pusht else task,
        obs_dim=cfg.get("policy.obs_dim", int),
        action_dim=cfg.get("policy.action_dim", int),
        n_obs_steps=cfg.get("policy.n_obs_steps", int),
        horizon=cfg.get("policy.horizon", int),
        n_action_steps=cfg.get("policy.n_action_steps", int),
        control_hz=10.0 if pusht else 20.0,
        contract=PUSHT if pusht and cfg.get("policy.obs_dim", int) == 20 else Contract(),
        **network_fields(cfg),
        **scheduler_fields(
            cfg.part("policy.noise_scheduler"),
            cfg.get("policy.noise_scheduler._target_", str).split(".")[-1].removesuffix("Scheduler"),
            cfg.get("policy.num_inference_steps", int | None, None),
        ),
    )


def unet_fields(cfg: Settings) -> dict[str, Any]:
    """What a U-Net's config says of a spec's network and executed steps.

    Raises:
        InputError: an option has no equal here.
    """
    if cfg.get("policy.obs_as_local_cond", bool, False):
        raise cfg.refused("policy.obs_as_local_cond", True, "local conditioning isn't supported")
    if not cfg.get("policy.obs_as_global_cond", bool, False):
        raise cfg.refused("policy.obs_as_global_cond", False, "conditioning by inpainting isn't supported")
    if cfg.get("policy.model.local_cond_dim", int | None, None) is not None:
        raise cfg.refused("policy.model.local_cond_dim", "a number", "local conditioning isn't supported")
    alone = cfg.get("policy.pred_action_steps_only", bool, False)
    late = not cfg.get("policy.oa_step_convention", bool, False)
    return {
        "first_executed": 0 if alone else cfg.get("policy.n_obs_steps", int) if late else None,
        "down_dims": tuple(cfg.get("policy.model.down_dims", list)),
        "diffusion_step_embed_dim": cfg.get("policy.model.diffusion_step_embed_dim", int, 256),
        "kernel_size": cfg.get("policy.model.kernel_size", int, 3),
        "n_groups": cfg.get("policy.model.n_groups", int, 8),
        "cond_predict_scale": cfg.get("policy.model.cond_predict_scale", bool, False),
    }


TRANSFORMER_DEFAULTS = TransformerOptions(
    n_layer=12, n_head=12, n_emb=768, p_drop_emb=0.1, p_drop_attn=0.1, causal_attn=False
)
"""Of diffusion_policy's network, for options that a config leaves out."""


def transformer_fields(cfg: Settings) -> dict[str, Any]:
    """What a transformer's config says of a spec's network and executed steps.

    Raises:
        InputError: an option has no equal here.
    """
    if not cfg.get("policy.obs_as_cond", bool, False):
        raise cfg.refused("policy.obs_as_cond", False, "conditioning by inpainting isn't supported")
    if not cfg.get("policy.model.time_as_cond", bool, True):
        raise cfg.refused("policy.model.time_as_cond", False, "encoder-only transformers aren't supported")
    for key, of_policy in (
        ("input_dim", "action_dim"),
        ("output_dim", "action_dim"),
        ("cond_dim", "obs_dim"),
        ("horizon", "horizon"),
        ("n_obs_steps", "n_obs_steps"),
    ):
        size, wanted = cfg.get(f"policy.model.{key}", int), cfg.get(f"policy.{of_policy}", int)
        if size != wanted:
            raise cfg.refused(f"policy.model.{key}", size, f"only policy.{of_policy}={wanted} is supported")
    alone = cfg.get("policy.pred_action_steps_only", bool, False)
    if alone and cfg.get("policy.n_action_steps", int) != cfg.get("policy.horizon", int):
        raise cfg.refused("policy.pred_action_steps_only", True, "plans must be as long as horizon")
    options = {
        name: cfg.get(f"policy.model.{name}", type(default), default)
        for name, default in vars(TRANSFORMER_DEFAULTS).items()
    }
    return {"network": "transformer", "network_options": options, "first_executed": 0 if alone else None}


POLICIES: dict[str, tuple[str, Callable[[Settings], dict[str, Any]]]] = {
    "DiffusionUnetLowdimPolicy": ("ConditionalUnet1D", unet_fields),
    "DiffusionTransformerLowdimPolicy": ("TransformerForDiffusion", transformer_fields),
}
"""Known policies: the network of each, and what reads its config."""


def _tensors(state_dicts: Any, name: str, path: Path) -> dict[str, StoredTensor]:
    stored = state_dicts.get(name) if isinstance(state_dicts, dict) else None
    if not isinstance(stored, dict):
        raise InputError(f"{path} has no state_dicts.{name}: it isn't a checkpoint of a trained policy")
    return {key: value for key, value in stored.items() if isinstance(value, StoredTensor)}


def _network(stored: StoredPolicy, spec: PolicySpec) -> dict[str, str]:
    """The network's weights: their names here, and there."""
    names = {key.removeprefix("model."): key for key in stored.tensors if key.startswith("model.")}
    derived = DERIVED if spec.network == "transformer" else ()
    return {name: key for name, key in names.items() if name not in derived}
