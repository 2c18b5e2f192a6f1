"""Writes datasets of LeRobot, version 3; ``lerobot`` has the layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ...files import write_json, write_new
from .demonstration import About, Demonstration, fields_of
from .parquet import pyarrow_parquet
from .video import write_video

INFO = "meta/info.json"
EPISODES_FILE = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_FILE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_FILE = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNKS_SIZE, FILE_MEGABYTES = 1000, 100
TASK = "demonstrations"
"""The one task that is named: what is converted doesn't tell of any."""
ROWS_AT_ONCE = 256
SAMPLED_FRAMES = 100
"""Of an episode, from which a camera's statistics are, or up to twice as many."""
RENAMED = {"rewards": "next.reward", "dones": "next.done"}
"""Fields of a demonstration, and the columns that they are."""
COUNTED = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}


def write(path: Path, demonstrations: Iterable[Demonstration], about: About) -> None:
    """Writes demonstrations to a new folder, or leaves none; one row group, and one video of each camera, per
    episode.  Observations are called ``observation.<name>``, cameras (``[N, H, W, 3]`` uint8)
    ``observation.images.<name>``; states, poses and scenes are left out.

    Raises:
        InputError: the path exists, steps per second aren't known, a demonstration can't be read, has fields
            that are neither vectors nor cameras, or differs from the first in form, or pyarrow, or for
            cameras PyAV, isn't installed.
    """
    if about.control_hz is None:
        raise InputError(
            f"{path} must say how many steps a second has, which the source doesn't: set control_hz, as "
            "control_hz=10"
        )
    rate = about.control_hz
    pyarrow_parquet()
    write_new(path, lambda temporary: _Writer(temporary, rate, str(path)).write(demonstrations))


