"""Checkpoints to and from the Hugging Face Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .locating import locate_checkpoint

if TYPE_CHECKING:
    from ..interchange.hub import HubName
    from .hub_schema import PullConfig, PushConfig


def push(cfg: PushConfig) -> None:
    """A checkpoint and its card to a repository; what is uploaded, and where to, is said before."""
    from ..checkpoint import METADATA
    from ..files import exists
    from ..interchange.hub import page, upload
    from ..tables import console, table

    name = hub_name(cfg.repo)
    if name.revision or name.file:
        raise InputError(f"repo={name} must be OWNER/NAME alone: files go to its newest revision")
    if cfg.checkpoint is None:
        raise InputError("no policy is named: write checkpoint=FOLDER")
    address, place = page(name.repo), locate_checkpoint(cfg.checkpoint)
    if exists(place) and not exists(place / METADATA):
        raise InputError(f"{place} has no {METADATA}: paradiffpolicy convert source={place} out=FOLDER")
    files = uploaded(place, name.repo, cfg)
    rows = [
        {"file": name, "bytes": len(each) if isinstance(each, bytes) else each.stat().st_size}
        for name, each in files.items()
    ]
    kind = "private" if cfg.private else "public, if it is new"
    console().print(table(f"to {address} ({kind})", rows))
    print(f"uploaded: {upload(name.repo, files, private=cfg.private)}", flush=True)


def uploaded(place: Path, repo: str, cfg: PushConfig) -> dict[str, Path | bytes]:
    """What ``push`` uploads, by path in the repository: the policy, its students, the card.

    Raises:
        InputError: any of it is damaged.
    """
    from ..checkpoint import METADATA, Checkpoint, read_description
    from ..evaluation.card import checkpoint_report, model_card
    from ..interchange.reading import students

    files: dict[str, Path | bytes] = {}
    about = {folder: read_description(folder) for folder in (place, *students(place))}
    for folder, each in about.items():
        Checkpoint.load(folder)  # compares the weights with their hash
        for path in (folder / METADATA, folder / each.weights_file):
            files[path.relative_to(place).as_posix()] = path
    if cfg.card:
        own = about.pop(place)
        named = {folder.name: each for folder, each in about.items()}
        report = checkpoint_report(place, own.sha256)
        files["README.md"] = model_card(repo, own, named, report, cfg.license).encode()
    return files


def pull(cfg: PullConfig) -> None:
    """A checkpoint on the Hub to a new folder."""
    from ..files import require_absent, write_new
    from ..interchange.hub import HubFiles
    from ..interchange.reading import fetch, read_checkpoint

    name = hub_name(cfg.repo)
    if cfg.out is None:
        raise InputError("no folder is named: write out=FOLDER")
    out = Path(cfg.out)
    require_absent(out)
    files = HubFiles.of(name)
    checkpoint = read_checkpoint(fetch(files))  # what is damaged isn't written

    def copy(folder: Path) -> None:
        for file in files.fetched:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.path(file), target)

    write_new(out, copy)
    millions = sum(weight.numel() for weight in checkpoint.weights.values()) / 1e6
    about = f"{millions:.1f} M weights, task {checkpoint.spec.task}"
    print(f"{out}: {about}, {len(files.fetched)} files of {name}")


def hub_name(text: str | None) -> HubName:
    """A setting's repository on the Hub.

    Raises:
        InputError: it has another form.
    """
    from ..interchange.hub import HubName

    name = None if text is None else HubName.parse(text)
    if name is None:
        raise InputError(f"repo={text!s:.200} must be a name on the Hugging Face Hub, as OWNER/NAME")
    return name
