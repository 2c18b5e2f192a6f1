"""A run as an episode of a dataset, and as a video: observers that note now and write at the end.

Both write when they are closed, which a ``with`` statement does however the run ended, so that what was
noted up to a fault is there to look at.  While the loop runs they only copy into storage that they took
before, since a tick has no time for files.

A run has a grid in time, and ticks that nobody called for.  Rows and pictures keep to the grid: where a
tick is missing, the one before stands for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray

from ..control.record import Fault, Tick
from ..data.replay_buffer import ReplayBuffer
from ..errors import InputError, require_count, require_positive
from ..files import write_atomically
from ..types import PolicySpec

Picture = Callable[[], NDArray[np.uint8]]
"""Gives what there is to see now, ``[height, width, 3]`` RGB; always of one size."""

Fields = Callable[[], Mapping[str, NDArray[Any]]]
"""Gives what else is known of the robot at the last observation; always the same names and shapes."""


class _Recorder:
    """``close`` at the end of a ``with`` statement, whatever ended it."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DatasetRecorder(_Recorder):
    """Appends a run to a store of demonstrations, as one episode.

    The episode has ``observation`` ``[n, O]`` and ``action`` ``[n, A]``, in float32, and ``fields``.  It
    begins at the first tick with a good observation and an action.  From there on there is a row for
    every ``every`` ticks of the grid.  What is missing in a row (a tick that nobody called for, an
    observation that was refused, NaN in a field, an action where none was safe) is the row's before:
    readers refuse NaN, and rows must stay equally far apart.

    Args:
        path: of the store, made if there is none.
        spec: of the policy: O and A.
        capacity: ticks of the run; what comes later isn't recorded.
        every: ticks per row: 1, or a policy's ticks per step, to train on.
        fields: what to record beside; called once at the beginning, and then for every row.

    Raises:
        InputError: the store has other fields, or isn't one.
    """

    def __init__(
        self,
        path: Path,
        spec: PolicySpec,
        capacity: int,
        *,
        every: int = 1,
        fields: Fields = dict,
    ) -> None:
        require_count(capacity=capacity, every=every)
        self.path, self._every, self._fields = path, every, fields
        rows = -(-capacity // every)
        like = {
            "observation": np.zeros(spec.obs_dim),
            "action": np.zeros(spec.action_dim),
            **{name: np.asarray(value) for name, value in fields().items()},
        }
        # full, not zeros: memory that was never written to is only there when it is first touched.
        self._rows = {name: np.full((rows, *value.shape), 0, _stored(value)) for name, value in like.items()}
        self._capacity, self._first, self.n_rows = rows, 0, 0
        if path.exists():
            ReplayBuffer.open(path).check({name: values[:1] for name, values in self._rows.items()})

    def __call__(self, tick: Tick) -> None:
        row = tick.index // self._every - self._first
        if row < self.n_rows or (self.n_rows and row >= self._capacity):
            return
        new: dict[str, Any] = {"observation": tick.observation, "action": tick.action, **self._fields()}
        if tick.faults & Fault.OBSERVATION_REFUSED:
            new["observation"] = None
        bad = [name for name, value in new.items() if value is None or not np.isfinite(value).all()]
        if not self.n_rows:
            if bad:
                return
            self._first, row = tick.index // self._every, 0
        for name, values in self._rows.items():
            if self.n_rows:
                values[self.n_rows : row + 1] = values[self.n_rows - 1]
            if name not in bad:
                values[row] = new[name]
        self.n_rows = row + 1

    def close(self) -> None:
        """Writes the episode; nothing, if there was no good tick."""
        length, self.n_rows = self.n_rows, 0
        if not length:
            return
        known = self.path.exists()
        buffer = ReplayBuffer.open(self.path, "r+") if known else ReplayBuffer.create(self.path)
        buffer.append({name: values[:length] for name, values in self._rows.items()})


def _stored(value: NDArray[Any]) -> np.dtype[Any]:
    """Numbers as float32, as demonstrations have them; pictures and flags as they are."""
    return np.dtype(np.float32) if value.dtype.kind == "f" else value.dtype


class VideoRecorder(_Recorder):
    """Writes a run as an MP4 that plays as fast as the run was.

    Pictures are kept uncompressed until the end: size² x 3 bytes each.

    Args:
        path: of the video.
        picture: called when one is due.
        rate_hz: of the loop.
        capacity: ticks of the run; what comes later isn't recorded.
        every: ticks per picture.

    Raises:
        InputError: the path doesn't end in .mp4, or a number is out of range.
    """

    def __init__(
        self, path: Path, picture: Picture, rate_hz: float, capacity: int, *, every: int = 1
    ) -> None:
        require_count(capacity=capacity, every=every)
        require_positive(rate_hz=rate_hz)
        if path.suffix != ".mp4":
            raise InputError(f"video={path} must end in .mp4")
        self.path, self._picture = path, picture
        self._every, self._fps = every, rate_hz / every
        first = np.asarray(picture())
        self._pictures = np.full((-(-capacity // every), *first.shape), 0, np.uint8)
        self.n_pictures = 0

    def __call__(self, tick: Tick) -> None:
        place = tick.index // self._every
        if not self.n_pictures <= place < len(self._pictures):
            return
        picture = self._picture()
        # Before the first one there is none: it stands for those that were missed, too.
        before = self._pictures[self.n_pictures - 1].copy() if self.n_pictures else picture
        self._pictures[self.n_pictures : place] = before
        self._pictures[place] = picture
        self.n_pictures = place + 1

    def close(self) -> None:
        """Writes the video; nothing, if there was no tick."""
        length, self.n_pictures = self.n_pictures, 0
        if length:
            write_video(self.path, self._pictures[:length], self._fps)


def write_video(path: Path, pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], fps: float) -> None:
    """Writes pictures ``[height, width, 3]`` as an MP4.  An odd last row or column is left out, since
    video codecs want even sizes."""
    height, width = pictures[0].shape[0] // 2 * 2, pictures[0].shape[1] // 2 * 2

    def write(temporary: Path) -> None:
        # Closed in any case: an encoder that is left alone writes its file when nobody expects it.
        writer: Any = imageio.get_writer(temporary, fps=fps, macro_block_size=1, codec="libx264")
        with contextlib.closing(writer):
            for picture in pictures:
                writer.append_data(picture[:height, :width])

    write_atomically(path, write)
