"""Pictures of demonstrations, uncompressed in a file that is mapped into memory: a training batch reads what
it needs of them, and the system keeps as much of the file in memory as there is room for."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files import writing
from ..task import Camera
from .replay_buffer import ReplayBuffer

PIECE = 2**26
"""Bytes of pictures that are decoded at a time."""


def recorded_cameras(
    buffer: ReplayBuffer, keys: Sequence[str], task: str | None = None
) -> tuple[Camera, ...]:
    """The cameras with the shapes that the store has their pictures in.

    Raises:
        InputError: the store lacks one, or has no pictures ``[H, W, 3]`` of it.
    """
    cameras = []
    for key in keys:
        if key not in buffer.fields:
            since = f", which task {task} sees" if task else ""
            raise InputError(f"{buffer.name} has no camera {key!r}{since}: it has {', '.join(buffer.fields)}")
        shape = buffer.shape(key)
        if len(shape) == 3 and shape[0] == 3 != shape[2]:
            raise InputError(
                f"{buffer.name}: data/{key} is {shape} per step, channels first: write it channels last, "
                f"{(*shape[1:], 3)}"
            )
        if len(shape) != 3:
            raise InputError(f"{buffer.name}: data/{key} is {shape} per step, pictures are [H, W, 3]")
        cameras.append(Camera(key, (shape[0], shape[1], shape[2])))
    return tuple(cameras)


def agreed_cameras(
    buffer: ReplayBuffer, cameras: Sequence[Camera], task: str | None = None
) -> tuple[Camera, ...]:
    """A task's cameras, whose pictures the store has.

    Raises:
        InputError: as ``recorded_cameras``, or the sizes differ.
    """
    found = recorded_cameras(buffer, [camera.key for camera in cameras], task)
    for wanted, there in zip(cameras, found, strict=True):
        if wanted != there:
            raise InputError(
                f"{buffer.name}: data/{there.key} is {there.shape} per step, but the task's camera says "
                f"shape={list(wanted.shape)}"
            )
    return found


def picture_bytes(buffer: ReplayBuffer, cameras: Sequence[Camera]) -> Tensor:
    """The pictures of every step, ``[n_steps, P]`` uint8, the cameras' one after the other.

    Raises:
        InputError: pictures can't be read, aren't bytes, or the disk for temporary files is full.
    """
    sizes = [math.prod(camera.shape) for camera in cameras]
    starts = np.cumsum([0, *sizes])
    pixels = mapped_bytes(buffer.n_steps, int(starts[-1]))
    mapped = pixels.numpy()
    with tqdm(total=buffer.n_steps, unit="picture", delay=2, dynamic_ncols=True, leave=False) as bar:
        piece = max(1, PIECE // (4 * int(starts[-1])))
        for first in range(0, buffer.n_steps, piece):
            stop = min(first + piece, buffer.n_steps)
            for camera, start, size in zip(cameras, starts, sizes, strict=False):
                where = f"{buffer.name}: data/{camera.key}"
                part = as_bytes(buffer.read(camera.key, first, stop), where)
                mapped[first:stop, start : start + size] = part.reshape(stop - first, size)
            bar.update(stop - first)
    return pixels


def mapped_bytes(n_rows: int, size: int) -> Tensor:
    """Zeros ``[n_rows, size]`` uint8 in a temporary file that is mapped into memory.

    Raises:
        InputError: the disk for temporary files is full.
    """
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        file.truncate(max(1, n_rows * size))
        # The mapping keeps the file, which has no name any more.
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(n_rows, size)))


def as_bytes(pictures: NDArray[np.generic], where: str) -> NDArray[np.uint8]:
    """Pictures as bytes: floats are, too, where they are whole numbers.

    Raises:
        InputError: they are no bytes, as pictures from 0 to 1 aren't.
    """
    if pictures.dtype == np.uint8:
        return pictures.astype(np.uint8, copy=False)
    found = pictures.astype(np.uint8)
    if not np.array_equal(found, pictures):
        raise InputError(f"{where} isn't bytes from 0 to 255 ({pictures.dtype}): write it as uint8")
    return found
