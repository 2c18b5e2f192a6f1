"""Reads checkpoints of LeRobot, 0.3 to 0.6: folders of its ``diffusion`` policies."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..checkpoint import Checkpoint, finite_weight
from ..data.normalizer import Normalizer
from ..errors import InputError, first_line
from ..files import contained, exists, require_regular
from ..models.networks import check_weights
from ..task import Camera, Contract, ObservationField
from ..types import PolicySpec
from .hub import HubFiles
from .pictures import UNUSED, resnet_name, with_pictures_last
from .settings import IMPORTED, Settings, scheduler_fields

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
LARGEST_JSON, LARGEST_WEIGHTS = 2**22, 2**36
"""Bytes that are read at most."""
ORDER = {"STATE": 0, "VISUAL": 1, "ENV": 2}
"""Kinds of observations, as they follow each other in the condition."""
RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
"""What a normalization maps to -1 and 1."""
EPS = 1e-8


def recognises(path: Path) -> bool:
    """Whether a path may be such a checkpoint."""
    return exists(path / CONFIG)


def fetch(files: HubFiles) -> Path | None:
    """Downloads a checkpoint's files from a repository, the weights last; None if it has no such checkpoint.

    Raises:
        InputError: a file is missing or too large, or the config has something that isn't known here.
    """
    if CONFIG not in files.sizes:
        return None
    folder = files.fetch(CONFIG, LARGEST_JSON).parent
    described(Settings(read_json(folder, CONFIG), f"{files.name}, {CONFIG}"))
    for name in PROCESSORS:
        if name in files.sizes:
            files.fetch(name, LARGEST_JSON)
    for name in _state_files(folder):
        files.fetch(name, LARGEST_WEIGHTS)
    files.fetch(WEIGHTS, LARGEST_WEIGHTS)
    return folder


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        InputError: it is damaged, or has something that isn't known here; the message names it.
    """
    config = Settings(read_json(path, CONFIG), str(path / CONFIG))
    spec, features = described(config)
    tensors = read_tensors(path, WEIGHTS)
    stats = {**_old_statistics(tensors), **_statistics(path)}
    old = any(key.startswith("normalize_inputs.") for key in tensors)
    mapping = config.get("normalization_mapping", dict)
    statistics = partial(_statistics_of, mapping=mapping, stats=stats, old=old, path=path)
    if spec.contract.cameras:
        seen = [statistics(camera.key, "VISUAL", (3, 1, 1)) for camera in spec.contract.cameras]
        mean, std = ([part.flatten().tolist() for part in parts] for parts in zip(*seen, strict=True))
        spec = replace(spec, encoder_options={**spec.encoder_options, "mean": mean, "std": std})
    stored = our_weights(spec, features, tensors)
    check_weights(spec, stored)
    weights = {name: finite_weight(name, each, path / WEIGHTS) for name, each in stored.items()}
    observed = [
        normalizer(*statistics(key, kind, (size,))) for key, kind, size in features if kind != "VISUAL"
    ]
    action = normalizer(*statistics("action", "ACTION", (spec.action_dim,)))
    parts = (torch.cat([getattr(each, name) for each in observed]) for name in ("scale", "offset"))
    info = {"origin": {"project": "lerobot", "file": path.name}}
    return Checkpoint(spec, weights, Normalizer(*parts), action, info, torch.float32)


