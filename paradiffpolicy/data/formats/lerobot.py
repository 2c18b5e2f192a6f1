"""Datasets of LeRobot, versions 2.0, 2.1 and 3: their numbers; videos and pictures are named and left out.

::

    FOLDER/
      meta/info.json          codebase_version, fps, features (dtype, shape), data_path, chunks_size
      v2  meta/episodes.jsonl                        episode_index, length
          data/chunk-000/episode_000000.parquet      one episode
      v3  meta/episodes/chunk-000/file-000.parquet   episode_index, length, data/chunk_index, data/file_index,
                                                     dataset_from_index
          data/chunk-000/file-000.parquet            several episodes, one after the other

Parquet files are read by pyarrow, one row group at a time, after the sizes in their footers were compared
with bounds.  Files that links lead to outside of the folder aren't read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, is_number, is_whole, nearest, reading
from ...files import Closing, contained, exists, require_regular
from .demonstration import OTHERS, Demonstration
from .env_args import EnvArgs
from .lerobot_writing import INFO, RENAMED, write
from .parquet import ParquetColumns

__all__ = ["LeRobotDataset", "open_source", "recognises", "write"]

SUFFIXES = (".lerobot",)
EPISODES = "meta/episodes.jsonl"
LARGEST_JSON = 2**26
MOST_EPISODES = 2**22
NOT_OBSERVED = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
COLUMNS = {column: field for field, column in RENAMED.items()}
MEDIA = {"video": "a video", "image": "pictures", "string": "text"}


@dataclass(frozen=True)
class Place:
    """Where the rows of an episode are."""

    index: int
    file: str
    start: int
    length: int
    rows: int
    """That the file must have."""


def recognises(path: Path) -> bool:
    """Whether a path is a folder with ``meta/info.json``."""
    return exists(path / INFO)


def open_source(path: Path, env_args: EnvArgs | None = None) -> LeRobotDataset:
    """See ``LeRobotDataset``."""
    return LeRobotDataset(path, env_args)


class LeRobotDataset(Closing):
    """A ``Source`` that reads a dataset of LeRobot; its actions are as recorded.

    Args:
        path: of the folder.
        env_args: describe the environment.

    Raises:
        InputError: it is of another version, damaged, has no actions, or pyarrow isn't installed.
    """

    kind = "recorded"

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self.name, self.env_args, self._folder = str(path), env_args, Path(path)
        with reading(f"{path}/{INFO}"):
            info = json.loads(self._text(INFO))
            version = str(info["codebase_version"])
            fps, features = info.get("fps"), info["features"]
            self._features = {str(name): dict(about) for name, about in features.items()}
            self._shapes = {name: tuple(about.get("shape") or ()) for name, about in self._features.items()}
        if re.fullmatch(r"v[23]\.\d+", version) is None:
            raise InputError(f"{path} is of LeRobot's {version:.20}, v2.0 to v3 are read: convert it there")
        self.control_hz = float(fps) if is_number(fps) and fps > 0 else None
        self._columns = ParquetColumns()
        self.keys, self.skipped = [], list[str]()
        for name, about in self._features.items():
            what = MEDIA.get(str(about.get("dtype")))
            if what:
                self.skipped.append(f"{path}: {name} is {what}, which isn't read")
            elif name != "action" and name not in NOT_OBSERVED and name not in COLUMNS and name not in OTHERS:
                self.keys.append(name)
        if "action" not in self._features:
            raise InputError(f"{path}/{INFO} has no action{nearest('action', self._features)}")
        with reading(f"{path}: its table of episodes"):
            places = self._places_v2(info) if version[1] == "2" else self._places_v3(info)
        if not places:
            raise InputError(f"{path} has no episodes: its table of episodes is empty")
        self._places = {f"demo_{index}": place for index, place in enumerate(places)}
        self.demos = list(self._places)
        self.masks: dict[str, list[str]] = {}

    def length(self, demo: str) -> int:
        """Steps of an episode, as the table of episodes says; ``read`` compares."""
        return self._place(demo).length

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        place, keys = self._place(demo), self.keys if keys is None else keys
        for key in keys:
            if key not in self.keys:
                raise InputError(f"{self.name} has no {key}{nearest(key, self.keys)}")
        others = [name for name in (*COLUMNS, *OTHERS) if name in self._features and name != "action"]
        names = {name: COLUMNS.get(name, name) for name in ("action", *keys, *others)}
        path = contained(self._folder / place.file, self._folder)
        shapes = {name: self._shapes[name] for name in names} | {"episode_index": (1,)}
        self._columns.require_rows(path, place.rows)
        values = self._columns.read(path, shapes, place.start, place.start + place.length)
        if (values["episode_index"] != place.index).any():
            raise InputError(f"{path} has rows of another episode than {place.index}: copy it again")
        fields = {new: values[old] for old, new in names.items()}
        with reading(f"{path}: a reward or end of a step"):
            fields |= {name: fields[name].reshape(place.length) for name in RENAMED if name in fields}
        return Demonstration.of(demo, fields, f"{path}: {demo}")

    def close(self) -> None:
        """Forgets the rows that were read last."""
        self._columns = ParquetColumns()

    def _place(self, demo: str) -> Place:
        if demo not in self._places:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        return self._places[demo]

    def _text(self, name: str) -> str:
        path = contained(self._folder / name, self._folder)
        require_regular(path, LARGEST_JSON)
        return path.read_text()

    def _places_v2(self, info: Mapping[str, Any]) -> list[Place]:
        chunks_size, places = _count(info["chunks_size"], 1), []
        for line in self._text(EPISODES).splitlines():
            about = json.loads(line)
            index, length = _count(about["episode_index"]), _count(about["length"], 1)
            numbers = {"episode_chunk": index // chunks_size, "episode_index": index}
            places.append(Place(index, _filled(info["data_path"], numbers), 0, length, length))
        return places

    def _places_v3(self, info: Mapping[str, Any]) -> list[Place]:
        """A file's first row is that of its first episode."""
        names = ("episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index")
        table: list[tuple[int, ...]] = []
        for path in sorted((self._folder / "meta/episodes").glob("*/*.parquet")):
            path = contained(path, self._folder)
            rows = self._columns.rows(path)
            if len(table) + rows > MOST_EPISODES:
                raise InputError(f"{path} has {rows} episodes, {MOST_EPISODES} are the most that are read")
            columns = self._columns.read(path, dict.fromkeys(names, ()), 0, rows)
            table += zip(*(map(_count, columns[name].tolist()) for name in names), strict=True)
        table.sort()
        totals: dict[tuple[int, int], int] = {}
        firsts: dict[tuple[int, int], int] = {}
        for _, length, chunk, file, first in table:
            totals[chunk, file] = totals.get((chunk, file), 0) + _count(length, 1)
            firsts[chunk, file] = min(first, firsts.get((chunk, file), first))
        places = []
        for index, length, chunk, file, first in table:
            file_name = _filled(info["data_path"], {"chunk_index": chunk, "file_index": file})
            places.append(Place(index, file_name, first - firsts[chunk, file], length, totals[chunk, file]))
        return places


def _count(value: Any, least: int = 0) -> int:
    if not is_whole(value) or not least <= int(value) < 2**40:
        raise ValueError(f"{value!r:.40} isn't a whole number from {least} on")
    return int(value)


def _filled(template: str, numbers: Mapping[str, int]) -> str:
    """A path with numbers in place of ``{name:03d}``; not by ``format``, which reaches into objects."""

    def number(match: re.Match[str]) -> str:
        return str(numbers[match[1]]).zfill(min(int(match[2] or 0), 20))

    return re.sub(r"\{(\w+)(?::(\d+)d)?\}", number, template)
