"""Demonstrations on disk, in diffusion_policy's layout.

::

    STORE.zarr/
      data/<field>        [n_steps, ...]   every episode's steps, one after the other
      meta/episode_ends   [n_episodes]     exclusive end of each episode in data/*
      meta/<text>         [n_bytes]        optional: a text per episode, one after the other, UTF-8
      meta/<text>_ends    [n_episodes]     exclusive end of each in meta/<text>

The store's attributes describe all of it, as the environment in which it was made.

zarr v2 stores (diffusion_policy's own) are read too; new stores are zarr v3.

An append writes the steps and texts first and ``episode_ends`` last.  zarr replaces every file as a
whole, so an append that is interrupted anywhere leaves the earlier episodes readable: steps past the last
end, and zeros at the tail of ``episode_ends`` (its length grows before its values arrive), are an
unfinished append, ignored by readers and overwritten by the next one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray

from ..errors import InputError, first_line, nearest, reading

CHUNK_BYTES = 2**20
ENDS_PER_CHUNK = 4096

Augment = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Makes another valid episode of an episode: same fields, same dtypes."""


class ReplayBuffer:
    """Episodes in a zarr group, in the layout above; made by ``ReplayBuffer.open`` or ``create``.

    Attributes:
        name: for error lines.
        episode_ends: ``[n_episodes]`` int64.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        self._group = group
        self.name = name
        self.episode_ends = _episode_ends(group, name)

    @staticmethod
    def open(path: str | Path, mode: str = "r") -> ReplayBuffer:
        """Opens an existing store; ``mode`` is ``"r"``, or ``"r+"`` to append.

        Raises:
            InputError: there is none, it isn't such a store, or it is damaged.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"no demonstrations at {path}: put a diffusion_policy zarr store there, name another with "
                "dataset=PATH, or record one with 'paradiffpolicy collect'"
            )
        try:
            return ReplayBuffer(zarr.open_group(path, mode=mode), str(path))  # type: ignore[arg-type]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path} is not a zarr group ({first_line(error)}): name the .zarr folder itself"
            )

    @staticmethod
    def create(
        store: Any, name: str | None = None, attributes: Mapping[str, Any] | None = None
    ) -> ReplayBuffer:
        """Creates an empty store; fields and texts appear with the first episode.

        Args:
            store: a path or zarr store.
            name: for error lines.
            attributes: describe the whole store; JSON values.

        Raises:
            InputError: something is there already.
        """
        if isinstance(store, str | Path) and Path(store).exists():
            raise InputError(f"{store} exists: choose another path, or append to it")
        group = zarr.open_group(store, mode="w-", zarr_format=3, attributes=_as_json(attributes))
        group.create_group("data")
        _write(group.create_group("meta"), "episode_ends", 0, np.array([], dtype=np.int64))
        return ReplayBuffer(group, name or str(store))

    @property
    def n_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def n_steps(self) -> int:
        return int(self.episode_ends[-1]) if self.n_episodes else 0

    @property
    def attributes(self) -> dict[str, Any]:
        """The description of the whole store."""
        return dict(self._group.attrs)

    @property
    def texts(self) -> list[str]:
        """Names of the texts that every episode has."""
        meta: Any = self._group["meta"]
        names = [name for name in meta.array_keys() if f"{name}_ends" in meta]
        # An interrupted append may have left texts that no episode has.
        return sorted(name for name in names if 0 < self.n_episodes <= meta[f"{name}_ends"].shape[0])

    def text(self, name: str, index: int) -> str:
        """A text of one episode.

        Raises:
            InputError: the text doesn't exist, or can't be decoded.
        """
        if name not in self.texts:
            raise InputError(f"{self.name} has no meta/{name}{nearest(name, self.texts)}")
        meta: Any = self._group["meta"]
        with reading(f"{self.name}: meta/{name}"):
            ends = np.asarray(meta[f"{name}_ends"][max(0, index - 1) : index + 1])
            start = int(ends[0]) if index else 0
            content = np.asarray(meta[name][start : int(ends[-1])])
            if len(content) != ends[-1] - start:
                raise ValueError("it is shorter than its ends say")
            return content.tobytes().decode()

    @property
    def fields(self) -> list[str]:
        return sorted(self._data().array_keys())

    def shape(self, field: str) -> tuple[int, ...]:
        """The shape of one step of a field.

        Raises:
            InputError: the field doesn't exist.
        """
        return tuple(self._array(field).shape[1:])

    def read(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Steps ``start … stop`` (all by default) of one field, ``[n, ...]``.

        Raises:
            InputError: the field doesn't exist, is shorter than ``episode_ends`` says, can't be
                decoded, or holds NaN or infinity.
        """
        array = self._array(field)
        if array.shape[0] < self.n_steps:
            raise InputError(
                f"{self.name}: data/{field} has {array.shape[0]} steps but meta/episode_ends needs "
                f"{self.n_steps}: the store is truncated, copy it again"
            )
        stop = self.n_steps if stop is None else min(stop, self.n_steps)
        where = f"{self.name}: data/{field}"
        with reading(where):
            values = np.asarray(array[start:stop])
        require_finite(values, where, "remove that episode or repair the value", start)
        return values

    def episode(self, index: int, fields: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """The fields (all by default) of one episode, ``[length, ...]`` each."""
        start = int(self.episode_ends[index - 1]) if index else 0
        stop = int(self.episode_ends[index])
        return {field: self.read(field, start, stop) for field in fields or self.fields}

    def append(self, episode: Mapping[str, NDArray[Any]], texts: Mapping[str, str] | None = None) -> None:
        """Adds one episode; all fields ``[length, ...]``, the same fields, dtypes and texts every time.

        Raises:
            InputError: the lengths differ, the episode is empty, or the fields, their shapes or
                dtypes, or the texts' names aren't the store's.
        """
        texts = texts or {}
        self.check(episode)
        if self.n_episodes and set(texts) != set(self.texts):
            raise InputError(f"{self.name} has texts {self.texts}, the episode has {sorted(texts)}")
        meta: Any = self._group["meta"]
        for field, values in episode.items():
            _write(self._data(), field, self.n_steps, values)
        for name, text in texts.items():
            start = int(meta[f"{name}_ends"][self.n_episodes - 1]) if self.n_episodes else 0
            content = np.frombuffer(text.encode(), dtype=np.uint8)
            _write(meta, name, start, content)
            _write(meta, f"{name}_ends", self.n_episodes, np.array([start + len(content)]))
        end = np.array([self.n_steps + len(next(iter(episode.values())))])
        _write(meta, "episode_ends", self.n_episodes, end)
        self.episode_ends = np.append(self.episode_ends, end)

    def check(self, episode: Mapping[str, NDArray[Any]]) -> None:
        """Raises ``InputError`` where ``append`` would refuse the episode's fields, shapes or dtypes."""
        lengths = {field: len(values) for field, values in episode.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InputError(f"{self.name}: an episode's fields must have one length above 0, got {lengths}")
        if self.n_episodes and set(episode) != set(self.fields):
            raise InputError(f"{self.name} has fields {self.fields}, the episode has {sorted(episode)}")
        data = self._data()
        for field, values in episode.items():
            if field not in data:
                continue
            array = data[field]
            if array.shape[1:] != values.shape[1:] or array.dtype != values.dtype:
                raise InputError(
                    f"{self.name}: data/{field} is {array.dtype} {array.shape[1:]} per step, "
                    f"the episode has {values.dtype} {values.shape[1:]}"
                )

    def fingerprint(self, fields: list[str]) -> str:
        """SHA-256 over the episode ends and the named fields' values: identifies the data."""
        digest = hashlib.sha256(self.episode_ends.tobytes())
        for field in sorted(fields):
            digest.update(field.encode())
            digest.update(np.ascontiguousarray(self.read(field)).tobytes())
        return digest.hexdigest()

    def _array(self, field: str) -> Any:
        if field not in self.fields:
            raise InputError(f"{self.name} has no data/{field}{nearest(field, self.fields)}")
        return self._data()[field]

    def _data(self) -> Any:
        return self._group["data"]


def augmented(buffer: ReplayBuffer, augment: Augment, fields: Collection[str]) -> ReplayBuffer:
    """Copies the named fields of every episode into memory, each followed by its augmented twin."""
    both = ReplayBuffer.create(zarr.storage.MemoryStore(), f"{buffer.name}, augmented")
    for index in range(buffer.n_episodes):
        episode = buffer.episode(index, fields)
        both.append(episode)
        both.append(augment(episode))
    return both


def _write(group: Any, name: str, start: int, values: NDArray[Any]) -> None:
    """Writes values from index ``start`` on, where the array then ends; makes the array if there is none."""
    shape = values.shape[1:]
    if name not in group:
        row_bytes = max(1, values.dtype.itemsize * math.prod(shape))
        rows = ENDS_PER_CHUNK if name.endswith("_ends") else max(1, CHUNK_BYTES // row_bytes)
        group.create_array(name, shape=(0, *shape), chunks=(rows, *shape), dtype=values.dtype)
    array = group[name]
    array.resize((start + len(values), *shape))
    array[start:] = values


def _episode_ends(group: zarr.Group, name: str) -> NDArray[np.int64]:
    with reading(f"{name}: meta/episode_ends"):
        if "meta/episode_ends" not in group or "data" not in group:
            raise InputError(f"{name} has no data/ and meta/episode_ends: it isn't a diffusion_policy store")
        stored: Any = group["meta/episode_ends"]
        ends = np.asarray(stored[:], dtype=np.int64)
    ends = np.trim_zeros(ends, "b")  # an append that was interrupted before its end was written
    rises = np.diff(ends, prepend=0) > 0
    if not rises.all():
        bad = int(np.argmin(rises))
        raise InputError(
            f"{name}: meta/episode_ends must rise, but entry {bad} is {ends[bad]}: rebuild the store"
        )
    return ends


def _as_json(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Raises ``InputError`` for values that JSON doesn't have, before anything is written."""
    try:
        return dict(json.loads(json.dumps(dict(attributes or {}))))
    except (TypeError, ValueError) as error:
        raise InputError(f"a store's attributes must be JSON's ({error})")


def require_finite(values: NDArray[Any], where: str, remedy: str, first_step: int = 0) -> None:
    """Raises ``InputError`` that names the first step of ``[N, ...]`` with NaN or infinity."""
    if np.issubdtype(values.dtype, np.floating):
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            step = first_step + int(np.argmin(finite))
            raise InputError(f"{where} has NaN or infinity at step {step}: {remedy}")
