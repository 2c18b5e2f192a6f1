"""Bytes in memory that two processes share: the newest win, and are read whole or not at all.

The writer counts up before and after it writes (a sequence lock); a reader that finds the count odd, or
changed, or another checksum (Python can't order writes to memory), has met a writer at work, and looks again
later.  Neither waits.
"""

from __future__ import annotations

import struct
import zlib

HEAD, COUNT = struct.Struct("=QI4x"), struct.Struct("=Q")
"""The count and the checksum of the content; the count alone."""


class Slot:
    """``size`` bytes of shared memory, for one writer and one reader.

    It begins at ``offset`` of the memory that both share, and takes ``Slot.taken(size)`` bytes.
    """

    def __init__(self, memory: memoryview, offset: int, size: int) -> None:
        self._memory, self._offset = memory, offset
        self._content = memory[offset + HEAD.size : offset + HEAD.size + size]
        self._seen = 0

    @staticmethod
    def taken(size: int) -> int:
        """Bytes of memory that a slot takes."""
        return HEAD.size + -(-size // 8) * 8

    def write(self, content: bytes) -> None:
        """Replaces the content."""
        (count,) = COUNT.unpack_from(self._memory, self._offset)
        count += 1 + count % 2  # odd, also after a writer that died at work
        COUNT.pack_into(self._memory, self._offset, count)
        self._content[:] = content
        HEAD.pack_into(self._memory, self._offset, count, zlib.crc32(content))
        COUNT.pack_into(self._memory, self._offset, count + 1)

    def read(self) -> bytes | None:
        """The content if it is new and whole, else None."""
        count, checksum = HEAD.unpack_from(self._memory, self._offset)
        if count == self._seen or count % 2:
            return None
        content = bytes(self._content)
        if COUNT.unpack_from(self._memory, self._offset)[0] != count or zlib.crc32(content) != checksum:
            return None
        self._seen = count
        return content
