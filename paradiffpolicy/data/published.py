"""Published datasets: where they are, what must be in them, and their way to where ``train`` looks for them.

A file is checked before it is put in place: its SHA-256, where one is known from a source beside the server
itself, and its content, by reading it.  Beside the data a small JSON keeps the SHA-256 of the file, so that
another download must be of the same, and of what was made of it, so that it can be checked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError, reading
from ..files import located, lock, require_regular, write_json, write_new, writing
from ..registry import Registry
from .formats.reading import open_source
from .transfer import PIECE, OnBytes, fetch
from .zipped import unpack

MOST_BYTES = 2**33
"""Of a file of unknown size, and of a zip file's content."""
MOST_FILES = 2**16


@dataclass(frozen=True)
class Published:
    """A dataset that is published as one file.

    Attributes:
        address: of the file.
        name: of the file or folder that it becomes.
        episodes, steps: that must be in it.
        keys: of observations that must be in it, among others.
        licence: its terms, as the publisher names them.
        inside: the folder in a zip file that is the dataset; ``None``: the file itself is.
        size: bytes of the file, if they are known.
        sha256: of the file, if it is known.
    """

    address: str
    name: str
    episodes: int
    steps: int
    keys: tuple[str, ...]
    licence: str
    inside: str | None = None
    size: int | None = None
    sha256: str | None = None


class _RefusedError(InputError):
    """What was downloaded isn't what it should be."""


ROBOMIMIC = (
    "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/"
    "74fa018461f479cd9fd15b924a16103012096203/v1.5"
)
"""A revision of robomimic's repository of datasets: files of a revision don't change."""


