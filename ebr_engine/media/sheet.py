"""Contact sheets: pictures of one size in a grid, a label above each, some of them marked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PAPER = np.array([0.09, 0.09, 0.10], np.float32)
INK = np.array([0.92, 0.92, 0.92], np.float32)
MARK = np.array([1.0, 0.72, 0.10], np.float32)
SHAPE = 4 / 3  # width by height that a sheet comes near to


@dataclass(frozen=True, eq=False)
class SheetTile:
    """One picture of a sheet."""

    pixels: np.ndarray  # [H, W, 3] float32 in [0, 1]
    label: str
    marked: bool = False


def contact_sheet(tiles: Sequence[SheetTile]) -> np.ndarray:
    """The sheet [H, W, 3] float32 in [0, 1]; labels are drawn by libvips, and shrunk where they are wider than a tile.

    ValueError for no tiles, and for tiles of unequal size.
    """
    shapes = {tile.pixels.shape for tile in tiles}
    if len(shapes) != 1:
        raise ValueError(f"a sheet takes pictures of one size, not of {sorted(shapes)}")
    height, width, _ = shapes.pop()
    bar, gap = _margins(height, width)
    places = tile_places(len(tiles), height, width)
    bottom, right = max(top for _, top, _, _ in places) + height + gap, max(left for left, _, _, _ in places) + width + gap
    sheet = np.empty((bottom, right, 3), np.float32)
    sheet[:] = PAPER
    for tile, (left, top, _, _) in zip(tiles, places):
        colour = MARK if tile.marked else INK
        cover = _text(tile.label, bar, width)
        area = sheet[top - bar : top - bar + cover.shape[0], left : left + cover.shape[1]]
        area += cover * (colour - area)
        if tile.marked:
            edge = gap // 2
            sheet[top - edge : top + height + edge, left - edge : left + width + edge] = MARK
        sheet[top : top + height, left : left + width] = tile.pixels
    return sheet


def tile_places(count: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) in pixels of each picture on a sheet of `count` pictures of one size."""
    bar, gap = _margins(height, width)
    columns = _columns(count, height + bar + gap, width + gap)
    lefts = [gap + index % columns * (width + gap) for index in range(count)]
    tops = [gap + bar + index // columns * (height + bar + gap) for index in range(count)]
    return [(left, top, width, height) for left, top in zip(lefts, tops)]


def _margins(height: int, width: int) -> tuple[int, int]:
    """The height of a label, and the gap around a picture."""
    return max(18, round(max(height, width) / 16)), max(4, round(max(height, width) / 64))


def _columns(count: int, height: int, width: int) -> int:
    """Columns with which a sheet comes nearest to its shape, without a hole that another number would fill."""

    def unlike(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * width / (rows * height) / SHAPE)) + 0.2 * (columns * rows - count) / columns

    return min(range(1, count + 1), key=unlike)


def _text(text: str, height: int, width: int) -> np.ndarray:
    """How much of each pixel a line of text covers: [height, at most width, 1]."""
    import pyvips

    points = max(6, round(0.62 * height))
    drawn = pyvips.Image.text(escape(text), font=f"sans {points}", dpi=72)
    if drawn.width > width or drawn.height > height:
        drawn = drawn.resize(min(width / drawn.width, height / drawn.height))
    line = drawn.numpy().astype(np.float32).reshape(drawn.height, drawn.width)[:height, :width] / 255
    cover = np.zeros((height, line.shape[1], 1), np.float32)
    top = max(0, (height - line.shape[0]) // 2)
    cover[top : top + line.shape[0], :, 0] = line
    return cover
