"""A few sizes in place of any: what is compiled or captured for a size should serve pictures of many.

Sides count in tokens and take the next number of at most three significant binary digits (1 to 8, 10, 12, 14, 16, 20, …), so
that a side grows by less than a quarter, a picture by less than 9/16 of its pixels, and by an eighth on average over all
sizes up to 512. Sides longer than a tile stay: they are cut into tiles of one size. Frames take the same numbers, batches
powers of two.
"""

import torch
from torch import Tensor

from ebr_engine.media.tiling import pad_to


def rounded(count: int) -> int:
    """The next number, from `count` on, of at most three significant binary digits."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def few_sizes(shape: tuple[int, ...], multiple: int, temporal: int, tile: int) -> tuple[int, int, int, int]:
    """Batch, frames, height and width in which pixels of `shape` [B, 3, F, H, W], sides multiples of `multiple`, are run.

    `tile`: pixels, above which a side is left as it is; 0 for no tiles. `temporal`: frames that a latent frame spans.
    """
    batch, _, frames, *sides = shape
    frames = 1 + temporal * rounded((frames - 1) // temporal) if frames > 1 else 1
    height, width = (side if 0 < tile < side else _at_most(multiple * rounded(side // multiple), tile) for side in sides)
    return 1 << (batch - 1).bit_length(), frames, height, width


def _at_most(side: int, tile: int) -> int:
    return min(side, tile) if tile else side


def widened(pixels: Tensor, batch: int, frames: int, height: int, width: int) -> Tensor:
    """Pixels [B, 3, F, H, W] extended: sides by reflection, frames and batch by repeating the last."""
    pixels = pad_to(pixels, height, width)
    for dim, size in ((0, batch), (2, frames)):
        if size > pixels.shape[dim]:
            last = pixels.narrow(dim, pixels.shape[dim] - 1, 1)
            pixels = torch.cat((pixels, last.repeat_interleave(size - pixels.shape[dim], dim)), dim)
    return pixels


def repeated(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise [B, C, f, h, w] extended to `shape` by beginning anew: what was there stays where it is."""
    for dim, size in enumerate(shape):
        if size > noise.shape[dim]:
            noise = noise.index_select(dim, torch.arange(size, device=noise.device) % noise.shape[dim])
    return noise
