"""A robot at the other end of a UDP socket; ``packets`` describes the datagrams."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import secrets
import socket
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..clock import Clock, MonotonicClock
from ..errors import InputError, require_count, require_positive
from ..files import Closing
from .packets import MAX_DATAGRAM, Kind, Packet, PacketError, require_form, require_room, unpack
from .robot import RobotSettings, RobotSetup

log = logging.getLogger(__name__)

Address = tuple[str, int]

DRAIN = 1000
"""Datagrams that are read at a time: a sender that is faster than the reader must not keep a loop busy."""

REMEMBERED = 16
"""Ended sessions that are remembered, so that their late datagrams are dropped."""


@dataclass
class Traffic:
    """Counts of what happened at one end of a link.

    Attributes:
        sent: datagrams that the system accepted.
        received: packets that were the newest when they came.
        lost: sequence numbers that were left out between those: lost, or overtaken by newer ones.
        stale: packets that came twice, or after a newer one.
        refused: datagrams that were malformed or unexpected.
        restarts: how often the other end started again, or another took its place.
        errors: the system's errors in sending and receiving, by name: ``ECONNREFUSED`` (nothing listens at
            that port), ``ENETUNREACH``, ``EAGAIN`` (no room to send), …
    """

    sent: int = 0
    received: int = 0
    lost: int = 0
    stale: int = 0
    refused: int = 0
    restarts: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Link:
    """One end of a connection: a socket that never blocks, and the order of packets.

    Args:
        local: address to listen at, for any sender; or
        remote: address to send to, and the only one listened to.
        session: of this end; None: drawn from the system's randomness.  (A seeded generator would draw the
            same number after a restart, which the session must distinguish.)

    Attributes:
        traffic: counts.
        peer: the other end's session; None before it was heard.
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
        with contextlib.ExitStack() as stack:
            try:
                family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
                self._socket = stack.enter_context(socket.socket(family, kind, protocol))
                self._socket.setblocking(False)
                # To one that is connected, the system gives no other sender's datagrams, and says when
                # nothing listens there.
                (self._socket.bind if remote is None else self._socket.connect)(found)
            except (OSError, UnicodeError) as error:
                raise InputError(f"{address=}: {getattr(error, 'strerror', None) or error}")
            stack.pop_all()
        self.address: Address = self._socket.getsockname()[:2]

    def packet(self, kind: Kind, time: float, numbers: ArrayLike = ()) -> bytes:
        """The next in this end's sequence."""
        self._sequence += 1
        return Packet(kind, self._session, self._sequence, time, np.asarray(numbers, dtype=np.float64)).pack()

    def send(self, datagram: bytes, to: Address | None = None) -> None:
        """Sends without blocking; an error is counted."""
        # "Refused" answers an earlier datagram, and is reported instead of sending this one: so try again.
        for _ in range(2):
            try:
                self._socket.sendto(datagram, to) if to else self._socket.send(datagram)
            except OSError as error:
                self._met(error)
                if not isinstance(error, ConnectionRefusedError):
                    return
            else:
                self.traffic.sent += 1
                return

    def receive(self) -> Iterator[tuple[bytes, Address]]:
        """Datagrams and their senders, in the order of arrival."""
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
        """Whether it is the newest so far, or the first of a new session; remembers it."""
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
        """Counts a datagram as refused; logs the first one's reason."""
        if not self.traffic.refused:
            log.warning("a datagram from %s is refused: %s", address, reason)
        self.traffic.refused += 1

    def fileno(self) -> int:
        """The socket's, for ``selectors``."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class UdpRobot(Closing):
    """A robot for ``ControlLoop``, behind a UDP socket.  No call blocks, and none raises because of the
    network: ``traffic`` counts its errors, and the controller's and the robot's own watchdogs handle them.

    Args:
        address: of the robot, ``(host, port)``.
        obs_dim, action_dim: O and A; an observation of another size is refused.
        clock: whose seconds count.
        hello_every: seconds without an observation after which it says hello (again), so that a robot
            that is started later, or again, knows where to send.
        stops: how many copies of a stop are sent, of which one must arrive.
        session: see ``Link``.

    Attributes:
        traffic: counts.
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
        """Sends a stop, newer than every command so far, several times."""
        # All with one number: late copies don't stop a later command.
        datagram = self._link.packet(Kind.STOP, self._clock.now())
        for _ in range(self._stops):
            self._link.send(datagram)

    def close(self) -> None:
        """Closes the socket; sends nothing."""
        self._link.close()


def build_udp(settings: RobotSettings) -> RobotSetup:
    """A robot in the network at ``settings.address``; its traffic is reported."""
    host, _, port = (settings.address or "").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"robot_address={settings.address} must be HOST:PORT, where robot=udp finds the robot"
        )
    spec = settings.spec
    robot = UdpRobot((host.strip("[]"), int(port)), spec.obs_dim, spec.action_dim, clock=settings.clock)
    return RobotSetup(robot, outcome=lambda: {"traffic": asdict(robot.traffic)}, close=robot.close)
