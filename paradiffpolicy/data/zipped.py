"""Zip files, also damaged ones and ones made to harm: sizes are compared with bounds before they are used.

Python's ``zipfile`` unpacks all that an entry has, even if it declares less, and reads a table of contents
of any size: both are checked here first.
"""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

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


class ZippedStore(ZipStore):
    """A zarr store in a zip file, to read.

    Attributes:
        files: its root.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="r")
        self.files = zipfile.Path(open_zip(path))
