"""Reads diffusion_policy's U-Net policies with cameras.

There are two.  The hybrid policy's encoder is robomimic's: per camera a ResNet-18, a spatial softmax, a
linear layer and a ReLU; its condition has the observations in the config's order.  The image policy's encoder
is a ResNet-18 with an average; its condition has the pictures first, each kind in the order of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.normalizer import Normalizer
from ..errors import InputError
from ..task import Camera, Contract, ObservationField
from ..types import PolicySpec
from .pictures import UNUSED, resnet_name, with_pictures_last
from .settings import IMPORTED, Settings, scheduler_fields
from .stored_policy import StoredPolicy

KNOWN = (
    "shape_meta",
    "noise_scheduler",
    "horizon",
    "n_action_steps",
    "n_obs_steps",
    "num_inference_steps",
    "obs_as_global_cond",
    "diffusion_step_embed_dim",
    "down_dims",
    "kernel_size",
    "n_groups",
    "cond_predict_scale",
)
"""Options that both policies have."""
KNOWN_ENCODER = (
    "_target_",
    "shape_meta",
    "rgb_model",
    "resize_shape",
    "crop_shape",
    "random_crop",
    "use_group_norm",
    "share_rgb_model",
    "imagenet_norm",
)
"""Options of the image policy's encoder; with or without ``random_crop``, plans see the middle."""
KEYPOINTS, FEATURES = 32, 64
"""Of robomimic's encoder, as the hybrid policy makes it."""
AVERAGED = 512
"""Features of a ResNet-18 with an average."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the pictures of ImageNet."""

Observed = Camera | ObservationField


@dataclass(frozen=True)
class Encoder:
    """An observation encoder of diffusion_policy's.

    Attributes:
        order: of the observations in a step of the condition.
        options: of our encoder, but for ``mean`` and ``std``.
        features: of each picture.
        folders: of the networks' weights in the file, in our networks' order.
        our_name: a weight's name in our camera encoder, of its name in a folder; empty: it isn't needed.
        imagenet: whether pictures are normalized with ``IMAGENET`` after the file's normalizers.
    """

    order: Sequence[Observed]
    options: dict[str, Any]
    features: int
    folders: Sequence[str]
    our_name: Callable[[str], str]
    imagenet: bool = False

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """In our order."""
        return tuple(each for each in self.order if isinstance(each, Camera))

    @property
    def fields(self) -> tuple[ObservationField, ...]:
        """In our order."""
        return tuple(each for each in self.order if isinstance(each, ObservationField))


def read_policy(cfg: Settings, stored: StoredPolicy) -> tuple[PolicySpec, dict[str, Tensor], Normalizer]:
    """A policy's spec, its network's weights, and the normalizer of its numbers.

    Raises:
        InputError: the file lacks something, or has an option that isn't known here.
    """
    spec, encoder = described(cfg)
    mean, std = statistics(encoder, stored)
    spec = replace(spec, encoder_options={**encoder.options, "mean": mean, "std": std})
    for name in stored.tensors:
        if name.endswith(".pool.temperature") and stored.read(name).ne(1).any():
            raise InputError(f"{stored.path}: {name} is {stored.read(name).tolist()}: only 1 is supported")
    weights = stored.weights(spec, names(encoder, stored))
    parts = [(isinstance(each, Camera), step_size(each, encoder)) for each in encoder.order]
    weights = with_pictures_last(weights, steps=spec.n_obs_steps, parts=parts)
    return spec, weights, normalizer(encoder, stored)


