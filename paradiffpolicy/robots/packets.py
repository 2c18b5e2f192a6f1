"""The packets that a robot behind UDP sends and gets: one datagram per observation, one per command.

Datagrams get lost, come twice and overtake each other.  So each carries a number that increases; the newest
wins, and what is older than the newest is dropped.  Nothing is sent again, since by then there is something
newer to send.  Nothing is authenticated: for a private network.

A datagram, little-endian, each field at a multiple of its size::

    byte  0   4 bytes   "PDPR"
          4   uint32    CRC-32 of all that follows
          8   uint8     version, 1
          9   uint8     kind: 1 hello, 2 observation, 3 command, 4 stop
         10   uint16    n, how many numbers
         12   uint32    session: of the sender, a new one each time it starts
         16   uint64    sequence number, increasing within the session
         24   float64   the sender's clock, seconds
         32   float64   n numbers; a client's hello and stop have none

The client says hello, repeatedly, until observations come, and then once a second; the robot sends its
observations to where the hello came from, and takes that session's commands.  An observation's time is when
it was measured, by the robot's clock.  For the client to know what that is by its own, the robot should
answer every hello: with a hello of the same sequence number and one number, the time at which that came.
"""

from __future__ import annotations

import enum
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

MAGIC, VERSION = b"PDPR", 1
FRONT = struct.Struct("<4sI")  # magic, checksum
HEAD = struct.Struct("<BBHIQd")  # version, kind, n, session, sequence, time
HEADER_SIZE = FRONT.size + HEAD.size

MAX_DATAGRAM = 65507  # IPv4's, in bytes
MAX_NUMBERS = (MAX_DATAGRAM - HEADER_SIZE) // 8
"""Ethernet sends more than 180 in pieces, and one lost piece loses all."""


class PacketError(Exception):
    """Bytes aren't a packet, or not one that is expected here; the message says why."""


class Kind(enum.IntEnum):
    HELLO = 1
    OBSERVATION = 2
    COMMAND = 3
    STOP = 4


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """A datagram's content.

    Attributes:
        kind: its purpose.
        session: of the sender, 0 … 2³² - 1.
        sequence: 0 … 2⁶⁴ - 1.
        time: the sender's clock, seconds; finite.
        numbers: ``[n]`` float64, any, NaN too: the receiver checks them.
    """

    kind: Kind
    session: int
    sequence: int
    time: float
    numbers: NDArray[np.float64]

    def pack(self) -> bytes:
        """Its bytes."""
        numbers = np.asarray(self.numbers, dtype="<f8")
        head = HEAD.pack(VERSION, self.kind, len(numbers), self.session, self.sequence, self.time)
        rest = head + numbers.tobytes()
        return FRONT.pack(MAGIC, zlib.crc32(rest)) + rest


def unpack(datagram: bytes) -> Packet:
    """The packet of a datagram's bytes.

    Raises:
        PacketError: they aren't exactly one packet.  No bytes raise anything else.
    """
    if len(datagram) < HEADER_SIZE:
        raise PacketError(f"{len(datagram)} bytes, fewer than a header's {HEADER_SIZE}")
    magic, checksum = FRONT.unpack_from(datagram)
    version, kind, n, session, sequence, time = HEAD.unpack_from(datagram, FRONT.size)
    if magic != MAGIC:
        raise PacketError(f"it begins with {magic!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise PacketError(f"it is of version {version}, not of version {VERSION}")
    if len(datagram) != HEADER_SIZE + 8 * n:
        raise PacketError(f"{len(datagram)} bytes, not {HEADER_SIZE} and 8 for each of {n} numbers")
    if zlib.crc32(memoryview(datagram)[FRONT.size :]) != checksum:
        raise PacketError("its checksum doesn't match: it was damaged on the way")
    if not 0 < kind <= len(Kind):
        raise PacketError(f"it is of kind {kind}, which there isn't")
    if not math.isfinite(time):
        raise PacketError(f"its time is {time}")
    numbers = np.frombuffer(datagram, "<f8", offset=HEADER_SIZE).astype(np.float64)
    return Packet(Kind(kind), session, sequence, time, numbers)


def require_form(packet: Packet, kind: Kind, count: int) -> None:
    """Raises ``PacketError`` if it is of another kind, or has another count of numbers."""
    if packet.kind != kind:
        raise PacketError(f"it is of kind {packet.kind.name.lower()}, not {kind.name.lower()}")
    if len(packet.numbers) != count:
        raise PacketError(f"it has {len(packet.numbers)} numbers, not {count}")


def require_room(**counts: int) -> None:
    """Raises ``InputError`` that names the first count that no datagram has room for."""
    for name, count in counts.items():
        if count > MAX_NUMBERS:
            raise InputError(f"{name}={count} numbers don't fit into a datagram: {MAX_NUMBERS} at most")
