"""A backbone at work: one attempt at restoring pixels in a given way, and the ladder of ways while memory runs out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.backbones.packed import unpack_trunk
from ebr_engine.fitting import Fitting, costs_of, rungs_of
from ebr_engine.geometry import DEFAULT_CHUNK, Geometry
from ebr_engine.media.tiling import crop, match_tones
from ebr_engine.memory import Rung, Work
from ebr_engine.offload import OFFLOADS, inner, offloaded
from ebr_engine.plan import Plan
from ebr_engine.runner import Runner, Tiling
from ebr_engine.safety import Safety
from ebr_engine.sampler import Callback
from ebr_engine.spinning import room_of
from ebr_engine.tiled import in_chunks, in_pixels, share

TILES_AT_ONCE = 4
TONE_CELLS = 4  # cells a tile, either way, in which a tiled picture takes the tones of the whole


class Pipeline:
    """Runs plans on a loaded backbone, each in the first way that fits into memory.

    `offload`: what waits on the CPU while `device` computes; for `blocks` the trunk has to be on the CPU when it comes in.
    `compile`: see `runner.py`. `parts`, `runner` and `safety` are made anew where the ladder is descended.
    """

    def __init__(self, parts: Backbone, device: torch.device, offload: str, compile: str, fitting: Fitting):
        self.fitting, self.asked_offload = fitting, offload
        self._place(offloaded(parts, device, offload), offload, compile)
        self.costs = costs_of(self.parts)

    def _place(self, parts: Backbone, offload: str, compile: str) -> None:
        self.parts, self.offload = parts, offload
        self.runner = Runner(parts, compile, offload == "blocks")
        self.safety = Safety(parts, offload == "blocks")

    @property
    def geometry(self) -> Geometry:
        """The shapes that the backbone runs."""
        return Geometry(self.parts)

    def run(
        self,
        pixels: Tensor,
        plan: Plan,
        seed: int,
        tile: int | None,
        overlap: int | None,
        blend: str,
        first: int = 0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Clips [B, 3, F, H, W] in [0, 1] → restored ones, float32 on the CPU; arguments as those of `Restorer.run`."""
        rungs, work = self.rungs(pixels.shape, tile, overlap, blend)

        def attempt(rung: Rung) -> Tensor:
            self.apply(rung)
            return Attempt(self.parts, self.runner, self.safety, plan, rung, seed).run(pixels, first, callback)

        return self.fitting.run(rungs, self.costs, work, attempt, self._free)

    def rungs(self, shape: Sequence[int], tile: int | None, overlap: int | None, blend: str) -> tuple[list[Rung], Work]:
        """The ways to restore pixels [B, 3, F, H, W], from the one that is asked for down, and what there is to do."""
        batch, _, frames, height, width = shape
        if self.parts.codec.temporal == 1:  # a clip is a batch of pictures
            batch, frames = 1, batch * frames
        codec_tile = getattr(inner(self.parts.codec), "asked_tile", None)
        sides = self.geometry.tile_size(tile, overlap)
        start = Rung(*sides, blend, TILES_AT_ONCE, frames, codec_tile, self.asked_offload)
        return rungs_of(self.parts, start, self.costs, self.runner.compile == "on"), Work(batch, frames, height, width)

    def chunk_size(
        self, frames: int | None, overlap: int | None, size: tuple[int, int] | None = None, tile: int | None = None
    ) -> tuple[int, int]:
        """See `Restorer.chunk_size`."""
        length, shared = self.geometry.chunk_size(frames)
        if size is not None and self.parts.codec.temporal > 1 and not self.parts.fixed:
            rungs, work = self.rungs((1, 3, length, *size), tile, None, "latent")
            length = rungs[self.fitting.rung(rungs, self.costs, work)].frames
        return length, min(shared, length - 1) if overlap is None else overlap

    def apply(self, rung: Rung) -> None:
        """Have codec and blocks be where a rung says, and the codec take tiles of its size."""
        if OFFLOADS.index(rung.offload) > OFFLOADS.index(self.offload):
            if rung.offload == "blocks":
                unpack_trunk(self.parts.trunk)
                self.parts.trunk.to("cpu")
            parts = replace(self.parts, codec=inner(self.parts.codec))
            self._place(offloaded(parts, self.parts.device, rung.offload), rung.offload, self.runner.compile)
        if self.costs.tiles_codec:
            inner(self.parts.codec).set_tile(rung.codec_tile)

    def _free(self) -> None:
        """Drop what a run left behind: recorded graphs, compiled code, and the transformer in other precisions."""
        self._place(self.parts, self.offload, self.runner.compile)


