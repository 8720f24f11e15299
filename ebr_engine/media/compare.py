"""Input and output in one picture, or one clip: side by side, or with a line that wipes from one to the other."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.images import resize_picture
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import open_video, write_video

SIDE, WIPE = WAYS = ("side", "wipe")
SWEEP = 4.0  # seconds that the line takes across and back
REACH = 0.45  # of the width, to both sides of the middle
LINE_SHARE = 400  # the line is twice a 400th of the shorter side, and none in tiny pictures


def side_by_side(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] of input and output in one picture, [H, 2W + line, 3], the input on the left."""
    line = _line(*before.shape[:2])
    return np.concatenate((before, np.ones((before.shape[0], line, *before.shape[2:]), before.dtype), after), axis=1)


def wiped(before: np.ndarray, after: np.ndarray, share: float = 0.5) -> np.ndarray:
    """Pixels [H, W, 3]: the input left of a line at `share` of the width, the output right of it."""
    height, width = before.shape[:2]
    at, half = round(width * share), _line(height, width) // 2
    joined = np.concatenate((before[:, :at], after[:, at:]), axis=1)
    joined[:, max(0, at - half) : at + half] = 1
    return joined


def compared(before: np.ndarray, after: np.ndarray, way: str, time: float = 0.0) -> np.ndarray:
    """One frame of a comparison at `time` seconds; a wipe's line begins in the middle and swings."""
    if way == SIDE:
        return side_by_side(before, after)
    return wiped(before, after, 0.5 + REACH * math.sin(2 * math.pi * time / SWEEP))


def compared_size(height: int, width: int, way: str) -> tuple[int, int]:
    """Height and width of a comparison of pictures of height × width."""
    return height, 2 * width + _line(height, width) if way == SIDE else width


def compare_clips(
    before: Path,
    after: Path,
    out: Path,
    way: str,
    reading: Mapping[str, Any] | None = None,
    writing: Mapping[str, Any] | None = None,
    callback: Callable[[int], None] | None = None,
) -> list[str]:
    """Write a clip and its restored form as one clip, with the sound and times of `before`; what could not be kept.

    A frame of each is held at a time. `reading`: of `open_video`, for the part of `before` that was restored; `writing`: of
    `write_video`; `callback(frames)` after each. A restored clip of another size is shown at that size. MediaError when the
    two do not have as many frames.
    """
    with open_video(before, **(reading or {})) as source, open_video(after) as result:
        height, width = result.info.height, result.info.width
        size = compared_size(height, width, way)
        target = write_video(out, source, size=size, keep=False, **(writing or {}))
        with target as writer:
            for one, other in zip_longest(source, result):
                if one is None or other is None:
                    raise MediaError(f"{out}: not written: {before} and {after} do not have as many frames")
                left = one.pixels if one.pixels.shape == other.pixels.shape else _resized(one.pixels, height, width)
                joined = compared(left, other.pixels, way, float(one.time))
                writer.write(joined, replace(one, alpha=None, messages={}))  # both would be of one half
                if callback is not None:
                    callback(writer.frames)
    return [*source.warnings, *target.warnings]


def _line(height: int, width: int) -> int:
    return 2 * round(min(height, width) / LINE_SHARE)


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return resize_picture(Picture(pixels), height, width).pixels
