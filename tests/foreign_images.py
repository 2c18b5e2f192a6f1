"""diffusion_policy's encoders of pictures, made of PyTorch's own layers, and files of policies with them."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from .foreign import ckpt, weights

IMAGES = "diffusion_policy.policy.diffusion_unet_image_policy.DiffusionUnetImagePolicy"
HYBRID = "diffusion_policy.policy.diffusion_unet_hybrid_image_policy.DiffusionUnetHybridImagePolicy"
META = {
    "obs": {
        "wrist": {"shape": [3, 97, 99], "type": "rgb"},
        "pose": {"shape": [3], "type": "low_dim"},
        "front": {"shape": [3, 90, 86], "type": "rgb"},
        "grip": {"shape": [1]},
    },
    "action": {"shape": [2]},
}
"""Neither sorted, nor one kind after the other."""
PUSHT = {
    "obs": {"image": {"shape": [3, 96, 96], "type": "rgb"}, "agent_pos": {"shape": [2], "type": "low_dim"}},
    "action": {"shape": [2]},
}
"""Of the task ``pusht_image``."""
RANGES = {"wrist": (2.0, -1.0), "front": (1.7, -0.6), "pose": (0.5, 0.25), "grip": (1.5, -0.5)}
"""Scale and offset of the normalizers."""


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int, norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), norm(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), norm(outer)
        self.downsample = None
        if stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, 2, bias=False), norm(outer))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def grouped(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels)


@functools.cache
def resnet(seed: int, group: bool) -> nn.Sequential:
    """A ResNet-18 up to its feature map, with torchvision's names and statistics of its own."""
    torch.manual_seed(seed)
    norm = grouped if group else nn.BatchNorm2d
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        bn1=norm(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )
    for k, (inner, outer) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512))):
        blocks = Residual(inner, outer, 1 + (k > 0), norm), Residual(outer, outer, 1, norm)
        layers[f"layer{k + 1}"] = nn.Sequential(*blocks)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return network.eval().requires_grad_(False)