def described(cfg: Settings) -> tuple[PolicySpec, Encoder]:
    """The spec that a config means, and its encoder.

    Raises:
        InputError: an option isn't known here.
    """
    read_encoder, options = POLICIES[cfg.get("policy._target_", str).split(".")[-1]]
    require_known(cfg.part("policy"), (*KNOWN, *options))
    if not cfg.get("policy.obs_as_global_cond", bool, True):
        raise cfg.refused("policy.obs_as_global_cond", False, "conditioning by inpainting isn't supported")
    encoder = read_encoder(cfg)
    for kind, those in (("rgb", encoder.cameras), ("low_dim", encoder.fields)):
        if not those:
            raise InputError(f"{cfg.where}: no observation is {kind}: policies with both are read")
    action = cfg.get("policy.shape_meta.action.shape", list)
    task = cfg.get("task.name", str, IMPORTED)
    pusht = task == "pusht_image" and action == [2]
    meaning: dict[str, Any] = {"action_kind": "position", "action_names": ("x", "y"), "action_unit": "px"}
    spec = PolicySpec(
        task=task,
        obs_dim=sum(step_size(each, encoder) for each in encoder.fields),
        action_dim=action[0] if len(action) == 1 else -1,
        n_obs_steps=cfg.get("policy.n_obs_steps", int),
        horizon=cfg.get("policy.horizon", int),
        n_action_steps=cfg.get("policy.n_action_steps", int),
        down_dims=tuple(cfg.get("policy.down_dims", list, [256, 512, 1024])),
        diffusion_step_embed_dim=cfg.get("policy.diffusion_step_embed_dim", int, 256),
        kernel_size=cfg.get("policy.kernel_size", int, 5),
        n_groups=cfg.get("policy.n_groups", int, 8),
        cond_predict_scale=cfg.get("policy.cond_predict_scale", bool, True),
        control_hz=10.0 if pusht else 20.0,
        contract=Contract(encoder.fields, cameras=encoder.cameras, **(meaning if pusht else {})),
        encoder_options=encoder.options,
        image_features=encoder.features * len(encoder.cameras),
        **scheduler_fields(
            cfg.part("policy.noise_scheduler"),
            cfg.get("policy.noise_scheduler._target_", str).split(".")[-1].removesuffix("Scheduler"),
            cfg.get("policy.num_inference_steps", int | None, None),
        ),
    )
    return spec, encoder


def robomimic_encoder(cfg: Settings) -> Encoder:
    """The hybrid policy's encoder.

    Raises:
        InputError: it isn't known here.
    """
    crop = cfg.get("policy.crop_shape", list | None, [76, 76])
    if crop is not None and not cfg.get("policy.eval_fixed_crop", bool, False):
        raise cfg.refused("policy.eval_fixed_crop", False, "random crops at run time aren't supported")
    group = cfg.get("policy.obs_encoder_group_norm", bool, False)
    order = observed(cfg.part("policy.shape_meta.obs"))
    options = {"keypoints": KEYPOINTS, "norm": "group" if group else "batch", "crop": crop}
    folders = [f"obs_encoder.obs_nets.{each.key}." for each in order if isinstance(each, Camera)]
    return Encoder(order, options, FEATURES, folders, robomimic_name)


def multi_image_encoder(cfg: Settings) -> Encoder:
    """The image policy's encoder.

    Raises:
        InputError: it isn't known here.
    """
    about, model = cfg.part("policy.obs_encoder"), cfg.part("policy.obs_encoder.rgb_model")
    for settings, key, known in (
        (about, "_target_", "MultiImageObsEncoder"),
        (model, "_target_", "get_resnet"),
        (model, "name", "resnet18"),
    ):
        value = settings.get(key, str)
        if value.split(".")[-1] != known:
            raise settings.refused(key, value, f"only {known} is read")
    require_known(about, KNOWN_ENCODER)
    require_known(model, ("_target_", "name", "weights"))  # what the weights began as doesn't matter
    order = observed(about.part("shape_meta.obs"))
    order.sort(key=lambda each: (isinstance(each, ObservationField), each.key))
    cameras = [each.key for each in order if isinstance(each, Camera)]
    shared = about.get("share_rgb_model", bool, False)
    # Group normalization replaces the other in copies of the network only, and a shared one isn't copied.
    group = about.get("use_group_norm", bool, False) and not shared
    options = {
        "pool": "average",
        "norm": "group" if group else "batch",
        "shared": shared,
        "resize": one_size(about, "resize_shape"),
        "antialias": False,  # torchvision 0.13, which the project is pinned to, doesn't with tensors
        "crop": one_size(about, "crop_shape"),
    }
    folders = [f"obs_encoder.key_model_map.{key}." for key in (["rgb"] if shared else cameras)]
    imagenet = about.get("imagenet_norm", bool, False)
    return Encoder(order, options, AVERAGED, folders, lambda name: f"backbone.{name}", imagenet)


POLICIES: dict[str, tuple[Callable[[Settings], Encoder], tuple[str, ...]]] = {
    "DiffusionUnetHybridImagePolicy": (
        robomimic_encoder,
        ("crop_shape", "obs_encoder_group_norm", "eval_fixed_crop"),
    ),
    "DiffusionUnetImagePolicy": (multi_image_encoder, ("obs_encoder",)),
}
"""Known policies: what reads the encoder of each, and its options beside ``KNOWN``."""


def require_known(settings: Settings, known: Sequence[str]) -> None:
    """Raises ``InputError`` for a setting that isn't known, unless it is Hydra's, with an underscore."""
    for key, value in settings.values.items():
        if key not in known and not str(key).startswith("_"):
            raise settings.refused(f"{key!s:.60}", value, "this option isn't known here")


