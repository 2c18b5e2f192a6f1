"""A file from a web server, in parts if need be.

A transfer that was cut goes on where it ended, if the server says that it still has the same file: the
request names the version of the first part (``If-Range``), and the answer must name it again.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError, first_line
from ..files import write_json

PIECE = 2**18
"""Bytes that are in memory at once."""
TRIES = 5
"""Connections of one transfer, after each of which more of the file must be there."""
SECONDS = 30.0
"""As long a server may be silent."""

OnBytes = Callable[[int, int | None], object]
"""Takes the bytes that are there, and those of the whole file, if they are known."""


@dataclass(frozen=True)
class Version:
    """What identifies the file that a server has: parts of one version fit together."""

    address: str
    validator: str | None
    """Its ETag, or else when it was last modified."""
    size: int | None


class _CutError(Exception):
    """A transfer ended before the file did, or didn't begin."""


class _AnewError(Exception):
    """What is there can't be gone on from."""


def fetch(
    address: str,
    part: Path,
    *,
    most: int,
    size: int | None = None,
    remedy: str,
    on_bytes: OnBytes = lambda done, total: None,
    schemes: Collection[str] = ("https",),
) -> None:
    """Downloads a file, or the rest of it.

    Args:
        part: where to; what an earlier call left there is used.  ``part.json`` beside it says of which
            version of the file it is.
        most: bytes that are taken at most.
        size: bytes that the file must have, if they are known.
        remedy: ends the line of an error that another try wouldn't mend.
        schemes: of addresses, also of those that the server redirects to.

    Raises:
        InputError: the server can't be reached, refuses, breaks off, or has a file of another size.
    """
    _require_scheme(address, schemes)
    opener, there, why = urllib.request.build_opener(_Redirects(schemes)), _bytes(part), ""
    for _ in range(TRIES):
        try:
            _go_on(opener, address, part, most, size, on_bytes)
            return
        except _AnewError:
            part.unlink(missing_ok=True)
            there, why = -1, "has another file at every answer"
        except _CutError as cut:
            why = str(cut)
            if _bytes(part) <= there:
                break
            there = _bytes(part)
    if not _bytes(part):
        raise InputError(f"{address} {why}: {remedy}")
    raise InputError(
        f"{address} {why}, {_bytes(part)} bytes are there: run this again, which goes on from them, or "
        f"{remedy}"
    )


def _go_on(
    opener: urllib.request.OpenerDirector,
    address: str,
    part: Path,
    most: int,
    size: int | None,
    on_bytes: OnBytes,
) -> None:
    """Takes what one connection gives, up to the end of the file."""
    old = _version(part)
    start = _bytes(part) if old and old.address == address and old.validator else 0
    if old and start and start == old.size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "paradiffpolicy"}
    if old and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": str(old.validator)}
    with _opened(opener, urllib.request.Request(address, headers=headers)) as answer:
        new, done = _answered(address, answer)
        if done and (done != start or new != old):
            raise _AnewError
        if size is not None and new.size not in (None, size):
            raise InputError(
                f"{address} has {new.size} bytes, {size} are expected: its publisher changed it, or what "
                "answers is another server"
            )
        with part.open("ab" if done else "wb") as file:
            if not done:  # the file is empty by now
                write_json(_beside(part), asdict(new))
            for piece in _pieces(answer):
                done += len(piece)
                if done > (size or most):
                    raise InputError(
                        f"{address} has more than {size or most} bytes: it isn't what is expected"
                    )
                file.write(piece)
                on_bytes(done, new.size)
    if new.size is not None and done < new.size:
        raise _CutError(f"broke off at {done} of {new.size} bytes")


def _opened(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> Any:
    """The server's answer, of status 200 or 206."""
    try:
        return opener.open(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _AnewError  # the part has more than the server's file
        raise _CutError(f"answers {error.code} {error.reason}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _CutError(f"can't be reached ({first_line(error)})")


def _pieces(answer: Any) -> Iterator[bytes]:
    """What the server sends."""
    try:
        while piece := answer.read(PIECE):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"broke off ({first_line(error)})")


def _answered(address: str, answer: Any) -> tuple[Version, int]:
    """The version of the file that is answered with, and from which byte on."""
    tag = answer.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified")
    if validator is not None and not validator.isprintable():
        validator = None
    if answer.status == http.client.PARTIAL_CONTENT:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
        if span is None or not int(span[1]):
            raise _AnewError
        return Version(address, validator, int(span[2])), int(span[1])
    length = answer.headers.get("Content-Length", "")
    return Version(address, validator, int(length) if length.isdecimal() else None), 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to addresses of some schemes."""

    def __init__(self, schemes: Collection[str]) -> None:
        self._schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _require_scheme(newurl, self._schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_scheme(address: str, schemes: Collection[str]) -> None:
    if urlsplit(address).scheme not in schemes:
        raise InputError(
            f"{address:.200} isn't an address with {' or '.join(schemes)}: nothing is fetched from it"
        )


def _beside(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _bytes(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _version(part: Path) -> Version | None:
    """The version of which a part is; ``None``: there is none, or it isn't known."""
    try:
        return Version(**json.loads(_beside(part).read_text()))
    except (OSError, TypeError, ValueError):
        return None
