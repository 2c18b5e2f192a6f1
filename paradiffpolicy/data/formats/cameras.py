"""Cameras of LeRobot's datasets: what their features declare, and compressed pictures as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, is_whole, reading
from ..arrays import LARGEST_STEP, require_memory

PICTURE_FORMATS = ("PNG", "JPEG")
EIGHT_BITS = ("L", "P", "RGB", "RGBA")
"""Pillow's names of pictures that become 8 bits of red, green and blue without a loss."""
SMALLEST_PICTURE = 2**16
"""Bytes that a compressed picture may have, however few pixels it declares."""


def picture_size(about: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that a feature declares; ``None`` where it isn't a picture of three colours.

    The shape is ``[H, W, 3]`` or ``[3, H, W]``, whatever its names say: they are often those of the other.
    """
    shape, told = about.get("shape"), about.get("info") or {}
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and all(map(is_whole, shape))):
        return None
    if any(told.get(name) for name in ("is_depth_map", "video.is_depth_map")):
        return None
    names = about.get("names")
    first = str(names[0])[:1] if isinstance(names, list) and names else ""
    if shape[0] == 3 and (shape[2] != 3 or first == "c"):
        height, width = shape[1:]
    elif shape[2] == 3:
        height, width = shape[:2]
    else:
        return None
    return (height, width) if min(height, width) > 0 and height * width * 3 <= LARGEST_STEP else None


def read_pictures(
    contents: Iterable[memoryview], steps: int, size: tuple[int, int], where: str
) -> NDArray[np.uint8]:
    """Decodes PNG or JPEG pictures, ``[steps, height, width, 3]`` RGB.

    Args:
        contents: of the pictures, one per step.
        size: height and width.

    Raises:
        InputError: a picture is damaged, of another size or of more than 8 bits, there are fewer, or the
            memory can't hold them.
    """
    from PIL import Image

    height, width = size
    require_memory(steps * height * width * 3, where)
    found, filled = np.empty((steps, height, width, 3), np.uint8), 0
    for content in contents:
        place = f"{where}, the picture of step {filled}"
        if len(content) > SMALLEST_PICTURE + 8 * height * width:
            raise InputError(f"{place} has {len(content)} bytes, too many for {height} x {width}")
        with reading(place), Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as picture:
            if picture.size != (width, height):
                raise InputError(
                    f"{place} is {picture.height} x {picture.width}, meta/info.json says {height} x {width}: "
                    "write it anew"
                )
            if picture.mode not in EIGHT_BITS:
                raise InputError(f"{place} is {picture.mode}, not 8 bits of each colour: write it anew")
            found[filled] = np.asarray(picture.convert("RGB"))
        filled += 1
    if filled != steps:
        raise InputError(f"{where} has {filled} pictures, its episode {steps} steps: copy it again")
    return found
