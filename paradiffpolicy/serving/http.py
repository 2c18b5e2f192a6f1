"""Answers plain HTTP requests on the server's port, and says which requests may become websockets."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from .metrics import Metrics
from .settings import ServerSettings

USAGE = "send GET /healthz, GET /metrics, or a websocket's handshake\n"


class HttpAnswers:
    """Answers health checks and metrics, and refuses websockets without a key or beyond the bound.

    Args:
        settings: the API key and the bound.
        metrics: shown, and told of refusals.
        sessions: counts the open connections.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, sessions: Callable[[], int]) -> None:
        self._settings, self._metrics, self._sessions = settings, metrics, sessions

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to a request; None accepts a websocket."""
        path = request.path.partition("?")[0]
        if getattr(request, "method", "GET") != "GET":  # older versions of websockets can't read others
            response = connection.respond(HTTPStatus.METHOD_NOT_ALLOWED, USAGE)
            response.headers["Allow"] = "GET"
            return response
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self._metrics.errors.labels("unauthorized").inc()
            response = connection.respond(
                HTTPStatus.UNAUTHORIZED, "wrong or no API key: send 'Authorization: Api-Key KEY'\n"
            )
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if self._settings.api_key is None and "Origin" in request.headers:
            self._metrics.errors.labels("origin").inc()
            return connection.respond(
                HTTPStatus.FORBIDDEN,
                "web pages may not use a policy server without an API key: set api_key\n",
            )
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, self._metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        bound = self._settings.max_sessions
        if self._sessions() >= bound:
            self._metrics.errors.labels("sessions").inc()
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"max_sessions={bound} connections are open already: try again later\n",
            )
        return None

    def _authorized(self, request: Request) -> bool:
        key = self._settings.api_key
        if key is None:
            return True
        shown = request.headers.get_all("Authorization")
        given = shown[0] if len(shown) == 1 else ""
        return hmac.compare_digest(given.encode(errors="surrogateescape"), f"Api-Key {key}".encode())
