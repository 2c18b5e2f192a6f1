"""Says what in a dataset is unusual, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError
from ..files import write_atomically
from ..tables import pairs, table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from ..data.formats.demonstration import Source
    from ..data.formats.robomimic import RobomimicFile
    from ..data.inspection import Finding
    from ..data.replay_buffer import ReplayBuffer
    from ..data.survey import Episodes

LARGEST_FIELD = 64
"""Numbers per step of a field that is inspected: others are pictures, or a simulator's."""
NOT_INSPECTED = {"rewards", "reward", "dones", "done", "success", "states", "terminated", "truncated"}
"""Fields that no policy observes."""
MOST_ROWS = 20
"""Of findings in a table."""


def inspected(path: Path, picture: Path | None) -> list[Table]:
    """Tables of what is unusual in a dataset; none where there is nothing to inspect.

    Args:
        picture: where to draw it, as PNG; None: nowhere.
    """
    with _opened(path) as episodes:
        if not episodes.lengths or not episodes.fields:
            return []
        try:
            return _inspected(path, episodes, picture)
        except InputError as error:
            return [pairs("", {"not inspected": error})]


def _inspected(path: Path, episodes: _Inspected, picture: Path | None) -> list[Table]:
    from ..data.inspection import inspect

    with _shown(episodes) as source:
        inspection = inspect(source)
    rows = [_row(finding) for finding in inspection.findings[:MOST_ROWS]]
    rest = len(inspection.findings) - MOST_ROWS
    if rest > 0:
        rows.append({**dict.fromkeys(rows[0], ""), "unusual": f"… {rest} more"})
    nothing = f"nothing, in {len(inspection.columns)} dimensions of {', '.join(episodes.fields)}"
    views = [table("", rows, left=tuple(rows[0])) if rows else pairs("", {"unusual": nothing})]
    if picture is not None:
        from ..telemetry.demonstrations import demonstrations

        steps = int(inspection.lengths.sum())
        title = f"{path.name}: {len(inspection.lengths)} episodes, {steps} steps"
        figure = demonstrations(episodes, inspection, title)
        write_atomically(picture, partial(figure.savefig, format="png"))
        views.append(pairs("", {"picture": picture}))
    return views


def _row(finding: Finding) -> dict[str, object]:
    episodes = finding.episodes
    named = ", ".join(map(str, episodes[:3])) + (
        f" and {len(episodes) - 3} more" if len(episodes) > 3 else ""
    )
    return {
        "unusual": finding.kind,
        "where": finding.column or "length",
        "found": finding.found,
        "episodes": named,
        "remedy": finding.remedy,
    }


class _Store:
    """Episodes of a zarr store."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        ends = buffer.episode_ends.tolist()
        self.buffer, self.lengths = (
            buffer,
            [end - start for start, end in zip([0, *ends], ends, strict=False)],
        )
        self.fields = [name for name in buffer.fields if _is_inspected(name, buffer.shape(name))]

    def read(self, index: int) -> Mapping[str, NDArray[Any]]:
        return self.buffer.episode(index, self.fields)


class _Demos:
    """Episodes of a robomimic file: the fields that every demonstration has."""

    def __init__(self, file: RobomimicFile) -> None:
        self.file, self.lengths = file, [file.length(demo) for demo in file.demos]
        known = [{name for name, why in file.fields(demo).items() if why is None} for demo in file.demos]
        common = sorted(set.intersection(*known)) if known else []
        self.fields = [
            name
            for name in common
            if not name.startswith("next_obs/") and _is_inspected(name, self._values(0, name).shape[1:])
        ]

    def read(self, index: int) -> Mapping[str, NDArray[Any]]:
        return {name: self._values(index, name) for name in self.fields}

    def _values(self, index: int, name: str) -> NDArray[Any]:
        return self.file.values(self.file.demos[index], name)


class _Demonstrations:
    """Episodes of a dataset of another format."""

    def __init__(self, source: Source) -> None:
        from ..data.formats.demonstration import numbers_of

        self.source, self.lengths = source, [source.length(demo) for demo in source.demos]
        first = source.read(source.demos[0], numbers_of(source)).observations
        self.keys = [name for name, values in first.items() if _is_inspected(name, values.shape[1:])]
        self.fields = [*self.keys, "action"]

    def read(self, index: int) -> Mapping[str, NDArray[Any]]:
        demo = self.source.read(self.source.demos[index], self.keys)
        return {**demo.observations, "action": demo.actions}


def _is_inspected(name: str, shape: Sequence[int]) -> bool:
    return name not in NOT_INSPECTED and len(shape) < 3 and 0 < math.prod(shape) <= LARGEST_FIELD


_Inspected: TypeAlias = "_Store | _Demos | _Demonstrations"


@contextmanager
def _opened(path: Path) -> Iterator[_Inspected]:
    from ..data.formats.reading import format_of, open_source
    from ..data.formats.robomimic import RobomimicFile
    from ..data.replay_buffer import ReplayBuffer

    if format_of(path) == "zarr":  # also one without actions
        with ReplayBuffer.open(path) as buffer:
            yield _Store(buffer)
        return
    with closing(open_source(path)) as source:
        yield _Demos(source) if isinstance(source, RobomimicFile) else _Demonstrations(source)


@contextmanager
def _shown(episodes: _Inspected) -> Iterator[Episodes]:
    """The same episodes, with a progress bar for what takes longer than two seconds."""
    from tqdm import tqdm

    class Shown:
        lengths = episodes.lengths

        def read(self, index: int) -> Mapping[str, NDArray[Any]]:
            bar.update()
            return episodes.read(index)

    twice = 2 * len(episodes.lengths) + 1
    with tqdm(total=twice, unit="episode", desc="inspects", delay=2, dynamic_ncols=True, leave=False) as bar:
        yield Shown()