class _Writer:
    def __init__(self, folder: Path, rate: float, name: str) -> None:
        self.folder, self.rate, self.name = folder, rate, name
        self.statistics: dict[str, _Statistics] = {}
        self.features: dict[str, dict[str, Any]] = {}
        self.videos: dict[str, dict[str, Any]] = {}
        """What is told of each camera's videos."""
        self.episodes: list[dict[str, Any]] = []
        self.steps = 0

    def write(self, demonstrations: Iterable[Demonstration]) -> None:
        file, number, size = None, 0, 0
        try:
            for demo in demonstrations:
                columns, cameras = self._columns(demo)
                table = _table(columns)
                if file is None or size > FILE_MEGABYTES * 2**20:
                    if file is not None:
                        file.close()
                        number += 1
                    place = self.folder / DATA_FILE.format(**_numbers_of(number))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file, size = pyarrow_parquet().ParquetWriter(place, table.schema), 0
                file.write_table(table, row_group_size=len(demo))
                size += table.nbytes
                self._write_videos(cameras)
                self._add(columns, len(demo), number)
        finally:
            if file is not None:
                file.close()
        self._write_meta()

    def _columns(self, demo: Demonstration) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """All columns of an episode, ``[n, ...]``, and its cameras; raises ``InputError`` where they aren't
        the first's."""
        fields, columns, cameras = fields_of(demo, self.name), {}, {}
        for key, values in fields.items():
            if key in ("states", "poses"):
                continue
            is_named = key == "action" or key in RENAMED or key.startswith("observation.")
            if values.ndim > 2:
                self._require_camera(key, values)
                cameras[key if is_named else f"observation.images.{key}"] = values
                continue
            name = RENAMED.get(key, key) if is_named else f"observation.{key}"
            columns[name] = values.reshape(len(demo), -1)
        found: dict[str, dict[str, Any]] = {
            name: {"dtype": str(values.dtype), "shape": [values.shape[1]], "names": None}
            for name, values in columns.items()
        }
        for name, values in cameras.items():
            names = ["height", "width", "channels"]
            found[name] = {"dtype": "video", "shape": list(values.shape[1:]), "names": names}
        self.features = self.features or found
        if found != self.features:
            raise InputError(f"{demo.name} isn't like those before it: it has {_brief(found)}")
        frames, episode = np.arange(len(demo)), len(self.episodes)
        counted = (frames / self.rate, frames, np.full(len(demo), episode), self.steps + frames)
        for (name, dtype), values in zip(COUNTED.items(), counted, strict=True):
            columns[name] = values.astype(dtype)[:, None]
        return {**columns, "task_index": np.zeros((len(demo), 1), np.int64)}, cameras

    def _require_camera(self, key: str, values: NDArray[Any]) -> None:
        """Raises ``InputError`` unless values are frames that are written as a video."""
        shape = values.shape[1:]
        if values.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
            raise InputError(
                f"{self.name}: {key} is {values.dtype} {shape} per step: vectors are written into LeRobot's "
                "datasets, and cameras, which are uint8 (height, width, 3), both even: choose obs_keys=[...]"
            )

    def _write_videos(self, cameras: Mapping[str, NDArray[np.uint8]]) -> None:
        """Writes an episode's frames, and adds some of them, in 0 … 1, to the statistics."""
        for name, frames in cameras.items():
            place = self.folder / VIDEO_FILE.format(video_key=name, **_numbers_of(len(self.episodes)))
            place.parent.mkdir(parents=True, exist_ok=True)
            self.videos[name] = write_video(place, frames, self.rate, f"{self.name}: {name}")
            statistics = self.statistics.setdefault(name, _Statistics(np.zeros(3)))
            for frame in frames[:: max(1, len(frames) // SAMPLED_FRAMES)]:
                statistics.add(frame.reshape(-1, 3) / 255)

    def _add(self, columns: Mapping[str, NDArray[Any]], length: int, number: int) -> None:
        for name, values in columns.items():
            statistics = self.statistics.setdefault(name, _Statistics(values[0]))
            for start in range(0, length, ROWS_AT_ONCE):
                statistics.add(values[start : start + ROWS_AT_ONCE])
        chunk, file = _numbers_of(number).values()
        about = {"data/chunk_index": chunk, "data/file_index": file, "length": length, "tasks": [TASK]}
        about |= {"dataset_from_index": self.steps, "dataset_to_index": self.steps + length}
        about |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for name in self.videos:
            place = _numbers_of(len(self.episodes)) | {
                "from_timestamp": 0.0,
                "to_timestamp": length / self.rate,
            }
            about |= {f"videos/{name}/{key}": value for key, value in place.items()}
        self.episodes.append({"episode_index": len(self.episodes), **about})
        self.steps += length

    def _write_meta(self) -> None:
        import pyarrow as pa

        episodes = self.folder / EPISODES_FILE.format(**_numbers_of(0))
        episodes.parent.mkdir(parents=True)
        pyarrow_parquet().write_table(pa.Table.from_pylist(self.episodes), episodes)
        # pandas, with which LeRobot reads this table, takes the column "task" for its index.
        kinds = (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        names = ("name", "pandas_type", "numpy_type", "field_name", "metadata")
        columns = [dict(zip(names, (*kind, kind[0], None), strict=True)) for kind in kinds]
        told = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
        tasks = pa.table({"task_index": [0], "task": [TASK]})
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps({**told, "pandas_version": "2.2.0"})})
        pyarrow_parquet().write_table(tasks, self.folder / "meta/tasks.parquet")
        counted = {**COUNTED, "task_index": "int64"}
        numbers = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in counted.items()}
        info: dict[str, Any] = {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": len(self.episodes),
            "total_frames": self.steps,
            "total_tasks": 1,
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": FILE_MEGABYTES,
            "video_files_size_in_mb": 500,
            "fps": int(self.rate) if self.rate == int(self.rate) else self.rate,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_FILE,
            "video_path": VIDEO_FILE if self.videos else None,
            "features": {**self.features, **numbers},
        }
        for name, told in self.videos.items():
            info["features"][name] = {**self.features[name], "info": told}
        write_json(self.folder / INFO, info)
        stats = {name: statistics.values() for name, statistics in self.statistics.items()}
        for name in self.videos:  # as LeRobot has them: a number per colour, [3, 1, 1]
            stats[name] |= {k: [[[v]] for v in stats[name][k]] for k in ("min", "max", "mean", "std")}
        write_json(self.folder / "meta/stats.json", stats)


class _Statistics:
    """Range, mean and deviation of a column, in float64, relative to its first row: offsets may be large."""

    def __init__(self, first: NDArray[Any]) -> None:
        self.first = first.astype(np.float64)
        self.low, self.high = np.full(len(first), np.inf), np.full(len(first), -np.inf)
        self.count, self.sum, self.squares = 0, np.zeros(len(first)), np.zeros(len(first))

    def add(self, values: NDArray[Any]) -> None:
        """Values ``[n, D]``."""
        apart = values.astype(np.float64) - self.first
        self.low, self.high = np.minimum(self.low, apart.min(0)), np.maximum(self.high, apart.max(0))
        self.count += len(values)
        self.sum, self.squares = self.sum + apart.sum(0), self.squares + (apart**2).sum(0)

    def values(self) -> dict[str, Any]:
        mean = self.sum / self.count
        deviation = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        found = {"min": self.low + self.first, "max": self.high + self.first, "mean": mean + self.first}
        return {**{k: v.tolist() for k, v in found.items()}, "std": deviation.tolist(), "count": [self.count]}


def _numbers_of(number: int) -> dict[str, Any]:
    return {"chunk_index": number // CHUNKS_SIZE, "file_index": number % CHUNKS_SIZE}


def _brief(features: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {about['dtype']} {about['shape']}" for name, about in features.items())


def _table(columns: Mapping[str, NDArray[Any]]) -> Any:
    """An arrow table; LeRobot stores a dimension of one as plain numbers."""
    import pyarrow as pa

    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        width = values.shape[1]
        arrays[name] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.table(arrays)
