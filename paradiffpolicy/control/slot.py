"""One record in memory that two processes share: the newest wins, and it is read whole or not at all.

The writer counts up before and after it writes; a reader that finds the count odd, or changed, or a
checksum that doesn't fit, has met a writer at work, and looks again later.  The checksum is there because
Python can't order writes to memory: on some machines they may be seen in another order.  Nobody waits
for anybody.
"""

from __future__ import annotations

import mmap
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Slot:
    """A record in shared memory, for one writer and one reader.

    Args:
        memory: shared by both, at least ``Slot.size(dtype)`` bytes from ``offset``.
        dtype: of the record, a structured one.
        offset: where it lies, a multiple of 8.
    """

    def __init__(self, memory: mmap.mmap | bytearray, dtype: np.dtype[Any], offset: int = 0) -> None:
        head = np.frombuffer(memory, np.uint64, count=2, offset=offset)
        self._count, self._checksum = head[:1], head[1:]
        self._record = np.frombuffer(memory, dtype, count=1, offset=offset + head.nbytes)
        self._bytes = self._record.view(np.uint8)
        self._copy = np.empty_like(self._record)
        self._seen = 0

    @staticmethod
    def size(dtype: np.dtype[Any]) -> int:
        """Bytes that it takes, a multiple of 8."""
        return 16 + -(-dtype.itemsize // 8) * 8

    def write(self, record: NDArray[Any]) -> None:
        """Puts ``record`` ``[1]`` in the place of what is there."""
        count = int(self._count[0])
        self._count[0] = count + 1 + count % 2  # odd; so it is too after a writer that died at work
        self._record[:] = record
        self._checksum[0] = zlib.crc32(self._bytes)  # type: ignore[arg-type]
        self._count[0] += np.uint64(1)

    def read(self) -> NDArray[Any] | None:
        """The record ``[1]`` if it is a new one and whole, else None; valid until the next call."""
        count = int(self._count[0])
        if count == self._seen or count % 2:
            return None
        self._copy[:] = self._record
        checksum = int(self._checksum[0])
        if int(self._count[0]) != count or zlib.crc32(self._copy.view(np.uint8)) != checksum:  # type: ignore[arg-type]
            return None
        self._seen = count
        return self._copy
