"""The address and bounds of a policy server."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, require_count, require_positive


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
        send_timeout: seconds that a request may take to arrive, and an answer to be sent, before the
            connection is cut.
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
        if (
            not isinstance(self.host, str) or not self.host.strip()
        ):  # sockets would take it for every interface
            raise InputError(
                "host='' isn't an address: 127.0.0.1 is this machine alone, 0.0.0.0 every interface"
            )
        key = self.api_key
        if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable() and key):
            raise InputError("api_key must be printable ASCII text; null: no key")
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
