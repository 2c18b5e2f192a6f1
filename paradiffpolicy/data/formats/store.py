"""Demonstrations in zarr stores, in a form that robomimic files can be made from.

A store's fields are the observations and, under names of their own, a demonstration's other arrays.
Its attributes: ``env_args``; ``control_hz``; ``actions``, their kind; ``demos``, names by episode;
``masks``, names by subset.  ``meta/model`` is each episode's scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, is_number, nearest
from ...files import write_new
from ..arrays import NotNumbersError
from ..replay_buffer import ReplayBuffer
from .demonstration import OTHERS, About, Demonstration, fields_of
from .env_args import EnvArgs

SUFFIXES = (".zarr",)
WIDE_POSE = 10
"""Numbers per arm of an absolute action in a store: position, two rows of the rotation, gripper."""


def recognises(path: Path) -> bool:
    """Whether a path may be a store: a folder, or a zip file."""
    return path.is_dir() or path.suffix == ".zip"


def open_source(path: Path, env_args: EnvArgs | None = None) -> StoreFile:
    """See ``StoreFile``."""
    return StoreFile(path, env_args)


class StoreFile:
    """A ``Source`` that reads a zarr store.

    Args:
        path: of the store.
        env_args: of a store that has none in its attributes.

    Raises:
        InputError: the store doesn't exist, has no actions, or is damaged.
    """

    cameras: Mapping[str, tuple[int, int, int]] = {}

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self._buffer = ReplayBuffer.open(path)
        self.name = str(path)
        attributes = self._buffer.attributes
        if "env_args" in attributes:
            env_args = EnvArgs.parse(attributes["env_args"], self.name)
        self.env_args = env_args
        count = self._buffer.n_episodes
        if not count:
            raise InputError(f"{self.name} has no episodes yet: record some with 'paradiffpolicy collect'")
        names = _names(attributes.get("demos", []), f"{self.name}: attribute demos")
        # Episodes that were appended since are named by their index.
        self.demos = names[:count] + [f"demo_{index}" for index in range(len(names), count)]
        if len(set(self.demos)) != count:
            self.demos = [f"demo_{index}" for index in range(count)]
        self.masks = stated_masks(attributes, self.name)
        unreadable = self._buffer.unreadable
        known = sorted({*self._buffer.fields, *unreadable})
        others = {field for field, why in unreadable.items() if isinstance(why, NotNumbersError)}
        self.skipped = [str(unreadable[field]) for field in sorted(others)]
        self.keys = [field for field in known if field not in OTHERS and field not in others]
        if "action" not in known:
            raise InputError(f"{self.name} has no data/action: it isn't a store of demonstrations")
        if len(self._buffer.shape("action")) != 1 or not self._buffer.shape("action")[0]:
            raise InputError(
                f"{self.name}: data/action is {self._buffer.shape('action')} per step, it must be a vector"
            )
        self.kind = self._kind(attributes.get("actions"))
        if self.env_args is not None:
            wide = WIDE_POSE * len(self.env_args.robots)
            self.env_args.require_width(self._buffer.shape("action")[0], f"{self.name}: data/action", wide)

    @property
    def control_hz(self) -> float | None:
        stated = self._buffer.attributes.get("control_hz")
        if is_number(stated) and stated > 0:
            return float(stated)
        return self.env_args.control_hz if self.env_args else None

    def length(self, demo: str) -> int:
        """See ``Source.length``."""
        ends = [0, *self._buffer.episode_ends.tolist()]
        index = self.demos.index(demo)
        return int(ends[index + 1] - ends[index])

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        if demo not in self.demos:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        index = self.demos.index(demo)
        keys = self.keys if keys is None else keys
        for key in keys:
            if key not in self.keys:
                raise InputError(
                    f"{self.name} has no data/{key}{nearest(key, self.keys)}; choose obs_keys=[...]"
                )
            if key in self._buffer.unreadable:
                raise InputError(f"{self._buffer.unreadable[key]}; or choose obs_keys=[...] without it")
        others = [field for field in OTHERS if field in self._buffer.fields]
        values = self._buffer.episode(index, [*keys, *others])
        return Demonstration(
            name=demo,
            observations={key: values[key] for key in keys},
            model=self._buffer.text("model", index) if "model" in self._buffer.texts else None,
            **{OTHERS[field]: values[field] for field in others},
        )

    def close(self) -> None:
        """Does nothing: a store isn't kept open."""

    def _kind(self, stated: Any) -> str | None:
        """The actions' kind: as the store's attributes state it, else by the actions' width."""
        if stated is not None or self.env_args is None or not self.env_args.is_robosuite:
            return stated if stated in ("absolute", "delta", "recorded") else None
        if self._buffer.shape("action")[0] == WIDE_POSE * len(self.env_args.robots):
            return "absolute"
        return self.env_args.kind


def stated_masks(attributes: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Names of demonstrations by subset, as a store's attributes state them.

    Raises:
        InputError: they aren't names.
    """
    masks = attributes.get("masks", {})
    if not isinstance(masks, dict):
        raise InputError(f"{where}: attribute masks must be lists of names: correct it in the store")
    return {key: _names(names, f"{where}: attribute masks, {key}") for key, names in masks.items()}


def _names(stated: Any, what: str) -> list[str]:
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise InputError(f"{what} must be a list of names: correct it in the store")
    return stated


def write(path: Path, demonstrations: Iterable[Demonstration], about: About) -> None:
    """As ``write_store``, with attributes that tell of the dataset."""
    known = {"env_args": about.env_args and about.env_args.to_dict(), "control_hz": about.control_hz}
    attributes = {"actions": about.actions, "demos": list(about.demos), "masks": dict(about.masks)}
    told = {key: value for key, value in known.items() if value is not None}
    write_store(path, demonstrations, {**told, **attributes})


def write_store(
    path: str | Path,
    demonstrations: Iterable[Demonstration],
    attributes: Mapping[str, Any],
) -> None:
    """Writes demonstrations to a new store, or leaves none; dtypes are the first demonstration's.

    Raises:
        InputError: the path exists, or a demonstration can't be read or differs from the first in form.
    """

    def write(temporary: Path) -> None:
        buffer, dtypes = ReplayBuffer.create(temporary, str(path), attributes), dict[str, np.dtype[Any]]()
        for demo in demonstrations:
            episode = fields_of(demo, str(path))
            dtypes = dtypes or {field: values.dtype for field, values in episode.items()}
            episode = {field: _as(dtypes.get(field), values) for field, values in episode.items()}
            texts = {} if demo.model is None else {"model": demo.model}
            try:
                buffer.check(episode, texts)
            except InputError as error:
                new = "can't be in a store" if not buffer.n_episodes else "isn't like those before it"
                raise InputError(f"{demo.name} {new}: {error}")
            buffer.append(episode, texts)

    write_new(Path(path), write)


def _as(dtype: np.dtype[Any] | None, values: NDArray[Any]) -> NDArray[Any]:
    """The same values in another dtype, if it can hold them; else as they are."""
    if dtype is None or dtype == values.dtype:
        return values
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
    return cast if np.array_equal(cast, values) else values
