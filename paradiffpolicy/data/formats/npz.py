"""Folders of numpy files, one per episode, in the order of their names.

::

    FOLDER/
      <any name>.npz
        action              [N, A]
        <observation>       [N, ...]   any name; the same in every file
        rewards, dones      [N]        optional
        states, poses       [N, ...]   optional

``<observation>[t]`` precedes ``action[t]``.  Nothing is unpickled, and sizes are compared with bounds before
anything is read.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ...errors import InputError, nearest, reading
from ...files import Closing, contained, write_new
from ..arrays import HARMLESS, LARGEST_STEP
from ..replay_buffer import require_finite
from ..zipped import open_zip
from .demonstration import OTHERS, About, Demonstration, fields_of
from .env_args import EnvArgs

SUFFIX = ".npz"
SUFFIXES = (SUFFIX,)
HEADER_BYTES = 2**14
LARGEST_ARRAY = 2**31
"""Bytes of one array of an episode."""
LARGEST_RATIO = 200
"""By this much an array may have shrunk; recorded numbers never do by so much."""


def recognises(path: Path) -> bool:
    """Whether a path is a folder with such files."""
    return path.is_dir() and any(path.glob(f"*{SUFFIX}"))


def open_source(path: Path, env_args: EnvArgs | None = None) -> NpzFolder:
    """See ``NpzFolder``."""
    return NpzFolder(path, env_args)


class NpzFolder(Closing):
    """A ``Source`` that reads a folder of episodes; its actions are as recorded.

    Args:
        path: of the folder.
        env_args: describe the environment.

    Raises:
        InputError: there are no such files, or the first has no actions.
    """

    kind = "recorded"
    control_hz = None
    cameras: Mapping[str, tuple[int, int, int]] = {}

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self.name, self.env_args = str(path), env_args
        files = sorted(Path(path).glob(f"*{SUFFIX}"), key=lambda file: file.name)
        if not files:
            raise InputError(f"{path} has no files *{SUFFIX}: write one per episode there")
        self._files = {f"demo_{index}": file for index, file in enumerate(files)}
        self.demos = list(self._files)
        self.masks: dict[str, list[str]] = {}
        with closing(self._open(files[0])) as file:
            names = _names(file)
            if "action" not in names:
                raise InputError(f"{files[0]} has no action{nearest('action', names)}")
            self.keys, self.skipped = [], list[str]()
            for name in names:
                if name in OTHERS:
                    continue
                try:
                    _header(file, name, f"{files[0]}: {name}")
                    self.keys.append(name)
                except InputError as error:
                    self.skipped.append(str(error))

    def length(self, demo: str) -> int:
        """Steps of an episode, from the header of its actions."""
        path = self._path(demo)
        with closing(self._open(path)) as file:
            return int(_header(file, "action", f"{path}: action")[0][0])

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        path = self._path(demo)
        with closing(self._open(path)) as file:
            names = _names(file)
            wanted = [*(self.keys if keys is None else keys), *(name for name in OTHERS if name in names)]
            for name in wanted if "action" in names else ("action",):
                if name not in names:
                    raise InputError(f"{path} has no {name}{nearest(name, names)}")
            values = {name: _read(file, name, f"{path}: {name}") for name in wanted}
        return Demonstration.of(demo, values, str(path))

    def close(self) -> None:
        """Does nothing: no file is kept open."""

    def _path(self, demo: str) -> Path:
        if demo not in self._files:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        return self._files[demo]

    def _open(self, path: Path) -> zipfile.ZipFile:
        return open_zip(contained(path, Path(self.name)))


def _names(file: zipfile.ZipFile) -> list[str]:
    return sorted(name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy"))


def _header(file: zipfile.ZipFile, name: str, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns come first, dtype, and bytes before the values, of an array that is numbers.

    Raises:
        InputError: it isn't, or its sizes don't fit together or are too large.
    """
    with reading(where):
        info = file.getinfo(f"{name}.npy")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{where} is packed in a way that isn't read: write it with numpy.savez")
        with file.open(info) as entry:
            head = io.BytesIO(entry.read(HEADER_BYTES))
        version = npy.read_magic(head)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise InputError(f"{where} is in numpy's format {version}, which isn't read: save plain arrays")
        shape, by_columns, dtype = read(head)
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which aren't unpickled: save arrays of numbers")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise InputError(f"{where} holds {dtype}, not numbers of 64 bits at most: save those")
    if not shape:
        raise InputError(f"{where} is a single number, not one per step")
    size, step = dtype.itemsize * math.prod(shape), dtype.itemsize * math.prod(shape[1:])
    if size + head.tell() != info.file_size:
        raise InputError(f"{where} is {shape} of {dtype} but has {info.file_size} bytes: copy it again")
    if step > LARGEST_STEP or size > LARGEST_ARRAY:
        raise InputError(f"{where} has {size} bytes, {LARGEST_ARRAY} are the most that is read")
    if size > max(HARMLESS, LARGEST_RATIO * info.compress_size):
        raise InputError(f"{where} unpacks from {info.compress_size} to {size} bytes, as no recording does")
    return shape, by_columns, dtype, head.tell()


def _read(file: zipfile.ZipFile, name: str, where: str) -> NDArray[Any]:
    shape, by_columns, dtype, before = _header(file, name, where)
    with reading(where), file.open(f"{name}.npy") as entry:
        entry.read(before)
        content = entry.read(dtype.itemsize * math.prod(shape)) + entry.read(1)  # its end: the checksum
        values = np.frombuffer(content, dtype)
        values = values.reshape(shape[::-1]).T if by_columns else values.reshape(shape)
    require_finite(values, where, "leave the episode out, or repair the value")
    return values.astype(dtype.newbyteorder("="), copy=False)


def write(path: Path, demonstrations: Iterable[Demonstration], about: About) -> None:
    """Writes demonstrations to a new folder, or leaves none; scenes, and what is told, are left out.

    Raises:
        InputError: the path exists, or a demonstration can't be read.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for index, demo in enumerate(demonstrations):
            with zipfile.ZipFile(temporary / f"episode_{index:06d}{SUFFIX}", "w") as file:
                for name, values in fields_of(demo, str(path)).items():
                    with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        npy.write_array(entry, np.asarray(values), allow_pickle=False)

    write_new(Path(path), write)
