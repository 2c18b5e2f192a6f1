"""A checkpoint is a folder: ``policy.json``, to read, and a safetensors file, to compute with.

``policy.json`` names the weights' file and its SHA-256, and is written last: a reader of the
folder sees the old policy or the new one.  Nothing in it is ever unpickled or imported by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .data.normalizer import Normalizer
from .errors import InputError, nearest, reading
from .files import exists, require_regular, write_atomically
from .types import ByValue, PolicySpec

METADATA = "policy.json"
FORMAT = 1
LARGEST_METADATA, LARGEST_WEIGHTS = 2**24, 2**36
"""Bytes of a file that are read at most."""
DEEPEST = 32
"""Levels of values in ``policy.json``."""


@dataclass(frozen=True, eq=False)
class Checkpoint(ByValue):
    """A trained policy at rest.

    Attributes:
        spec: its shape.
        weights: the network's state dict, names as diffusion_policy's.
        observation_normalizer, action_normalizer: fitted from the demonstrations.
        info: anything to know about it: training settings, dataset fingerprint, curve, score.
        stored: what weights are stored in; half precision is half the size, and far finer than what
            closed-loop scores can tell apart.
    """

    spec: PolicySpec
    weights: dict[str, Tensor]
    observation_normalizer: Normalizer
    action_normalizer: Normalizer
    info: dict[str, Any]
    stored: torch.dtype = torch.float16

    def save(self, folder: str | Path) -> None:
        """Writes (or replaces) the checkpoint.

        Raises:
            InputError: a weight isn't finite; nothing is written.
        """
        folder = Path(folder)
        weights = {name: w.detach().to("cpu", self.stored).contiguous() for name, w in self.weights.items()}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise InputError(f"weight {name} isn't finite as {self.stored}: the old checkpoint stays")
        content = safetensors.torch.save(weights)
        digest = hashlib.sha256(content).hexdigest()
        file_name = f"weights-{digest[:8]}.safetensors"
        write_atomically(folder / file_name, lambda path: path.write_bytes(content))
        metadata = {
            "format": FORMAT,
            "weights": {"file": file_name, "sha256": digest},
            "spec": dataclasses.asdict(self.spec),
            "normalizers": {
                "observation": self.observation_normalizer.to_dict(),
                "action": self.action_normalizer.to_dict(),
            },
            "info": self.info,
        }
        text = json.dumps(metadata, indent=2) + "\n"
        write_atomically(folder / METADATA, lambda path: path.write_text(text))
        for stale in folder.glob("weights-*.safetensors"):
            if stale.name != file_name:
                stale.unlink(missing_ok=True)

    def with_spec(self, **changes: Any) -> Checkpoint:
        """The same with parts of its spec replaced, as ``n_action_steps=4``.

        Raises:
            InputError: the spec has no such part.
        """
        known = [field.name for field in dataclasses.fields(self.spec)]
        for name in changes:
            if name not in known:
                raise InputError(f"a policy's spec has no {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changes))

    @staticmethod
    def load(folder: str | Path) -> Checkpoint:
        """Reads a checkpoint; weights come back as float32.  While it is replaced, it is the old or the new.

        Raises:
            InputError: it doesn't exist, is damaged, or isn't a checkpoint.
        """
        folder, before = Path(folder), ""
        while True:
            about = read_description(folder)
            try:
                weights, stored = _read_weights(folder / about.weights_file, about.sha256)
            except InputError:
                if about.sha256 == before:
                    raise
                before = about.sha256  # a writer may have replaced it meanwhile
                continue
            normalizers = about.observation_normalizer, about.action_normalizer
            return Checkpoint(about.spec, weights, *normalizers, about.info, stored)


@dataclass(frozen=True, eq=False)
class Description(ByValue):
    """The content of ``policy.json``: a checkpoint but for its weights.

    Attributes:
        weights_file: name of the weights' file, in the same folder.
        sha256: of that file.
    """

    weights_file: str
    sha256: str
    spec: PolicySpec
    observation_normalizer: Normalizer
    action_normalizer: Normalizer
    info: dict[str, Any]


def read_description(folder: Path) -> Description:
    """Reads and checks ``policy.json``.

    Raises:
        InputError: it doesn't exist, isn't a checkpoint's, or has a value that a checkpoint can't have; the
            message names it.
    """
    path = folder / METADATA
    if not exists(path):
        raise InputError(f"no checkpoint at {folder!s:.200}: name the folder that has its {METADATA}")
    require_regular(path, LARGEST_METADATA)
    try:
        metadata = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({error!s:.200}): copy the checkpoint again")
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is int and version > FORMAT:
        raise InputError(
            f"{path} is of format {version!s:.20}, this version reads {FORMAT}: install a newer one"
        )
    if type(version) is not int or version != FORMAT:
        raise InputError(f"{path} is not a format-{FORMAT} checkpoint of paradiffpolicy: train it again")
    try:
        return _description(metadata)
    except (InputError, OverflowError) as error:
        raise InputError(f"{path} is not a policy's description ({error}): train it again")


def _description(metadata: dict[str, Any]) -> Description:
    _require_shallow(metadata)
    weights, normalizers = _mapping(metadata, "weights"), _mapping(metadata, "normalizers")
    for part, known in (
        (metadata, ("format", "weights", "spec", "normalizers", "info")),
        (weights, ("file", "sha256")),
        (normalizers, ("observation", "action")),
    ):
        for name in part:
            if name not in known:
                raise InputError(f"unknown {name!r:.40}{nearest(name, known)}")
    file, sha256 = weights.get("file"), weights.get("sha256")
    if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file, re.ASCII):
        raise InputError(f"weights.file={file!r:.40} must be a plain name that ends in .safetensors")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"weights.sha256={sha256!r:.40} must be 64 hexadecimal digits")
    spec = PolicySpec.from_dict(_mapping(metadata, "spec"))
    observation = Normalizer.from_dict(_mapping(normalizers, "observation"), spec.obs_dim)
    action = Normalizer.from_dict(_mapping(normalizers, "action"), spec.action_dim)
    info = _mapping({"info": {}, **metadata}, "info")
    for name in ("dataset", "training"):
        _mapping({name: {}, **info}, name)
    return Description(file, sha256, spec, observation, action, info)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.40} stands there twice")
    return values


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a mapping, not {type(value).__name__}")
    return value


def _require_shallow(value: Any) -> None:
    """Raises ``InputError`` for values that are nested too deep to be written or shown."""
    level = [value]
    for _ in range(DEEPEST):
        nested = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for each in nested for value in each if isinstance(value, dict | list)]
        if not level:
            return
    raise InputError(f"its values are nested more than {DEEPEST} deep")


def _read_weights(path: Path, sha256: str) -> tuple[dict[str, Tensor], torch.dtype]:
    if not path.exists():
        raise InputError(f"{path} is missing: copy the whole checkpoint folder again")
    require_regular(path, LARGEST_WEIGHTS)
    with reading(str(path), "copy the checkpoint again"):  # a writer may just have removed it
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{path} is truncated or changed (its SHA-256 isn't {METADATA}'s): copy it again")
    try:
        stored = safetensors.torch.load(content)
    except Exception as error:  # its own kind, and any that a damaged header leads to
        raise InputError(f"{path} is no safetensors file ({error!s:.100}): copy the checkpoint again")
    weights = {name: finite_weight(name, weight, path) for name, weight in stored.items()}
    single = any(weight.dtype == torch.float32 for weight in stored.values())
    return weights, torch.float32 if single else torch.float16


def finite_weight(name: str, weight: Tensor, path: Path) -> Tensor:
    """A weight of a file as float32.

    Raises:
        InputError: it isn't made of finite numbers.
    """
    # A sum is finite only if all are, and is many times faster than looking at each.
    if not weight.is_floating_point() or not (weight.float().sum().isfinite() or weight.isfinite().all()):
        raise InputError(f"{path}: {name!r:.80} has values that aren't finite numbers: train it again")
    return weight.float()