class Keypoints(nn.Module):
    """robomimic's spatial softmax."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(512, 32, 1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("pos_x", x.reshape(1, -1))
        self.register_buffer("pos_y", y.reshape(1, -1))

    def forward(self, x):
        share = (self.nets(x).flatten(2) / self.temperature).softmax(-1)
        return torch.stack([(share * place).sum(-1) for place in (self.pos_x, self.pos_y)], dim=-1)


class VisualCore(nn.Module):
    """robomimic's encoder of one camera, whose modules are in its state dict twice."""

    def __init__(self, backbone: nn.Sequential, height: int, width: int) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.nets = nn.Sequential(*backbone)
        self.backbone.forward = self.backbone.nets.forward
        self.pool = Keypoints(-(-height // 32), -(-width // 32))
        self.nets = nn.Sequential(self.backbone, self.pool, nn.Flatten(), nn.Linear(64, 64))

    def forward(self, x):
        return self.nets(x)


def center(x: torch.Tensor, size) -> torch.Tensor:
    """The middle of pictures ``[..., H, W]``, rounded as torchvision does."""
    if size is None:
        return x
    top, left = (round((n - m) / 2.0) for n, m in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def ranged(key: str, x: torch.Tensor) -> torch.Tensor:
    scale, offset = RANGES[key]
    return x * scale + offset


class Hybrid:
    """The hybrid policy's encoder: ``modules`` have its weights."""

    def __init__(self, group: bool = True, crop=(84, 84), meta=META) -> None:
        self.group, self.crop, self.meta = group, crop, meta
        torch.manual_seed(5)
        self.modules = nn.Module()
        self.modules._dummy_variable = nn.Parameter()
        self.modules.obs_nets = nn.ModuleDict(
            {
                key: VisualCore(resnet(k, group), *(crop or about["shape"][1:]))
                for k, (key, about) in enumerate(meta["obs"].items())
                if about.get("type") == "rgb"
            }
        )
        self.modules.requires_grad_(False)

    def parts(self, observed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a step of the condition, in its order; pictures are ``[rows, 3, H, W]``, in [0, 1]."""
        found = {}
        for key, about in self.meta["obs"].items():
            x = ranged(key, observed[key])
            if about.get("type") == "rgb":
                x = self.modules.obs_nets[key](center(x, self.crop)).relu()
            found[key] = x
        return found

    def save(self, path: Path, **changes) -> Path:
        """A file of a policy with it."""
        own = {
            "_target_": HYBRID,
            "crop_shape": self.crop and list(self.crop),
            "obs_encoder_group_norm": self.group,
            "eval_fixed_crop": True,
        }
        return images_ckpt(path, self, own, 64, changes)


class Images:
    """The image policy's encoder."""

    def __init__(
        self, group=True, shared=False, imagenet=True, resize=None, crop=(84, 84), meta=META
    ) -> None:
        self.group, self.shared, self.imagenet = group, shared, imagenet
        self.resize, self.crop, self.meta = resize, crop, meta
        keys = sorted(key for key, about in meta["obs"].items() if about.get("type") == "rgb")
        # A shared network keeps its batch normalization.
        networks = [resnet(k, group and not shared) for k in range(1 if shared else len(keys))]
        self.modules = nn.Module()
        self.modules._dummy_variable = nn.Parameter()
        named = zip(["rgb"] if shared else keys, networks, strict=True)
        self.modules.key_model_map = nn.ModuleDict(dict(named))

    def parts(self, observed):
        found = {}
        for vectors in (False, True):
            for key in sorted(self.meta["obs"]):
                x = ranged(key, observed[key])
                if vectors != (self.meta["obs"][key].get("type") != "rgb"):
                    continue
                found[key] = x if vectors else self.seen(key, x)
        return found

    def seen(self, key: str, x: torch.Tensor) -> torch.Tensor:
        if self.resize is not None:
            x = nn.functional.interpolate(x, self.resize, mode="bilinear", align_corners=False)
        x = center(x, self.crop)
        if self.imagenet:
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            x = (x - mean[:, None, None]) / std[:, None, None]
        return self.modules.key_model_map["rgb" if self.shared else key](x).mean((2, 3))

    def save(self, path: Path, **changes) -> Path:
        encoder = {
            "_target_": "diffusion_policy.model.vision.multi_image_obs_encoder.MultiImageObsEncoder",
            "shape_meta": copy.deepcopy(self.meta),
            "rgb_model": {
                "_target_": "diffusion_policy.model.vision.model_getter.get_resnet",
                "name": "resnet18",
                "weights": None,
            },
            "resize_shape": self.resize and list(self.resize),
            "crop_shape": self.crop and list(self.crop),
            "random_crop": True,
            "use_group_norm": self.group,
            "share_rgb_model": self.shared,
            "imagenet_norm": self.imagenet,
        }
        return images_ckpt(path, self, {"_target_": IMAGES, "obs_encoder": encoder}, 512, changes)


def images_ckpt(path: Path, encoder, own: dict, features: int, changes: dict) -> Path:
    """A file of a policy.

    Args:
        own: settings of its policy, beside those that both have.
        features: of a picture.
        changes: of settings, as ``ckpt`` takes them; and ``tensors``, which changes those in place.
    """
    policy = {
        "shape_meta": copy.deepcopy(encoder.meta),
        "noise_scheduler": {
            "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
            "num_train_timesteps": 100,
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "fixed_small",
            "clip_sample": True,
            "prediction_type": "epsilon",
        },
        "horizon": 8,
        "n_action_steps": 4,
        "n_obs_steps": 2,
        "num_inference_steps": 10,
        "obs_as_global_cond": True,
        "diffusion_step_embed_dim": 8,
        "down_dims": [8, 16],
        "n_groups": 4,
        **own,
    }
    shapes = {key: about["shape"] for key, about in encoder.meta["obs"].items()}
    size = sum(features if len(shape) == 3 else shape[0] for shape in shapes.values())
    tensors = {f"model.{name}": each for name, each in weights(size).items()}
    tensors |= {f"obs_encoder.{name}": each for name, each in encoder.modules.state_dict().items()}
    for key, shape in (shapes | {"action": [2]}).items():
        for name, value in zip(("scale", "offset"), RANGES.get(key, (0.5, 0.25)), strict=True):
            tensors[f"normalizer.params_dict.{key}.{name}"] = torch.full(
                (1 if len(shape) == 3 else shape[0],), value
            )
    tensors |= {"_dummy_variable": torch.empty(0), "mask_generator._dummy_variable": torch.empty(0)}
    changes.pop("tensors", lambda tensors: None)(tensors)
    return ckpt(path, tensors, policy=policy, **changes)
