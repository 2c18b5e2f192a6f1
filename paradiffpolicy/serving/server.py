"""Serves a policy: openpi's protocol and pure requests on websockets, health and metrics on HTTP.

One event loop reads and writes, one thread plans (``batching``).  Everything that a client could make
grow is bounded: bytes per message, connections, messages read ahead, requests that wait, and the time
to send an answer.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from ..clock import Clock
from ..errors import InputError, require_count, require_positive
from ..policy import Policy
from ..types import Plan
from .batching import Batcher, TimedResult
from .messages import MessageError, pack, unpack
from .metrics import Metrics
from .protocol import Metadata, PlanFormat, ServerError, checked_map, error_map, job_of, kind_of, line_of
from .session import ClientSession

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings:
    """A server's address and bounds.

    Attributes:
        host, port: to listen at; port 0: any that is free.
        api_key: key that clients must send; None: none.
        certificate, private_key: PEM files for TLS; None: plain.
        max_batch: batch elements planned at once.
        max_queue: requests that may wait.
        max_message: bytes of a request.
        max_sessions: connections.
        send_timeout: seconds that an answer may take to be sent before the connection is cut.
        seed: of the sessions' noise.

    Raises:
        InputError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_message: int = 2**20
    max_sessions: int = 64
    send_timeout: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_count(
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_message=self.max_message,
            max_sessions=self.max_sessions,
        )
        require_positive(send_timeout=self.send_timeout)
        for name, value, high in (("port", self.port, 2**16 - 1), ("seed", self.seed, 2**63 - 1)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                raise InputError(f"{name}={value} must be a whole number from 0 to {high}")
        key = self.api_key
        if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable() and key):
            raise InputError(
                "api_key must be printable ASCII text: quote a number, as 'api_key=\"123\"'; null: no key"
            )
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("certificate and private_key go together: give both, or neither")

    def tls(self) -> ssl.SSLContext | None:
        """Makes the context for TLS, or None.

        Raises:
            InputError: the files can't be used.
        """
        if self.certificate is None or self.private_key is None:
            return None
        for name, path in (("certificate", self.certificate), ("private_key", self.private_key)):
            if not path.is_file():
                raise InputError(f"no {name} at {path}: name a PEM file")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.private_key)
        except (ssl.SSLError, OSError) as error:
            raise InputError(
                f"certificate={self.certificate} and private_key={self.private_key} can't be used ({error}): "
                "name PEM files that belong together"
            )
        return context


