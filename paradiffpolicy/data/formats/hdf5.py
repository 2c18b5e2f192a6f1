"""Values in HDF5 files, also in damaged ones and in ones made to harm.

Links and storage outside the file aren't followed, sizes are compared with bounds before anything is read,
and what was never written, or lost, is an error instead of zeros.
"""

from __future__ import annotations

import contextlib
import io
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, first_line, reading
from ..arrays import DEFLATE_RATIO, HARMLESS, LARGEST_STEP, require_memory

DEEPEST = 8
"""Groups in each other, and links to links."""
PACKING = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF, h5py.h5z.FILTER_SZIP}


def open_file(path: Path) -> h5py.File:
    """Opens a file to read.

    Raises:
        InputError: it doesn't exist, is damaged, or a writer has it open.
    """
    if not path.is_file():
        raise InputError(f"no file at {path}: name a robomimic HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "lock file" in str(error) or "already open for write" in str(error):
            raise InputError(
                f"{path} is open for writing: wait until its writer has closed it; if that was killed, "
                f"'h5clear -s {path}' says so"
            )
        if "truncated file" in str(error):
            raise InputError(f"{path} is cut short ({path.stat().st_size} bytes are left): copy it again")
        raise InputError(f"{path} is not an HDF5 file, or damaged ({first_line(error)}): copy it again")


class _Patient(io.FileIO):
    """A file to which writing never fails, since HDF5 crashes where it does; the first failure is kept."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and self.failed is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.failed = error
        return len(data)

    def require_written(self) -> None:
        """Raises the failure."""
        if self.failed is not None:
            raise self.failed


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[h5py.File, Callable[[], object]]]:
    """Opens a new file, and gives beside it what raises the system's error if it can't be written so far."""
    with _Patient(path, "w+") as written:
        try:
            with h5py.File(written, "w") as file:
                yield file, written.require_written
        finally:
            written.require_written()


def find(group: h5py.Group, path: str, depth: int = 0) -> h5py.Group | h5py.Dataset | None:
    """What is at a path below a group in the same file; ``None``: nothing, or it is elsewhere."""
    for name in path.split("/"):
        if not isinstance(group, h5py.Group) or depth > DEEPEST:
            return None
        link = group.get(name, getlink=True) if name else None
        if isinstance(link, h5py.SoftLink):
            start = group.file if link.path.startswith("/") else group
            group = find(start, link.path.strip("/"), depth + 1)
        else:
            group = group[name] if isinstance(link, h5py.HardLink) else None
    return group


def entries(group: h5py.Group) -> list[str]:
    """What is in a group.

    Raises:
        InputError: a name isn't text.
    """
    found: list[Any] = list(group)
    for name in found:
        if not isinstance(name, str):
            where = f"{group.file.filename}: {group.name}"
            raise InputError(f"{where} has the name {name!r}, which isn't text: the file is damaged")
    return found


def datasets(
    group: h5py.Group, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, h5py.Dataset | None]]:
    """All datasets below a group, by path; ``None`` in place of links that lead to nothing in the file."""
    for name in entries(group) if depth < DEEPEST else ():
        item = find(group, name)
        if isinstance(item, h5py.Group):
            yield from datasets(item, f"{prefix}{name}/", depth + 1)
        elif item is None or isinstance(item, h5py.Dataset):
            yield prefix + name, item


def unreadable(dataset: h5py.Dataset | None) -> str | None:
    """Why a dataset isn't numbers ``[N, ...]`` that can be read, if so."""
    if dataset is None:
        return "is a link to nothing in this file: copy its values here"
    if dataset.dtype.kind not in "biuf":
        return f"holds {'text' if dataset.dtype.kind in 'OS' else dataset.dtype}, not numbers"
    if dataset.dtype.itemsize > 8:
        return f"holds {dataset.dtype}, of which 64 bits at most are read: write it anew"
    if not dataset.shape:
        return "holds a single value, not one per step"
    created = dataset.id.get_create_plist()
    if created.get_external_count() or created.get_layout() == h5py.h5d.VIRTUAL:
        return "keeps its values in other files: copy them here"
    for code, *_ in map(created.get_filter, range(created.get_nfilters())):
        if not h5py.h5z.filter_avail(code):
            return f"is packed with filter {code}, which isn't installed: install its plugin (hdf5plugin)"
    return None


def numbers(dataset: h5py.Dataset | None, where: str) -> NDArray[Any]:
    """All of a dataset's numbers, ``[N, ...]``.

    Raises:
        InputError: it isn't readable, too large, or not all of it is there.
    """
    with reading(where):
        why = unreadable(dataset)
        if why or dataset is None:
            raise InputError(f"{where} {why}")
        step = dataset.dtype.itemsize * math.prod(dataset.shape[1:])
        chunk = dataset.dtype.itemsize * math.prod(dataset.chunks or ())
        if max(step, chunk) > LARGEST_STEP:
            raise InputError(
                f"{where} has {max(step, chunk)} bytes per step or chunk, {LARGEST_STEP} at most are read"
            )
        require_memory(dataset.nbytes, where)
        _check_stored(dataset, where)
        return np.asarray(dataset[()])


def _check_stored(dataset: h5py.Dataset, where: str) -> None:
    """Raises ``InputError`` unless all chunks are there, and none unpacks to more than its size."""
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < dataset.nbytes:
            raise InputError(f"{where} was never written, or is lost: write the demo anew")
        return
    wanted = math.prod(math.ceil(n / chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    there = dataset.id.get_num_chunks()
    if there < wanted:
        raise InputError(f"{where} has {there} of its {wanted} chunks: copy the file again")
    created = dataset.id.get_create_plist()
    filters = [created.get_filter(index)[0] for index in range(created.get_nfilters())]
    if len(PACKING & set(filters)) > 1 or any(filters.count(code) > 1 for code in PACKING):
        raise InputError(f"{where} is packed twice, which isn't read: write it anew")
    if h5py.h5z.FILTER_DEFLATE not in filters:
        return
    most = max(2 * dataset.dtype.itemsize * math.prod(dataset.chunks), HARMLESS)
    large: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(
        lambda chunk: large.append(chunk.chunk_offset) if chunk.size * DEFLATE_RATIO > most else None
    )
    for offset in large:
        skipped, packed = dataset.id.read_direct_chunk(offset)
        if skipped >> filters.index(h5py.h5z.FILTER_DEFLATE) & 1:
            continue
        if len(zlib.decompressobj().decompress(packed, most + 1)) > most:
            raise InputError(f"{where} has a chunk that unpacks to more than its size: the file is damaged")
