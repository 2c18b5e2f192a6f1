"""Videos as arrays, decoded and encoded by PyAV, which is optional.

A video is MP4 whose frames have the size that the dataset declares; sizes are compared before anything is
decoded, and FFmpeg's decoders are told not to allocate more.  One thread decodes: FFmpeg's threads have
crashed on damaged files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, reading
from ...files import require_regular
from ..arrays import require_memory

LARGEST_FILE = 2**36
TOLERANCE = 0.4
"""How far a frame may be from its step, in frames, so that no other frame is nearer.  LeRobot's default is
1e-4 s, which its own files of several episodes exceed where times were rounded."""
REORDERED = 16
"""Frames that a codec may decode before those that are shown earlier, at most."""
PADDING = 512
"""Pixels by which a decoder's buffers may exceed the picture in each direction."""
ENCODERS = {
    "libx264": {"crf": "18", "g": "2"},
    "libsvtav1": {"crf": "20", "g": "2"},
    "mpeg4": {"qmin": "2", "qmax": "4", "g": "2"},
}
"""Encoders and their settings, the first that is there is taken.  A key frame every two frames, as LeRobot
writes, since training reads frames in any order."""


def pyav(needed: str) -> Any:
    """PyAV; raises ``InputError`` where it isn't installed.

    Args:
        needed: what needs it, for the error line.
    """
    try:
        import av

        return av
    except ImportError:
        raise InputError(
            f"{needed} needs PyAV: pip install 'paradiffpolicy[video]', or choose obs_keys=[...] without it"
        )


def read_video(
    path: Path, times: NDArray[np.float64], fps: float, size: tuple[int, int], is_whole: bool
) -> NDArray[np.uint8]:
    """Decodes a frame for each step, ``[n, height, width, 3]`` RGB.

    Args:
        times: ``[n]``, seconds from the beginning of the video, rising.
        fps: frames per second.
        size: height and width.
        is_whole: whether the video must have no other frames.

    Raises:
        InputError: it isn't a video of such frames, is damaged, has other frames than these steps, the
            memory can't hold them, or PyAV isn't installed.
    """
    steps, (height, width) = len(times), size
    require_memory(steps * height * width * 3, str(path))
    found = np.empty((steps, height, width, 3), np.uint8)
    with _opened(path, size) as (container, stream):
        if is_whole and stream.frames not in (0, steps):
            raise InputError(f"{path} has {stream.frames} frames, its episode {steps} steps: copy both again")
        start = float(times[0])
        if start > 0:
            early = max(0.0, start - REORDERED / fps)
            container.seek(int(early / stream.time_base), stream=stream, backward=True)
        filled = 0
        for frame in container.decode(stream):
            if frame.time is None:
                raise InputError(f"{path} has frames without a time: write it anew")
            if frame.time < start - TOLERANCE / fps:
                continue
            _check_frame(frame, float(times[filled]), fps, size, f"{path}: the frame of step {filled}")
            found[filled] = frame.to_ndarray(format="rgb24")
            filled += 1
            if filled == steps:
                return found
    raise InputError(f"{path} ends after {filled} of its episode's {steps} steps: copy it again")


def _check_frame(frame: Any, time: float, fps: float, size: tuple[int, int], where: str) -> None:
    if abs(frame.time - time) * fps > TOLERANCE:
        raise InputError(
            f"{where} is at {frame.time:.4g} s, not {time:.4g}: it must have {fps:g} frames a second, as "
            "meta/info.json says, and none may be missing: write it anew"
        )
    if (frame.height, frame.width) != size:
        raise InputError(f"{where} has another size than the first: write it anew")
    if frame.is_corrupt:
        raise InputError(f"{where} is damaged: copy it again")


@contextlib.contextmanager
def _opened(path: Path, size: tuple[int, int]) -> Iterator[tuple[Any, Any]]:
    """A file's container and video stream, whose declared size was compared with ``size``."""
    av = pyav(str(path))
    require_regular(path, LARGEST_FILE)
    limit = {"max_pixels": str((size[0] + PADDING) * (size[1] + PADDING))}
    # The format is named, and the file is opened here: some of FFmpeg's formats name other files to read.
    with (
        reading(str(path)),
        path.open("rb") as file,
        av.open(file, format="mp4", options=limit) as container,
    ):
        stream = next(iter(container.streams.video), None)
        codec = stream and stream.codec_context
        if codec is None:  # decoding would crash
            raise InputError(f"{path} has no video that can be decoded: copy it again")
        if (codec.height, codec.width) != size:
            raise InputError(
                f"{path} has frames of {codec.height} x {codec.width}, meta/info.json says {size[0]} x "
                f"{size[1]}: write it anew"
            )
        codec.options, codec.thread_count = limit, 1
        yield container, stream


def write_video(path: Path, frames: NDArray[np.uint8], fps: float, where: str) -> dict[str, Any]:
    """Writes frames ``[n, height, width, 3]`` RGB, of even sides, as MP4 with a lossy codec; returns what
    LeRobot's ``meta/info.json`` tells of it.

    Args:
        where: for the error line.

    Raises:
        InputError: PyAV isn't installed.
    """
    av, (_, height, width, _) = pyav(where), frames.shape
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = ENCODERS[encoder]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        codec = stream.codec_context.codec.canonical_name
    told = {"height": height, "width": width, "channels": 3, "fps": fps, "codec": codec}
    told |= {"pix_fmt": "yuv420p", "is_depth_map": False}
    return {**{f"video.{name}": value for name, value in told.items()}, "has_audio": False}
