"""Demonstrations on disk, in diffusion_policy's layout.

::

    STORE.zarr/
      data/<field>        [n_steps, ...]   every episode's steps, one after the other
      meta/episode_ends   [n_episodes]     exclusive end of each episode in data/*
      meta/<text>         [n_bytes]        optional: a text per episode, one after the other, UTF-8
      meta/<text>_ends    [n_episodes]     exclusive end of each in meta/<text>

The store's attributes describe all of it, as the environment in which it was made.

zarr v2 stores (diffusion_policy's own) and stores in zip files are read too; new stores are zarr v3.

An append writes the steps and texts first and ``episode_ends`` last; of each array, the values first and
its length last.  zarr replaces every file as a whole, so an append that is interrupted anywhere leaves the
earlier episodes readable: what lies past the last end is an unfinished append, ignored by readers and
overwritten by the next one.  (Zeros at the tail of ``episode_ends`` are one of earlier versions.)

One writer at a time: it holds a lock of the folder until it is closed or freed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray

from ..errors import InputError, nearest, reading
from ..files import Closing, clear_unfinished, lock, write_atomically, write_new, writing
from .arrays import array_names, check_rows, open_array, open_group, read_rows, subgroup, write_rows

NAME = re.compile(r"[^./\\\0][^/\\\0]*")
"""A field's: that of a folder, which isn't hidden."""
Augment = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Makes another valid episode of an episode: same fields, same dtypes."""


