"""Datasets of LeRobot, versions 2.0, 2.1 and 3: their numbers, and their cameras where they are asked for.

::

    FOLDER/
      meta/info.json          codebase_version, fps, features (dtype, shape), chunks_size,
                              data_path, video_path
      v2  meta/episodes.jsonl                        episode_index, length
          data/chunk-000/episode_000000.parquet      one episode
          videos/chunk-000/CAMERA/episode_000000.mp4
      v3  meta/episodes/chunk-000/file-000.parquet   episode_index, length, data/chunk_index, data/file_index,
                                                     dataset_from_index; of each camera videos/CAMERA/…
                                                     chunk_index, file_index, from_timestamp
          data/chunk-000/file-000.parquet            several episodes, one after the other
          videos/CAMERA/chunk-000/file-000.mp4       several episodes, one after the other

A camera is a feature ``video``, or ``image``: compressed pictures in the parquet files.  It is decoded only
where it is among the keys that are read, one episode at a time.  Parquet files are read by pyarrow, one row
group at a time, after the sizes in their footers were compared with bounds.  Files that links lead to outside
of the folder aren't read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, is_number, is_whole, nearest, reading
from ...files import Closing, contained, exists, require_regular
from .cameras import picture_size, read_pictures
from .demonstration import OTHERS, Demonstration
from .env_args import EnvArgs
from .lerobot_writing import INFO, RENAMED, write
from .parquet import ParquetColumns
from .video import read_video

__all__ = ["LeRobotDataset", "open_source", "recognises", "write"]

SUFFIXES = (".lerobot",)
EPISODES = "meta/episodes.jsonl"
LARGEST_JSON = 2**26
MOST_EPISODES = 2**22
NOT_OBSERVED = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
COLUMNS = {column: field for field, column in RENAMED.items()}
CAMERAS = {"video": "a video", "image": "pictures"}
"""Kinds of features, and what they are."""
LONGEST = 1e6
"""Seconds of a video."""
PLACE_COLUMNS = ("episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index")
CLIP_COLUMNS = ("chunk_index", "file_index", "from_timestamp")


@dataclass(frozen=True)
class Place:
    """Where the rows of an episode are."""

    index: int
    file: str
    start: int
    length: int
    rows: int
    """That the file must have."""


@dataclass(frozen=True)
class VideoClip:
    """Where a camera's frames of an episode are."""

    file: str
    start: float
    """Seconds."""
    is_whole: bool
    """Whether the file has no other episode's."""


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
        self._info, self._is_v2 = info, version[1] == "2"
        self._columns = ParquetColumns()
        self._clips: dict[str, dict[int, VideoClip]] = {}
        self.keys, self.skipped = list[str](), list[str]()
        self.cameras: dict[str, tuple[int, int, int]] = {}
        with reading(f"{path}/{INFO}"):
            self._sort_features()
        if "action" not in self._features:
            raise InputError(f"{path}/{INFO} has no action{nearest('action', self._features)}")
        with reading(f"{path}: its table of episodes"):
            places = self._places_v2() if self._is_v2 else self._places_v3()
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
        numbers = [key for key in keys if key not in self.cameras]
        names = {name: COLUMNS.get(name, name) for name in ("action", *numbers, *others)}
        path = contained(self._folder / place.file, self._folder)
        shapes = {name: self._shapes[name] for name in names} | {"episode_index": (1,)}
        if "timestamp" in self._features and len(numbers) < len(keys):
            shapes["timestamp"] = (1,)
        self._columns.require_rows(path, place.rows)
        values = self._columns.read(path, shapes, place.start, place.start + place.length)
        if (values["episode_index"] != place.index).any():
            raise InputError(f"{path} has rows of another episode than {place.index}: copy it again")
        fields = {new: values[old] for old, new in names.items()}
        with reading(f"{path}: a reward or end of a step"):
            fields |= {name: fields[name].reshape(place.length) for name in RENAMED if name in fields}
        times = values.get("timestamp", np.arange(place.length) / (self.control_hz or 1)).reshape(-1)
        fields |= {key: self._pictures(key, place, path, times) for key in keys if key in self.cameras}
        return Demonstration.of(demo, fields, f"{path}: {demo}")

    def _pictures(self, key: str, place: Place, path: Path, times: NDArray[Any]) -> NDArray[np.uint8]:
        """A camera's frames of an episode, ``[n, H, W, 3]``."""
        size, stop = self.cameras[key][:2], place.start + place.length
        if self._features[key]["dtype"] == "image":
            contents = self._columns.contents(path, key, place.start, stop)
            return read_pictures(contents, place.length, size, f"{path}: {key}")
        if key not in self._clips:
            with reading(f"{self.name}: where its table of episodes has {key}"):
                self._clips[key] = self._clips_v2(key) if self._is_v2 else self._clips_v3(key)
        clip = self._clips[key][place.index]
        video = contained(self._folder / clip.file, self._folder)
        if not exists(video):
            raise InputError(f"{video} is missing: copy it too, or choose obs_keys=[...] without {key}")
        times = clip.start + times.astype(np.float64)
        return read_video(video, times, self.control_hz or 1, size, clip.is_whole)

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

    def _sort_features(self) -> None:
        """Finds the observations, the cameras among them, and what is left out."""
        for name, about in self._features.items():
            kind, size = str(about.get("dtype")), picture_size(about)
            if name == "action" or name in NOT_OBSERVED or name in COLUMNS or name in OTHERS:
                continue
            why = None
            if kind == "string":
                why = "text, which isn't read"
            elif kind in CAMERAS and size is None:
                why = f"{CAMERAS[kind]} of the shape {about.get('shape')!r:.40}, not of three colours"
            elif kind == "video" and not (self._info.get("video_path") and self.control_hz):
                why = "a video, but meta/info.json has no video_path or no fps"
            if why:
                self.skipped.append(f"{self.name}: {name} is {why}")
                continue
            self.keys.append(name)
            if kind in CAMERAS and size:
                self.cameras[name] = (*size, 3)

    def _places_v2(self) -> list[Place]:
        chunks_size, places = _count(self._info["chunks_size"], 1), []
        for line in self._text(EPISODES).splitlines():
            about = json.loads(line)
            index, length = _count(about["episode_index"]), _count(about["length"], 1)
            numbers = {"episode_chunk": index // chunks_size, "episode_index": index}
            places.append(Place(index, _filled(self._info["data_path"], numbers), 0, length, length))
        return places

    def _places_v3(self) -> list[Place]:
        """A file's first row is that of its first episode."""
        table = sorted(tuple(map(_count, row)) for row in self._episode_rows(PLACE_COLUMNS))
        totals: dict[tuple[int, int], int] = {}
        firsts: dict[tuple[int, int], int] = {}
        for _, length, chunk, file, first in table:
            totals[chunk, file] = totals.get((chunk, file), 0) + _count(length, 1)
            firsts[chunk, file] = min(first, firsts.get((chunk, file), first))
        places = []
        for index, length, chunk, file, first in table:
            file_name = _filled(self._info["data_path"], {"chunk_index": chunk, "file_index": file})
            places.append(Place(index, file_name, first - firsts[chunk, file], length, totals[chunk, file]))
        return places

    def _episode_rows(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Columns of v3's table of episodes, row by row."""
        total = 0
        for path in sorted((self._folder / "meta/episodes").glob("*/*.parquet")):
            path = contained(path, self._folder)
            rows = self._columns.rows(path)
            total += rows
            if total > MOST_EPISODES:
                raise InputError(f"{path} has {rows} episodes, {MOST_EPISODES} are the most that are read")
            columns = self._columns.read(path, dict.fromkeys(names, ()), 0, rows)
            yield from zip(*(columns[name].tolist() for name in names), strict=True)

    def _clips_v2(self, key: str) -> dict[int, VideoClip]:
        chunks_size, clips = _count(self._info["chunks_size"], 1), {}
        for place in self._places.values():
            numbers = {"episode_chunk": place.index // chunks_size, "episode_index": place.index}
            file = _filled(self._info["video_path"], {**numbers, "video_key": key})
            clips[place.index] = VideoClip(file, start=0.0, is_whole=True)
        return clips

    def _clips_v3(self, key: str) -> dict[int, VideoClip]:
        names = ("episode_index", *(f"videos/{key}/{name}" for name in CLIP_COLUMNS))
        clips = {}
        for index, chunk, file, start in self._episode_rows(names):
            if not 0 <= start < LONGEST:
                raise ValueError(f"an episode begins at {start:g} s")
            numbers: dict[str, int | str] = {"chunk_index": _count(chunk), "file_index": _count(file)}
            video = _filled(self._info["video_path"], {**numbers, "video_key": key})
            clips[_count(index)] = VideoClip(video, start, is_whole=False)
        return clips


def _count(value: Any, least: int = 0) -> int:
    if not is_whole(value) or not least <= int(value) < 2**40:
        raise ValueError(f"{value!r:.40} isn't a whole number from {least} on")
    return int(value)


def _filled(template: str, numbers: Mapping[str, int | str]) -> str:
    """A path with numbers in place of ``{name:03d}``; not by ``format``, which reaches into objects."""

    def number(match: re.Match[str]) -> str:
        return str(numbers[match[1]]).zfill(min(int(match[2] or 0), 20))

    return re.sub(r"\{(\w+)(?::(\d+)d)?\}", number, template)
