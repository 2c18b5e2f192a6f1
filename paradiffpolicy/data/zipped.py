"""Zip files, also damaged ones and ones made to harm: sizes are compared with bounds before they are used.

Python's ``zipfile`` unpacks all that an entry has, even if it declares less, and reads a table of contents
of any size: both are checked here first.
"""

from __future__ import annotations

import copy
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from zarr.storage import ZipStore

from ..errors import InputError, reading
from ..files import require_regular

LARGEST_FILE = 2**40
LARGEST_CONTENTS = 2**27
"""Bytes of a table of contents; an entry takes about a hundred."""
PIECE = 2**20
END, END64 = b"PK\5\6", b"PK\6\6"
"""Begin the records that say how long the table of contents is."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip file to read.

    Raises:
        InputError: it isn't a regular file, isn't a zip file, is cut short, or its table is too large.
    """
    require_regular(path, LARGEST_FILE)
    with reading(f"{path} is no whole zip file, it"):
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, 2**17), 2)
            tail = file.read()
        for magic, start, stop in ((END, 12, 16), (END64, 40, 48)):
            at = tail.rfind(magic)
            declared = int.from_bytes(tail[at + start : at + stop], "little") if at >= 0 else 0
            if declared > LARGEST_CONTENTS and (magic == END64 or declared != 2**32 - 1):
                raise InputError(f"{path} has {declared} bytes of file names, {LARGEST_CONTENTS} are read")
        return zipfile.ZipFile(path)


def check_entry(file: zipfile.ZipFile, name: str, most: int, where: str) -> int:
    """Checks that an entry is there and unpacks to what it declares; returns its bytes.

    Raises:
        InputError: it is missing, damaged, packed in another way than deflate, or larger than ``most``.
    """
    with reading(where):
        info = file.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise InputError(f"{where} is packed in a way that isn't read: write it stored or with deflate")
        if info.file_size > most:
            raise InputError(f"{where} has {info.file_size} bytes, {most} are the most that is read")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise InputError(f"{where} isn't as long as it declares: it is damaged, copy it again")
        if info.compress_type == zipfile.ZIP_DEFLATED:
            longer = copy.copy(info)
            longer.file_size = most + 1  # zipfile stops at what it takes for the size
            with file.open(longer) as entry:
                total = sum(map(len, iter(lambda: entry.read(PIECE), b"")))
            if total != info.file_size:
                raise InputError(f"{where} unpacks to more or less than it declares: it is damaged")
        return info.file_size


def unpack(path: Path, inside: str, target: Path, *, most_bytes: int, most_files: int) -> None:
    """Unpacks a folder of a zip file to a new folder.

    Args:
        inside: the folder's path in the zip file.
        most_bytes, most_files: that its content may have.

    Raises:
        InputError: the folder isn't there, or too large, or an entry is damaged, a link, or leads elsewhere;
            part of it may be unpacked by then.
    """
    with open_zip(path) as file:
        count, total = len(file.infolist()), sum(info.file_size for info in file.infolist())
        if count > most_files or total > most_bytes:
            raise InputError(
                f"{path} unpacks to {count} files and {total} bytes, {most_files} and {most_bytes} are the "
                "most that is unpacked"
            )
        infos = {_entry_path(info, path): info for info in file.infolist()}
        files = {place for place, info in infos.items() if not info.is_dir()}
        if len(infos) < count or any(parent in files for place in infos for parent in place.parents):
            raise InputError(f"{path} has two entries of one name: it is damaged, copy it again")
        wanted = [place for place in files if place.is_relative_to(inside) and place != PurePosixPath(inside)]
        if not wanted:
            raise InputError(f"{path} has no folder {inside}: it is another file")
        target.mkdir()
        for place in wanted:
            made = target / place.relative_to(inside)
            made.parent.mkdir(parents=True, exist_ok=True)
            with made.open("xb") as content:
                for piece in _unpacked(file, infos[place], f"{path}: {place}"):
                    content.write(piece)


def _entry_path(info: zipfile.ZipInfo, path: Path) -> PurePosixPath:
    """Where an entry belongs, from the root of the zip file.

    Raises:
        InputError: it would lead out of there, or it isn't a file or folder that can be read.
    """
    where, place = f"{path}: {info.filename!r:.80}", PurePosixPath(info.filename)
    odd = {"\\", "\0"} & set(info.orig_filename)
    if odd or place.is_absolute() or ".." in place.parts or not place.parts:
        raise InputError(f"{where} leads out of the folder: nothing of it is unpacked")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG):
        raise InputError(f"{where} is a link, or no file: nothing of it is unpacked")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise InputError(f"{where} is packed in a way that isn't read: nothing of it is unpacked")
    return place


def _unpacked(file: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Iterator[bytes]:
    """An entry's content; ``zipfile`` stops where it has what is declared, and compares its checksum."""
    done = 0
    with reading(where), file.open(info) as entry:
        while piece := entry.read(PIECE):
            done += len(piece)
            yield piece
    if done != info.file_size:
        raise InputError(f"{where} unpacks to {done} bytes, not to {info.file_size}: it is damaged")


class ZippedStore(ZipStore):
    """A zarr store in a zip file, to read.

    Attributes:
        files: its root.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="r")
        self.files = zipfile.Path(open_zip(path))
