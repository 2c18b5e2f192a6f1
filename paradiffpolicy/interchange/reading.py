"""Checkpoints of any known project, on this machine or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from types import ModuleType

from ..checkpoint import LARGEST_METADATA, LARGEST_WEIGHTS, METADATA, Checkpoint, read_description
from ..errors import InputError
from ..files import exists, located
from ..provenance import sha256
from . import diffusion_policy, lerobot
from .hub import HubFiles, HubName

PROJECTS: dict[str, ModuleType] = {"diffusion_policy": diffusion_policy, "lerobot": lerobot}
"""Other projects' checkpoints: each module ``recognises`` a path and can ``read`` it, and can ``fetch`` its
files from the Hub."""
KNOWN = f"a folder with {METADATA} or LeRobot's {lerobot.CONFIG}, or diffusion_policy's .ckpt"


def is_checkpoint(path: Path) -> bool:
    """Whether a path may be a checkpoint of any of them, or of ours."""
    return exists(path / METADATA) or any(project.recognises(path) for project in PROJECTS.values())


def weights_sha256(path: Path) -> str:
    """The hash of a checkpoint's weights; of another project's, of all of it."""
    return read_description(path).sha256 if exists(path / METADATA) else sha256(path)


def found(name: str | Path) -> Path:
    """The path of a checkpoint: as ``files.located`` finds it; where nothing is there and it has the form of
    a ``HubName``, of that checkpoint in the Hub's cache, which is downloaded unless it is there.

    Raises:
        InputError: as ``fetch`` does.
    """
    path, on_hub = located(name), HubName.parse(str(name))
    return path if on_hub is None or exists(path) else fetch(HubFiles.of(on_hub))


def fetch(files: HubFiles) -> Path:
    """Downloads a checkpoint from the Hub, as far as it is read: descriptions first, then weights.

    Raises:
        InputError: the repository has none that is known here, or what ``HubFiles.fetch`` raises.
    """
    ours = files.name.file is None and METADATA in files.sizes
    kinds = [_fetch_ours] if ours else [project.fetch for project in PROJECTS.values()]
    for fetch_kind in kinds:
        path: Path | None = fetch_kind(files)
        if path is not None:
            return path
    raise InputError(f"{files.name} has no checkpoint that is known here: it needs the files of {KNOWN}")


def _fetch_ours(files: HubFiles) -> Path:
    """Downloads a folder of ours, with its students, which have folders in it."""
    root = files.fetch(METADATA, LARGEST_METADATA).parent
    for name in sorted(files.sizes):
        if PurePosixPath(name).name == METADATA and name.count("/") == 1:
            files.fetch(name, LARGEST_METADATA)
    for folder in (root, *students(root)):
        weights = (folder / read_description(folder).weights_file).relative_to(root)
        files.fetch(weights.as_posix(), LARGEST_WEIGHTS)
    return root


def students(folder: Path) -> list[Path]:
    """The folders of a policy's students, in a folder of ours.

    Raises:
        InputError: a description is damaged.
    """
    within = sorted(path.parent for path in folder.glob(f"*/{METADATA}"))
    return [path for path in within if read_description(path).spec.student_timesteps]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint: a folder of ours or of LeRobot's, a file of diffusion_policy's, or one of these on
    the Hugging Face Hub, as ``found`` finds them.

    Raises:
        InputError: there is none, it is damaged, or has something that isn't known here.
    """
    path = found(path)
    if exists(path) and not exists(path / METADATA):
        for project in PROJECTS.values():
            if project.recognises(path):
                checkpoint: Checkpoint = project.read(path)
                return checkpoint
        raise InputError(f"{path!s:.200} is no checkpoint that is known here: name {KNOWN}")
    return Checkpoint.load(path)
