"""Surveys demonstrations: ranges, starts and a sample of the steps, one episode in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

Array = NDArray[np.float64]

MIN_RANGE = 1e-4
"""Dimensions of a smaller range are only centred by ``Normalizer.fit``."""
SAMPLED_STEPS = 20_000
"""Of so many steps, at most twice as many, quantiles are computed."""
FEW_VALUES = 16
"""A dimension with no more distinct values has states: it may jump between them."""
SHARE, FEW_EPISODES = 0.1, 2
"""Of the episodes, and at least so many, a finding is in at most."""


class Episodes(Protocol):
    """Episodes that are read one at a time."""

    @property
    def lengths(self) -> list[int]:
        """Steps of every episode."""
        ...

    def read(self, index: int) -> Mapping[str, NDArray[Any]]:
        """The inspected fields ``[length, ...]`` of one episode, the same fields every time."""
        ...


@dataclass(frozen=True)
class Column:
    """A dimension of a field."""

    field: str
    index: int

    def __str__(self) -> str:
        return f"{self.field}[{self.index}]"


def matrix(episode: Mapping[str, NDArray[Any]]) -> Array:
    """The fields of an episode side by side, ``[length, D]``."""
    columns = [np.asarray(values, dtype=np.float64).reshape(len(values), -1) for values in episode.values()]
    return np.concatenate(columns, axis=1)


class Survey:
    """The first pass."""

    def __init__(self, source: Episodes) -> None:
        self.source, self.lengths = source, [int(length) for length in source.lengths]
        if not self.lengths:
            raise InputError("there are no episodes to inspect: record some with 'paradiffpolicy collect'")
        first = source.read(0)
        sizes = {name: int(np.prod(np.shape(values)[1:])) for name, values in first.items()}
        self.columns = [Column(name, k) for name, size in sizes.items() for k in range(size)]
        if not self.columns:
            raise InputError("the episodes have no field of vectors to inspect")
        digits = {name: np.finfo(v.dtype).eps if v.dtype.kind == "f" else 0.0 for name, v in first.items()}
        self.eps = np.array([digits[column.field] for column in self.columns])
        ends = np.cumsum(list(sizes.values())).tolist()
        self.quaternions = [
            slice(end - 4, end) for end, n in zip(ends, sizes.values(), strict=True) if n == 4
        ]
        n = len(self.columns)
        self.low, self.high = np.full(n, np.inf), np.full(n, -np.inf)
        self.starts, self.ranges = np.zeros((len(self.lengths), n)), np.zeros((len(self.lengths), n))
        stride, offset = max(1, sum(self.lengths) // SAMPLED_STEPS), 0
        sample, moves = [], []
        for index, values in self.episodes():
            low, high = values.min(axis=0), values.max(axis=0)
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            self.starts[index], self.ranges[index] = values[0], high - low
            chosen = np.arange(-offset % stride, len(values), stride)
            sample.append(values[chosen])
            moves.append(np.abs(values[chosen[chosen > 0]] - values[chosen[chosen > 0] - 1]))
            offset += len(values)
        self.sample = np.concatenate(sample)
        self.middle = np.median(self.sample, axis=0)
        # Of few steps, one that is far off isn't among these.
        self.q01 = np.quantile(self.sample, 0.01, axis=0, method="higher")
        self.q99 = np.quantile(self.sample, 0.99, axis=0, method="lower")
        self.span = self.q99 - self.q01
        steps = np.concatenate(moves)
        self.move = np.quantile(steps, 0.99, axis=0) if len(steps) else np.zeros(n)
        self.discrete = np.array([len(np.unique(values)) <= FEW_VALUES for values in self.sample.T])
        self.still = self.high - self.low < MIN_RANGE
        self.quaternions = [part for part in self.quaternions if self._is_rotation(part)]

    def episodes(self) -> Iterator[tuple[int, Array]]:
        """Every episode's steps ``[length, D]``."""
        for index in range(len(self.lengths)):
            values = matrix(self.source.read(index))
            if len(values):
                yield index, values

    def limit(self) -> int:
        """In more episodes than these, nothing is unusual."""
        return max(FEW_EPISODES, int(SHARE * len(self.lengths)))

    def _is_rotation(self, part: slice) -> bool:
        norms = np.linalg.norm(self.sample[:, part], axis=1)
        return bool(np.abs(norms - 1).max() < 1e-2)
