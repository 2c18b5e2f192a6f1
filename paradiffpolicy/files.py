"""Writing files so that a reader sees the old content or the new, never half of it; closing what is open."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from .errors import InputError

UNFINISHED = ".unfinished-"
"""Begins the names of hidden folders in which files are made."""


class Closing:
    """A context manager that calls its ``close`` at the end of a ``with`` statement, however it ends."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ``InputError`` that names ``path`` for the system's errors, as of a full disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} can't be written ({reason}): free space there, or name another place")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` on a temporary file of the same name and moves the result over ``path``.  A crash, or
    an exception from ``write``, leaves whatever was at ``path``.

    Raises:
        InputError: the system can't write it, as on a full disk.
    """
    with writing(path), _unfinished(path) as temporary:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)


def write_new(path: Path, write: Callable[[Path], object]) -> None:
    """As ``write_atomically``, but ``write`` may also make a folder.

    Raises:
        InputError: something is at ``path``, or the system can't write it.
    """
    require_absent(path)
    with writing(path), _unfinished(path) as temporary:
        write(temporary)
        _flush(temporary)
        require_absent(path)  # or another made it meanwhile
        temporary.rename(path)


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


def located(path: str | Path) -> Path:
    """A path as given, from the working folder, or else from the checkout or the package of this code, so
    that the shipped policy and the tasks are found from anywhere."""
    given, package = Path(path).expanduser(), Path(__file__).resolve().parent
    places = [folder / given for folder in (Path(), package.parent, package)]
    return next((place for place in places if exists(place)), given)


def exists(path: Path) -> bool:
    """Whether a path is there; no path is of a name that no file can have, as one that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def require_absent(path: Path) -> None:
    """Raises ``InputError`` where something is at ``path``."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: choose another path")


def require_writable(**paths: Path) -> None:
    """Raises ``InputError`` that names the first path that can't be written to: for what ends in a file, so
    that it needn't end in an error.  Nothing is left there."""
    for name, path in paths.items():
        try:
            there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise InputError(f"{name}={path} can't be written ({error.strerror}): name another place")


def require_regular(path: Path, most: int) -> None:
    """Raises ``InputError`` unless a path is, or leads to, a regular file of at most ``most`` bytes: reading
    a pipe would wait, and a device may never end."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): copy it again")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} isn't a regular file: copy it again")
    if status.st_size > most:
        raise InputError(f"{path} has {status.st_size} bytes, {most} are the most that is read")


def contained(path: Path, folder: Path) -> Path:
    """The same path.  Links may lead from it to files in its folder and, where the folder is a snapshot in a
    cache of the Hugging Face Hub, to the cache's blobs, which are what all files of a snapshot are links to.

    Raises:
        InputError: links lead elsewhere.
    """
    try:
        real, root = path.resolve(), folder.resolve()
        inside = any(real.is_relative_to(place) for place in (root, *_blobs(root)))
    except (OSError, RuntimeError, ValueError):
        inside = False
    if not inside:
        raise InputError(f"{path} leads out of {folder}: copy the file itself there (cp -L)")
    return path


def _blobs(folder: Path) -> Iterator[Path]:
    """The blobs of a Hub's cache, ``CACHE/REPOSITORY/snapshots/COMMIT``: those of the repository, and those
    that the repositories of the cache share."""
    for above in (folder, *folder.parents):
        if above.name == "snapshots":
            yield above.parent / "blobs"
            yield above.parent.parent / "blobs"


def clear_unfinished(folder: Path) -> None:
    """Removes what killed writers left: hidden folders without a holder of their lock."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            held = lock(left)
            if held is not None:
                _remove(left, held)


def lock(folder: Path) -> int | None:
    """Locks a folder until the file descriptor that it returns is closed, or this process ends; ``None`` if
    it is locked, by this process or another.

    Raises:
        OSError: there is no such folder, or its file system has no locks.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if not isinstance(error, BlockingIOError):
            raise
        return None
    return file


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yields a path of the same name in a new hidden folder beside ``path``, which is locked meanwhile, and
    removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path.parent)
    folder, held = _new_folder(path.parent)
    try:
        yield folder / path.name
    finally:
        _remove(folder, held)


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """A new hidden folder and its lock, ``None`` where the file system has none."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        try:
            held = lock(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return folder, None
        # Before it was locked, another writer may have taken it for a killed one's.
        if held is not None and folder.exists():
            return folder, held
        _remove(folder, held)


def _remove(folder: Path, held: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if held is not None:
        os.close(held)


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
