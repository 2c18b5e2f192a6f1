"""Captions on the frames of videos and film strips: which episode this is, when, and how it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SMALLEST, LARGEST = 8, 22
"""Pixels of the text: a sixteenth of the frame's width, but within these."""


def captioned(frame: NDArray[np.uint8], lines: Sequence[str]) -> NDArray[np.uint8]:
    """Writes lines of text onto a white strip above a frame; all frames of one size stay of one size.

    Text that is too wide is set smaller, and cut only where that isn't enough.

    Args:
        frame: ``[height, width, 3]`` RGB.
        lines: from top to bottom, in Latin, Greek or Cyrillic letters; none: no strip.

    Returns:
        ``[strip + height, width, 3]``; the strip's height, an even number, depends on the width and on
        how many lines there are, never on what they say.
    """
    from PIL import Image, ImageDraw

    if not lines:
        return frame
    width = frame.shape[1]
    size = int(np.clip(width // 16, SMALLEST, LARGEST))
    row = size + size // 4
    strip = Image.new("RGB", (width, 2 * -(-(row * len(lines) + 2) // 2)), "white")
    draw = ImageDraw.Draw(strip)
    for k, line in enumerate(lines):
        text, font = _fitted(line, width - 6, size)
        draw.text((3, k * row + row // 2 + 1), text, "black", font, anchor="lm")
    return np.concatenate((np.asarray(strip), frame))


def episode_lines(
    sampler: str,
    seed: int,
    seconds: float,
    score: float,
    best: float,
    best_at: float,
    *,
    ended: bool = False,
) -> list[str]:
    """Describes one moment of an episode in three lines, for ``captioned``.

    Args:
        sampler: its name.
        seed: of the episode.
        seconds: since the reset.
        score: the last step's reward; NaN before the first step.
        best: the largest reward so far, or NaN.
        best_at: seconds since the reset when ``best`` was reached.
        ended: the episode is over, and ``seconds`` is its end.
    """
    now, record = f", score {score:.2f}", f"best {best:.2f} (at {best_at:.1f} s)"
    return [
        f"seed {seed}, {sampler}",
        f"{'ended at ' if ended else ''}{seconds:.1f} s{'' if math.isnan(score) else now}",
        "" if math.isnan(best) else record,
    ]


@cache
def _font(size: int) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _fitted(text: str, width: int, size: int) -> tuple[str, Any]:
    """The text, cut if it must be, and the largest font up to ``size`` that it fits ``width`` pixels in."""
    while size > SMALLEST and _font(size).getlength(text) > width:
        size -= 1
    font, shown = _font(size), text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…" if text else ""
    return shown, font
