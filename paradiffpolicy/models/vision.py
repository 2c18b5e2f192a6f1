"""Encoders of pictures: a ResNet-18 per camera, to numbers that join a policy's condition.

As in Diffusion Policy (Chi et al. 2023, section 3.2): group normalization in place of batch normalization,
and a spatial softmax in place of the average over the picture.  The weights of ``ResNet18`` have
torchvision's names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ..diffusion.prefix import with_delay
from ..errors import InputError, nearest
from ..registry import Registry
from ..task import Camera
from ..types import PolicySpec
from .pictures import jitter_factors, jittered, require_strengths, resizing

CHANNELS_PER_GROUP = 16
"""Of group normalization, as diffusion_policy and LeRobot have them."""

MakeNorm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch normalization with the statistics that it was trained with, which here are never updated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def group_norm(channels: int) -> nn.Module:
    """Group normalization of 16 channels a group."""
    return nn.GroupNorm(max(1, channels // CHANNELS_PER_GROUP), channels)


NORMS: Registry[MakeNorm] = Registry("norm", {"group": group_norm, "batch": FrozenBatchNorm})
"""Normalizations by name; ``batch`` is for weights that were trained elsewhere."""


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 pixels beside a shortcut (He et al. 2015, figure 5)."""

    def __init__(self, inner: int, outer: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = norm(outer)
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """A ResNet-18 without its average and its last layer: ``[rows, 3, H, W]`` to
    ``[rows, 8 width, H / 32, W / 32]``, rounded up.

    Args:
        width: channels of the first layer; 64 is the published network's.
        norm: makes the normalization of some channels.
    """

    def __init__(self, width: int = 64, norm: MakeNorm = group_norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        inner = width
        for level in range(4):
            outer, stride = width << level, 1 if level == 0 else 2
            blocks = BasicBlock(inner, outer, stride, norm), BasicBlock(outer, outer, 1, norm)
            self.add_module(f"layer{level + 1}", nn.Sequential(*blocks))
            inner = outer
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for level in range(4):
            x = cast(nn.Module, getattr(self, f"layer{level + 1}"))(x)
        return x


def feature_map(size: int) -> int:
    """Pixels along one axis of ``ResNet18``'s output, for so many of its input."""
    for _ in range(5):
        size = -(-size // 2)
    return size


class SpatialSoftmax(nn.Module):
    """Keypoints of a feature map (Finn et al. 2016; Levine et al. 2016): the mean place of a softmax over the
    pixels, in [-1, 1].

    ``[rows, channels, H, W]`` to ``[rows, 2 keypoints]``, x and y of each.
    """

    def __init__(self, channels: int, keypoints: int, height: int, width: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, 1)
        # On the CPU wherever the rest is made: no state dict has it, so the meta device would lose it.
        x, y = (torch.linspace(-1.0, 1.0, n, device="cpu") for n in (width, height))
        grid = torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)
        self.register_buffer("pos_grid", grid, persistent=False)
        self.pos_grid: Tensor

    def forward(self, x: Tensor) -> Tensor:
        attention = rearrange(self.nets(x), "b k h w -> b k (h w)").softmax(dim=-1)
        return (attention @ self.pos_grid.to(attention.dtype)).flatten(1)


class CameraEncoder(nn.Module):
    """Normalized pictures ``[rows, 3, H, W]`` to features ``[rows, F]``."""

    def __init__(self, backbone: nn.Module, pool: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.backbone, self.pool, self.out = backbone, pool, out

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.out(self.pool(self.backbone(x)))
        return features


class Average(nn.Module):
    """The mean over the pixels, ``[rows, channels, H, W]`` to ``[rows, channels]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


@dataclass(frozen=True)
class ResNetOptions:
    """Options of the encoder ``resnet18``.

    Attributes:
        width: channels of its first layer.
        pool: ``spatial_softmax``, or ``average``, whose features are the network's last channels.
        keypoints: of the spatial softmax.
        norm: a name in ``NORMS``.
        shared: one network for all cameras; else one each.
        resize: ``(H, W)`` to which pictures are resized first, bilinear.
        antialias: whether that averages over all pixels of a picture that becomes smaller.
        crop: ``(h, w)`` that is cut out after that: at random in training, else from the middle.
        jitter: strengths of changes of brightness, contrast and saturation in training (``jittered``).
        mean, std: that pictures, in [0, 1], are normalized with: a number per channel, or that per camera.
    """

    width: int = 64
    pool: str = "spatial_softmax"
    keypoints: int = 32
    norm: str = "group"
    shared: bool = False
    resize: tuple[int, int] | None = None
    antialias: bool = True
    crop: tuple[int, int] | None = None
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mean: tuple[Any, ...] = (0.5, 0.5, 0.5)
    std: tuple[Any, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name, most in (("width", 1024), ("keypoints", 4096)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise InputError(
                    f"encoder option {name}={value!r:.40} must be a whole number from 1 to {most}"
                )
        for name in ("resize", "crop"):
            value = getattr(self, name)
            two = isinstance(value, tuple) and len(value) == 2
            if value is not None and not (two and all(type(n) is int and 1 <= n <= 4096 for n in value)):
                raise InputError(f"encoder option {name}={value!r:.40} must be [height, width] in pixels")
        require_strengths(self.jitter)
        NORMS.named(self.norm)
        if self.pool not in ("spatial_softmax", "average"):
            raise InputError(f"encoder option pool={self.pool!r:.40} must be spatial_softmax or average")
        for name in ("shared", "antialias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"encoder option {name}={getattr(self, name)!r:.40} must be true or false")

    @staticmethod
    def of(options: dict[str, Any]) -> ResNetOptions:
        """Of a spec's ``encoder_options``.  Raises ``InputError`` for one that is unknown or malformed."""
        known = [each.name for each in fields(ResNetOptions)]
        for name in options:
            if name not in known:
                raise InputError(f"encoder resnet18 has no option {name!r:.40}{nearest(name, known)}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return ResNetOptions(**given)

    def statistics(self, name: str, cameras: int) -> Tensor:
        """Mean or std, ``[cameras, 3]``."""
        given = getattr(self, name)
        try:
            values = torch.tensor(given, dtype=torch.float32, device="cpu").expand(cameras, 3)
        except (TypeError, ValueError, RuntimeError):
            values = torch.full((cameras, 3), torch.nan, device="cpu")
        if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
            raise InputError(f"encoder option {name}={given!r:.60} must be a number per channel")
        return values


class PictureEncoder(nn.Module):
    """Encodes the pictures of all cameras.

    Args:
        cameras: in the order of their bytes.
        options: of the networks.
        features: per camera.

    Raises:
        InputError: options and pictures don't fit together.
    """

    def __init__(self, cameras: Sequence[Camera], options: ResNetOptions, features: int) -> None:
        super().__init__()
        self.cameras, self.options = tuple(cameras), options
        mean, std = (options.statistics(name, len(cameras)) for name in ("mean", "std"))
        # Of bytes, as one product and one sum.
        for name, values in (("scale", 1 / (255 * std)), ("shift", -mean / std)):
            self.register_buffer(name, values[:, None, :, None, None], persistent=False)
        self.scale: Tensor
        self.shift: Tensor
        seen = [self.size_seen(camera) for camera in cameras]
        if options.shared and len(set(seen)) > 1:
            raise InputError("cameras of different sizes share an encoder: shared=false, or crop them")
        self.networks = nn.ModuleList(
            camera_encoder(options, size, features) for size in (seen[:1] if options.shared else seen)
        )
        for index, camera in enumerate(cameras):
            if options.resize is not None:
                for axis, (n, new) in enumerate(zip(camera.shape[:2], options.resize, strict=True)):
                    matrix = resizing(n, new, options.antialias)
                    self.register_buffer(f"resize_{index}_{axis}", matrix, persistent=False)

    def before_crop(self, camera: Camera) -> tuple[int, int]:
        """Height and width that a crop is cut from."""
        return self.options.resize or camera.shape[:2]

    def size_seen(self, camera: Camera) -> tuple[int, int]:
        """Height and width of what the network sees."""
        whole, crop = self.before_crop(camera), self.options.crop
        if crop is None:
            return whole
        if crop[0] > whole[0] or crop[1] > whole[1]:
            raise InputError(f"crop={list(crop)} is larger than pictures of {camera.key!r}, {list(whole)}")
        return crop

    def forward(self, pixels: Tensor, places: Tensor | None = None, colours: Tensor | None = None) -> Tensor:
        """Features ``[rows, To, cameras F]`` of pictures.

        Args:
            pixels: ``[rows, To, P]`` uint8, the cameras' pictures ``[H, W, 3]`` one after the other.
            places: ``[rows, cameras, 2]``, each from 0 to 1: how far down and to the right crops are cut;
                None: from the middle.
            colours: ``[rows, cameras, 3]``, each from 0 to 1, for ``jitter_factors``; None: they stay.
        """
        rows, features = len(pixels), []
        sizes = [math.prod(camera.shape) for camera in self.cameras]
        for index, (camera, part) in enumerate(zip(self.cameras, pixels.split(sizes, dim=-1), strict=True)):
            height, width, _ = camera.shape
            picture = rearrange(part, "b t (h w c) -> b t h w c", h=height, w=width)
            resized = self.options.resize is not None
            if not resized:  # bytes are quicker to move than floats
                picture = self._cropped(picture, camera, None if places is None else places[:, index])
            x = rearrange(picture, "b t h w c -> b t c h w").to(self.scale.dtype)
            if colours is not None and any(self.options.jitter):
                x = jittered(x, jitter_factors(self.options.jitter, colours[:, index]))
            x = x * self.scale[index] + self.shift[index]
            if resized:
                tall, wide = (cast(Tensor, getattr(self, f"resize_{index}_{axis}")) for axis in range(2))
                x = rearrange(tall @ x @ wide.T, "b t c h w -> b t h w c")
                x = self._cropped(x, camera, None if places is None else places[:, index])
                x = rearrange(x, "b t h w c -> b t c h w")
            network = self.networks[0 if self.options.shared else index]
            seen = network(rearrange(x, "b t c h w -> (b t) c h w"))
            features.append(rearrange(seen, "(b t) f -> b t f", b=rows))
        return torch.cat(features, dim=-1)

    def _cropped(self, picture: Tensor, camera: Camera, places: Tensor | None) -> Tensor:
        """``[rows, To, H, W, C]``, cropped at ``places`` ``[rows, 2]``, or in the middle."""
        if self.options.crop is None:
            return picture
        (tall, wide), (height, width) = self.options.crop, self.before_crop(camera)
        if places is None:  # rounded as torchvision does
            top, left = round((height - tall) / 2), round((width - wide) / 2)
            return picture[:, :, top : top + tall, left : left + wide]
        free = places.new_tensor([height - tall + 1, width - wide + 1])
        first = (places * free).long()[:, :, None, None]
        row, down, along = (torch.arange(n, device=places.device) for n in (len(picture), tall, wide))
        row, down, along = row[:, None, None], first[:, 0] + down[:, None], first[:, 1] + along
        # Indices beside a slice come first: [rows, h, w, To, C].
        return rearrange(picture[row, :, down, along], "b h w t c -> b t h w c")


def camera_encoder(options: ResNetOptions, size: tuple[int, int], features: int) -> CameraEncoder:
    """One camera's network, for pictures ``size`` in height and width."""
    channels = 8 * options.width
    backbone = ResNet18(options.width, NORMS.named(options.norm))
    if options.pool == "average":
        if features != channels:
            raise InputError(f"pool=average gives {channels} features of a camera, not {features}")
        return CameraEncoder(backbone, Average(), nn.Identity())
    height, width = (feature_map(n) for n in size)
    if height * width == 1:
        raise InputError(
            f"pictures of {list(size)} pixels leave one pixel to a spatial softmax, which sees nothing then: "
            "over 32 on one side, or pool=average"
        )
    pool = SpatialSoftmax(channels, options.keypoints, height, width)
    out = nn.Sequential(nn.Linear(2 * options.keypoints, features), nn.ReLU())
    return CameraEncoder(backbone, pool, out)


def build_resnet18(spec: PolicySpec) -> PictureEncoder:
    """The ResNet-18 encoder of a spec, with fresh weights.

    Raises:
        InputError: the spec's options and sizes don't fit together.
    """
    cameras = spec.contract.cameras
    each, rest = divmod(spec.image_features, len(cameras))
    if rest:
        raise InputError(f"image_features={spec.image_features} must be a multiple of {len(cameras)} cameras")
    return PictureEncoder(cameras, ResNetOptions.of(spec.encoder_options), each)


ENCODERS: Registry[Callable[[PolicySpec], PictureEncoder]] = Registry("encoder", {"resnet18": build_resnet18})
"""Every encoder of pictures by name: a builder from a policy's spec, of a module that is called like
``PictureEncoder``."""


class Sight(NamedTuple):
    """What a ``VisualNetwork`` makes a condition of.

    Attributes:
        numbers: ``[rows, To, O]``, normalized.
        pixels: ``[rows, To, P]`` uint8.
        places: of random crops, as ``PictureEncoder`` takes them; None: from the middle.
        kept: ``[rows]``, 0 where the whole condition is blanked, else 1; None: all are kept.
        delay: ``[rows, To, D]``, of ``diffusion.prefix``; None: the network knows of no delays.
        colours: of colour jitter, as ``PictureEncoder`` takes them; None: there is none.
    """

    numbers: Tensor
    pixels: Tensor
    places: Tensor | None = None
    kept: Tensor | None = None
    delay: Tensor | None = None
    colours: Tensor | None = None


class VisualNetwork(nn.Module):
    """A policy's network with eyes: an encoder of pictures, and the head that it conditions.

    Called as the head, with a condition ``[rows, G]``, which ``encode`` makes once per plan; or, as in
    training, with a ``Sight`` in its place.
    """

    def __init__(self, encoder: PictureEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder: PictureEncoder = encoder
        self.head = head

    def encode(self, numbers: Tensor, pixels: Tensor, places: Tensor | None = None, *drawn: Tensor) -> Tensor:
        """Conditions ``[rows, To (O + F)]``: of every step the numbers, then the cameras' features; for the
        arguments see ``Sight``; ``drawn`` are its colours, if it has any."""
        features = self.encoder(pixels, places, *drawn).to(numbers.dtype)
        return torch.cat((numbers, features), dim=-1).flatten(1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | Sight) -> Tensor:
        if isinstance(condition, Sight):
            kept, delay, colours = condition.kept, condition.delay, condition.colours
            condition = self.encode(*condition[:3], *([] if colours is None else [colours]))
            condition = condition if kept is None else condition * kept[:, None]
            condition = condition if delay is None else with_delay(condition, delay)
        return cast(Tensor, self.head(x, t, condition))
