"""Minari's datasets, of version 0.5 and later, whose data are in HDF5.

::

    FOLDER/data/
      metadata.json         data_format, total_episodes
                            observation_space, action_space, env_spec: JSON in texts
      main_data.hdf5
        episode_<i>         attributes: total_steps, seed
          observations      [N + 1, ...]; a group where the space is a Dict, with groups for Dicts in it
          actions           [N, A]
          rewards, terminations, truncations    [N]

No action follows the last observation, which is left out.  A Dict's observations are called by their keys,
those of a Dict in it by both keys, as ``goal.position``; a Box's are called ``observations``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, is_whole, nearest, reading
from ...files import Closing, contained, exists, require_regular
from ..replay_buffer import require_finite
from .demonstration import Demonstration
from .env_args import GYM_TYPE, EnvArgs
from .hdf5 import datasets, entries, find, numbers, open_file, unreadable

SUFFIXES: tuple[str, ...] = ()
"""None: such datasets are read, not written."""
METADATA, MAIN = "data/metadata.json", "data/main_data.hdf5"
OBSERVATIONS = "observations"
LARGEST_METADATA, LARGEST_FILE = 2**26, 2**44


def recognises(path: Path) -> bool:
    """Whether a path is a folder with ``data/metadata.json`` or ``data/main_data.hdf5``."""
    return exists(path / METADATA) or exists(path / MAIN)


def open_source(path: Path, env_args: EnvArgs | None = None) -> MinariDataset:
    """See ``MinariDataset``."""
    return MinariDataset(path, env_args)


class MinariDataset(Closing):
    """A ``Source`` that reads a dataset of Minari; its actions are as recorded.

    Args:
        path: of the dataset's folder.
        env_args: of a dataset that doesn't say in which environment it was made.

    Attributes:
        seeds: of the environment's resets, by the names of the demonstrations that have one.

    Raises:
        InputError: it is damaged, its data aren't in HDF5, or its actions aren't vectors.
    """

    kind = "recorded"
    cameras: Mapping[str, tuple[int, int, int]] = {}

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self.name, self.masks = str(path), dict[str, list[str]]()
        about = _metadata(Path(path))
        with reading(f"{path}/{METADATA}"):
            self.env_args = _environment(about.get("env_spec"), self.name) or env_args
            seen = _space(about, "observation_space")
            stated = None if seen is None else dict(_parts(seen))
        main = contained(Path(path) / MAIN, Path(path))
        require_regular(main, LARGEST_FILE)
        self._file = open_file(main)
        try:
            with reading(f"{path}/{MAIN}"):
                self._groups = self._episodes(about.get("total_episodes"))
                self.demos = list(self._groups)
                self.seeds = {demo: int(seed) for demo in self.demos if is_whole(seed := self._seed(demo))}
                self._paths, self.skipped = self._observed(stated)
            self.keys = list(self._paths)
        except BaseException:
            self._file.close()
            raise

    @property
    def control_hz(self) -> float | None:
        return self.env_args.control_hz if self.env_args else None

    def length(self, demo: str) -> int:
        """Steps of an episode: its actions."""
        with reading(f"{self.name}: {demo}/actions"):
            return int((self._dataset(demo, "actions").shape or (0,))[0])

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        keys = self.keys if keys is None else keys
        for key in keys:
            if key not in self._paths:
                raise InputError(f"{self.name} has no {key}{nearest(key, self.keys)}")
        length, where, group = self.length(demo), f"{self.name}: {demo}", self._group(demo)
        with reading(where):
            stated = int(group.attrs.get("total_steps", length))
            has = {name for name in entries(group) if isinstance(find(group, name), h5py.Dataset)}
        if stated != length:
            raise InputError(f"{where} has {length} actions but total_steps {stated}: copy the dataset again")
        fields = {"action": self._values(demo, "actions", length)}
        for key in keys:
            fields[key] = self._values(demo, self._paths[key], length + 1)[:-1]
        if "rewards" in has:
            fields["rewards"] = self._values(demo, "rewards", length)
        if {"terminations", "truncations"} <= has:
            ends = [self._values(demo, name, length) for name in ("terminations", "truncations")]
            with reading(f"{where}: terminations and truncations"):
                fields["dones"] = np.logical_or(*ends)
        return Demonstration.of(demo, fields, where)

    def close(self) -> None:
        self._file.close()

    def _episodes(self, total: Any) -> dict[str, str]:
        """Names of the groups by those of the demonstrations, in the order of their numbers."""
        found = [match for name in entries(self._file) if (match := re.fullmatch(r"episode_(\d+)", name))]
        found.sort(key=lambda match: int(match[1]))
        if not found:
            raise InputError(f"{self.name} has no episodes: {MAIN} has no groups episode_<number>")
        if total is not None and total != len(found):
            raise InputError(
                f"{self.name}: {METADATA} says {total} episodes, {MAIN} has {len(found)}: copy it again"
            )
        return {f"demo_{match[1]}": match[0] for match in found}

    def _seed(self, demo: str) -> Any:
        return self._group(demo).attrs.get("seed")

    def _observed(self, stated: dict[str, str] | None) -> tuple[dict[str, str], list[str]]:
        """Paths of the observations by their keys, and lines on those that aren't read.

        Args:
            stated: types of spaces by path; ``None``: all that the first episode has are read.
        """
        first = self.demos[0]
        root = find(self._group(first), OBSERVATIONS)
        found = {OBSERVATIONS: root}
        if isinstance(root, h5py.Group):
            found = {f"{OBSERVATIONS}/{path}": each for path, each in datasets(root)}
        kinds = dict.fromkeys(found, "Box") if stated is None else stated
        paths, skipped = dict[str, str](), []
        for path, kind in kinds.items():
            key = path.removeprefix(f"{OBSERVATIONS}/").replace("/", ".")
            if key in paths:
                raise InputError(f"{self.name} has two observations that are called {key!r}: rename one")
            if kind != "Box":
                why: str | None = f"is of a {kind} space, which isn't read"
            elif path not in found:
                raise InputError(f"{self.name}: {first} has no {path}{nearest(path, found)}")
            else:
                why = _packed(found[path]) or unreadable(found[path])
            if why is None:
                paths[key] = path
            else:
                skipped.append(f"{self.name}: {first}/{path} {why}")
        return paths, skipped

    def _values(self, demo: str, path: str, length: int) -> NDArray[Any]:
        """All values of a dataset ``[length, ...]``, finite."""
        where = f"{self.name}: {demo}/{path}"
        values = numbers(self._dataset(demo, path), where)
        if len(values) != length:
            raise InputError(
                f"{where} has {len(values)} steps, {length} belong to its actions: write it anew"
            )
        require_finite(values, where, "leave the episode out, or repair the value")
        return values

    def _group(self, demo: str) -> h5py.Group:
        if demo not in self._groups:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        with reading(f"{self.name}: {demo}"):
            group = find(self._file, self._groups[demo])
            if not isinstance(group, h5py.Group):
                raise InputError(f"{self.name}: {self._groups[demo]} in {MAIN} isn't a group: copy it again")
            return group

    def _dataset(self, demo: str, path: str) -> h5py.Dataset:
        group = self._group(demo)
        with reading(f"{self.name}: {demo}/{path}"):
            found = find(group, path)
            if not isinstance(found, h5py.Dataset):
                raise InputError(f"{self.name}: {demo} has no {path}{nearest(path, entries(group))}")
            return found


def _metadata(folder: Path) -> dict[str, Any]:
    """What ``metadata.json`` says.

    Raises:
        InputError: it isn't there or damaged, or data are stored or actions made in a way that isn't read.
    """
    if not exists(folder / METADATA):
        raise InputError(f"{folder} has no {METADATA}, which Minari writes since 0.5: convert it there")
    path = contained(folder / METADATA, folder)
    require_regular(path, LARGEST_METADATA)
    with reading(str(path)):
        about = dict(json.loads(path.read_text(encoding="utf-8")))
        stored, acted = about.get("data_format", "hdf5"), _space(about, "action_space")
        kind = "Box" if acted is None else acted["type"]
    if stored != "hdf5":
        raise InputError(f"{folder}: its data are in {stored!r:.40}, hdf5 is read: convert it with Minari")
    if kind != "Box":
        raise InputError(f"{folder}: its actions are of a {kind!s:.40} space, vectors (Box) are read")
    return about


def _packed(found: h5py.Dataset | None) -> str | None:
    """Why a dataset's pictures can't be read, if they are JPEG files."""
    if found is None or h5py.check_vlen_dtype(found.dtype) != np.uint8:
        return None
    return "holds JPEG pictures, which aren't read: make it with jpeg_encoding=False"


def _space(about: dict[str, Any], name: str) -> dict[str, Any] | None:
    stated = about.get(name)
    return None if stated is None else dict(json.loads(stated))


def _parts(space: dict[str, Any], path: str = OBSERVATIONS) -> Iterator[tuple[str, str]]:
    """Paths of the spaces in a Dict, or of the space itself, and their types."""
    if space["type"] != "Dict":
        yield path, f"{space['type']:.40}"
        return
    for key, inner in space["subspaces"].items():
        yield from _parts(inner, f"{path}/{key}")


def _environment(spec: str | None, where: str) -> EnvArgs | None:
    """The environment that gymnasium's spec, as JSON, names."""
    if spec is None:
        return None
    stated = json.loads(spec)
    values = {"env_name": stated["id"], "type": GYM_TYPE, "env_kwargs": stated.get("kwargs")}
    return EnvArgs.parse(values, where)
