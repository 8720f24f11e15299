"""Which shapes a backbone runs: padding and fixed sizes, tiles, chunks, and the latent with its noise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.bridge.sampler import Callback, Velocity, draw_noise
from ebr_engine.errors import EngineError
from ebr_engine.media.sizes import pad_frames, reduced_size, resized
from ebr_engine.media.tiling import Tiles, pad_to, pad_to_multiple, plan_tiles

WHOLE_SIDE = 2  # times a tile's: what is longer runs in tiles, however narrow it is
SMALLEST_GUIDE = 256  # pixels a side: less does not show what is in the picture


@dataclass(frozen=True)
class Geometry:
    """The shapes of one backbone's runs. An exported transformer may take a single one (`Backbone.fixed`)."""

    backbone: Backbone

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """Side and overlap of the tiles in pixels, checked, with the backbone's defaults; a side of 0 never tiles."""
        multiple, fixed = self.backbone.multiple, self.backbone.fixed
        if fixed and tile is not None:
            raise EngineError(f"this graph runs tiles of {fixed[1]} x {fixed[2]} pixels only; leave the tile size out")
        tile = (min(fixed[1:]) if fixed else self.backbone.spec.tile) if tile is None else tile
        if tile < 0 or tile % multiple:
            raise EngineError(f"the tile size must be a multiple of {multiple} pixels, got {tile}")
        if tile == 0:
            return 0, 0
        overlap = min(self.backbone.spec.overlap, tile // 2) if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise EngineError(f"the tile overlap must be at least 0 and less than the tile of {tile} pixels, got {overlap}")
        return tile, overlap

    def runs_whole(self, height: int, width: int) -> bool:
        """Whether a picture larger than a tile runs in one piece all the same, unless tiles are asked for (`Spec.whole`)."""
        spec, multiple = self.backbone.spec, self.backbone.multiple
        height, width = (math.ceil(side / multiple) * multiple for side in (height, width))
        fits = height * width <= spec.whole * spec.tile**2 and max(height, width) <= WHOLE_SIDE * spec.tile
        return fits and self.backbone.fixed is None

    def tiles(self, height: int, width: int, tile: int, overlap: int, room: int = 0, even: bool = False) -> Tiles:
        """The tiles of a padded picture of height × width pixels, in latent cells; `tile`, `overlap`: of `tile_size`.

        `room`: cells by which the grid is larger than the picture, either way; every tile is, too. `even`: they are no larger
        than they have to be, but for a graph of one size.
        """
        cell = self.backbone.codec.spatial
        sides = self.backbone.fixed[1:] if self.backbone.fixed else 2 * (tile or max(height, width),)
        cells = tuple(side // cell for side in sides)
        height, width, overlap = (length // cell + room for length in (height, width, overlap))
        sides = tuple(side + room for side in cells)
        return plan_tiles(height, width, sides, overlap, self.backbone.patch, even and self.backbone.fixed is None)

    def guide(self, padded: Tensor, side: int) -> Tensor:
        """A small version of padded pixels [B, 3, F, H, W], as large as one tile whose longer side is `side` pixels."""
        return resized(padded, *self._guide_size(*padded.shape[-2:], side))

    def _guide_size(self, height: int, width: int, side: int) -> tuple[int, int]:
        if self.backbone.fixed:
            return self.backbone.fixed[1:]
        return reduced_size(height, width, max(side, SMALLEST_GUIDE), self.backbone.multiple)

    def small(self, pixels: Tensor, finer: int = 1) -> Tensor:
        """A version of pixels [B, 3, F, H, W] that shows all of them in one tile, of sides that the backbone takes.

        `finer`: how many times that version is enlarged before it is seen; it is as much smaller itself.
        """
        return resized(pixels, *self.small_size(*pixels.shape[-2:], finer))

    def small_size(self, height: int, width: int, finer: int = 1) -> tuple[int, int]:
        """Height and width of that version."""
        if self.backbone.fixed:
            return tuple(side // finer for side in self.backbone.fixed[1:])
        spec = self.backbone.spec
        return self._guide_size(height, width, (spec.small_side or spec.tile) // finer)

    @property
    def untiled(self) -> int | None:
        """What to ask for as a tile so that there are none; a graph of one size takes nothing else."""
        return None if self.backbone.fixed else 0

    def chunk_size(self, frames: int | None) -> tuple[int, int]:
        """Length of a clip's chunks in frames, the backbone's default for None, and how many neighbours share by default.

        Raises `EngineError` for a length that the codec does not take.
        """
        length, shared = self.backbone.spec.chunk
        codec = self.backbone.codec
        if self.backbone.fixed and self.backbone.spec.knows_time:
            length = self.backbone.fixed[0]
        length = length if frames is None else frames
        if (taken := codec.frames(length)) != length:
            raise EngineError(f"{self.backbone.name} takes chunks of 4n + 1 frames, not {length}; use {taken}")
        return length, min(shared, length - 1)

    def few(self, height: int, width: int, tile: int | None = None) -> tuple[int, int]:
        """Height and width of the latents in which a picture is run where sizes are few: a tile's, where it is larger."""
        if tile is None:
            tile = 0 if self.runs_whole(height, width) else self.tile_size(None, None)[0]
        multiple = self.backbone.multiple
        sides = (-(-side // multiple) * multiple for side in (height, width))
        _, _, *sides = few_sizes((1, 3, 1, *sides), multiple, self.backbone.codec.temporal, tile)
        return tuple(min(side, tile or side) // self.backbone.codec.spatial for side in sides)

    def ready(self, pixels: Tensor, seed: int, first: int, tile: int, few: bool) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, F, H, W] extended to a shape that is run, and the noise for their latent.

        `first`: number of the first frame in its clip. `few`: extended further, to one of a few sizes, see `few_sizes`.
        """
        padded = self.padded(pixels)
        noise = self.noise(padded.shape, seed, first)
        if not few:
            return padded, noise
        shape = few_sizes(padded.shape, self.backbone.multiple, self.backbone.codec.temporal, tile)
        padded = widened(padded, *shape)
        return padded, repeated(noise, self.latent_shape(padded.shape))

    def padded(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] extended to what codec and transformer take; `EngineError` where that is less."""
        fixed, frames = self.backbone.fixed, self.backbone.codec.frames(pixels.shape[2])
        padded = pad_to_multiple(pad_frames(pixels, max(frames, fixed[0]) if fixed else frames), self.backbone.multiple)
        if fixed and (frames > fixed[0] or any(found < made for found, made in zip(padded.shape[-2:], fixed[1:]))):
            made, found = (f"{f} frame(s) of {h} x {w} pixels" for f, h, w in (fixed, pixels.shape[2:]))
            raise EngineError(f"this graph was made for {made}, not for {found}; export one with --dynamic, or for that size")
        return padded

    def noise(self, shape: Sequence[int], seed: int, first: int) -> Tensor:
        """The noise for the latent of padded pixels [B, 3, F, H, W] that begin with frame `first` of a clip.

        Noise belongs to a moment of the clip, not to a place in a chunk: where chunks overlap, they see the same.
        """
        batch, *cells = self.latent_shape(shape)
        moment = round(first / self.backbone.codec.temporal)
        noise = draw_noise((1, *cells), seed) * self.backbone.noise
        return noise.roll(-moment, dims=2).expand(batch, -1, -1, -1, -1)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, C, f, h, w] of padded pixels [B, 3, F, H, W]."""
        batch, _, frames, height, width = shape
        codec = self.backbone.codec
        return batch, codec.channels, 1 + (frames - 1) // codec.temporal, height // codec.spatial, width // codec.spatial


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


Run = Callable[[Tensor, Tensor, Callback | None], Tensor]  # pixels [B, 3, F, H, W], noise of their latent → restored pixels


def tiled(
    velocity: Velocity, tiles: Tiles, at_once: int, equal: bool = False, heard: Callable[[int], None] | None = None
) -> Velocity:
    """The same velocity function evaluated tile by tile, `at_once` together, so that neighbours agree after every step.

    `heard(count)`: after every group, how many tiles it had; what it raises ends the run.

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
            if heard is not None:
                heard(len(group))
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


def stretch(callback: Callback | None, first: int, count: int, total: int) -> Callback | None:
    """The callback of a part that is `count` of `total` units of the whole, from number `first` on, whatever it counts itself."""
    return callback and (lambda done, steps: callback(first + count * done // steps, total))