def described(config: Settings) -> tuple[PolicySpec, list[tuple[str, str, int]]]:
    """The spec that a config means, and its observations in the condition's order: key, kind, and numbers per
    step in the condition.

    Raises:
        InputError: the policy, or an option of it, isn't known here.
    """
    kind = config.get("type", str)
    if kind != "diffusion":
        raise config.refused("type", kind, "only diffusion policies are read")
    features, cameras = [], []
    for key, feature in config.get("input_features", dict).items():
        about = Settings(feature, f"{config.where}, input_features.{key}")
        kind, shape = about.get("type", str), about.get("shape", list)
        sizes = {"STATE": 1, "ENV": 1, "VISUAL": 3}.get(kind)
        if sizes is None or len(shape) != sizes or any(type(n) is not int for n in shape):
            raise config.refused(
                f"input_features.{key}", feature, "STATE and ENV vectors, and VISUAL [3, H, W] are known"
            )
        if kind == "VISUAL":
            cameras.append(Camera(key, (shape[1], shape[2], shape[0])))
        features.append((key, kind, 0 if kind == "VISUAL" else shape[0]))
    encoder = encoder_options(config) if cameras else {}
    each = 2 * encoder.get("keypoints", 0)
    features = [(key, kind, each if kind == "VISUAL" else size) for key, kind, size in features]
    features.sort(key=lambda feature: ORDER[feature[1]])
    vectors = [kind for _, kind, _ in features if kind != "VISUAL"]
    if len(set(vectors)) != len(vectors) or not vectors:
        raise config.refused(
            "input_features", [key for key, *_ in features], "one STATE and one ENV are known"
        )
    action = Settings(config.get("output_features", dict), config.where).part("action").get("shape", list)
    fields = tuple(ObservationField(key, shape=(size,)) for key, kind, size in features if kind != "VISUAL")
    spec = PolicySpec(
        task=IMPORTED,
        obs_dim=sum(size for _, kind, size in features if kind != "VISUAL"),
        action_dim=action[0] if len(action) == 1 else -1,
        n_obs_steps=config.get("n_obs_steps", int),
        horizon=config.get("horizon", int),
        n_action_steps=config.get("n_action_steps", int),
        down_dims=tuple(config.get("down_dims", list)),
        diffusion_step_embed_dim=config.get("diffusion_step_embed_dim", int),
        kernel_size=config.get("kernel_size", int),
        n_groups=config.get("n_groups", int),
        cond_predict_scale=config.get("use_film_scale_modulation", bool),
        contract=Contract(fields, cameras=tuple(cameras)),
        encoder_options=encoder,
        image_features=each * len(cameras),
        **scheduler_fields(
            config,
            config.get("noise_scheduler_type", str),
            config.get("num_inference_steps", int | None, None),
        ),
    )
    return spec, features


def encoder_options(config: Settings) -> dict[str, Any]:
    """The encoder of a config with cameras.

    Raises:
        InputError: it isn't known here.
    """
    backbone = config.get("vision_backbone", str)
    if backbone != "resnet18":
        raise config.refused("vision_backbone", backbone, "only resnet18 is read")
    crop, ratio = config.get("crop_shape", list | None, None), config.get("crop_ratio", int | float, 1.0)
    if crop is None and ratio != 1:
        raise config.refused("crop_ratio", ratio, "only with the crop_shape that it gives")
    return {
        "keypoints": config.get("spatial_softmax_num_keypoints", int),
        "norm": "group" if config.get("use_group_norm", bool) else "batch",
        "shared": not config.get("use_separate_rgb_encoder_per_camera", bool),
        "resize": config.get("resize_shape", list | None, None),
        "crop": crop,
    }


