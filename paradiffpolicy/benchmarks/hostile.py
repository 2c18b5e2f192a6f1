"""Hostile clients of a policy server, in a process of their own.

They stand for other machines, so their process gives way to the server's and to the good clients'.
Nothing here imports torch, which takes seconds.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pickle
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..process import ChildProcess, Connection

PAUSE = 0.1
"""Seconds until a hostile client that was cut off comes back."""

PING = b"\x89\x80" + bytes(4)


def raw_client(uri: str, receive_buffer: int | None = None) -> socket.socket:
    """Opens a websocket and leaves the rest to its user."""
    raw = half_open(uri, receive_buffer)
    finish_opening(raw)
    return raw


def finish_opening(raw: socket.socket) -> None:
    """Ends a websocket's handshake."""
    key = base64.b64encode(bytes(16)).decode()
    raw.sendall(
        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    received = b""
    while b"\r\n\r\n" not in received:
        more = raw.recv(1)
        if not more:
            raise ConnectionError("the server refuses the websocket")
        received += more


def half_open(uri: str, receive_buffer: int | None = None) -> socket.socket:
    """Begins a websocket's handshake."""
    host, port = uri.removeprefix("ws://").split(":")
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(30)
    raw.connect((host, int(port)))
    raw.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n".encode())
    return raw


def frame(payload: bytes) -> bytes:
    """Encodes a binary message, masked with zeros."""
    return b"\x82" + struct.pack("!BQ", 0xFF, len(payload)) + bytes(4) + payload


def mutated(content: bytes, draw: np.random.Generator, head: int = 150) -> bytes:
    """Changes, removes or inserts bytes in one to three places, mostly within the first ``head``: where a
    format's structure is, rather than inside of thousands of bytes of numbers."""
    data = bytearray(content)
    for _ in range(draw.integers(1, 4)):
        place = int(draw.integers(len(data) if draw.random() < 0.3 else min(head, len(data))))
        match draw.integers(4):
            case 0:
                data[place] = draw.integers(256)
            case 1:
                data[place] ^= 1 << draw.integers(8)
            case 2:
                del data[place : place + int(draw.integers(1, 20))]
            case 3:
                data[place:place] = draw.bytes(int(draw.integers(1, 5)))
        data = data or bytearray(b"\0")
    return bytes(data)


Attack = Callable[[str, Sequence[bytes], np.random.Generator], None]
"""Attacks a server until it cuts the connection, given good messages and a generator."""


def malformed(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Sends mutated messages, each as soon as the last is answered."""
    with raw_client(uri) as raw:
        while raw.recv(2**16):
            raw.sendall(frame(mutated(messages[int(draw.integers(len(messages)))], draw)))


def never_reads(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Sends good messages and reads no answer."""
    with raw_client(uri, receive_buffer=4096) as raw:
        while True:
            raw.sendall(frame(messages[0]))


def pings(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Sends pings and reads no pong."""
    with raw_client(uri, receive_buffer=4096) as raw:
        while True:
            raw.sendall(PING * 1000)


def holds_handshakes(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Begins handshakes and leaves them open."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(half_open(uri)) for _ in range(8)]
        for raw in held:
            raw.recv(2**16)


def leaves_unfinished(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Sends all but the end of a large message."""
    with raw_client(uri) as raw:
        raw.sendall(frame(bytes(10**6))[:-1])
        while raw.recv(2**16):
            pass


def comes_and_goes(uri: str, messages: Sequence[bytes], draw: np.random.Generator) -> None:
    """Opens a connection and resets it."""
    with raw_client(uri) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


ATTACKS: tuple[Attack, ...] = (
    malformed,
    never_reads,
    pings,
    holds_handshakes,
    leaves_unfinished,
    comes_and_goes,
)


@contextlib.contextmanager
def attacked(uri: str, clients: int, messages: Sequence[bytes], seed: int) -> Iterator[dict[str, int]]:
    """Attacks a server, by as many clients of all kinds in turn; what is yielded counts, at the end, the
    connections by the attack's name."""
    counts: dict[str, int] = {}
    content = pickle.dumps((uri, clients, list(messages), seed))
    process = ChildProcess(attack, content, name="hostile clients")
    try:
        process.await_ready(60)
        yield counts
        process.connection.send_bytes(b"")
        counts |= json.loads(process.connection.recv_bytes())
    finally:
        process.end()


def attack(connection: Connection, content: tuple[str, int, list[bytes], int]) -> None:
    """Runs the clients, one thread each, until the connection says to stop."""
    uri, clients, messages, seed = content
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    stopped, counts = threading.Event(), Counter[str]()

    def client(kind: Attack, draw: np.random.Generator) -> None:
        while not stopped.wait(PAUSE):
            counts[kind.__name__] += 1
            with contextlib.suppress(OSError):  # it was cut off, as it should be
                kind(uri, messages, draw)

    draws = np.random.default_rng(seed).spawn(clients)
    for kind, draw in zip(itertools.cycle(ATTACKS), draws, strict=False):
        threading.Thread(target=client, args=(kind, draw), daemon=True).start()
    connection.send_bytes(b"")
    connection.recv_bytes()
    stopped.set()
    connection.send_bytes(json.dumps(counts).encode())
