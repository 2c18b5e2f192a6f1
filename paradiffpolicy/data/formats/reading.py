"""Datasets of any known format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ...errors import InputError
from . import lerobot, minari, npz, robomimic, store
from .demonstration import About, Demonstration, Source
from .env_args import EnvArgs

FORMATS: dict[str, ModuleType] = {
    "lerobot": lerobot,
    "minari": minari,
    "npz": npz,
    "zarr": store,
    "robomimic": robomimic,
}
"""Each module ``recognises`` a path, has an ``open_source`` that reads it, and can ``write`` paths that end
in one of its ``SUFFIXES``, if it has any.  The first that recognises a path is taken.
The last two take what is a folder, and what isn't: what is no dataset is refused by them."""


def format_of(path: Path) -> str:
    """The name of a path's format, among ``FORMATS``."""
    return next(name for name, module in FORMATS.items() if module.recognises(path))


def open_source(path: Path, env_args: EnvArgs | None = None) -> Source:
    """Opens a dataset of any format.

    Args:
        path: of a file or folder.
        env_args: of a dataset that doesn't say in which environment it was made.

    Raises:
        InputError: it doesn't exist, is damaged, or isn't a dataset.
    """
    source: Source = FORMATS[format_of(path)].open_source(path, env_args)
    return source


def require_suffix(path: Path) -> str:
    """The name of the format that a path's ending asks for.

    Raises:
        InputError: there is none.
    """
    for name, module in FORMATS.items():
        if path.suffix in module.SUFFIXES:
            return name
    known = ", ".join(suffix for module in FORMATS.values() for suffix in module.SUFFIXES)
    raise InputError(f"out={path} must end in one of {known}, which says what to write")


def write(path: Path, demonstrations: Iterable[Demonstration], about: About) -> None:
    """Writes demonstrations to a new dataset of the format that the path's ending asks for, or leaves none.

    Raises:
        InputError: the path exists, the format needs to know more, or a demonstration can't be read.
    """
    FORMATS[require_suffix(path)].write(path, demonstrations, about)
