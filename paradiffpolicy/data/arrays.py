"""Arrays of zarr stores, also of damaged ones and of ones made to harm.

Where a chunk is missing, zarr fills in zeros; here that is an error: writers of this layout store every
chunk.  Sizes are compared with bounds before anything is read, only regular files are, and no codec that
executes what it reads.  These checks are of stores in a folder or a zip file; others, in memory, are this
process's own.
"""

from __future__ import annotations

import bz2
import dataclasses
import itertools
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore

from ..errors import InputError, reading
from ..files import require_regular
from .zipped import ZippedStore, check_entry

CHUNK_BYTES = 2**20
PICTURES_BYTES = 2**17
"""Of a chunk of pictures: training reads few of them at a time, in any order."""
ENDS_PER_CHUNK = 4096
LARGEST_METADATA = 2**22
LARGEST_STEP = 2**28
"""Bytes of one step of an array, and of one chunk."""
HARMLESS = 2**26
"""Bytes that an unpacked chunk may have, whatever it should have."""
METADATA = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
PACKING = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
"""Codecs of which chunks may be much shorter than their content."""
DEFLATE_RATIO = 1032
"""By this much the content of gzip and zlib is longer, at most."""


Place: TypeAlias = Path | zipfile.Path
"""Of a file or folder, on disk or in a zip file."""


class NotNumbersError(InputError):
    """An array isn't numbers ``[n, ...]``: it may be a text, or of the store as a whole."""


def open_group(path: Path, mode: str) -> zarr.Group:
    """Opens a store's root group; a consolidated copy of the metadata, which may be stale, isn't used."""
    zipped = ZippedStore(path) if path.is_file() else None
    if zipped and mode != "r":
        raise InputError(f"{path} is a zip file, which can't be appended to: unpack it, or convert it")
    for group in ("", "data", "meta"):
        _check_metadata((zipped.files if zipped else path).joinpath(group))
    with reading(f"{path} is not a zarr group, it", "name the .zarr folder itself"):
        return zarr.open_group(zipped or path, mode=mode, use_consolidated=False)  # type: ignore[arg-type]


def subgroup(group: zarr.Group, name: str) -> zarr.Group | None:
    """A group in the root group, as ``open_group`` opens it; ``None`` if there is none of that name."""
    try:
        return zarr.open_group(
            group.store,
            path=name,
            mode="r" if group.read_only else "r+",
            zarr_format=group.metadata.zarr_format,
            use_consolidated=False,
        )
    except (FileNotFoundError, ContainsArrayError):
        return None


def array_names(group: zarr.Group) -> list[str]:
    """Names of a group's arrays, also of those that can't be opened."""
    folder = _folder(group)
    if folder is None:
        return sorted(group.array_keys())
    entries = folder.iterdir() if isinstance(folder, zipfile.Path) else os.scandir(folder)
    return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[:1] != ".")


def open_array(group: zarr.Group, name: str, where: str) -> Any:
    """Opens an array of numbers ``[n, ...]`` whose sizes are bounded.

    Raises:
        InputError: it isn't one, is damaged, too large, or its codec isn't installed.
    """
    folder = _folder(group)
    if folder is not None:
        _check_metadata(folder / name)
    with reading(where, "install its codec, or copy it again if it is damaged"):
        array: Any = zarr.open_array(
            group.store, path=f"{group.path}/{name}", zarr_format=group.metadata.zarr_format, mode="r"
        )
        step = array.dtype.itemsize * math.prod(array.shape[1:])
        chunk = array.dtype.itemsize * math.prod(array.chunks)
        codecs = _codecs(array)
    if array.dtype.kind not in "biuf":
        raise NotNumbersError(f"{where} holds {array.dtype}, not numbers")
    if not array.ndim:
        raise NotNumbersError(f"{where} is a single number, not one per step")
    if max(step, chunk) > LARGEST_STEP:
        raise InputError(
            f"{where} has {max(step, chunk)} bytes per step or chunk, at most {LARGEST_STEP} are read: write "
            "it anew in smaller ones"
        )
    packing = [index for index, codec in enumerate(codecs) if codec in PACKING]
    outermost = len(codecs) - 1 - (codecs[-1:] == ["crc32c"])
    if "pickle" in codecs or "sharding_indexed" in codecs or packing not in ([], [outermost]):
        raise InputError(
            f"{where} is stored as {' + '.join(codecs)}, which isn't read: write it anew with one compressor"
        )
    return array


def check_rows(array: Any, start: int, stop: int, where: str) -> None:
    """Raises ``InputError`` where chunks of rows ``start … stop`` are missing or unpack to too much."""
    folder = _folder(array)
    if folder is None:
        return
    with reading(where):
        for steps, key in _chunks(array, start, stop):
            _check_chunk(folder / key, array, f"{where}: its chunk {key} ({steps})")


def read_rows(array: Any, start: int, stop: int, where: str) -> NDArray[Any]:
    """Rows ``start … stop`` of an array that ``open_array`` opened.

    Raises:
        InputError: chunks are missing, damaged, or larger than declared, or memory can't hold the rows.
    """
    require_memory((stop - start) * array.dtype.itemsize * math.prod(array.shape[1:]), where)
    check_rows(array, start, stop, where)
    with reading(where), np.errstate(all="ignore"):  # as of a filter that divides by 0
        return np.asarray(array[start:stop])


def require_memory(n_bytes: int, where: str) -> None:
    """Raises ``InputError`` where so much is more than this machine has."""
    if n_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise InputError(f"{where}: {n_bytes / 2**30:.0f} GiB are more than this machine's memory")


