"""A checkpoint is a folder: ``policy.json``, to read, and a safetensors file, to compute with.

``policy.json`` names the weights' file and its SHA-256, and is written last: a reader of the
folder sees the old policy or the new one.  Nothing in it is ever unpickled or imported by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .data.normalizer import Normalizer
from .errors import InputError, nearest
from .files import write_atomically
from .types import ByValue, PolicySpec

METADATA = "policy.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Checkpoint(ByValue):
    """A trained policy at rest.

    Attributes:
        spec: its shape.
        weights: the network's state dict, names as diffusion_policy's.
        observation_normalizer, action_normalizer: fitted from the demonstrations.
        info: anything to know about it: training settings, dataset fingerprint, curve, score.
    """

    spec: PolicySpec
    weights: dict[str, Tensor]
    observation_normalizer: Normalizer
    action_normalizer: Normalizer
    info: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Writes (or replaces) the checkpoint.  Weights are stored in half precision: half the size, and
        far finer than what closed-loop scores can tell apart."""
        folder = Path(folder)
        weights = {name: w.detach().to("cpu", torch.float16).contiguous() for name, w in self.weights.items()}
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
                stale.unlink()

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
        """Reads a checkpoint; weights come back as float32.

        Raises:
            InputError: it doesn't exist, is truncated, or isn't a checkpoint.
        """
        folder = Path(folder)
        metadata = read_metadata(folder)
        try:
            weights_file = folder / Path(metadata["weights"]["file"]).name
            spec = PolicySpec.from_dict(metadata["spec"])
            observation = Normalizer.from_dict(metadata["normalizers"]["observation"], spec.obs_dim)
            action = Normalizer.from_dict(metadata["normalizers"]["action"], spec.action_dim)
            digest = metadata["weights"]["sha256"]
        except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
            raise InputError(f"{folder / METADATA} is not a policy's description ({error}): train it again")
        if not weights_file.exists():
            raise InputError(f"{weights_file} is missing: copy the whole checkpoint folder again")
        content = weights_file.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(
                f"{weights_file} is truncated or changed (its SHA-256 isn't {METADATA}'s): copy it again"
            )
        weights = {name: w.float() for name, w in safetensors.torch.load(content).items()}
        return Checkpoint(spec, weights, observation, action, metadata.get("info", {}))


def find_checkpoint(folder: str | Path) -> Path:
    """A checkpoint's folder: as given, else in the checkout or the installed package.

    The shipped PushT checkpoint is found as ``checkpoints/pusht_keypoints`` from any working folder.
    """
    given = Path(folder).expanduser()
    package = Path(__file__).resolve().parent
    shipped = (package.parent / given, package / given)
    return next((path for path in (given, *shipped) if (path / METADATA).exists()), given)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of ``policy.json``, without the weights.

    Raises:
        InputError: it doesn't exist or isn't a checkpoint's.
    """
    path = folder / METADATA
    if not path.exists():
        raise InputError(f"no checkpoint at {folder}: name the folder that has its {METADATA}")
    try:
        metadata = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} can't be read ({error}): copy the checkpoint again")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a format-{FORMAT} checkpoint of paradiffpolicy: train it again")
    return metadata
