"""A robot at the other end of a UDP socket: one datagram per observation, one per command.

Datagrams get lost, come twice and overtake each other.  So each carries a number that goes up, the newest
wins, and what is older than what was seen is dropped: nothing is ever sent again, since by then there is
something newer to send.  Nothing is authenticated: for a network of one's own.

A datagram, little-endian, each field at a multiple of its size::

    byte  0   4 bytes   "PDPR"
          4   uint32    CRC-32 of all that follows
          8   uint8     version, 1
          9   uint8     kind: 1 hello, 2 observation, 3 command, 4 stop
         10   uint16    n, how many numbers
         12   uint32    session: of whoever sends, another each time it starts
         16   uint64    sequence number, going up within the session
         24   float64   the sender's clock, seconds
         32   float64   n numbers; hello and stop have none

The client says hello, repeatedly, until observations come; the robot then sends its observations to where
the hello came from, and takes that session's commands.
"""

from __future__ import annotations

import enum
import errno
import logging
import math
import secrets
import socket
import struct
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..clock import Clock, MonotonicClock
from ..errors import InputError, require_count, require_positive
from ..files import Closing

log = logging.getLogger(__name__)

Address = tuple[str, int]

MAGIC, VERSION = b"PDPR", 1
FRONT = struct.Struct("<4sI")
"""Magic, checksum."""
HEAD = struct.Struct("<BBHIQd")
"""Version, kind, n, session, sequence, time."""
HEADER_SIZE = FRONT.size + HEAD.size

MAX_DATAGRAM = 65507
"""IPv4's, in bytes."""

MAX_NUMBERS = (MAX_DATAGRAM - HEADER_SIZE) // 8
"""More than 180 are sent in pieces by Ethernet, and one that is lost loses all."""

DRAIN = 1000
"""Datagrams that are read at a time: who sends faster than they can be read must not keep a loop busy."""

REMEMBERED = 16
"""Sessions that are over, and whose late datagrams are known as such."""


class PacketError(Exception):
    """These bytes aren't a packet, or not one that is wanted here; says why."""


class Kind(enum.IntEnum):
    HELLO = 1
    OBSERVATION = 2
    COMMAND = 3
    STOP = 4


KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """What a datagram says.

    Attributes:
        kind: what for.
        session: of the sender, 0 … 2³² - 1.
        sequence: 0 … 2⁶⁴ - 1.
        time: the sender's clock, seconds; finite.
        numbers: ``[n]`` float64, any, NaN too: who takes them judges them.
    """

    kind: Kind
    session: int
    sequence: int
    time: float
    numbers: NDArray[np.float64]

    def pack(self) -> bytes:
        """The datagram."""
        numbers = np.asarray(self.numbers, dtype="<f8")
        head = HEAD.pack(VERSION, self.kind, len(numbers), self.session, self.sequence, self.time)
        rest = head + numbers.tobytes()
        return FRONT.pack(MAGIC, zlib.crc32(rest)) + rest


