"""Scalars of a training run in TensorBoard's format, on the disk as soon as they are added."""

from __future__ import annotations

import errno
import io
import os
import platform
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ..files import Closing, writing


class ScalarFile(Closing):
    """A new file of scalars in a folder; TensorBoard forgets the folder's scalars from ``first_step`` on.

    torch's ``SummaryWriter`` writes in a thread, whose error on a full disk ends nothing.

    Raises:
        InputError: (all methods) it can't be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{platform.node()}.{os.getpid()}.{nanoseconds}"
        self._path = folder / name
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb", buffering=0)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **values: float) -> None:
        """Adds the scalars of a step, by name."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
        with writing(self._path):
            if self._file.write(record.getvalue()) != len(record.getvalue()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
