"""Columns of parquet files: numbers, a row group in memory at a time, and files, one by one; pyarrow is
optional."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, nearest, reading
from ...files import require_regular
from ..replay_buffer import require_finite

LARGEST_FILE = 2**36
LARGEST_GROUP = 2**28
"""Bytes of a row group's columns that are read."""
LARGEST_EPISODE = 2**31
LARGEST_FOOTER = 2**24
ROWS_AT_ONCE, FILES_AT_ONCE = 1024, 4


def pyarrow_parquet() -> Any:
    """pyarrow's module for parquet; raises ``InputError`` where it isn't installed."""
    try:
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError:
        raise InputError("LeRobot's datasets need pyarrow: pip install 'paradiffpolicy[lerobot]'")


class ParquetColumns:
    """Reads rows of parquet files; the last file and row group are kept, as episodes follow each other."""

    def __init__(self) -> None:
        self._parquet = pyarrow_parquet()
        self._path: Path | None = None
        self._file: Any = None
        self._group: tuple[int, tuple[str, ...]] | None = None
        self._values: dict[str, NDArray[Any]] = {}

    def rows(self, path: Path) -> int:
        """Rows of a file.

        Raises:
            InputError: it isn't a regular file, isn't parquet, or is damaged.
        """
        return int(self._opened(path).metadata.num_rows)

    def require_rows(self, path: Path, rows: int) -> None:
        """Raises ``InputError`` where a file has more or fewer rows than the table of episodes says."""
        there = self.rows(path)
        if there != rows:
            raise InputError(
                f"{path} has {there} rows, the table of episodes says {rows}: copy the dataset again"
            )

    def read(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], start: int, stop: int
    ) -> dict[str, NDArray[Any]]:
        """Rows ``start … stop`` of columns, ``[n, *shape]`` each.

        Args:
            shapes: per row, by the names of the columns; ``()`` and ``(1,)`` are of single numbers.

        Raises:
            InputError: a column is missing, isn't numbers of that shape, has gaps, NaN or infinity, or is
                too large, or the file is damaged.
        """
        self._opened(path)
        with reading(str(path)):
            self._require_there(shapes, start, stop)
            width = sum(math.prod(shape) for shape in shapes.values())
            if (stop - start) * width * 8 > LARGEST_EPISODE:
                raise InputError(f"{path}: rows {start} to {stop} are more than {LARGEST_EPISODE} bytes")
            parts: dict[str, list[NDArray[Any]]] = {name: [] for name in shapes}
            for group, first in self._groups(start, stop):
                in_group = self._read_group(group, shapes)
                for name in shapes:
                    parts[name].append(in_group[name][max(0, start - first) : stop - first])
            found = {name: _joined(each) for name, each in parts.items() if each}
        for name, values in found.items():
            where = f"{path}: {name}"
            if len(values) != stop - start:
                raise InputError(f"{where} has {len(values)} rows in place of {stop - start}: copy it again")
            require_finite(values, where, "leave the episode out, or repair the value", start)
        return found

    def contents(self, path: Path, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """Contents of files in rows ``start … stop`` of a column ``{bytes, path}``, one by one.

        Raises:
            InputError: the column is missing, isn't of files, or has gaps, or the file is damaged.
        """
        file = self._opened(path)
        self._require_there([name], start, stop)
        options = {"columns": [name], "use_threads": False, "batch_size": FILES_AT_ONCE}
        with reading(str(path)):
            for group, first in self._groups(start, stop):
                self._require_bounded(group)
                for batch in file.iter_batches(row_groups=[group], **options):
                    for row in range(max(start, first), min(stop, first + batch.num_rows)):
                        value = batch.column(name).field("bytes")[row - first]
                        if not value.is_valid:
                            raise InputError(f"{path}: {name} has no picture in row {row}: store it there")
                        yield memoryview(value.as_buffer())
                    first += batch.num_rows
                    if first >= stop:
                        break

    def _require_there(self, names: Iterable[str], start: int, stop: int) -> None:
        """Raises ``InputError`` unless the opened file has such columns and rows."""
        known, rows = self._file.schema_arrow.names, self._file.metadata.num_rows
        if not 0 <= start <= stop <= rows:
            raise InputError(f"{self._path} has {rows} rows, not {start} to {stop}: copy it again")
        for name in names:
            if known.count(name) != 1:
                raise InputError(f"{self._path} has no column {name}{nearest(name, known)}")

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The row groups that have some of the rows ``start … stop``, and the first row of each."""
        first, metadata = 0, self._file.metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                yield group, first
            first += rows

    def _require_bounded(self, group: int) -> None:
        """Raises ``InputError`` where a row group declares more bytes than are read."""
        size = self._file.metadata.row_group(group).total_byte_size
        if size > LARGEST_EPISODE:
            raise InputError(
                f"{self._path} has {size} bytes in a row group with all its columns, at most "
                f"{LARGEST_EPISODE} are read"
            )

    def _opened(self, path: Path) -> Any:
        if path != self._path:
            self._path, self._group, self._values = None, None, {}
            require_regular(path, LARGEST_FILE)
            with reading(str(path)):
                with path.open("rb") as file:
                    file.seek(-8, 2)
                    tail = file.read()
                if tail[4:] != b"PAR1" or int.from_bytes(tail[:4], "little") > LARGEST_FOOTER:
                    raise InputError(f"{path} isn't a whole parquet file: copy it again")
                self._file = self._parquet.ParquetFile(
                    path,
                    thrift_string_size_limit=LARGEST_FOOTER,
                    thrift_container_size_limit=2**20,
                    buffer_size=2**16,
                )
            self._path = path
        return self._file

    def _read_group(self, group: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
        """The columns of a row group, whose declared size is checked first."""
        wanted = (group, tuple(shapes))
        if self._group != wanted:
            # Not of columns: pyarrow aborts the process where a footer's statistics of one are damaged.
            self._require_bounded(group)
            about = self._file.metadata.row_group(group)
            size = 8 * about.num_rows * sum(math.prod(shape) for shape in shapes.values())
            if size > LARGEST_GROUP:
                raise InputError(
                    f"{self._path} has {size} bytes in a row group, at most {LARGEST_GROUP} are read"
                )
            self._group, self._values = None, {}
            options = {"columns": list(shapes), "use_threads": False, "batch_size": ROWS_AT_ONCE}
            values, filled = dict[str, NDArray[Any]](), 0
            for batch in self._file.iter_batches(row_groups=[group], **options):
                for name, shape in shapes.items():
                    found = _numbers(batch.column(name), shape, f"{self._path}: {name}")
                    if name not in values:
                        values[name] = np.empty((about.num_rows, *shape), found.dtype)
                    values[name][filled : filled + len(found)] = found
                filled += batch.num_rows
            if filled != about.num_rows or not filled:
                raise InputError(
                    f"{self._path} has {filled} rows in place of {about.num_rows}: copy it again"
                )
            self._values = values
            self._group = wanted
        return self._values


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _numbers(column: Any, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """A column's values ``[rows, *shape]``."""
    import pyarrow as pa

    rows, values = len(column), column
    for size in (*shape, None):
        values = getattr(values, "storage", values)
        if values.null_count:
            raise InputError(f"{where} has rows without a value: leave that episode out")
        if not (
            pa.types.is_list(values.type)
            or pa.types.is_fixed_size_list(values.type)
            or pa.types.is_large_list(values.type)
        ):
            break
        lengths = np.diff(values.offsets.to_numpy()) if hasattr(values, "offsets") else np.array([])
        if size is None or (lengths != size).any():
            raise InputError(f"{where} has rows that aren't {shape}, as meta/info.json says: write it anew")
        values = values.flatten()
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise InputError(f"{where} holds {kind}, not numbers: write numbers")
    found = values.to_numpy(zero_copy_only=False)
    if found.size != rows * math.prod(shape):
        raise InputError(f"{where} has rows that aren't {shape}, as meta/info.json says: write it anew")
    return np.asarray(found).reshape(rows, *shape)