class ReplayBuffer(Closing):
    """Episodes in a zarr group, in the layout above; made by ``ReplayBuffer.open`` or ``create``.

    Attributes:
        name: for error lines.
        episode_ends: ``[n_episodes]`` int64.
        unreadable: why, by the names of fields that aren't numbers per step, or can't be decoded.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        self.name = name
        self.attributes: dict[str, Any] = dict(group.attrs)
        """The description of the whole store."""
        with reading(name):
            data, meta = subgroup(group, "data"), subgroup(group, "meta")
        if data is None or meta is None or "episode_ends" not in array_names(meta):
            raise InputError(f"{name} has no data/ and meta/episode_ends: it isn't a diffusion_policy store")
        self._data, self._meta = data, meta
        self.episode_ends = self._read_ends()
        self._survey()
        self._release: Callable[[], object] = lambda: None

    @staticmethod
    def open(path: str | Path, mode: str = "r", name: str | None = None) -> ReplayBuffer:
        """Opens an existing store; ``mode`` is ``"r"``, or ``"r+"`` to append; ``name`` is for error lines.

        Raises:
            InputError: there is none, it isn't such a store, it is damaged, or another writer has it open.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(
                f"no demonstrations at {path}: put a diffusion_policy zarr store there, name another with "
                "dataset=PATH, record one with 'paradiffpolicy collect', or see 'paradiffpolicy download'"
            )
        group = open_group(path, mode)
        release = _lock_writer(path) if mode == "r+" else None
        try:
            buffer = ReplayBuffer(group, name or str(path))
        except BaseException:
            if release:
                release()
            raise
        if release:
            buffer._release = weakref.finalize(buffer, release)
        return buffer

    @staticmethod
    def create(
        store: Any, name: str | None = None, attributes: Mapping[str, Any] | None = None
    ) -> ReplayBuffer:
        """Creates an empty store, open to append; fields and texts appear with the first episode.

        Args:
            store: a path or zarr store.
            name: for error lines.
            attributes: describe the whole store; JSON values.

        Raises:
            InputError: something is there already.
        """
        attributes = _as_json(attributes)

        def write(place: Any) -> zarr.Group:
            group = zarr.open_group(place, mode="w-", zarr_format=3, attributes=attributes)
            group.create_group("data")
            write_rows(group.create_group("meta"), "episode_ends", 0, np.array([], dtype=np.int64))
            return group

        if not isinstance(store, str | Path):
            return ReplayBuffer(write(store), name or str(store))
        if Path(store).exists():
            raise InputError(f"{store} exists: choose another path, or append to it")
        write_new(Path(store), write)
        return ReplayBuffer.open(store, "r+", name)

    @staticmethod
    def require_new(name: str, episode: Mapping[str, NDArray[Any]]) -> None:
        """Raises ``InputError`` where a new store of that name would refuse an episode."""
        ReplayBuffer.create(zarr.storage.MemoryStore(), name).check(episode)

    def close(self) -> None:
        """Lets others write to the store."""
        self._release()

    @property
    def n_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def n_steps(self) -> int:
        return int(self.episode_ends[-1]) if self.n_episodes else 0

    @property
    def fields(self) -> list[str]:
        return list(self._arrays)

    @property
    def texts(self) -> list[str]:
        """Names of the texts that every episode has."""
        names = array_names(self._meta) if self.n_episodes else []
        # An interrupted append may have left texts that no episode has.
        return [name for name in names if f"{name}_ends" in names and self._has_texts(name)]

    def text(self, name: str, index: int) -> str:
        """A text of one episode.

        Raises:
            InputError: the text doesn't exist, or can't be decoded.
        """
        if name not in self.texts:
            raise InputError(f"{self.name} has no meta/{name}{nearest(name, self.texts)}")
        ends = [0, *self._read_meta(f"{name}_ends", max(0, index - 1), index + 1)]
        content = self._read_meta(name, int(ends[-2]), int(ends[-1]))
        with reading(f"{self.name}: meta/{name}"):
            return content.astype(np.uint8).tobytes().decode()

    def shape(self, field: str) -> tuple[int, ...]:
        """The shape of one step of a field.

        Raises:
            InputError: the field doesn't exist.
        """
        return tuple(self._array(field).shape[1:])

    def read(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Steps ``start … stop`` (all by default) of one field, ``[n, ...]``.

        Raises:
            InputError: the field doesn't exist, is shorter than ``episode_ends`` says, lacks a chunk, can't
                be decoded, or holds NaN or infinity.
        """
        array, where = self._whole_array(field), f"{self.name}: data/{field}"
        stop = self.n_steps if stop is None else min(stop, self.n_steps)
        values = read_rows(array, start, stop, where)
        require_finite(values, where, "remove that episode or repair the value", start)
        return values

    def require_whole(self, field: str) -> None:
        """Raises ``InputError`` where ``read`` would miss a chunk of a field; reads none."""
        check_rows(self._whole_array(field), 0, self.n_steps, f"{self.name}: data/{field}")

    def episode(self, index: int, fields: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """The fields (all by default) of one episode, ``[length, ...]`` each."""
        start = int(self.episode_ends[index - 1]) if index else 0
        stop = int(self.episode_ends[index])
        return {field: self.read(field, start, stop) for field in fields or self.fields}

    def append(self, episode: Mapping[str, NDArray[Any]], texts: Mapping[str, str] | None = None) -> None:
        """Adds one episode; all fields ``[length, ...]``, the same fields, dtypes and texts every time.

        Raises:
            InputError: the lengths differ, the episode is empty, the fields, their shapes or dtypes, or the
                texts' names aren't the store's, the store's last steps can't be read, or the disk is full.
        """
        texts = texts or {}
        self.check(episode, texts)
        last = self.n_episodes - 1
        if self.n_episodes:  # what new steps are written beside, in the same chunks, must be there
            starts = {name: int(self._read_meta(f"{name}_ends", last, last + 1)[0]) for name in texts}
            for field in self.fields:
                self.read(field, self.n_steps - 1)
            for name, start in starts.items():
                self._read_meta(name, max(0, start - 1), start)
        else:
            starts = dict.fromkeys(texts, 0)
        end = np.array([self.n_steps + len(next(iter(episode.values())))])
        with writing(Path(self.name)):
            for field, values in episode.items():
                write_rows(self._data, field, self.n_steps, values)
            for name, text in texts.items():
                content = np.frombuffer(text.encode(), dtype=np.uint8)
                write_rows(self._meta, name, starts[name], content)
                write_rows(self._meta, f"{name}_ends", last + 1, np.array([starts[name] + len(content)]))
            write_rows(self._meta, "episode_ends", last + 1, end)
        self.episode_ends = np.append(self.episode_ends, end)
        self._survey()

    def check(self, episode: Mapping[str, NDArray[Any]], texts: Iterable[str] = ()) -> None:
        """Raises ``InputError`` where ``append`` would refuse the episode's fields, shapes or dtypes, or the
        names of its texts."""
        lengths = {field: len(values) for field, values in episode.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InputError(f"{self.name}: an episode's fields must have one length above 0, got {lengths}")
        if self.n_episodes and set(episode) != {*self.fields, *self.unreadable}:
            known = sorted({*self.fields, *self.unreadable})
            raise InputError(f"{self.name} has fields {known}, the episode has {sorted(episode)}")
        if self.n_episodes and set(texts) != set(self.texts):
            raise InputError(f"{self.name} has texts {self.texts}, the episode has {sorted(texts)}")
        for field, values in episode.items():
            if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
                raise InputError(f"{self.name}: data/{field} can't be {values.dtype}, it must be numbers")
            require_finite(values, f"the episode's {field}", "leave the episode out")
            if field not in self.fields and field not in self.unreadable:
                if not NAME.fullmatch(field) or field == "zarr.json" or len(field.encode()) > 200:
                    raise InputError(f"{self.name}: a field can't be called {field[:40]!r}: rename it")
                continue
            array = self._array(field)
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
        if field in self.unreadable:
            raise InputError(str(self.unreadable[field]))
        if field not in self._arrays:
            raise InputError(f"{self.name} has no data/{field}{nearest(field, self.fields)}")
        return self._arrays[field]

    def _whole_array(self, field: str) -> Any:
        array = self._array(field)
        if array.shape[0] < self.n_steps:
            raise InputError(
                f"{self.name}: data/{field} has {array.shape[0]} steps but meta/episode_ends needs "
                f"{self.n_steps}: the store is truncated, copy it again"
            )
        return array

    def _survey(self) -> None:
        """Opens every field."""
        self._arrays: dict[str, Any] = {}
        self.unreadable: dict[str, InputError] = {}
        for field in array_names(self._data):
            try:
                self._arrays[field] = open_array(self._data, field, f"{self.name}: data/{field}")
            except InputError as error:
                self.unreadable[field] = error

    def _read_meta(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Whole numbers of an array in meta/."""
        where = f"{self.name}: meta/{name}"
        array = open_array(self._meta, name, where)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"{where} is {array.dtype} {array.shape}: it must be a row of whole numbers")
        stop = array.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= array.shape[0]:
            raise InputError(f"{where} has no entries {start} to {stop}: the store is damaged, copy it again")
        return read_rows(array, start, stop, where)

    def _has_texts(self, name: str) -> bool:
        ends = open_array(self._meta, f"{name}_ends", f"{self.name}: meta/{name}_ends")
        return bool(self.n_episodes <= ends.shape[0])

    def _read_ends(self) -> NDArray[np.int64]:
        ends = self._read_meta("episode_ends").astype(np.int64)
        ends = np.trim_zeros(ends, "b")  # an append that was interrupted before its end was written
        rises = np.diff(ends, prepend=0) > 0
        if not rises.all():
            bad = int(np.argmin(rises))
            raise InputError(
                f"{self.name}: meta/episode_ends must rise, but entry {bad} is {ends[bad]}: rebuild the store"
            )
        return ends


