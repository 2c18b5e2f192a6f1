"""Where the paths are that settings name."""

from __future__ import annotations

import functools
from pathlib import Path

from ..errors import InputError
from ..files import exists, located


def locate(path: str | None, setting: str) -> Path:
    """A setting's path, as ``located`` finds it.

    Raises:
        InputError: it is null; ``setting`` is its name.
    """
    if path is None:
        raise InputError(f"{setting} is null, and the task names none: write {setting}=PATH")
    return located(path)


def locate_checkpoint(path: str | None, setting: str = "checkpoint") -> Path:
    """A setting's path, or where a checkpoint of the Hugging Face Hub is after it was downloaded.

    Raises:
        InputError: as ``locate`` and ``interchange.reading.found`` do.
    """
    place = locate(path, setting)
    return place if exists(place) else _found(str(path))


@functools.cache
def _found(name: str) -> Path:
    # Once per process: all parts of a command are about the same commit of the repository.
    from ..interchange.reading import found

    return found(name)