def _robomimic(task: str, steps: int, size: int, sha256: str) -> Published:
    """200 demonstrations by one proficient human, low-dim observations."""
    return Published(
        address=f"{ROBOMIMIC}/{task}/ph/low_dim_v15.hdf5",
        name=f"{task}_ph_low_dim_v15.hdf5",
        episodes=200,
        steps=steps,
        keys=("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
        licence="MIT",
        size=size,
        sha256=sha256,
    )


# The SHA-256s of robomimic's files are those of their repository's metadata; PushT's is what several projects
# that use the file pinned independently of each other.
DATASETS: Registry[Published] = Registry(
    "dataset",
    {
        "pusht": Published(
            address="https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
            name="pusht_cchi_v7_replay.zarr",
            episodes=206,
            steps=25_650,
            keys=("keypoint", "state"),
            licence="MIT",
            inside="pusht/pusht_cchi_v7_replay.zarr",
            size=30_988_725,
            sha256="63d52a114a3f010861f0181309d165b7d69133ccae426ece2fc94caed147bdf9",
        ),
        "lift": _robomimic(
            "lift", 9_666, 21_084_088, "2067777cb8b532e9263dd09fd6448c41cc31224bb27be4a3b734010ae13eb540"
        ),
        "can": _robomimic(
            "can", 23_207, 46_889_752, "3f2eb92e0a5025d0095e866ac16cc8092d6a762abe27dec90dbaff9027282962"
        ),
        "square": _robomimic(
            "square", 30_154, 51_145_256, "45d8cabb6d57a4c03e839aa5e4b3e58fb60fe8bd20e1951fec563a2abfd14951"
        ),
    },
)
"""By the name of the task that trains on them."""


def default_folder() -> Path:
    """The folder in which the tasks' files look for published datasets."""
    return located(os.environ.get("PARADIFFPOLICY_DATA", "../shared/data"))


def download(
    published: Published,
    folder: Path,
    *,
    on_bytes: OnBytes = lambda done, total: None,
    schemes: Collection[str] = ("https",),
) -> str:
    """Puts a published dataset in a folder, or checks the one that is there, which is never replaced.

    A zip file that was put in the folder by hand is taken in place of a download.

    Args:
        on_bytes: hears of the transfer's progress.
        schemes: of addresses.

    Returns:
        A line that says what was done.

    Raises:
        InputError: it can't be downloaded or written, it or what is there already isn't what it should be, or
            another process downloads it.
    """
    place = folder / published.name
    with writing(folder), _workplace(folder, place) as work:
        record = _record(place)
        if os.path.lexists(place):
            return _checked(published, place, record)
        given = folder / Path(urlsplit(published.address).path).name
        if published.inside is not None and given.exists():
            require_regular(given, published.size or MOST_BYTES)
            file, where = given, str(given)
        else:
            by_hand = f"fetch it by hand, as {given if published.inside else place}, and run this again"
            file, where = work / "part", published.address
            _require_room(folder, published.size or 0)
            fetch(
                where,
                file,
                most=MOST_BYTES,
                size=published.size,
                remedy=by_hand,
                on_bytes=on_bytes,
                schemes=schemes,
            )
        size, sha256 = file.stat().st_size, digest(file)
        try:
            _require_same(published, where, sha256, record, place)
            write_new(place, lambda temporary: _make(published, file, temporary, where))
        except _RefusedError:  # it isn't taken for a good part next time
            shutil.rmtree(work, ignore_errors=True)
            raise
        about = {"address": published.address, "downloaded": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(_beside(place), {**about, "size": size, "sha256": sha256, "made_sha256": digest(place)})
        shutil.rmtree(work, ignore_errors=True)
    return f"{place}: {published.episodes} episodes, {published.steps} steps"


def check(published: Published, path: Path) -> None:
    """Reads a dataset's first and last episode.

    Raises:
        InputError: it can't be read, or hasn't what it should have.
    """
    with contextlib.closing(open_source(path)) as source:
        found = (len(source.demos), sum(map(source.length, source.demos)))
        if found != (published.episodes, published.steps):
            raise InputError(
                f"{path} has {found[0]} episodes and {found[1]} steps, not {published.episodes} and "
                f"{published.steps}: it is another dataset"
            )
        for demo in (source.demos[0], source.demos[-1]):
            source.read(demo, published.keys)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; of a folder, that of its files' names and SHA-256s."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            total.update(f"{digest(file)} {file.relative_to(path).as_posix()}\n".encode())
        return total.hexdigest()
    with path.open("rb") as content:
        while piece := content.read(PIECE):
            total.update(piece)
    return total.hexdigest()


def _make(published: Published, file: Path, temporary: Path, where: str) -> None:
    """Makes the dataset of the published file, and checks it; ``where`` the file is from, for error lines."""
    try:
        if published.inside is None:
            file.rename(temporary)
        else:
            unpack(file, published.inside, temporary, most_bytes=MOST_BYTES, most_files=MOST_FILES)
        check(published, temporary)
    except InputError as error:
        line = str(error).replace(str(temporary), published.name)
        raise _RefusedError(f"{where} isn't what it should be ({line}): nothing is put in place")


def _checked(published: Published, place: Path, record: dict[str, Any] | None) -> str:
    """A line on a dataset that is there already; raises ``InputError`` if it isn't the published one."""
    if record is not None:
        if digest(place) != record.get("made_sha256"):
            raise InputError(
                f"{place} isn't as it was when it was downloaded: move it away, and run this again"
            )
        return f"{place} is there already, and as it was when it was downloaded"
    try:
        check(published, place)
        if published.inside is None and published.sha256 not in (None, digest(place)):
            raise InputError("its SHA-256 isn't the published file's")
    except InputError as error:
        raise InputError(
            f"{place} is there already, and another dataset ({error}): move it away, or name out="
        )
    return f"{place} is there already: {published.episodes} episodes, {published.steps} steps; it is kept"


def _require_same(
    published: Published, where: str, sha256: str, record: dict[str, Any] | None, place: Path
) -> None:
    """Raises ``InputError`` if a file hasn't the SHA-256 that is published, or that of the last download."""
    if published.sha256 not in (None, sha256):
        raise _RefusedError(
            f"{where} has the SHA-256 {sha256[:16]}…, {str(published.sha256)[:16]}… is expected: it was "
            "damaged on the way, or isn't the published file; nothing is put in place"
        )
    if record is not None and record.get("sha256") != sha256:
        raise _RefusedError(
            f"{where} isn't the file that was downloaded before (its SHA-256 is another): remove "
            f"{_beside(place)} to take it"
        )


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{folder} has room for {free} bytes, {size} are needed: free space there, or name out="
        )


def _beside(place: Path) -> Path:
    return place.with_name(f"{place.name}.download.json")


def _record(place: Path) -> dict[str, Any] | None:
    """What was kept of the last download; ``None``: there was none."""
    path = _beside(place)
    if not os.path.lexists(path):
        return None
    require_regular(path, 2**16)
    with reading(str(path), "remove it"):
        return dict(json.loads(path.read_text()))


@contextlib.contextmanager
def _workplace(folder: Path, place: Path) -> Iterator[Path]:
    """A hidden folder for the parts of a download, locked meanwhile; it stays, unless it is empty.

    Raises:
        InputError: another process has it.
    """
    work = folder / f".download-{place.name}"
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(work)
        except FileNotFoundError:
            continue
        if held is None:
            raise InputError(f"{place} is being downloaded by another process: wait until it has ended")
        if work.exists() and os.path.samestat(os.fstat(held), work.stat()):
            break
        os.close(held)  # its last holder removed it
    try:
        yield work
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()
        os.close(held)
