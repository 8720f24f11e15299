"""A picture through the sampler in tiles: blended in the latent inside every step, or in pixels when all steps are done.

Either way there is one field of noise for the whole picture, of which a tile sees its part, and what tiles cannot know (how
much haze or light there is) is taken from a small version of the whole, once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebr_engine.media.tiling import Tiles, plan_tiles
from ebr_engine.sampler import Callback, Velocity

BLENDS = ("latent", "pixel")
Run = Callable[[Tensor, Tensor, Callback | None], Tensor]  # pixels [B, 3, F, H, W], noise of their latent → restored pixels


def tiled(velocity: Velocity, tiles: Tiles, at_once: int, equal: bool = False) -> Velocity:
    """The same velocity function evaluated tile by tile, `at_once` together, so that neighbours agree after every step.

    `tiles` lie on the latent's grid. The result is float32, summed tile by tile: no more than a group of them is held.
    `equal` makes all groups of one size, as near to `at_once` as wastes least; the last one may repeat its last tile.
    """
    if equal:
        at_once = math.ceil(len(tiles) / math.ceil(len(tiles) / at_once))

    def blended(state: Tensor, step: Any) -> Tensor:
        total = torch.zeros(state.shape, dtype=torch.float32, device=state.device)
        for first in range(0, len(tiles), at_once):
            group = range(first, min(first + at_once, len(tiles)))
            cut = [tiles.cut(state, i) for i in group]
            cut += cut[-1:] * (at_once - len(cut) if equal else 0)
            for i, part in zip(group, velocity(torch.cat(cut), step).chunk(len(cut))):
                tiles.add(part, i, total)
        return total

    return blended


def in_pixels(run: Run, pixels: Tensor, noise: Tensor, tiles: Tiles, cell: int, callback: Callback | None) -> Tensor:
    """Restore each tile by itself, all steps and the decoder too, and blend the results: needs little more than one tile does.

    `pixels` [B, 3, F, H, W]; `noise` for their latent, on whose grid `tiles` lie; a latent cell spans `cell` pixels either
    way. The result is float32 on the CPU. `callback` hears of the steps of all tiles.
    """
    scaled, count = tiles.scaled(cell), len(tiles)
    total = torch.zeros(pixels.shape, dtype=torch.float32)
    for i in range(count):
        scaled.add(run(scaled.cut(pixels, i), tiles.cut(noise, i), share(callback, i, count)), i, total)
    return total


def in_chunks(
    run: Callable[[Tensor, int, Callback | None], Tensor], pixels: Tensor, length: int, overlap: int, callback: Callback | None
) -> Tensor:
    """Restore a clip [B, 3, F, H, W] in chunks of `length` frames that fade over the `overlap` or more that they share.

    `run(chunk, first, callback)` restores one whose first frame is the clip's frame `first`.
    """
    chunks = plan_tiles(pixels.shape[2], 1, (length, 1), overlap)
    total = torch.zeros(pixels.shape, dtype=torch.float32)
    for i, (start, weights) in enumerate(zip(chunks.tops, chunks.row_weights)):
        part = slice(start, start + chunks.tile_height)
        restored = run(pixels[:, :, part], start, share(callback, i, len(chunks)))
        total[:, :, part] += restored * torch.tensor(weights)[:, None, None]
    return total


def share(callback: Callback | None, index: int, count: int) -> Callback | None:
    """The callback of part `index` of `count`, for which the whole's hears of the steps of all parts."""
    return callback and (lambda done, steps: callback(index * steps + done, count * steps))