def our_weights(
    spec: PolicySpec, features: list[tuple[str, str, int]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The network's weights by their names here."""
    prefix = re.compile(r"(?:_orig_mod\.)?diffusion\.(?:_orig_mod\.)?(unet|rgb_encoder)\.(.*)")
    head, encoder = {}, {}
    for found, value in ((prefix.match(key), value) for key, value in tensors.items()):
        if found and found[1] == "unet":
            head[our_name(found[2])] = value
        elif found and not UNUSED.search(found[2]):
            encoder[encoder_name(found[2])] = value
    if not spec.contract.cameras:
        return head
    parts = [(kind == "VISUAL", size) for _, kind, size in features]
    head = with_pictures_last(head, steps=spec.n_obs_steps, parts=parts)
    return encoder | {f"head.{name}": value for name, value in head.items()}


def encoder_name(name: str) -> str:
    """A weight's name here, of its name in an encoder, or in one of several."""
    found = re.fullmatch(r"(?:(\d+)\.)?(backbone|pool|out)\.(.*)", name)
    if found is None:
        return f"encoder.{name}"
    index, part, rest = found[1] or "0", found[2], found[3]
    rest = resnet_name(rest) if part == "backbone" else rest if part == "pool" else f"0.{rest}"
    return f"encoder.networks.{index}.{part}.{rest}"


def our_name(name: str) -> str:
    """A weight's name here: diffusion_policy's, of which LeRobot renamed some."""
    name = re.sub(r"\.conv([12])\.block\.", lambda found: f".blocks.{int(found[1]) - 1}.block.", name)
    return re.sub(r"^((?:down|up)_modules\.\d+\.2)\.(weight|bias)$", r"\1.conv.\2", name)


def read_json(folder: Path, name: str) -> Any:
    """A JSON file in a folder.

    Raises:
        InputError: it is missing, too large, or no JSON.
    """
    path = _inside(folder, name)
    require_regular(path, LARGEST_JSON)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({first_line(error):.160}): copy the checkpoint again")


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file in a folder.

    Raises:
        InputError: it is missing or damaged.
    """
    path = _inside(folder, name)
    require_regular(path, LARGEST_WEIGHTS)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except Exception as error:  # its own kind, and any that a damaged header leads to
        raise InputError(
            f"{path} is no safetensors file ({first_line(error):.100}): copy the checkpoint again"
        )


def _inside(folder: Path, name: str) -> Path:
    """A file's path in a folder.

    Raises:
        InputError: its name isn't a plain one, it isn't there, or leads out of the folder.
    """
    path = folder / name
    if Path(name).name != name or not exists(path):
        raise InputError(f"{path} is missing: copy the whole checkpoint folder again")
    return contained(path, folder)


def _statistics(folder: Path) -> dict[str, Tensor]:
    """``<feature>.<statistic>`` of the processors' files, which 0.4 and later write."""
    found: dict[str, Tensor] = {}
    for name in _state_files(folder):
        found |= read_tensors(folder, name)
    return found


def _state_files(folder: Path) -> Iterator[str]:
    """Names of the files that hold the statistics, as the processors' JSON files say."""
    for name in PROCESSORS:
        if not exists(folder / name):
            continue
        about = Settings(read_json(folder, name), str(folder / name))
        for step in about.get("steps", list):
            steps = Settings(step, about.where)
            if steps.get("registry_name", str, "") in ("normalizer_processor", "unnormalizer_processor"):
                yield steps.get("state_file", str)
            elif steps.get("registry_name", str, "") == "rename_observations_processor":
                renamed = steps.get("config", dict, {}).get("rename_map", {})
                if renamed:
                    raise about.refused("rename_map", renamed, "rename the observations yourself")


def _old_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of 0.3's buffers, whose names have ``_`` for ``.``."""
    found = {}
    for key, value in tensors.items():
        part = re.fullmatch(r"(?:normalize_inputs|unnormalize_outputs)\.buffer_(\w+)\.(\w+)", key)
        if part:
            found[f"{part[1]}.{part[2]}"] = value
    return found


def normalizer(middle: Tensor, half: Tensor) -> Normalizer:
    """Maps ``middle`` to 0, and ``middle + half`` to 1."""
    return Normalizer(1 / half, -middle / half)


def _statistics_of(
    key: str,
    kind: str,
    shape: tuple[int, ...],
    mapping: dict[str, Any],
    stats: dict[str, Tensor],
    old: bool,
    path: Path,
) -> tuple[Tensor, Tensor]:
    """What one feature is normalized with: x to (x - the first) / the second.  A kind that the mapping lacks
    isn't normalized."""
    mode = mapping.get(kind, "IDENTITY")
    one = torch.ones(shape, dtype=torch.float64)
    if mode == "IDENTITY":
        return 0 * one, one
    if mode not in (*RANGES, "MEAN_STD"):
        raise InputError(f"{path}: normalization_mapping.{kind}={mode!r:.40} isn't known")

    def statistic(name: str) -> Tensor:
        names = (f"{key}.{name}", f"{key.replace('.', '_')}.{name}")
        values = next((stats[each] for each in names if each in stats), None)
        if values is None or tuple(values.shape) != shape:
            raise InputError(
                f"{path} has no statistic {key}.{name} of {math.prod(shape)} numbers, its normalizer's"
            )
        return finite_weight(names[0], values, path).double()

    if mode == "MEAN_STD":
        return statistic("mean"), statistic("std") + EPS
    low, high = (statistic(name) for name in RANGES[mode])
    width = high - low
    width = width + EPS if old else torch.where(width == 0, EPS, width)
    return low + width / 2, width / 2
