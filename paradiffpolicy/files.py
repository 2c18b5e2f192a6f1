"""Writing files so that a reader sees the old content or the new, never half of it; closing what is open."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from .errors import InputError


class Closing:
    """A context manager that calls its ``close`` at the end of a ``with`` statement, however it ends."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` on a temporary sibling of ``path`` and moves the result over ``path``.

    The suffix is kept, since many writers choose their format by it.  A crash, or an exception
    from ``write``, leaves whatever was at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes plain values as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(plain_json(content), indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def plain_json(content: Any) -> Any:
    """The same plain values with null for NaN and infinity, which JSON doesn't have."""
    if isinstance(content, dict):
        return {key: plain_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` on a temporary sibling of ``path``, where it makes a folder, and renames that.

    Raises:
        InputError: something is at ``path``.
    """
    if path.exists():
        raise InputError(f"{path} exists: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(**paths: Path) -> None:
    """Raises ``InputError`` that names the first path that can't be written to.  Makes the folders that
    they are in: for what ends in a file, so that it needn't end in an error."""
    for name, path in paths.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"{name}={path} can't be written ({error.strerror}): name another place")
