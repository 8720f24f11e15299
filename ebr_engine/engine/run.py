"""A backbone at work: one attempt at restoring pixels in a given way, and the next way when memory runs out."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import unpack_trunk
from ebr_engine.backbones.views import room_of
from ebr_engine.bridge.sampler import Callback
from ebr_engine.engine.costs import costs_of
from ebr_engine.engine.execute import Runner, Tiling
from ebr_engine.engine.fallback import Fitting, Safety, fallbacks_of, release
from ebr_engine.engine.layout import Geometry, in_chunks, in_pixels, share, stretch
from ebr_engine.engine.memory import Costs, Fallback, Work
from ebr_engine.engine.offload import inner, offloaded
from ebr_engine.engine.parallel import heads_of, led
from ebr_engine.engine.plan import Plan
from ebr_engine.engine.ranks import Ranks
from ebr_engine.errors import EngineError, out_of_memory, warn
from ebr_engine.media import motion
from ebr_engine.media.calm import kept_calm
from ebr_engine.media.deconvolution import deconvolved
from ebr_engine.media.detail import NEIGHBOURS, detail_of_input, noise_of
from ebr_engine.media.sizes import enlarged, resized
from ebr_engine.media.tiling import Tiles, crop, match_tones
from ebr_engine.request import OFFLOADS

TILES_AT_ONCE = {"cuda": 4, "cpu": 1}  # one tile fills a CPU; it can be stopped and heard of sooner, in less memory
PIXELS_AT_ONCE = 512 * 512  # of pictures together on a CPU: beyond it memory that is handed out anew costs more than is gained
LONG_FRAMES = 12  # of a chunk where the backbone knows no time, and neighbours smooth each other afterwards
LONG_PIXELS = 48 << 20  # of such a chunk, unless the backbone's own is larger
NOISY = 0.01  # standard deviation of the noise in a clip with its input's detail, from which on its frames agree
TONE_CELLS = 4  # cells a tile, either way, in which a tiled picture takes the tones of the whole


class Engine:
    """Runs plans on a loaded backbone, each in the first way that fits into memory.

    `offload`: what waits on the CPU while `device` computes; for `blocks` the trunk has to be on the CPU when it comes in.
    `compile`: see `execute.py`. `backbone`, `runner` and `safety` are made anew where memory ends.
    """

    def __init__(self, backbone: Backbone, device: torch.device, offload: str, compile: str, fitting: Fitting):
        self.fitting, self.asked_offload = fitting, offload
        self.ranks: Ranks | None = None
        self._place(offloaded(backbone, device, offload), offload, compile)
        self._costs = costs_of(self.backbone)

    def _place(self, backbone: Backbone, offload: str, compile: str) -> None:
        if self.ranks and compile == "auto":
            compile = "off"  # what pays is measured, and would be found elsewhere at another time
        self.backbone, self.offload = backbone, offload
        self.runner = Runner(backbone, compile, offload == "blocks")
        self.safety = Safety(backbone, offload == "blocks")
        if self.ranks and self.ranks.leads:
            self.backbone, self.runner, self.safety = led(self.ranks, self.backbone, self.runner, offload == "blocks")
        self.geometry = Geometry(self.backbone)

    def join(self, ranks: Ranks) -> bool:
        """Work with the processes of other devices from here on; whether this one has anything to do with them.

        Raises `EngineError` for a transformer whose tokens cannot be shared, and `DeviceLost` where a process has ended.
        """
        ranks.join(heads_of(self.backbone))
        if ranks.idle or ranks.size == 1:  # no two can share the heads: the first one works alone
            ranks.end()
            return False
        self.ranks = ranks
        self._place(self.backbone, self.offload, self.runner.compile)
        return True

    @property
    def costs(self) -> Costs:
        """What a run costs, as the runner runs it now."""
        graphs = self.runner.graphs is not None
        return replace(self._costs, few_sizes=graphs or self.runner.compile == "on", graphs=graphs)

    def begin(self) -> None:
        """A new file begins; see `Fitting.begin`."""
        self.fitting.begin()

    def expect(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Pictures or frames of these sizes (height, width) are to come, each as often as it comes."""
        self.runner.expect(self.geometry.few(height, width) for height, width in sizes)

    def run(
        self,
        pixels: Tensor,
        plan: Plan,
        first: int = 0,
        callback: Callback | None = None,
        *,
        seed: int = 42,
        tile: int | None = None,
        tile_overlap: int | None = None,
        tile_blend: str = "latent",
        detail: str = "auto",
        deconvolve: str = "auto",
        temporal_window: int | None = 0,
    ) -> Tensor:
        """Clips [B, 3, F, H, W] in [0, 1] → restored ones, float32 on the CPU; arguments as those of `Restorer.run`.

        Raises what the way that needs least raises.
        """
        how = {"seed": seed, "tile": tile, "tile_overlap": tile_overlap, "tile_blend": tile_blend}
        if plan.deconvolves(deconvolve):
            more = {"detail": detail, "deconvolve": "off", "temporal_window": temporal_window}
            return calmed(pixels, self.run(self.unblurred(pixels), plan, first, callback, **how | more))
        how["deconvolve"] = "off"
        if pixels.shape[2] > 1 and (reach := self.window(temporal_window)):
            clips = self.run(pixels, plan, first, callback, detail=detail, **how).transpose(1, 2)  # [B, F, 3, H, W]
            steady = temporal_window is None and plan.by_input(detail)  # but for noise, which is its input's
            quiet = [steady and noise_of(clip).mean() < NOISY for clip in clips]
            clips = torch.stack([clip if q else agreed(clip, reach) for clip, q in zip(clips, quiet)]).transpose(1, 2)
            return clips if plan.by_input(detail) else calmed(pixels, clips)
        if plan.by_input(detail):
            self.geometry.tile_size(tile, tile_overlap)  # refuses impossible ones, though there are no tiles
            small = self.geometry.small(pixels, plan.supersample)
            restored = self.run(
                small, plan, first, callback, seed=seed, tile=self.geometry.untiled, detail="model", deconvolve="off"
            )
            return detail_of_input(pixels, small, restored)
        seen = enlarged(pixels, plan.supersample)
        ways, work = self.fallbacks(seen.shape, tile, tile_overlap, tile_blend)
        index = self.fitting.choose(ways, self.costs, work)
        while True:
            try:
                self.apply(ways[index])
                attempt = Attempt(self.backbone, self.geometry, self.runner, self.safety, plan, ways[index], seed)
                restored = attempt.run(seen, first, callback)
                return restored if seen is pixels else resized(restored, *pixels.shape[-2:])
            except (MemoryError, RuntimeError) as error:
                lower = None if self.ranks else self.fitting.next(ways, self.costs, work, index)
                if not out_of_memory(error) or lower is None:
                    raise
            # Outside of the handler: the error's traceback held what the attempt had made.
            self._place(self.backbone, self.offload, self.runner.compile)  # graphs, compiled code, other precisions
            release()
            self.fitting.descend(ways, lower, work)
            index = lower

    def unblurred(self, pixels: Tensor) -> Tensor:
        """Clips [B, 3, F, H, W] in [0, 1] without the blur that each shows; `EngineError` where a limit leaves no room for it."""
        self.fitting.check_filter(self.costs, Work(len(pixels), *pixels.shape[2:]))
        return torch.stack([deconvolved(clip.transpose(0, 1)).transpose(0, 1) for clip in pixels])

    def fallbacks(self, shape: Sequence[int], tile: int | None, overlap: int | None, blend: str) -> tuple[list[Fallback], Work]:
        """The ways to restore pixels [B, 3, F, H, W], from the one that is asked for down, and what there is to do."""
        batch, _, frames, height, width = shape
        together = frames
        if not self.backbone.spec.knows_time:  # a clip is a batch of pictures
            together = min(batch * frames, self.pictures_at_once(batch, height * width))
            batch, frames = 1, batch * frames
        codec_tile = getattr(inner(self.backbone.codec), "asked_tile", None)
        sides = self.geometry.tile_size(tile, overlap)
        at_once = TILES_AT_ONCE[self.backbone.device.type]
        start = Fallback(*sides, blend, at_once, together, codec_tile, self.asked_offload)
        ways = fallbacks_of(self.backbone, start, self.costs, self.runner.compile == "on")
        larger = max(height, width) > start.tile
        if tile is None and larger and not self.fitting.low and self.geometry.runs_whole(height, width):
            ways = [replace(start, tile=0, overlap=0), *ways]
        return ways, Work(batch, frames, height, width)

    def pictures_at_once(self, batch: int, pixels: int) -> int:
        """How many pictures of a batch, or frames of a clip, are restored together where nothing passes between them."""
        most = max(batch, self.backbone.spec.chunk[0])
        return most if self.backbone.device.type != "cpu" else max(1, min(most, PIXELS_AT_ONCE // pixels))

    def stages(self, plan: Plan, height: int, width: int, how: Mapping[str, Any]) -> list[Plan]:
        """The runs of a picture: those that see it finer than its pixels, where it is small and they fit into what is allowed.

        Where the detail is the input's, it is small if it is no larger than the version that is seen. `how`: options of `run`.
        """
        tiles, spec = (how["tile_overlap"], how["tile_blend"]), self.backbone.spec

        def fits(stage: Plan) -> bool:
            sides = self.seen_size(stage, height, width, how["detail"])
            tile = how["tile"]
            if stage.by_input(how["detail"]):
                tile = self.geometry.untiled
                if max(height, width) > (spec.small_side or spec.tile):
                    return False
            ways, work = self.fallbacks((1, spec.colours, 1, *sides), tile, *tiles)
            return self.fitting.fits(ways, self.costs, work)

        both = zip(plan.stages, plan.stages_for(height, width))
        return [finer if finer is not stage and fits(finer) else stage for stage, finer in both]

    def seen_size(self, plan: Plan, height: int, width: int, detail: str) -> tuple[int, int]:
        """Height and width in which the transformer sees a picture in one stage of a plan, before tiles."""
        if plan.by_input(detail):
            height, width = self.geometry.small_size(height, width, plan.supersample)
        return height * plan.supersample, width * plan.supersample

    def evaluations(
        self, height: int, width: int, plan: Plan, tile: int | None, overlap: int | None, blend: str, detail: str
    ) -> Counter[tuple[int, int]]:
        """How often a picture has the transformer evaluated, by the size of latents (height, width), in one stage of a plan."""
        steps, cell = len(plan.table), self.backbone.codec.spatial
        if plan.by_input(detail):
            sides = self.seen_size(plan, height, width, detail)
            return Counter({tuple(side // cell for side in sides): steps})
        height, width = height * plan.supersample, width * plan.supersample
        ways, work = self.fallbacks((1, 3, 1, height, width), tile, overlap, blend)
        way = ways[self.fitting.choose(ways, self.costs, work)]
        sides = tuple(math.ceil(side / self.backbone.multiple) * self.backbone.multiple for side in (height, width))
        tiles = self.geometry.tiles(*sides, way.tile, way.overlap, even=True)
        small = (tiles.tile_height, tiles.tile_width)
        guides = len(tiles) > 1 and plan.supersample == 1  # a small version, about a tile
        return Counter({small: steps * (len(tiles) + guides)})

    def chunk_size(
        self,
        frames: int | None,
        overlap: int | None,
        size: tuple[int, int] | None,
        by_input: bool,
        how: Mapping[str, Any],
    ) -> tuple[int, int]:
        """See `Restorer.chunk_size`."""
        length, shared = self.geometry.chunk_size(frames)
        tile = how["tile"]
        if not self.backbone.spec.knows_time and (by_input or self.window(how["temporal_window"])):
            fitting = LONG_PIXELS // (size[0] * size[1]) if size else LONG_FRAMES
            length = max(length, min(LONG_FRAMES, fitting)) if frames is None else frames
            shared = min(NEIGHBOURS, length - 1)
        if by_input and size is not None:
            size, tile = self.geometry.small_size(*size), self.geometry.untiled
        if size is not None and self.backbone.spec.knows_time and not self.backbone.fixed:
            shape = (1, self.backbone.spec.colours, length, *size)
            ways, work = self.fallbacks(shape, tile, how["tile_overlap"], how["tile_blend"])
            length = ways[self.fitting.choose(ways, self.costs, work)].frames
        return length, min(shared, length - 1) if overlap is None else overlap

    def window(self, asked: int | None) -> int:
        """Frames on either side with which each frame of a clip agrees, `asked` or the backbone's; 0 where it knows time.

        Raises `EngineError` where it is asked for a backbone that knows time, and `EbrError` where OpenCV is missing for it.
        """
        spec = self.backbone.spec
        if spec.knows_time:
            if asked:
                raise EngineError(f"{spec.name} sees a clip's frames together; leave --temporal-window out")
            return 0
        if asked is None and spec.window and not motion.available():
            warn("the frames of a clip are restored one by one; with pip install 'ebr-engine[clips]' they agree with each other")
            return 0
        reach = spec.window if asked is None else asked
        if reach:
            motion.opencv()
        return reach

    def apply(self, way: Fallback) -> None:
        """Have codec and blocks be where a way to run says, and the codec take tiles of its size; on all devices."""
        if self.ranks and self.ranks.leads:
            self.ranks.tell({"do": "apply", "way": asdict(way)})
        if OFFLOADS.index(way.offload) > OFFLOADS.index(self.offload):
            if way.offload == "blocks":
                unpack_trunk(self.backbone.trunk)
                self.backbone.trunk.to("cpu")
            backbone = replace(self.backbone, codec=inner(self.backbone.codec))
            self._place(offloaded(backbone, self.backbone.device, way.offload), way.offload, self.runner.compile)
        if self.costs.tiles_codec:
            inner(self.backbone.codec).set_tile(way.codec_tile)


@dataclass(frozen=True)
class Attempt:
    """Restores pixels by one plan in one way."""

    backbone: Backbone
    geometry: Geometry
    runner: Runner
    safety: Safety
    plan: Plan
    way: Fallback
    seed: int

    def run(self, pixels: Tensor, first: int = 0, callback: Callback | None = None) -> Tensor:
        """Clips [B, 3, F, H, W] that begin with frame `first` of theirs → restored ones, float32 on the CPU."""
        batch, _, frames, height, width = pixels.shape
        if not self.backbone.spec.knows_time and (frames > 1 or batch > self.way.frames):
            return self._frame_by_frame(pixels, callback)
        if frames > self.way.frames:
            shared = min(self.backbone.spec.chunk[1], self.way.frames - 1)

            def run(chunk: Tensor, start: int, callback: Callback | None) -> Tensor:
                return self.run(chunk, first + start, callback)

            return in_chunks(run, pixels, self.way.frames, shared, callback)
        padded, noise = self._ready(pixels, first, self.way.tile)
        if len(self._tiles(padded)) == 1:
            restored = self._whole(padded, noise, callback)
        else:
            restored = self._tiled(padded, noise, first, callback)
        if bounds := self.backbone.spec.bounds:
            restored = restored.clamp(*bounds)
        return crop(restored, height, width)[:batch, :, :frames]

    def _frame_by_frame(self, pixels: Tensor, callback: Callback | None) -> Tensor:
        """Clips of a backbone that knows no time: pictures, as many together as the way allows, all with the same noise."""
        groups = pixels.transpose(1, 2).flatten(0, 1).unsqueeze(2).split(self.way.frames)
        parts = [self.run(x, 0, share(callback, i, len(groups))) for i, x in enumerate(groups)]
        return torch.cat(parts).squeeze(2).unflatten(0, (len(pixels), -1)).transpose(1, 2)

    def _tiled(self, padded: Tensor, noise: Tensor, first: int, callback: Callback | None) -> Tensor:
        """How much haze or light there is shows in the whole picture only: it gives the tones, the tiles add the detail.

        A picture that is seen finer than its pixels has no small version of that fineness, and the tones of its tiles.
        """
        tiles, steps = self._tiles(padded), len(self.plan.table)
        count = steps * len(tiles)
        cell = self.backbone.codec.spatial
        side, guide = cell * max(tiles.tile_height, tiles.tile_width), None
        if self.plan.supersample == 1:
            total = steps + count  # the small version is about a tile, too
            small = self.geometry.guide(padded, side)
            guide = crop(self._whole(*self._ready(small, first, 0), stretch(callback, 0, steps, total)), *small.shape[-2:])
            callback = stretch(callback, steps, count, total)
        if self.way.blend == "pixel":
            restored = in_pixels(self._whole, padded, noise, tiles, cell, callback)
        else:
            moved = self._tiles(padded, room_of(self.backbone.codec, self.plan.views))
            restored = self._whole(padded, noise, callback, Tiling(moved, self.way.at_once))
        if guide is None:
            return restored
        by_frame = (x.transpose(1, 2).flatten(0, 1) for x in (restored, guide))
        matched = match_tones(*by_frame, side // TONE_CELLS)
        return matched.unflatten(0, (len(padded), -1)).transpose(1, 2)

    def _tiles(self, padded: Tensor, room: int = 0) -> Tiles:
        """The tiles of padded pixels, in latent cells: even ones, but where a new shape costs something."""
        even = not self._few(padded, self.way.tile)
        return self.geometry.tiles(*padded.shape[-2:], self.way.tile, self.way.overlap, room, even)

    def _few(self, pixels: Tensor, tile: int) -> bool:
        return self.runner.static(self.geometry.few(*pixels.shape[-2:], tile), self.plan)

    def _ready(self, pixels: Tensor, first: int, tile: int) -> tuple[Tensor, Tensor]:
        return self.geometry.ready(pixels, self.seed, first, tile, self._few(pixels, tile))

    def _whole(self, pixels: Tensor, noise: Tensor, callback: Callback | None = None, tiling: Tiling | None = None) -> Tensor:
        """Padded pixels through codec, sampler and codec."""
        degraded = self.backbone.codec.encode(pixels.to(self.backbone.device))
        latent = self.runner.run(self.plan, degraded, noise, callback, tiling)
        if not latent.isfinite().all():
            latent = self.safety.run(self.plan, degraded, noise, tiling)
        return self.backbone.codec.decode(latent).cpu()


def agreed(clip: Tensor, reach: int) -> Tensor:
    """See `motion.agreed`, of frames [F, 3, H, W]."""
    return torch.from_numpy(motion.agreed(clip.movedim(1, -1).contiguous().numpy(), reach)).movedim(-1, 1)


def calmed(before: Tensor, after: Tensor) -> Tensor:
    """See `calm.kept_calm`, of clips [B, 3, F, H, W]."""
    return torch.stack([kept_calm(*(clip.transpose(0, 1) for clip in pair)).transpose(0, 1) for pair in zip(before, after)])
