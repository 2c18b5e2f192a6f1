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

from ..clock import Clock, ClockOffset, MonotonicClock
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
        session: of this end.
        sequence: number of this end's last packet.
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
        self.session = secrets.randbits(32) if session is None else session
        self.sequence, self._newest = -1, -1
        self._over: deque[int] = deque(maxlen=REMEMBERED)
        if not 0 <= self.session < 2**32:
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
        self.sequence += 1
        return Packet(kind, self.session, self.sequence, time, np.asarray(numbers, dtype=np.float64)).pack()

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
        elif self.is_over(packet.session):
            self.traffic.stale += 1
            return False
        elif self.peer is not None:
            self._over.append(self.peer)
            self.traffic.restarts += 1
        self.peer, self._newest = packet.session, packet.sequence
        self.traffic.received += 1
        return True

    def is_over(self, session: int) -> bool:
        """Whether another session of that end came after it."""
        return session in self._over

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
        sync_every: seconds between hellos while observations come: their answers say what time it is there.
        stops: how many copies of a stop are sent, of which one must arrive.
        session: see ``Link``.

    Attributes:
        traffic: counts.
        observed: when the newest observation was measured, by the robot's clock; NaN before there is one.
        observed_at: the same by ``clock``, right to half a round trip; None: the robot didn't answer a hello.

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
        sync_every: float = 1.0,
        stops: int = 5,
        session: int | None = None,
    ) -> None:
        require_count(obs_dim=obs_dim, action_dim=action_dim, stops=stops)
        require_positive(hello_every=hello_every, sync_every=sync_every)
        require_room(obs_dim=obs_dim, action_dim=action_dim)
        self._clock, self._stops = clock or MonotonicClock(), stops
        self._hello_every, self._sync_every = hello_every, sync_every
        self._obs_dim, self._action_shape = obs_dim, (action_dim,)
        self._link = Link(remote=address, session=session)
        self.traffic, self.observed = self._link.traffic, math.nan
        self.observed_at: float | None = None
        self._ahead, self._ahead_of = ClockOffset(), self._link.peer
        self._hellos: dict[int, float] = {}
        self._say_hello()

    def observe(self) -> NDArray[np.float64] | None:
        """The newest observation ``[O]``; None if none has come since the last call."""
        newest, now = None, self._clock.now()
        for datagram, address in self._link.receive():
            try:
                packet = unpack(datagram)
                if packet.kind == Kind.HELLO:
                    self._take_answer(packet, now)
                    continue
                require_form(packet, Kind.OBSERVATION, self._obs_dim)
            except PacketError as reason:
                self._link.refuse(reason, address)
                continue
            if self._link.is_news(packet):
                newest = packet
        if newest is not None:
            self._quiet_since = now
            self._place(newest, now)
        due = min(self._quiet_since + self._hello_every, self._said + self._sync_every)
        if now >= due - 1e-6:  # moments on a grid are rounded
            self._say_hello()
        return None if newest is None else newest.numbers

    def _take_answer(self, packet: Packet, now: float) -> None:
        """To a hello: when that came there."""
        require_form(packet, Kind.HELLO, 1)
        came = float(packet.numbers[0])
        if not math.isfinite(came):
            raise PacketError(f"the hello that it answers came at {came}")
        said = self._hellos.pop(packet.sequence, None)
        if said is None or self._link.is_over(packet.session):
            self.traffic.stale += 1
            return
        ahead = self._offset_of(packet.session)
        ahead.sent(said, came)
        ahead.received(packet.time, now)

    def _offset_of(self, session: int) -> ClockOffset:
        """A robot that was started again may have another clock."""
        if session != self._ahead_of:
            self._ahead, self._ahead_of = ClockOffset(), session
        return self._ahead

    def _place(self, newest: Packet, now: float) -> None:
        """Notes when an observation was measured."""
        ahead = self._offset_of(newest.session)
        ahead.received(newest.time, now)
        before, self.observed = self.observed, newest.time
        offset = ahead.seconds
        if math.isnan(offset):
            self.observed_at = None
        elif newest.time != before or self.observed_at is None:
            # A better estimate of the offset must not make a later one earlier.
            later = -math.inf if self.observed_at is None else math.nextafter(self.observed_at, math.inf)
            self.observed_at = max(min(now, newest.time - offset), later)

    def _say_hello(self) -> None:
        now = self._clock.now()
        self._quiet_since = self._said = now
        hello = self._link.packet(Kind.HELLO, now)
        self._hellos = dict([*self._hellos.items(), (self._link.sequence, now)][-REMEMBERED:])
        self._link.send(hello)

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


def host_and_port(address: str | None) -> Address:
    """The parts of ``HOST:PORT``.

    Raises:
        InputError: it isn't that.
    """
    host, _, port = (address or "").rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise InputError(f"robot_address={address} must be HOST:PORT, where robot=udp finds the robot")
    return host.strip("[]"), int(port)


def build_udp(settings: RobotSettings) -> RobotSetup:
    """A robot in the network at ``settings.address``; its traffic is reported."""
    spec = settings.spec
    robot = UdpRobot(host_and_port(settings.address), spec.obs_dim, spec.action_dim, clock=settings.clock)
    return RobotSetup(robot, outcome=lambda: {"traffic": asdict(robot.traffic)}, close=robot.close)