def write_rows(group: Any, name: str, start: int, values: NDArray[Any]) -> None:
    """Writes values from row ``start`` on, where the array then ends; makes the array if there is none.

    The rows come first, then the length: whatever an array's length covers has been written.
    """
    shape = values.shape[1:]
    if name not in group:
        row_bytes = max(1, values.dtype.itemsize * math.prod(shape))
        chunk_bytes = PICTURES_BYTES if len(shape) == 3 else CHUNK_BYTES
        rows = ENDS_PER_CHUNK if name.endswith("_ends") else max(1, chunk_bytes // row_bytes)
        group.create_array(name, shape=(0, *shape), chunks=(rows, *shape), dtype=values.dtype)
    array = group[name]
    if array.shape[0] > start:
        array.resize((start, *shape))
    end = (start + len(values), *shape)
    stored = array.async_array.with_config({"write_empty_chunks": True})
    zarr.Array(dataclasses.replace(stored, metadata=array.metadata.update_shape(end)))[start:] = values
    array.resize(end)


def _folder(node: Any) -> Place | None:
    if isinstance(node.store, ZippedStore):
        return node.store.files.joinpath(node.path)
    return node.store.root / node.path if isinstance(node.store, LocalStore) else None


def _is_there(place: Place) -> bool:
    return place.exists() if isinstance(place, zipfile.Path) else os.path.lexists(place)


def _require_bounded(place: Place, most: int) -> int:
    """Bytes of a file; raises ``InputError`` unless it is regular and has at most ``most``."""
    if isinstance(place, zipfile.Path):
        return check_entry(place.root, place.at, most, str(place))
    require_regular(place, most)
    return place.stat().st_size


def _check_metadata(folder: Place) -> None:
    for name in METADATA:
        if _is_there(folder / name):
            _require_bounded(folder / name, LARGEST_METADATA)


def _codecs(array: Any) -> list[str]:
    """Names of an array's codecs, in the order of writing."""
    if array.metadata.zarr_format == 2:
        used = [*(array.metadata.filters or ()), array.metadata.compressor]
        return [codec.codec_id for codec in used if codec is not None]
    return [codec.to_dict()["name"].removeprefix("numcodecs.") for codec in array.metadata.codecs]


def _chunks(array: Any, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """The steps and keys of the chunks that rows ``start … stop`` are in."""
    if start >= stop:
        return
    rows = array.chunks[0]
    others = [range(math.ceil(n / chunk)) for n, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
    for index in range(start // rows, math.ceil(stop / rows)):
        steps = f"steps {index * rows} to {min((index + 1) * rows, array.shape[0]) - 1}"
        for rest in itertools.product(*others):
            yield steps, array.metadata.encode_chunk_key((index, *rest))


def _check_chunk(path: Place, array: Any, what: str) -> None:
    if not _is_there(path):
        raise InputError(
            f"{what} is missing: copy the store again; if these are all {array.fill_value}, write them with "
            "zarr's write_empty_chunks=True"
        )
    declared = array.dtype.itemsize * math.prod(array.chunks)
    most = 8 * declared + CHUNK_BYTES  # filters may widen numbers
    size = _require_bounded(path, most)
    packing = [codec for codec in _codecs(array) if codec in PACKING]
    if packing and _unpacked(path, size, packing[0], most) > most:
        raise InputError(f"{what} unpacks to more than its {declared} bytes: the store is damaged")


def _unpacked(path: Place, size: int, codec: str, most: int) -> int:
    """Bytes that a packed chunk says it has, or unpacks to; 0 where they can't exceed ``most``."""
    if codec in ("gzip", "zlib") and size * DEFLATE_RATIO <= max(most, HARMLESS):
        return 0
    with path.open("rb") as file:
        content = file.read() if codec not in ("blosc", "lz4") else file.read(8)
    if codec == "blosc":
        return int.from_bytes(content[4:], "little")
    if codec == "lz4":
        return int.from_bytes(content[:4], "little")
    if codec == "zstd":
        return _zstd_bytes(content)
    return _stream_bytes(content, codec, most)


def _zstd_bytes(content: bytes) -> int:
    """Bytes that a frame of Zstandard says it has, or that its blocks can have."""
    if len(content) < 6:
        return 0
    descriptor = content[4]
    is_single = descriptor >> 5 & 1
    at = 6 - is_single + (0, 1, 2, 4)[descriptor & 3]
    size = (is_single, 2, 4, 8)[descriptor >> 6]
    if size:
        return int.from_bytes(content[at : at + size], "little")
    total = last = 0
    while not last and at + 3 <= len(content):
        header = int.from_bytes(content[at : at + 3], "little")
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        total += length if kind < 2 else 2**17
        at += 3 + (1 if kind == 1 else length)
    return total + _zstd_bytes(content[at + 4 * (descriptor >> 2 & 1) :])


def _stream_bytes(content: bytes, codec: str, most: int) -> int:
    """Bytes that a stream, or several in a row, unpacks to; stops beyond ``most``."""
    made: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(31),
        "zlib": zlib.decompressobj,
        "bz2": bz2.BZ2Decompressor,
        "lzma": lambda: lzma.LZMADecompressor(memlimit=LARGEST_STEP),
    }
    magic, total, unpack = content[:2], 0, made[codec]()
    while total <= most:
        piece = unpack.decompress(content, CHUNK_BYTES)
        total += len(piece)
        content = getattr(unpack, "unconsumed_tail", b"")
        if unpack.eof and unpack.unused_data[:2] == magic:
            content, unpack = unpack.unused_data, made[codec]()
        elif unpack.eof or not (piece or content):
            break
    return total
