"""Demonstrations in zarr stores, in a form that robomimic files can be made from.

A store's fields are the observations and, under names of their own, a demonstration's other arrays.
Its attributes: ``env_args``; ``actions``, their kind; ``demos``, names by episode; ``masks``, names by
subset.  ``meta/model`` is each episode's scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, nearest
from ...files import write_new
from ..replay_buffer import ReplayBuffer
from .demonstration import Demonstration
from .env_args import EnvArgs

OTHERS = {"action": "actions", "poses": "poses", "states": "states", "rewards": "rewards", "dones": "dones"}
"""Fields that aren't observations, and the attributes of a ``Demonstration`` that they are."""
WIDE_POSE = 10
"""Numbers per arm of an absolute action in a store: position, two rows of the rotation, gripper."""


class StoreFile:
    """A ``Source`` that reads a zarr store.

    Args:
        path: of the store.
        env_args: of a store that has none in its attributes.

    Raises:
        InputError: the store doesn't exist, has no actions, or is damaged.
    """

    def __init__(self, path: str | Path, env_args: EnvArgs | None = None) -> None:
        self._buffer = ReplayBuffer.open(path)
        self.name = str(path)
        attributes = self._buffer.attributes
        if "env_args" in attributes:
            env_args = EnvArgs.parse(attributes["env_args"], self.name)
        self.env_args = env_args
        count = self._buffer.n_episodes
        names = [str(name) for name in attributes.get("demos", ())]
        # Episodes that were appended since are named by their index.
        self.demos = names[:count] + [f"demo_{index}" for index in range(len(names), count)]
        if len(set(self.demos)) != count:
            self.demos = [f"demo_{index}" for index in range(count)]
        masks = dict(attributes.get("masks", {}))
        self.masks = {str(key): [str(name) for name in values] for key, values in masks.items()}
        self.keys = [field for field in self._buffer.fields if field not in OTHERS]
        if "action" not in self._buffer.fields:
            raise InputError(f"{self.name} has no data/action: it isn't a store of demonstrations")
        self.kind = self._kind(attributes.get("actions"))

    def read(self, demo: str, keys: Sequence[str] | None = None) -> Demonstration:
        """See ``Source.read``."""
        if demo not in self.demos:
            raise InputError(f"{self.name} has no {demo}{nearest(demo, self.demos)}")
        index = self.demos.index(demo)
        for key in keys or ():
            if key not in self.keys:
                raise InputError(
                    f"{self.name} has no data/{key}{nearest(key, self.keys)}; choose obs_keys=[...]"
                )
        keys = self.keys if keys is None else keys
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
        width = self._buffer.read("action", 0, 1).shape[1]
        if width == WIDE_POSE * len(self.env_args.robots):
            return "absolute"
        return self.env_args.kind


def write_store(
    path: str | Path,
    demonstrations: Iterable[Demonstration],
    attributes: Mapping[str, Any],
) -> None:
    """Writes demonstrations to a new store, or leaves none; dtypes are kept.

    Raises:
        InputError: the path exists, or a demonstration can't be read or differs from the first in form.
    """

    def write(temporary: Path) -> None:
        buffer = ReplayBuffer.create(temporary, str(path), attributes)
        for demo in demonstrations:
            taken = set(demo.observations) & set(OTHERS)
            if taken:
                raise InputError(
                    f"{path}: an observation can't be called {sorted(taken)} in a store: leave it out"
                )
            others = {field: getattr(demo, attribute) for field, attribute in OTHERS.items()}
            fields = {field: np.asarray(v) for field, v in others.items() if v is not None}
            try:
                buffer.append(
                    {**demo.observations, **fields},
                    texts={} if demo.model is None else {"model": demo.model},
                )
            except InputError as error:
                raise InputError(f"{demo.name} isn't like those before it: {error}")

    write_new(Path(path), write)