@dataclass(frozen=True)
class Attempt:
    """Restores pixels by one plan in one way, a rung of the ladder."""

    parts: Backbone
    runner: Runner
    safety: Safety
    plan: Plan
    rung: Rung
    seed: int

    @cached_property
    def geometry(self) -> Geometry:
        """The shapes that the backbone runs."""
        return Geometry(self.parts)

    def run(self, pixels: Tensor, first: int = 0, callback: Callback | None = None) -> Tensor:
        """Clips [B, 3, F, H, W] that begin with frame `first` of theirs → restored ones, float32 on the CPU."""
        frames = pixels.shape[2]
        if self.parts.codec.temporal == 1 and (frames > 1 or len(pixels) > self.rung.frames):
            return self._frame_by_frame(pixels, callback)
        if frames > self.rung.frames:
            shared = min(DEFAULT_CHUNK[self.parts.name][1], self.rung.frames - 1)

            def run(chunk: Tensor, start: int, callback: Callback | None) -> Tensor:
                return self.run(chunk, first + start, callback)

            return in_chunks(run, pixels, self.rung.frames, shared, callback)
        return self._together(pixels, first, callback)

    def _frame_by_frame(self, pixels: Tensor, callback: Callback | None) -> Tensor:
        """Clips of a backbone that knows no time: pictures, as many together as the rung allows, all with the same noise."""
        groups = pixels.transpose(1, 2).flatten(0, 1).unsqueeze(2).split(self.rung.frames)
        parts = [self.run(x, 0, share(callback, i, len(groups))) for i, x in enumerate(groups)]
        return torch.cat(parts).squeeze(2).unflatten(0, (len(pixels), -1)).transpose(1, 2)

    def _together(self, pixels: Tensor, first: int, callback: Callback | None) -> Tensor:
        """Frames that run together, whole or in tiles."""
        batch, _, frames, height, width = pixels.shape
        padded, noise = self._ready(pixels, first, self.rung.tile)
        tiles = self.geometry.tiles(*padded.shape[-2:], self.rung.tile, self.rung.overlap)
        if len(tiles) == 1:
            restored = self._whole(padded, noise, callback)
        else:
            # How much haze or light there is shows in the whole picture only; the tiles add the detail.
            cell = self.parts.codec.spatial
            side = cell * max(tiles.tile_height, tiles.tile_width)
            small = self.geometry.guide(padded, side)
            guide = crop(self._whole(*self._ready(small, first, 0)), *small.shape[-2:])
            if self.rung.blend == "pixel":
                restored = in_pixels(self._whole, padded, noise, tiles, cell, callback)
            else:
                room = room_of(self.parts.codec, self.plan.views)
                moved = self.geometry.tiles(*padded.shape[-2:], self.rung.tile, self.rung.overlap, room)
                restored = self._whole(padded, noise, callback, Tiling(moved, self.rung.at_once))
            by_frame = (x.transpose(1, 2).flatten(0, 1) for x in (restored, guide))
            matched = match_tones(*by_frame, side // TONE_CELLS)
            restored = matched.unflatten(0, (len(padded), -1)).transpose(1, 2)
        return crop(restored.clamp(0, 1), height, width)[:batch, :, :frames]

    def _ready(self, pixels: Tensor, first: int, tile: int) -> tuple[Tensor, Tensor]:
        return self.geometry.ready(pixels, self.seed, first, tile, few=self.runner.static)

    def _whole(self, pixels: Tensor, noise: Tensor, callback: Callback | None = None, tiling: Tiling | None = None) -> Tensor:
        """Padded pixels through codec, sampler and codec."""
        degraded = self.parts.codec.encode(pixels.to(self.parts.device))
        latent = self.runner.run(self.plan, degraded, noise, callback, tiling)
        if not latent.isfinite().all():
            latent = self.safety.run(self.plan, degraded, noise, tiling)
        return self.parts.codec.decode(latent).cpu()
