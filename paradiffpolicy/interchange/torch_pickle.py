"""Reads files of ``torch.save`` without running anything of theirs.

Such a file is a zip archive: a pickle, and a member per storage of numbers.  The pickle may name classes and
functions; here it gets stand-ins that hold what they are given and do nothing, for a few known names, and is
refused for any other.  Numbers are read when they are wanted, and no more of them than the file has.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..files import require_regular

LARGEST_FILE, LARGEST_PICKLE = 2**36, 2**26
"""Bytes that are read at most."""
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
REFUSED_OPCODES = ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
"""That no checkpoint has."""


class Inert:
    """A stand-in for an object of a class that isn't here: keeps its state, and does nothing.

    Attributes:
        state: what the object's attributes would be.
    """

    def __init__(self, *arguments: Any) -> None:
        self.state: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores an item, as of a ``defaultdict``."""


class OmegaConf(Inert):
    """A stand-in for a container or a value of omegaconf."""


@dataclass(frozen=True)
class Storage:
    """Numbers of a file, not read yet.

    Attributes:
        member: of the archive.
        count: of numbers.
    """

    member: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet: contiguous, from ``first`` of its storage on."""

    storage: Storage
    first: int
    shape: tuple[int, ...]


class TorchFile:
    """An open file of ``torch.save``.

    Args:
        path: of the file.

    Attributes:
        content: what was saved; tensors are ``StoredTensor``, what isn't known is ``Inert``.

    Raises:
        InputError: it is no such file, is damaged, or names what isn't needed for a policy.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path, LARGEST_FILE)
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            self._members = checked_members(self._archive, path.stat().st_size)
            self.content = self._unpickled()
        except InputError:
            raise
        except RecursionError:
            raise InputError(f"{path} can't be read (it is nested too deep): copy the checkpoint again")
        except Exception as error:  # whatever a damaged archive or pickle leads to
            raise InputError(f"{path} can't be read ({first_line(error):.160}): copy the checkpoint again")

    def _unpickled(self) -> Any:
        names = [name for name in self._members if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it isn't a file of torch.save")
        (name,) = names
        if self._members[name] > LARGEST_PICKLE:
            raise ValueError(f"its pickle is over {LARGEST_PICKLE} bytes")
        order = name.removesuffix("data.pkl") + "byteorder"
        if order in self._members and self._archive.read(order) != sys.byteorder.encode():
            raise ValueError("its numbers are in another byte order")
        pickled = self._archive.read(name)
        require_harmless(pickled)
        return Unpickler(pickled, name.removesuffix("data.pkl"), self._members).load()

    def read(self, tensor: StoredTensor) -> Tensor:
        """A tensor's numbers, in memory of their own."""
        storage, count = tensor.storage, math.prod(tensor.shape)
        try:
            with self._archive.open(storage.member) as member:
                member.seek(tensor.first * storage.dtype.itemsize)
                content = bytearray(member.read(count * storage.dtype.itemsize))
            values = torch.frombuffer(content, dtype=storage.dtype) if count else torch.empty(0)
            return values.reshape(tensor.shape)
        except (ValueError, OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} is damaged ({first_line(error):.160}): copy the checkpoint again")

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()


def checked_members(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """An archive's members and their sizes: stored as they are, each name once, together not over the file.

    Raises:
        ValueError: they aren't.
    """
    members: dict[str, int] = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its part {info.filename!r:.60} is compressed, which torch.save doesn't do")
        if info.filename in members:
            raise ValueError(f"its part {info.filename!r:.60} is there twice")
        members[info.filename] = info.file_size
    if sum(members.values()) > size:
        raise ValueError("its parts overlap")
    return members


def require_harmless(pickled: bytes) -> None:
    """Raises ``ValueError`` for what would take memory out of proportion, or that no checkpoint has."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in REFUSED_OPCODES:
            raise ValueError(f"its pickle has the operation {opcode.name}")
        if "PUT" in opcode.name and int(argument or 0) > len(pickled):
            raise ValueError("its pickle numbers an object beyond its own length")


class Unpickler(pickle.Unpickler):
    """Builds containers, ``StoredTensor`` and stand-ins."""

    def __init__(self, pickled: bytes, folder: str, members: dict[str, int]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._folder, self._members = folder, members

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "omegaconf":
            return OmegaConf
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        known = KNOWN.get((module, name))
        if known is None:
            raise InputError(f"it names {f'{module}.{name}'!r:.100}, which no policy needs: it isn't trusted")
        return known

    def persistent_load(self, reference: Any) -> Storage:
        kind, dtype, key, _, count = reference
        member = f"{self._folder}data/{key}"
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int:
            raise ValueError("a storage in it is malformed")
        if self._members.get(member) != count * dtype.itemsize:
            raise ValueError(f"storage {key!r:.40} doesn't have the {count} numbers that it declares")
        return Storage(member, dtype, count)


def stored_tensor(
    storage: Storage, first: int, shape: tuple[int, ...], strides: Any, *_: Any
) -> StoredTensor:
    """In place of ``torch._utils._rebuild_tensor_v2``.  Raises ``ValueError`` if the tensor isn't contiguous,
    or reaches out of its storage."""
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in (first, *shape)):
        raise ValueError("a tensor in it is malformed")
    if first + math.prod(shape) > storage.count:
        raise ValueError("a tensor in it has more numbers than its storage")
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(n > 1 and s != e for n, s, e in zip(shape, strides, expected, strict=True)):
        raise ValueError("a tensor in it isn't contiguous")
    return StoredTensor(storage, first, shape)


def encoded(text: str, encoding: str) -> bytes:
    """In place of ``_codecs.encode``: how Python 2's protocol writes bytes."""
    if encoding != "latin1":
        raise ValueError("bytes in it are encoded in an unknown way")
    return text.encode("latin1")


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): Inert,
    ("typing", "Any"): Inert,
    ("dill._dill", "_load_type"): Inert,
    ("_codecs", "encode"): encoded,
    ("torch._utils", "_rebuild_tensor_v2"): stored_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
"""What stands in for a name of a pickle."""


def plain(value: Any) -> Any:
    """A config of omegaconf's as Python's containers and values."""
    if isinstance(value, OmegaConf):
        state = value.state
        return plain(state["_content"] if "_content" in state else state.get("_val"))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value
