"""Records a run as an episode of a dataset, and as a video.

Both recorders are observers of a control loop.  While it runs they only copy into memory, since a tick has no
time for files; they write when they are closed, which a ``with`` statement
does however the run ended, so that what was recorded up to a fault is there to look at.

A run has a grid in time, and may miss ticks of it.  Rows and frames keep to the grid: where a tick is
missing, the one before is repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray

from ..control.record import Fault, Tick
from ..data.replay_buffer import ReplayBuffer
from ..errors import InputError, require_count, require_positive
from ..files import Closing, write_atomically
from ..task import NUMBERS
from ..types import PolicySpec
from .caption import captioned

Picture = Callable[[], NDArray[np.uint8]]
"""Draws the scene as it is now, ``[height, width, 3]`` RGB; always of one size."""

Caption = Callable[[Tick], Sequence[str]]
"""Describes the scene at a tick in lines of text; always equally many."""

Fields = Callable[[], Mapping[str, NDArray[Any]]]
"""Reads the robot's state at the last observation; always the same names and shapes."""


class DatasetRecorder(Closing):
    """Appends a run to a store of demonstrations, as one episode.

    The episode has ``observation`` ``[n, O]`` and ``action`` ``[n, A]``, in float32, the pictures of the
    policy's cameras, and ``fields``.  It
    starts at the first tick with a good observation and an action.  From there on there is a row for
    every ``every`` ticks of the grid.  A value that is missing (a missed tick, an observation that was
    refused, NaN in a field, an action where none was safe) is repeated from the row before: readers
    refuse NaN, and rows must stay equally far apart.

    Args:
        path: of the store, made if there is none.
        spec: of the policy: O and A.
        capacity: ticks of the run; later ones aren't recorded.
        every: ticks per row: 1, or a policy's ticks per step, to train on.
        fields: further values to record; called once here, and then for every row.

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
        self._cameras = [camera.key for camera in spec.contract.cameras]
        rows = -(-capacity // every)
        like: dict[str, NDArray[Any]] = {
            "observation": np.zeros(spec.obs_dim),
            **{camera.key: np.zeros(camera.shape, np.uint8) for camera in spec.contract.cameras},
            "action": np.zeros(spec.action_dim),
            **{name: np.asarray(value) for name, value in fields().items()},
        }
        # full, not zeros: memory that was never written to is only there when it is first touched.
        self._rows = {name: np.full((rows, *value.shape), 0, _stored(value)) for name, value in like.items()}
        self._capacity, self._first, self.n_rows = rows, 0, 0
        # Held from now on: a second writer is refused before its run, not after this one's.
        self._buffer = ReplayBuffer.open(path, "r+") if path.exists() else None
        check = self._buffer.check if self._buffer else partial(ReplayBuffer.require_new, str(path))
        check({name: values[:1] for name, values in self._rows.items()})

    def __call__(self, tick: Tick) -> None:
        row = tick.index // self._every - self._first
        if row < self.n_rows or (self.n_rows and row >= self._capacity):
            return
        new: dict[str, Any] = {"action": tick.action, **self._fields()}
        good = None if tick.faults & Fault.OBSERVATION_REFUSED else tick.observation
        new["observation"] = good if good is None or not self._cameras else good[NUMBERS]
        new |= {key: None if good is None else good[key] for key in self._cameras}
        with np.errstate(over="ignore"):  # beyond single precision is bad, too
            new = {n: v if v is None else np.asarray(v).astype(self._rows[n].dtype) for n, v in new.items()}
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
        buffer, self._buffer = self._buffer, None
        if length and not buffer:
            known = self.path.exists()
            buffer = ReplayBuffer.open(self.path, "r+") if known else ReplayBuffer.create(self.path)
        if buffer:
            with buffer:
                if length:
                    buffer.append({name: values[:length] for name, values in self._rows.items()})


def _stored(value: NDArray[Any]) -> np.dtype[Any]:
    """The dtype of a value in the store: float32 for numbers, as in demonstrations; others keep theirs."""
    return np.dtype(np.float32) if value.dtype.kind == "f" else value.dtype


LONGEST_VIDEO = 2**32
"""Bytes of a video's frames, uncompressed."""


class VideoRecorder(Closing):
    """Writes a run as an MP4 that plays as fast as the run was.

    Frames are kept uncompressed until the end, size² x 3 bytes each, one by one as they come.

    Args:
        path: of the video.
        picture: called for each frame.
        rate_hz: of the loop.
        capacity: ticks of the run; later ones aren't recorded.
        every: ticks per frame.
        caption: lines above each frame; none by default.

    Raises:
        InputError: the path doesn't end in .mp4, a number is out of range, or the frames of the whole run
            would take more than ``LONGEST_VIDEO``.
    """

    def __init__(
        self,
        path: Path,
        picture: Picture,
        rate_hz: float,
        capacity: int,
        *,
        every: int = 1,
        caption: Caption = lambda tick: (),
    ) -> None:
        require_count(capacity=capacity, every=every)
        require_positive(rate_hz=rate_hz)
        if path.suffix != ".mp4":
            raise InputError(f"video={path} must end in .mp4")
        self.path, self._picture, self._caption = path, picture, caption
        self._every, self._fps = every, rate_hz / every
        self._capacity = -(-capacity // every)
        size = np.asarray(picture()).nbytes
        if self._capacity * size > LONGEST_VIDEO:
            raise InputError(
                f"video={path}: {self._capacity} frames of {size / 1e3:.0f} kB are more than "
                f"{LONGEST_VIDEO / 2**30:.0f} GiB: fewer seconds, or smaller pictures"
            )
        self._frames: list[NDArray[np.uint8]] = []
        self._captions: list[Sequence[str]] = []

    def __call__(self, tick: Tick) -> None:
        place, n_frames = tick.index // self._every, len(self._frames)
        if not n_frames <= place < self._capacity:
            return
        frame, caption = np.array(self._picture(), np.uint8), self._caption(tick)
        # Missed frames repeat the one before them, or the first one.
        before = (self._frames[-1], self._captions[-1]) if n_frames else (frame, caption)
        self._frames += [*[before[0]] * (place - n_frames), frame]
        self._captions += [*[before[1]] * (place - n_frames), caption]

    def close(self) -> None:
        """Writes the video; nothing, if there was no tick."""
        frames, self._frames = self._frames, []
        if frames:
            write_video(self.path, map(captioned, frames, self._captions), self._fps)


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Writes frames ``[height, width, 3]`` as an MP4.  An odd last row or column is left out, since
    video codecs want even sizes."""

    def write(temporary: Path) -> None:
        # Closed in any case: an encoder that is left open writes its file later, over the next one's.
        writer: Any = imageio.get_writer(temporary, fps=fps, macro_block_size=1, codec="libx264")
        with contextlib.closing(writer):
            for frame in frames:
                height, width = (size // 2 * 2 for size in frame.shape[:2])
                writer.append_data(frame[:height, :width])

    write_atomically(path, write)
