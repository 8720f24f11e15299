"""Overlapping tiles on a 2-D grid: where they lie, how they are cut out, how they blend back.

The unit of the grid is the caller's (pixels, latent cells). Along each axis the tiles have one size, lie evenly spread,
and fade into their neighbours by a raised cosine over exactly the cells they share; the weights of all tiles sum to one
in every cell. The two axes are independent, so a tile's weight is the outer product of its row and column weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.errors import EbrError

GUIDE_CELL = 16  # cells of a guide that one tone is averaged over, at least: fewer would carry its detail over


@dataclass(frozen=True)
class Tiles:
    """A plan made by `plan_tiles`. All lengths in cells of the grid; boxes run row by row."""

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    row_weights: tuple[tuple[float, ...], ...]  # [len(tops)][tile_height]
    column_weights: tuple[tuple[float, ...], ...]  # [len(lefts)][tile_width]

    @property
    def boxes(self) -> list[tuple[int, int]]:
        """(top, left) of every tile, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def weight(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Blending weights [tile_height, tile_width], float32, of the tile `boxes[index]`."""
        row, column = divmod(index, len(self.lefts))
        rows = torch.tensor(self.row_weights[row], dtype=torch.float32, device=device)
        return torch.outer(rows, torch.tensor(self.column_weights[column], dtype=torch.float32, device=device))

    def cut(self, x: Tensor, index: int) -> Tensor:
        """The tile `boxes[index]` of [..., H, W], a view [..., h, w]."""
        if x.shape[-2:] != (self.height, self.width):
            raise ValueError(f"the tiles are planned for {self.height} x {self.width}, not {tuple(x.shape[-2:])}")
        top, left = self.boxes[index]
        return x[..., top : top + self.tile_height, left : left + self.tile_width]

    def add(self, part: Tensor, index: int, total: Tensor) -> None:
        """Add what became of the tile `boxes[index]`, [..., h, w], by its weights to `total` [..., H, W] float32, in place."""
        self.cut(total, index).add_(part.to(total) * self.weight(index, total.device))

    def scaled(self, factor: int) -> "Tiles":
        """The same tiles on a grid of `factor` times as many cells either way; they fade as smoothly as on any grid."""
        height, width, tile_height, tile_width = (
            factor * side for side in (self.height, self.width, self.tile_height, self.tile_width)
        )
        tops, lefts = (tuple(factor * start for start in starts) for starts in (self.tops, self.lefts))
        weights = (_axis_weights(tops, tile_height, height), _axis_weights(lefts, tile_width, width))
        return Tiles(height, width, tile_height, tile_width, tops, lefts, *weights)


def plan_tiles(
    height: int, width: int, tile: int | tuple[int, int], overlap: int, multiple: int = 1, even: bool = False
) -> Tiles:
    """Cover a height × width grid with equal tiles of at most tile × tile cells that share at least `overlap` cells.

    `tile` may be two numbers, height and width. A side shorter than `tile` gets one tile of its own length. Tile sides are
    multiples of `multiple`; a side that is shorter than a tile and is not, has to be padded first (`pad_to_multiple`).
    `even`: tiles are no longer than as many of them need, in place of `tile` and a larger overlap.
    Raises EbrError on impossible sizes.
    """
    if height < 1 or width < 1:
        raise EbrError(f"cannot tile a grid of {height} x {width} cells")
    sides = (tile, tile) if isinstance(tile, int) else tile
    if multiple < 1 or any(side < multiple or side % multiple for side in sides):
        raise EbrError(f"the tile size must be a positive multiple of {multiple}, not {tile}")
    if not 0 <= overlap < min(sides):
        raise EbrError(f"the tile overlap must be at least 0 and less than the tile size {tile}, not {overlap}")
    tops, tile_height = _spread(height, sides[0], overlap, multiple, even)
    lefts, tile_width = _spread(width, sides[1], overlap, multiple, even)
    return Tiles(
        height,
        width,
        tile_height,
        tile_width,
        tops,
        lefts,
        _axis_weights(tops, tile_height, height),
        _axis_weights(lefts, tile_width, width),
    )


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend [..., H, W] below and to the right to multiples of `multiple`, by reflection.

    A side too short to reflect (shorter than its padding plus one) repeats its last cell. `crop` undoes it.
    """
    return pad_to(x, *(size + -size % multiple for size in x.shape[-2:]))


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Extend [..., H, W] below and to the right to `height` × `width`, which are no less, as `pad_to_multiple` does."""
    for dim, wanted in ((-2, height), (-1, width)):
        size = x.shape[dim]
        padding = wanted - size
        if padding:
            index = torch.arange(size + padding, device=x.device)
            beyond = 2 * (size - 1) - index if padding < size else torch.full_like(index, size - 1)
            x = x.index_select(dim, torch.where(index < size, index, beyond))
    return x


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The top left height × width cells of [..., H, W]."""
    return x[..., :height, :width]


def match_tones(picture: Tensor, guide: Tensor, scale: int) -> Tensor:
    """Give a picture made of tiles the tones of a small one made in one piece, so that no tile stands out.

    picture [B, 3, H, W]; guide [B, 3, h, w], the same view; only differences that extend over about `scale` cells of the
    picture or more are taken over, so that no detail is.
    """
    sides = zip(picture.shape[-2:], guide.shape[-2:])
    coarse = [max(1, min(math.ceil(side / scale), small // GUIDE_CELL)) for side, small in sides]
    difference = F.adaptive_avg_pool2d(guide, coarse) - F.adaptive_avg_pool2d(picture, coarse)
    return picture + F.interpolate(difference, picture.shape[-2:], mode="bicubic", align_corners=False)


def _spread(size: int, tile: int, overlap: int, multiple: int, even: bool) -> tuple[tuple[int, ...], int]:
    """Starts of the tiles along one axis, and their length there."""
    if size <= tile:
        if size % multiple:
            raise EbrError(f"a side of {size} is no multiple of {multiple}: pad it first")
        return (0,), size
    count = math.ceil((size - overlap) / (tile - overlap))
    if even:  # no longer than a tile, as that is a multiple which `count` of them reach
        tile = math.ceil((size + (count - 1) * overlap) / count / multiple) * multiple
    return tuple(round(i * (size - tile) / (count - 1)) for i in range(count)), tile


def _axis_weights(starts: tuple[int, ...], tile: int, size: int) -> tuple[tuple[float, ...], ...]:
    """Raised-cosine ramps over what neighbours share, none at the grid's own border, normalised to sum to one."""
    weights = torch.ones(len(starts), tile, dtype=torch.float64)
    for i in range(1, len(starts)):
        shared = starts[i - 1] + tile - starts[i]
        ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(shared, dtype=torch.float64) + 0.5) / shared)
        weights[i, :shared] *= ramp
        weights[i - 1, tile - shared :] *= ramp.flip(0)
    total = torch.zeros(size, dtype=torch.float64)
    for start, weight in zip(starts, weights):
        total[start : start + tile] += weight
    return tuple(tuple((w / total[s : s + tile]).tolist()) for s, w in zip(starts, weights))