def _lock_writer(path: Path) -> Callable[[], None]:
    """Takes a store's lock, and removes what killed writers left beside and in it; returns what releases it.

    Raises:
        InputError: another writer has it.
    """
    try:
        held = lock(path)
    except OSError:  # a file system without locks
        return lambda: None
    if held is None:
        raise InputError(f"{path} is being written to: wait for that writer, or name another store")
    for folder in (path.parent, path, path / "data", path / "meta"):
        clear_unfinished(folder)
    for left in path.rglob("*.partial"):
        if re.search(r"\.[0-9a-f]{32}\.partial$", left.name):
            left.unlink(missing_ok=True)
    (path / ".zmetadata").unlink(missing_ok=True)
    for metadata in (path / group / "zarr.json" for group in ("", "data", "meta")):
        _drop_consolidated(metadata)
    return functools.partial(os.close, held)


def _drop_consolidated(metadata: Path) -> None:
    """Removes a copy of all metadata, which appending would make stale."""
    with reading(str(metadata)):
        content = dict(json.loads(metadata.read_text())) if metadata.is_file() else {}
    if content.pop("consolidated_metadata", None):
        write_atomically(metadata, lambda temporary: temporary.write_text(json.dumps(content)))


def augmented(buffer: ReplayBuffer, augment: Augment, fields: Collection[str]) -> ReplayBuffer:
    """Copies the named fields of every episode into memory, each followed by its augmented twin."""
    episodes = (buffer.episode(index, fields) for index in range(buffer.n_episodes))
    both = (twin for episode in episodes for twin in (episode, augment(episode)))
    return in_memory(both, f"{buffer.name}, augmented")


def in_memory(episodes: Iterable[Mapping[str, NDArray[Any]]], name: str) -> ReplayBuffer:
    """A store in memory with the episodes; ``name`` is for error lines.

    Raises:
        InputError: an episode can't be read, or differs from the first in form.
    """
    buffer = ReplayBuffer.create(zarr.storage.MemoryStore(), name)
    for episode in episodes:
        buffer.append(episode)
    return buffer


def _as_json(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Raises ``InputError`` for values that JSON doesn't have, before anything is written."""
    try:
        return dict(json.loads(json.dumps(dict(attributes or {}))))
    except (TypeError, ValueError) as error:
        raise InputError(f"a store's attributes must be JSON's ({error})")


def require_finite(values: NDArray[Any], where: str, remedy: str, first_step: int = 0) -> None:
    """Raises ``InputError`` that names the first step of ``[N, ...]`` with NaN or infinity."""
    if np.issubdtype(values.dtype, np.floating):
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            step = first_step + int(np.argmin(finite))
            raise InputError(f"{where} has NaN or infinity at step {step}: {remedy}")