def unpack(datagram: bytes) -> Packet:
    """The packet that these bytes are.

    Raises:
        PacketError: they aren't exactly one; whatever they are, nothing else is raised.
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
        raise PacketError("its checksum doesn't fit: it was damaged on the way")
    if kind not in KINDS:
        raise PacketError(f"it is of kind {kind}, which there isn't")
    if not math.isfinite(time):
        raise PacketError(f"its time is {time}")
    numbers = np.frombuffer(datagram, "<f8", offset=HEADER_SIZE).astype(np.float64)
    return Packet(Kind(kind), session, sequence, time, numbers)


@dataclass
class Traffic:
    """What one end of a link has met, counted.

    Attributes:
        sent: datagrams that the system took.
        received: packets that were the newest when they came.
        lost: numbers that were left out between those: lost, or overtaken by newer ones.
        stale: packets that came twice, or after a newer one.
        refused: datagrams that weren't what they should be.
        restarts: the other end began anew, or another took its place.
        errors: what the system said when it couldn't send or receive, by name: ``ECONNREFUSED`` (nobody
            is at that port), ``ENETUNREACH``, ``EAGAIN`` (no room to send), …
    """

    sent: int = 0
    received: int = 0
    lost: int = 0
    stale: int = 0
    refused: int = 0
    restarts: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Link:
    """One end: a socket that never waits, and which packets are new.

    Args:
        local: to wait at for whoever comes; or
        remote: to send to, and nobody else is listened to.
        session: of this end; None: one that the system draws.  (A seeded generator would draw the same
            again when a program starts again, which is what it has to tell.)

    Attributes:
        traffic: what happened here, counted.
        peer: the other end's session, None before it was heard.
        address: of this end.

    Raises:
        InputError: there is no such address, it is taken, or it can't be reached.
    """

    def __init__(
        self,
        *,
        local: Address | None = None,
        remote: Address | None = None,
        session: int | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.peer: int | None = None
        self._session = secrets.randbits(32) if session is None else session
        self._sequence, self._newest = -1, -1
        self._over: deque[int] = deque(maxlen=REMEMBERED)
        if not 0 <= self._session < 2**32:
            raise InputError(f"{session=} must be a number of 32 bits")
        address: object = local if remote is None else remote
        lowest = 0 if remote is None else 1  # 0: any that is free
        match address:
            case (str(host), int(port)) if lowest <= port <= 65535:
                pass
            case _:
                raise InputError(f"{address=} must be (host, port), the port {lowest} to 65535")
        try:
            family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            self._socket = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:
            raise InputError(f"{address=}: {error}")
        try:
            self._socket.setblocking(False)
            if remote is None:
                self._socket.bind(found)
            else:
                # Then the system keeps strangers out, and tells when nobody is there.
                self._socket.connect(found)
        except OSError as error:
            self._socket.close()
            raise InputError(f"{address=}: {error.strerror}")
        self.address: Address = self._socket.getsockname()[:2]

    def packet(self, kind: Kind, time: float, numbers: ArrayLike = ()) -> bytes:
        """The next in this end's sequence."""
        self._sequence += 1
        return Packet(kind, self._session, self._sequence, time, np.asarray(numbers, dtype=np.float64)).pack()

    def send(self, datagram: bytes, to: Address | None = None) -> None:
        """Gives it to the system, if that takes it now; if not, that is counted."""
        # What the system says when nobody is at the port is the answer to an earlier datagram, and it
        # says so instead of sending this one.  So once more.
        for _ in range(2):
            try:
                if to is None:
                    self._socket.send(datagram)
                else:
                    self._socket.sendto(datagram, to)
            except OSError as error:
                self._met(error)
                if not isinstance(error, ConnectionRefusedError):
                    return
            else:
                self.traffic.sent += 1
                return

    def receive(self) -> Iterator[tuple[bytes, Address]]:
        """What has come, in the order in which it came, and from where."""
        for _ in range(DRAIN):
            try:
                datagram, address = self._socket.recvfrom(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError as error:
                self._met(error)
                if not isinstance(error, ConnectionRefusedError):
                    return
            else:
                yield datagram, address

    def _met(self, error: OSError) -> None:
        self.traffic.errors[errno.errorcode.get(error.errno or 0, str(error.errno))] += 1

    def is_news(self, packet: Packet) -> bool:
        """Whether it is the newest so far, or the first of a session that wasn't heard before; it is
        taken as seen."""
        if packet.session == self.peer:
            if packet.sequence <= self._newest:
                self.traffic.stale += 1
                return False
            self.traffic.lost += packet.sequence - self._newest - 1
        elif packet.session in self._over:
            self.traffic.stale += 1
            return False
        elif self.peer is not None:
            self._over.append(self.peer)
            self.traffic.restarts += 1
        self.peer, self._newest = packet.session, packet.sequence
        self.traffic.received += 1
        return True

    def refuse(self, reason: PacketError, address: Address) -> None:
        """Counts it; says why the first time."""
        if not self.traffic.refused:
            log.warning("a datagram from %s is refused: %s", address, reason)
        self.traffic.refused += 1

    def fileno(self) -> int:
        """For who wants to wait for datagrams with ``selectors``."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class UdpRobot(Closing):
    """A robot for ``ControlLoop``, behind a UDP socket.  No call waits, and none raises because of the
    network: what it does is in ``traffic``, and what to do about it is the controller's and the robot's
    own watchdog's business.

    Args:
        address: of the robot, ``(host, port)``.
        obs_dim, action_dim: O and A; an observation of another size is refused.
        clock: whose seconds count.
        hello_every: seconds without an observation after which it says hello (again), so that a robot
            that was started again, or later, knows whom to send to.
        stops: how often a stop is sent, at once: any of them will do.
        session: see ``Link``.

    Attributes:
        traffic: what happened, counted.
        observed: when the newest observation was sent, by the robot's clock; NaN before there is one.

    Raises:
        InputError: no such address, or a setting is out of range.
    """

    def __init__(
        self,
        address: Address,
        obs_dim: int,
        action_dim: int,
        *,
        clock: Clock | None = None,
        hello_every: float = 0.1,
        stops: int = 5,
        session: int | None = None,
    ) -> None:
        require_count(obs_dim=obs_dim, action_dim=action_dim, stops=stops)
        require_positive(hello_every=hello_every)
        require_room(obs_dim=obs_dim, action_dim=action_dim)
        self._clock, self._hello_every, self._stops = clock or MonotonicClock(), hello_every, stops
        self._obs_dim, self._action_shape = obs_dim, (action_dim,)
        self._link = Link(remote=address, session=session)
        self.traffic, self.observed = self._link.traffic, math.nan
        self._quiet_since = -math.inf
        self._say_hello()

    def observe(self) -> NDArray[np.float64] | None:
        """The newest observation ``[O]``; None if none has come since the last call."""
        newest = None
        for datagram, address in self._link.receive():
            try:
                packet = unpack(datagram)
                require_form(packet, Kind.OBSERVATION, self._obs_dim)
            except PacketError as reason:
                self._link.refuse(reason, address)
                continue
            if self._link.is_news(packet):
                newest = packet
        if newest is None:
            self._say_hello()
            return None
        self.observed, self._quiet_since = newest.time, self._clock.now()
        return newest.numbers

    def _say_hello(self) -> None:
        now = self._clock.now()
        if now - self._quiet_since >= self._hello_every:
            self._quiet_since = now
            self._link.send(self._link.packet(Kind.HELLO, now))

    def apply(self, action: NDArray[Any]) -> None:
        """Sends a command ``[A]``.

        Raises:
            InputError: it isn't A finite numbers.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self._action_shape or not np.isfinite(action).all():
            raise InputError(f"{action=} must be {self._action_shape[0]} finite numbers")
        self._link.send(self._link.packet(Kind.COMMAND, self._clock.now(), action))

    def stop(self) -> None:
        """Sends a stop, several times: any of them will do, and it is newer than every command so far."""
        # One number for all of them: the others, if they come late, stop nothing that came after.
        datagram = self._link.packet(Kind.STOP, self._clock.now())
        for _ in range(self._stops):
            self._link.send(datagram)

    def close(self) -> None:
        """Gives the socket back; the robot is told nothing."""
        self._link.close()


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
