"""Reads checkpoints of diffusion_policy: ``.ckpt`` files of its low-dimensional U-Net policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, finite_weight
from ..data.normalizer import Normalizer
from ..errors import InputError
from ..models.networks import check_weights
from ..task import Contract, ObservationField
from ..types import PolicySpec
from .hub import HubFiles
from .settings import IMPORTED, Settings, scheduler_fields
from .torch_pickle import LARGEST_FILE, StoredTensor, TorchFile, plain

POLICY, NETWORK = "DiffusionUnetLowdimPolicy", "ConditionalUnet1D"
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
        spec = described(cfg)
        name = "ema_model" if cfg.get("training.use_ema", bool, False) else "model"
        stored = _tensors(content["state_dicts"], name, path)
        check_weights(spec, _network(stored))
        observation, action = (_normalizer(file, stored, part, path) for part in ("obs", "action"))
        weights = {
            name: finite_weight(name, file.read(each), path) for name, each in _network(stored).items()
        }
    finally:
        file.close()
    info = {"origin": {"project": "diffusion_policy", "file": path.name, "weights": name}}
    return Checkpoint(spec, weights, observation, action, info, torch.float32)


def described(cfg: Settings) -> PolicySpec:
    """The spec that a config means.

    Raises:
        InputError: the policy, or an option of it, isn't known here.
    """
    for key, known in (("policy._target_", POLICY), ("policy.model._target_", NETWORK)):
        target = cfg.get(key, str)
        if target.split(".")[-1] != known:
            raise cfg.refused(key, target, f"only {known} is read")
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


def _network(stored: dict[str, StoredTensor]) -> dict[str, Any]:
    return {key.removeprefix("model."): each for key, each in stored.items() if key.startswith("model.")}


def _normalizer(file: TorchFile, stored: dict[str, StoredTensor], part: str, path: Path) -> Normalizer:
    names = [f"normalizer.params_dict.{part}.{name}" for name in ("scale", "offset")]
    for name in names:
        if name not in stored:
            raise InputError(f"{path} has no {name}, its normalizer: save the checkpoint again")
    return Normalizer(*(file.read(stored[name]).double() for name in names))
