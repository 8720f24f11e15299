"""Which shapes a backbone runs: padding and fixed sizes, tiles, chunks, and the latent with its noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ebr_engine import buckets
from ebr_engine.backbones.loading import Backbone
from ebr_engine.errors import EngineError
from ebr_engine.media.sizes import pad_frames, reduced, resized
from ebr_engine.media.tiling import Tiles, pad_to_multiple, plan_tiles
from ebr_engine.sampler import draw_noise

DEFAULT_TILE = {"mini": 512, "wan": 832, "flux": 1024}  # the sizes that the backbones know
DEFAULT_OVERLAP = 64
DEFAULT_CHUNK = {"mini": (4, 0), "wan": (33, 8), "flux": (1, 0)}  # frames restored together, and what neighbours share
SMALLEST_GUIDE = 256  # pixels a side: less does not show what is in the picture


@dataclass(frozen=True)
class Geometry:
    """The shapes of one backbone's runs. An exported transformer may take a single one (`Backbone.fixed`)."""

    parts: Backbone

    def tile_size(self, tile: int | None, overlap: int | None) -> tuple[int, int]:
        """Side and overlap of the tiles in pixels, checked, with the backbone's defaults; a side of 0 never tiles."""
        multiple, fixed = self.parts.multiple, self.parts.fixed
        if fixed and tile is not None:
            raise EngineError(f"this graph runs tiles of {fixed[1]} x {fixed[2]} pixels only; leave the tile size out")
        tile = (min(fixed[1:]) if fixed else DEFAULT_TILE[self.parts.name]) if tile is None else tile
        if tile < 0 or tile % multiple:
            raise EngineError(f"the tile size must be a multiple of {multiple} pixels, got {tile}")
        if tile == 0:
            return 0, 0
        overlap = min(DEFAULT_OVERLAP, tile // 2) if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise EngineError(f"the tile overlap must be at least 0 and less than the tile of {tile} pixels, got {overlap}")
        return tile, overlap

    def tiles(self, height: int, width: int, tile: int, overlap: int, room: int = 0) -> Tiles:
        """The tiles of a padded picture of height × width pixels, in latent cells; `tile`, `overlap`: of `tile_size`.

        `room`: cells by which the grid is larger than the picture, either way; every tile is, too.
        """
        cell = self.parts.codec.spatial
        sides = self.parts.fixed[1:] if self.parts.fixed else 2 * (tile or max(height, width),)
        cells = tuple(side // cell for side in sides)
        height, width, overlap = (length // cell + room for length in (height, width, overlap))
        return plan_tiles(height, width, tuple(side + room for side in cells), overlap, self.parts.patch)

    def guide(self, padded: Tensor, side: int) -> Tensor:
        """A small version of padded pixels [B, 3, F, H, W], as large as one tile whose longer side is `side` pixels."""
        if self.parts.fixed:
            return resized(padded, *self.parts.fixed[1:])
        return reduced(padded, max(side, SMALLEST_GUIDE), self.parts.multiple)

    def chunk_size(self, frames: int | None) -> tuple[int, int]:
        """Length of a clip's chunks in frames, the backbone's default for None, and how many neighbours share by default.

        Raises `EngineError` for a length that the codec does not take.
        """
        length, shared = DEFAULT_CHUNK[self.parts.name]
        codec = self.parts.codec
        if self.parts.fixed and codec.temporal > 1:
            length = self.parts.fixed[0]
        length = length if frames is None else frames
        if (taken := codec.frames(length)) != length:
            raise EngineError(f"{self.parts.name} takes chunks of 4n + 1 frames, not {length}; use {taken}")
        return length, min(shared, length - 1)

    def ready(self, pixels: Tensor, seed: int, first: int, tile: int, few: bool) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, F, H, W] extended to a shape that is run, and the noise for their latent.

        `first`: number of the first frame in its clip. `few`: extended further, to one of a few sizes, see `buckets.py`.
        """
        padded = self.padded(pixels)
        noise = self.noise(padded.shape, seed, first)
        if not few:
            return padded, noise
        shape = buckets.few_sizes(padded.shape, self.parts.multiple, self.parts.codec.temporal, tile)
        padded = buckets.widened(padded, *shape)
        return padded, buckets.repeated(noise, self.latent_shape(padded.shape))

    def padded(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] extended to what codec and transformer take; `EngineError` where that is less."""
        fixed, frames = self.parts.fixed, self.parts.codec.frames(pixels.shape[2])
        padded = pad_to_multiple(pad_frames(pixels, max(frames, fixed[0]) if fixed else frames), self.parts.multiple)
        if fixed and (frames > fixed[0] or any(found < made for found, made in zip(padded.shape[-2:], fixed[1:]))):
            made, found = (f"{f} frame(s) of {h} x {w} pixels" for f, h, w in (fixed, pixels.shape[2:]))
            raise EngineError(f"this graph was made for {made}, not for {found}; export one with --dynamic, or for that size")
        return padded

    def noise(self, shape: Sequence[int], seed: int, first: int) -> Tensor:
        """The noise for the latent of padded pixels [B, 3, F, H, W] that begin with frame `first` of a clip.

        Noise belongs to a moment of the clip, not to a place in a chunk: where chunks overlap, they see the same.
        """
        batch, *cells = self.latent_shape(shape)
        moment = round(first / self.parts.codec.temporal)
        noise = draw_noise((1, *cells), seed) * self.parts.noise
        return noise.roll(-moment, dims=2).expand(batch, -1, -1, -1, -1)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, C, f, h, w] of padded pixels [B, 3, F, H, W]."""
        batch, _, frames, height, width = shape
        codec = self.parts.codec
        return batch, codec.channels, 1 + (frames - 1) // codec.temporal, height // codec.spatial, width // codec.spatial
