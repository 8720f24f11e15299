"""Tiles for networks that look beyond what they give: read with a margin, of which the result is thrown away."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebr_engine.media.tiling import plan_tiles


@dataclass(frozen=True)
class Window:
    """A tile, by rows and columns: what goes in, what of the result is kept, where that belongs and with which weights."""

    source: tuple[slice, slice]
    kept: tuple[slice, slice]
    target: tuple[slice, slice]
    weights: tuple[Tensor, Tensor]

    def cut(self, x: Tensor) -> Tensor:
        """What goes in, of [..., H, W]."""
        return x[(..., *self.source)]

    def add(self, part: Tensor, total: Tensor) -> None:
        """Add what is kept of a result, weighted, to `total`, in place; the windows of a plan add up to the whole."""
        weight = torch.outer(*self.weights).to(total.device)
        total[(..., *self.target)] += part[(..., *self.kept)].to(total) * weight


def plan_windows(height: int, width: int, tile: int, overlap: int, margin: int, read: int, write: int) -> list[Window]:
    """Cover a grid of cells with windows of at most tile × tile cells, neighbours of which share at least `overlap`.

    A cell is `read` × `read` of what goes in and `write` × `write` of what comes out. Where a window ends inside the grid,
    its outermost `margin` cells are read but not kept; what neighbours share beyond that is blended. 2·margin ≤ overlap.
    """
    plan = plan_tiles(height, width, tile - 2 * margin, overlap - 2 * margin)
    scaled = plan.scaled(write)

    def axis(start: int, length: int, side: int, weights: Sequence[float]) -> tuple[slice, slice, slice, Tensor]:
        begin, end = max(0, start - margin), min(side, start + length + margin)
        kept = slice((start - begin) * write, (start - begin + length) * write)
        target = slice(start * write, (start + length) * write)
        return slice(begin * read, end * read), kept, target, torch.tensor(weights)

    rows = [axis(top, plan.tile_height, height, w) for top, w in zip(plan.tops, scaled.row_weights)]
    columns = [axis(left, plan.tile_width, width, w) for left, w in zip(plan.lefts, scaled.column_weights)]
    return [Window(*zip(row, column)) for row in rows for column in columns]