def observed(meta: Settings) -> list[Observed]:
    """The observations of a config's ``shape_meta``, in its order.

    Raises:
        InputError: one is neither a picture nor a vector.
    """
    found: list[Observed] = []
    for key, value in meta.values.items():
        about = Settings(value, f"{meta.where}, {key!s:.60}")
        kind, shape = about.get("type", str, "low_dim"), about.get("shape", list)
        if len(shape) != {"rgb": 3, "low_dim": 1}.get(kind):
            raise meta.refused(key, value, "rgb [3, H, W] and low_dim [n] are known")
        if kind == "rgb":
            found.append(Camera(key, (shape[1], shape[2], shape[0])))
        else:
            found.append(ObservationField(key, shape=tuple(shape)))
    return found


def one_size(about: Settings, key: str) -> list[Any] | None:
    """A size in pixels that is the same for all cameras, or None.

    Raises:
        InputError: it isn't the same.
    """
    size: Any = about.get(key, list | dict | None, None)
    if not isinstance(size, dict):
        return size
    sizes = list(size.values())
    if not sizes or not isinstance(sizes[0], list) or any(each != sizes[0] for each in sizes):
        raise about.refused(key, size, "only one size for all cameras is supported")
    return sizes[0]


def robomimic_name(name: str) -> str:
    """A weight's name in our camera encoder, of its name in robomimic's ``VisualCore``.

    It has most modules twice, by name and by place; only the linear layer has no name.
    """
    for theirs, ours in (("pool.nets.", "pool.nets."), ("nets.3.", "out.0.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name.startswith("backbone.nets."):
        return f"backbone.{resnet_name(name.removeprefix('backbone.nets.'))}"
    return "" if name.startswith(("nets.0.", "nets.1.", "pool.pos_")) else name


def names(encoder: Encoder, stored: StoredPolicy) -> dict[str, str]:
    """The network's weights: their names here, and in the file.  What has none here keeps its name."""
    found = {}
    for theirs in stored.tensors:
        folder = next((each for each in encoder.folders if theirs.startswith(each)), None)
        if theirs.startswith("model."):
            found[f"head.{theirs.removeprefix('model.')}"] = theirs
        elif theirs.startswith("obs_encoder.") and not UNUSED.search(theirs):
            ours = theirs
            if folder is not None:
                ours = encoder.our_name(theirs.removeprefix(folder))
                ours = ours and f"encoder.networks.{encoder.folders.index(folder)}.{ours}"
            if ours:
                found[ours] = theirs
    return found


def step_size(each: Observed, encoder: Encoder) -> int:
    """Numbers of an observation in a step of the condition."""
    return encoder.features if isinstance(each, Camera) else each.size or 0


def statistics(encoder: Encoder, stored: StoredPolicy) -> tuple[list[list[float]], list[list[float]]]:
    """What pictures, in [0, 1], are normalized with: mean and deviation, ``[cameras][3]``.

    The file's normalizers map x to s x + o, and ``IMAGENET`` that to (s x + o - m) / d, which is
    (x - (m - o) / s) / (d / s).

    Raises:
        InputError: a camera's normalizer doesn't map brighter to more, all channels alike.
    """
    means, deviations = IMAGENET if encoder.imagenet else ((0.0,) * 3, (1.0,) * 3)
    mean, std = [], []
    for camera in encoder.cameras:
        its = stored.normalizer(camera.key)
        scale, offset = its.scale, its.offset
        if len(scale) != 1 or scale.item() <= 0:
            raise InputError(
                f"{stored.path}: the normalizer of camera {camera.key!r:.60} has the scale "
                f"{scale.tolist()!s:.60}: only one number above 0 is supported"
            )
        mean.append([(m - offset.item()) / scale.item() for m in means])
        std.append([d / scale.item() for d in deviations])
    return mean, std


def normalizer(encoder: Encoder, stored: StoredPolicy) -> Normalizer:
    """The normalizer of the observation vector.

    Raises:
        InputError: a field's normalizer has another size.
    """
    scales, offsets = [], []
    for field in encoder.fields:
        its = stored.normalizer(field.key)
        if len(its.scale) not in (1, field.size):
            raise InputError(
                f"{stored.path}: the normalizer of {field.key!r:.60} has {len(its.scale)} numbers, "
                f"expected {field.size}"
            )
        scales.append(its.scale.expand(field.size or 0))
        offsets.append(its.offset.expand(field.size or 0))
    return Normalizer(torch.cat(scales), torch.cat(offsets))
