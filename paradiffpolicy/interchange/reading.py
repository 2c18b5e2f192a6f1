"""Checkpoints of any known project."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..checkpoint import METADATA, Checkpoint, read_description
from ..errors import InputError
from ..files import exists
from ..provenance import sha256
from . import diffusion_policy, lerobot

PROJECTS: dict[str, ModuleType] = {"diffusion_policy": diffusion_policy, "lerobot": lerobot}
"""Other projects' checkpoints: each module ``recognises`` a path and can ``read`` it."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path may be a checkpoint of any of them, or of ours."""
    return exists(path / METADATA) or any(project.recognises(path) for project in PROJECTS.values())


def weights_sha256(path: Path) -> str:
    """The hash of a checkpoint's weights; of another project's, of all of it."""
    return read_description(path).sha256 if exists(path / METADATA) else sha256(path)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint: a folder of ours or of LeRobot's, or a file of diffusion_policy's.

    Raises:
        InputError: there is none, it is damaged, or has something that isn't known here.
    """
    path = Path(path)
    if exists(path) and not exists(path / METADATA):
        for project in PROJECTS.values():
            if project.recognises(path):
                checkpoint: Checkpoint = project.read(path)
                return checkpoint
        known = f"a folder with {METADATA} or LeRobot's {lerobot.CONFIG}, or diffusion_policy's .ckpt"
        raise InputError(f"{path!s:.200} is no checkpoint that is known here: name {known}")
    return Checkpoint.load(path)
