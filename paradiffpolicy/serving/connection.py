"""Bounds what a client may cost: its frames, its errors, and the time that it leaves things unfinished.

An allowance of frames (a token bucket) pays for each frame, and an answered request gives its frames
back.  Pings, fragments and messages that run ahead of their answers use the allowance up, which ends the
connection; errors use it up to a half, and from there on are answered no faster than it grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ProtocolError
from websockets.frames import Frame, Opcode
from websockets.protocol import State

from .http import USAGE
from .settings import ServerSettings

ALLOWANCE, PER_SECOND = 512, 20
"""Frames that a client has at first and at most, and that it is given per second."""

GRACE = 0.25
"""Seconds for a client to read why its connection ends."""


class BoundedConnection(ServerConnection):
    """A connection that costs no more than its allowance, and is cut off when it is left unfinished.

    Args:
        settings: how long a message may take, and how many handshakes may be open.
        alive: all connections of the server, the oldest first.
        on_cut: called with a word that says why a connection is cut off.
    """

    def __init__(
        self,
        *args: Any,
        settings: ServerSettings,
        alive: dict[BoundedConnection, None],
        on_cut: Callable[[str], object],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._settings, self._alive, self._on_cut = settings, alive, on_cut
        self._allowance, self._counted_at = float(ALLOWANCE), self.loop.time()
        self._frames, self._unanswered = 0, deque[int]()  # of the message that comes, and of those before
        self._plans, self._asked_at = 0.0, -math.inf
        self._completed = self._failed = False
        self._timer: asyncio.TimerHandle | None = None
        self._method = b""
        # The parser's own steps, since a single read can hold tens of thousands of frames.
        self._receive_frame, self.protocol.recv_frame = self.protocol.recv_frame, self._frame  # type: ignore[method-assign]
        self._end_writing, self.protocol.send_eof = self.protocol.send_eof, self._answer_bad_http  # type: ignore[method-assign]

    # -------------------------------------------------------------------------------------- allowance

    def _spend(self, frames: float) -> float:
        """Takes from the allowance, or gives back; returns what is left."""
        now = self.loop.time()
        grown = self._allowance + PER_SECOND * (now - self._counted_at)
        self._allowance, self._counted_at = min(grown, ALLOWANCE) - frames, now
        return self._allowance

    def _frame(self, frame: Frame) -> None:
        if self._spend(1) < 0:
            self._failed = True
            self._on_cut("flood")
            raise ProtocolError("too many pings, fragments, or messages ahead of their answers")
        self._receive_frame(frame)
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._frames += 1
            if frame.fin:
                self._unanswered.append(self._frames)
                self._frames, self._completed = 0, True

    def needed(self, plans_hz: float) -> bool:
        """Whether a request is one that a robot needs: not after errors or requests that ran ahead, and no
        faster than one per control step, but for a first second's worth."""
        now = self.loop.time()
        self._plans = min(self._plans + plans_hz * (now - self._asked_at), max(plans_hz, 1.0))
        self._asked_at = now
        needed = self._plans >= 1
        self._plans -= needed
        return needed and self._spend(0) > 0.9 * ALLOWANCE

    async def settle(self, message: str | bytes, *, error: bool) -> None:
        """Ends the turn of an answered message: lets the other connections have theirs."""
        frames, cost = self._unanswered.popleft(), 1 + len(message) / 2**14
        left = self._spend(cost - frames if error else -frames)
        await asyncio.sleep(0)
        if error and left < ALLOWANCE / 2:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait_closed(), cost / PER_SECOND)

    # ---------------------------------------------------------------------------------- time and places

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # A client that doesn't read is noticed after few answers, not after megabytes of them.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**15)
        self._alive[self] = None
        opening = [each for each in self._alive if each.protocol.state is State.CONNECTING]
        if len(opening) > self._settings.max_sessions:
            self._on_cut("opening")
            self._alive.pop(opening[0])  # now, since more may be accepted before it hears that it is lost
            opening[0].transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._alive.pop(self, None)
        self._restart(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._method = (self._method + data[:8])[:8] if self.request is None else b""
        self._completed = False
        super().data_received(data)
        if self._failed:
            self.transport.pause_reading()
            self._restart(GRACE)
        elif self._frames or self.protocol.reader.buffer or self.protocol.close_expected():
            if self._completed or self._timer is None:
                self._restart(self._settings.send_timeout)
        else:
            self._restart(None)

    def _restart(self, seconds: float | None) -> None:
        """Restarts the timer, after which the connection is cut off; None stops it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._cut_off)

    def _cut_off(self) -> None:
        if not self._failed:
            if not self.transport.is_reading():  # the server itself isn't ready for the rest
                self._restart(self._settings.send_timeout)
                return
            self._on_cut("slow_client")
        self.transport.abort()

    def _answer_bad_http(self) -> None:
        """Says what is wrong with a request that the parser can't read; its own answer is silence."""
        if self.protocol.state is State.CONNECTING and self.request is None and not self.protocol.writes:
            get = self._method.startswith(b"GET ")
            status = HTTPStatus.BAD_REQUEST if get else HTTPStatus.METHOD_NOT_ALLOWED
            response = self.respond(status, USAGE)
            response.headers["Allow"] = "GET"
            self.protocol.writes.append(response.serialize())
        self._end_writing()