class PolicyServer:
    """Serves one policy.

    Start it with ``await start()``, end it with ``await stop()``; ``warm_up`` before makes the first
    answers as fast as the later ones.

    Args:
        policy: to serve.
        sampler: its sampler's name, for clients.
        settings: address and bounds.
        clock: measures the reported times.
    """

    def __init__(self, policy: Policy, sampler: str, settings: ServerSettings, clock: Clock) -> None:
        self._policy, self._settings, self._clock = policy, settings, clock
        self._metrics = Metrics(lambda: len(self._batcher), lambda: self._n_sessions)
        self._batcher = Batcher(policy, settings.max_batch, settings.max_queue, clock, self._on_batch)
        self._form = PlanFormat.of(policy)
        self._metadata = Metadata(self._form, sampler, settings.max_batch, settings.max_message)
        self._server: Server | None = None
        self._reading: set[ServerConnection] = set()
        self._stopping = False
        self._connections = 0

    @property
    def warm_up_sizes(self) -> int:
        """Times that ``warm_up`` calls ``on_size``."""
        return len(self._batcher.sizes)

    async def warm_up(self, on_size: Callable[[], object] = lambda: None) -> None:
        """Compiles the programs of every batch size, calling ``on_size`` after each."""
        await self._batcher.warm_up(on_size)

    async def start(self) -> None:
        """Starts to listen.

        Raises:
            InputError: the address or the certificate can't be used.
        """
        settings, tls = self._settings, self._settings.tls()
        try:
            self._server = await serve(
                self._connected,
                settings.host,
                settings.port,
                ssl=tls,
                ssl_handshake_timeout=settings.send_timeout if tls else None,
                process_request=self._http,
                compression=None,  # noise and float32 numbers don't get smaller
                max_size=settings.max_message,
                max_queue=1,  # messages read ahead of the one that is being answered
                open_timeout=settings.send_timeout,
                close_timeout=settings.send_timeout,
                logger=logging.Logger("websockets", logging.CRITICAL),  # clients' errors are in the metrics
            )
        except OSError as error:
            code = error.errno or 0
            reason = os.strerror(code) if code > 0 else error.strerror  # asyncio's tells the address again
            raise InputError(
                f"can't listen on {settings.host}:{settings.port} ({reason}): another port, as port=8001, or "
                "port=0 for any"
            )
        if settings.host not in LOOPBACK and (tls is None or settings.api_key is None):
            log.warning(
                "listening on %s without %s: every machine that reaches it can use the policy",
                settings.host,
                "TLS" if settings.api_key else "an API key",
            )

    @property
    def uri(self) -> str:
        """The address that clients connect to, once started."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        scheme = "ws" if self._settings.certificate is None else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Accepts no more requests, answers those received, closes all connections (1001: going away)."""
        self._stopping = True
        if self._server is not None:
            self._server.close(close_connections=False)
            await asyncio.gather(*map(self._go_away, list(self._reading)))
            await self._server.wait_closed()
        self._batcher.stop()

    # ------------------------------------------------------------------------------------------ HTTP

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP requests, and refuses websockets without a key or beyond the bound.

        Returns None to accept a websocket.
        """
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self._metrics.errors.labels("unauthorized").inc()
            response = connection.respond(
                HTTPStatus.UNAUTHORIZED, "wrong or no API key: send 'Authorization: Api-Key KEY'\n"
            )
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, "")
            response.body = self._metrics.text()
            for name, value in (
                ("Content-Type", CONTENT_TYPE_LATEST),
                ("Content-Length", str(len(response.body))),
            ):
                del response.headers[name]
                response.headers[name] = value
            return response
        if self._n_sessions >= self._settings.max_sessions:
            self._metrics.errors.labels("sessions").inc()
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"max_sessions={self._settings.max_sessions} connections are open already: try again later\n",
            )
        return None

    def _authorized(self, request: Request) -> bool:
        key = self._settings.api_key
        if key is None:
            return True
        shown = request.headers.get_all("Authorization")
        given = shown[0] if len(shown) == 1 else ""
        return hmac.compare_digest(given.encode(errors="surrogateescape"), f"Api-Key {key}".encode())

    @property
    def _n_sessions(self) -> int:
        # A connection counts from the moment that it was let in: nothing is awaited between.
        return 0 if self._server is None else len(self._server.connections)

    # ------------------------------------------------------------------------------------ websockets

    async def _connected(self, connection: ServerConnection) -> None:
        """Answers a connection's messages, one after the other."""
        self._connections += 1
        seed = np.random.SeedSequence([self._settings.seed, self._connections]).generate_state(1, np.uint64)
        session, previous_seconds = ClientSession(self._policy, int(seed[0] >> 1)), None
        try:
            await self._send(connection, pack(self._metadata.to_map()))
            while not self._stopping:
                self._reading.add(connection)
                try:
                    message = await connection.recv()
                finally:
                    self._reading.discard(connection)
                started = self._clock.now()
                await self._send(connection, await self._answer(session, message, previous_seconds))
                previous_seconds = self._clock.now() - started
                self._metrics.request.observe(previous_seconds)
            await self._go_away(connection)
        except ConnectionClosed:
            pass
        except TimeoutError:
            self._metrics.errors.labels("slow_client").inc()
            connection.transport.abort()
        except Exception:
            log.exception("a connection failed")
            await connection.close(CloseCode.INTERNAL_ERROR)

    async def _go_away(self, connection: ServerConnection) -> None:
        await connection.close(CloseCode.GOING_AWAY, "the server stops")

    async def _send(self, connection: ServerConnection, answer: bytes | str) -> None:
        async with asyncio.timeout(self._settings.send_timeout):
            await connection.send(answer)

    async def _answer(
        self, session: ClientSession, message: str | bytes, previous_seconds: float | None
    ) -> bytes | str:
        """Answers one message; an answer in text is an error."""
        try:
            if isinstance(message, str):
                raise MessageError("the message is text: send a packed map as a binary message")
            request = unpack(message)
            pure = isinstance(request, dict) and "plan" in request
        except MessageError as error:
            self._metrics.requests.labels("unknown").inc()
            return self._failed(error)
        self._metrics.requests.labels("plan" if pure else "session").inc()
        if pure:
            return pack(await self._pure_answer(request, previous_seconds))
        try:
            return pack(await self._session_answer(session, request, previous_seconds))
        except InputError as error:
            return self._failed(error)

    async def _session_answer(
        self, session: ClientSession, request: Any, previous_seconds: float | None
    ) -> dict[str, Any]:
        planned = await self._batcher.plan(session.job(request))
        session.remember(planned.plan, planned.states[0])
        plan = planned.plan
        if not isinstance(plan, Plan):
            raise plan if isinstance(plan, InputError) else ServerError(line_of(plan))
        return {
            "actions": plan.executed_actions[0],
            "plan": plan.actions[0],
            "iterations": int(plan.solution.iterations[0]),
            "nfe": int(plan.solution.nfe[0]),
            "policy_timing": {"infer_ms": planned.infer_seconds * 1e3},
            "server_timing": _timing(planned, previous_seconds),
        }

    async def _pure_answer(self, request: Any, previous_seconds: float | None) -> dict[str, Any]:
        try:
            asked = checked_map(request, "the request", ["plan"], ())["plan"]
            planned = await self._batcher.plan(job_of(asked, self._policy, self._settings.max_batch))
        except InputError as error:
            return self._error_map(error)
        answer: dict[str, Any] = {"generator": list(planned.states)}
        if not isinstance(planned.plan, Plan):
            return answer | self._error_map(planned.plan)
        timing = _timing(planned, previous_seconds)
        return answer | {"plan": self._form.plan_map(planned.plan), "server_timing": timing}

    def _failed(self, error: Exception) -> str:
        self._metrics.errors.labels(kind_of(error)).inc()
        return line_of(error)

    def _error_map(self, error: Exception) -> dict[str, Any]:
        self._metrics.errors.labels(kind_of(error)).inc()
        return error_map(error)

    def _on_batch(self, size: int, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.inference.observe(seconds)


def _timing(planned: TimedResult, previous_seconds: float | None) -> dict[str, float]:
    """The times of an answer in ms, and the total of the answer before, which was not known then."""
    timing = {"infer_ms": planned.infer_seconds * 1e3, "queue_ms": planned.queue_seconds * 1e3}
    return timing if previous_seconds is None else timing | {"prev_total_ms": previous_seconds * 1e3}
