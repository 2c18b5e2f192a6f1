"""Says what in a dataset is unusual, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_atomically
from ..tables import pairs, table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

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
    """Tables of what is unusual in a zarr store or a robomimic file; none where there is nothing to inspect.

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


def _inspected(path: Path, episodes: _Store | _Demos, picture: Path | None) -> list[Table]:
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


def _is_inspected(name: str, shape: Sequence[int]) -> bool:
    return name not in NOT_INSPECTED and len(shape) < 3 and 0 < math.prod(shape) <= LARGEST_FIELD


@contextmanager
def _opened(path: Path) -> Iterator[_Store | _Demos]:
    from ..data.formats.robomimic import RobomimicFile
    from ..data.replay_buffer import ReplayBuffer

    if path.is_dir():
        with ReplayBuffer.open(path) as buffer:
            yield _Store(buffer)
        return
    file = RobomimicFile(path)
    try:
        yield _Demos(file)
    finally:
        file.close()


@contextmanager
def _shown(episodes: _Store | _Demos) -> Iterator[Episodes]:
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
