"""Keeps finished blocks of episodes, from which an evaluation that was cut off goes on.

They lie in a folder beside the report until it is complete::

    unfinished/settings.json      all that decides the results: another evaluation's blocks aren't taken
    unfinished/0003-ddpm-….npz    the fourth block of seeds, of one sampler
    unfinished/latencies-….json   other values that were measured
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ..control.record import Record
from ..errors import InputError
from ..files import plain_json, write_atomically, write_json
from .episodes import Episode

FOLDER = "unfinished"
ARRAYS = ("rewards", "iterations", "nfe", "windows", "actions", "frames")
"""Lists of an episode that are stored as arrays."""


class Blocks:
    """Finished blocks of one evaluation.

    Args:
        folder: of the report; None: nothing is kept.
        settings: plain values that decide the results.
        kept: the name of the folder in it that they lie in.

    Raises:
        InputError: the folder holds blocks of other settings.
    """

    def __init__(
        self,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        kept: str = FOLDER,
    ) -> None:
        self._folder = None if folder is None else folder / kept
        if folder is None or self._folder is None:
            return
        known, given = kept_settings(folder, kept), json.loads(json.dumps(plain_json(settings or {})))
        if known is not None and known != given:
            names = sorted(name for name in {*known, *given} if known.get(name) != given.get(name))
            what = "an unfinished evaluation" if kept == FOLDER else "blocks of an evaluation"
            raise InputError(
                f"out={folder} has {what} with other settings ({', '.join(names)}): finish "
                f"it with those, name another folder, or delete {self._folder}"
            )
        self._settings = given

    def _keep(self, path: Path, write: Callable[[Path], object]) -> None:
        """Writes a file, and first of all the settings that it belongs to."""
        settings = path.with_name("settings.json")
        if not settings.exists():
            write_json(settings, self._settings)
        write(path)

    def _path(self, name: str, block: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{block:04}-{_file_name(name)}.npz"

    def has(self, name: str, block: int) -> bool:
        """Whether a block of a sampler's or case's episodes is kept."""
        path = self._path(name, block)
        return path is not None and path.exists()

    def episodes(self, name: str, block: int, make: Callable[[], list[Episode]]) -> list[Episode]:
        """The episodes of a sampler or case in one block of seeds: kept ones, or else made and kept."""
        path = self._path(name, block)
        if path is None:
            return make()
        if not path.exists():
            episodes, pack = make(), lambda temporary: temporary.write_bytes(_packed(episodes))
            self._keep(path, lambda path: write_atomically(path, pack))
            return episodes
        try:
            return _unpacked(path)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}): delete it, and its episodes are run again")

    def values(self, name: str, make: Callable[[], Any]) -> Any:
        """Plain values that were measured: kept ones, or else made and kept."""
        if self._folder is None:
            return make()
        path = self._folder / f"{_file_name(name)}.json"
        if not path.exists():
            measured = make()
            self._keep(path, lambda path: write_json(path, measured))
        return json.loads(path.read_text())

    def remove(self) -> None:
        """Removes what was kept: the report is complete."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _file_name(name: str) -> str:
    readable = "".join(letter if letter.isalnum() else "_" for letter in name)[:40]
    return f"{readable}-{sha256(name.encode()).hexdigest()[:8]}"


def kept_settings(folder: Path, kept: str = FOLDER) -> Any:
    """The settings of an unfinished evaluation in a report's folder; None: there is none."""
    try:
        return json.loads((folder / kept / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def _packed(episodes: Sequence[Episode]) -> bytes:
    arrays: dict[str, Any] = {}
    plain = {field.name for field in fields(Episode)} - {*ARRAYS, "infos", "record"}
    heads = [{name: getattr(episode, name) for name in sorted(plain)} for episode in episodes]
    arrays["heads"] = np.array(json.dumps(heads))
    for k, episode in enumerate(episodes):
        arrays |= {f"{k}/{name}": np.array(getattr(episode, name)) for name in ARRAYS}
        if episode.record is not None:
            arrays |= {f"{k}/ticks": episode.record.ticks, f"{k}/plans": episode.record.plans}
            arrays[f"{k}/requests"] = np.array(episode.record.n_requests)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def _unpacked(path: Path) -> list[Episode]:
    episodes = []
    with np.load(path, allow_pickle=False) as arrays:
        for k, head in enumerate(json.loads(str(arrays["heads"]))):
            own: dict[str, Any] = {name: list(arrays[f"{k}/{name}"]) for name in ARRAYS}
            own |= {name: arrays[f"{k}/{name}"].tolist() for name in ("rewards", "iterations", "nfe")}
            record = None
            if f"{k}/ticks" in arrays:
                ticks, plans, requests = (arrays[f"{k}/{name}"] for name in ("ticks", "plans", "requests"))
                record = Record.of(ticks, plans, int(requests))
            episodes.append(Episode(**head, **own, record=record))
    return episodes
