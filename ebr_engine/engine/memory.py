"""How much memory a run takes, computed from sizes alone, and the ways to run, from the fastest to the smallest.

Everything here is arithmetic. What a transformer needs for a token and a codec for a pixel was counted from what is alive at
the worst moment of a forward pass; `benchmarks/memory.py` holds the sums against measured peaks on a CPU. For a GPU they are
computed only.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ebr_engine.engine.layout import few_sizes
from ebr_engine.errors import EngineError

GRAPHS = 8  # CUDA graphs that are kept (`execute.KEPT`); they share the memory of their runs
FLOAT = 4  # bytes: latents, the state and pixels are float32
PIXEL = 3 * FLOAT
FILTERED = 80  # bytes of a pixel of the one frame whose blur is sought and taken out, which is done on the CPU
SMALLER_TILES = (1024, 768, 512, 384, 256, 192, 128)  # pixels
SMALLER_CHUNKS = (33, 17, 9, 5, 1)  # frames
CODEC_TILE = 32  # latent cells; below, what tiles throw away is most of what they compute
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Costs:
    """What of a loaded backbone decides how much memory a run takes, in bytes; a latent cell spans `spatial`² pixels."""

    trunk: int  # the transformer's weights
    waiting: int  # of those, what can wait on the CPU but for two blocks (`offload` blocks)
    codec: int  # the codec's weights, which can wait on the CPU; of one that works in every step they are the trunk's
    token: float  # of one token at the worst moment of a step
    rotary: int  # of one token in the position tables that the trunk keeps
    text: int  # tokens beside the picture's
    encode: float  # of one pixel that is coded at once, for as many frames as a latent frame spans
    decode: float
    feature: float  # of one pixel between the codec's halves, where it tiles
    codec_whole: int  # pixels that the codec takes in one piece by default; 0 is any number
    codec_tile: int  # and the side of its tiles beyond
    channels: int
    spatial: int
    temporal: int
    patch: int
    multiple: int  # pixels that a tile's side has to be a multiple of
    pixel: int = PIXEL  # bytes of a pixel
    knows_time: bool = False  # frames see each other, so that they run in chunks
    cuda: bool = False
    few_sizes: bool = False  # pictures are extended to one of a few sizes (`layout.few_sizes`)
    graphs: bool = False  # runs are recorded as CUDA graphs, whose memory stays

    @property
    def tiles_codec(self) -> bool:
        """Whether the codec can take smaller pieces."""
        return self.codec_tile > 0


@dataclass(frozen=True)
class Fallback:
    """One way to run: pixels a tile's side (0: never tiled) and its overlap, `latent` or `pixel` blending, tiles at once,
    frames together, the side of the codec's tiles (None: its own choice), and what waits on the CPU."""

    tile: int
    overlap: int
    blend: str = "latent"
    at_once: int = 4
    frames: int = 1
    codec_tile: int | None = None
    offload: str = "none"

    def __str__(self) -> str:
        tiles = f"tiles of {self.tile} pixels, blended in {self.blend}s, {self.at_once} at once" if self.tile else "no tiles"
        frames = f", {self.frames} frames together" if self.frames > 1 else ""
        codec = f", codec in tiles of {self.codec_tile}" if self.codec_tile else ""
        waits = {"none": "", "codec": ", codec offloaded", "blocks": ", codec and blocks offloaded"}[self.offload]
        return tiles + frames + codec + waits


@dataclass(frozen=True)
class Work:
    """What is to be restored: pictures or clips of one size, in pixels."""

    batch: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        frames = f"{self.frames} frames" if self.frames > 1 else "a picture"
        return f"{frames} of {self.width} x {self.height} pixels"


def size_of(text: str | int) -> int:
    """Bytes of a size such as `8G`, `1.5 GB`, `900M` (powers of 1024) or a number of bytes; `EngineError` for others."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if not match or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise EngineError(f"cannot read {text!r} as a size of memory; write it like 8G or 900M")
    return size


def format_size(size: float) -> str:
    """A size for people: 1.5 GB (of 2³⁰ bytes, as graphics cards have them), rounded up: so much is enough."""
    for unit in ("G", "M", "K"):
        if (count := size / UNITS[unit]) >= 1:
            scale = 10 ** max(0, 2 - int(math.log10(count)))  # three digits
            return f"{math.ceil(count * scale) / scale:g} {unit}B"
    return f"{math.ceil(size)} bytes"


def peak(costs: Costs, way: Fallback, work: Work) -> int:
    """Bytes at the worst moment of a run, weights included: of the device, and on a CPU of all that it holds."""
    batch, frames, height, width = _run_size(costs, way, work)
    count = math.prod(_tiles(side, way.tile, way.overlap) for side in (height, width)) if way.tile else 1
    whole = _phases(costs, way, batch, frames, height, width, min(way.at_once, count))
    part = _phases(costs, replace(way, tile=0), batch, frames, *_guide_size(costs, way, height, width), 1)
    pixels = costs.pixel * batch * frames * height * width
    given = 0 if costs.cuda else costs.pixel * math.prod((work.batch, work.frames, work.height, work.width)) + pixels
    if count == 1:
        run = whole
    elif way.blend == "pixel":
        run = part + (0 if costs.cuda else pixels) + _latent(costs, batch, frames, height, width)
    else:
        run = max(whole, part)
    matched = 0 if costs.cuda or count == 1 else 4 * pixels
    return _weights(costs, way) + given + max(run, matched)


def filter_peak(costs: Costs, work: Work) -> int:
    """Bytes that a process holds at most while blur is taken out of pictures or frames, before they are restored."""
    return costs.trunk + costs.codec + work.height * work.width * (FILTERED + 2 * PIXEL * work.batch * work.frames)


def _run_size(costs: Costs, way: Fallback, work: Work) -> tuple[int, int, int, int]:
    """Batch, frames, height and width in which work is run, with what is added at the borders."""
    frames = min(work.frames, way.frames)
    height, width = (math.ceil(side / costs.multiple) * costs.multiple for side in (work.height, work.width))
    if not costs.few_sizes or way.offload == "blocks":  # nothing is compiled or recorded then
        return work.batch, frames, height, width
    frames = 1 + costs.temporal * (_latent_frames(costs, frames) - 1)
    return few_sizes((work.batch, 3, frames, height, width), costs.multiple, costs.temporal, way.tile)


def _guide_size(costs: Costs, way: Fallback, height: int, width: int) -> tuple[int, int]:
    """Height and width of the small version of a picture that is cut into tiles, which runs in one piece, as a tile does."""
    sides = (min(side, way.tile or side) for side in (height, width))
    if costs.few_sizes and way.offload != "blocks":
        return few_sizes((1, 3, 1, *sides), costs.multiple, costs.temporal, 0)[2:]
    return tuple(sides)


def choose(ways: list[Fallback], costs: Costs, work: Work, limit: int | None, first: int = 0) -> int:
    """The first way from `first` on that fits into `limit` bytes (None: any); `EngineError` says the least that would do."""
    if limit is None:
        return first
    needs = [peak(costs, way, work) for way in ways[first:]]
    for index, need in enumerate(needs, first):
        if need <= limit:
            return index
    raise EngineError(f"{work} need {format_size(min(needs))} at least, more than the {format_size(limit)} that are allowed")


def fallbacks(start: Fallback, costs: Costs, blocks: bool = True, fixed: bool = False) -> list[Fallback]:
    """The ways to run from `start` on, fastest first: the first ones change nothing but time, the last ones what is seen too.

    `blocks`: whether the transformer's blocks can wait on the CPU; `fixed`: it takes tiles and chunks of one size only.
    """
    ways = [start]
    for change in _changes(start, costs, blocks, fixed):
        way = replace(ways[-1], **change)
        if way != ways[-1]:
            ways.append(way)
    return ways


def first_within(ways: list[Fallback], limits: tuple[float, ...]) -> int:
    """The first way that keeps to the `limits_of` other lists of fallbacks; the last where there is none."""
    return next((i for i, way in enumerate(ways) if all(a <= b for a, b in zip(_demands(way), limits))), len(ways) - 1)


def limits_of(ways: list[Fallback], index: int) -> tuple[float, ...]:
    """What a fallback has less of than the first, and infinity for the rest."""
    return tuple(after if after < before else math.inf for before, after in zip(_demands(ways[0]), _demands(ways[index])))


def unseen(limits: tuple[float, ...]) -> tuple[float, ...]:
    """The limits of `limits_of` that change nothing in a picture: what waits on the CPU, and how many tiles run at once."""
    return tuple(limit if index in (2, 4, 5) else math.inf for index, limit in enumerate(limits))


def _demands(way: Fallback) -> tuple[float, ...]:
    """All that a way to run can have less of."""
    tile, codec_tile = way.tile or math.inf, way.codec_tile or math.inf
    keeps = way.offload == "none", way.offload != "blocks", way.blend == "latent"
    return tile, codec_tile, way.at_once, way.frames, *keeps


def last_with_view(ways: list[Fallback]) -> int:
    """The last fallback that sees as much of a picture and of a clip at once as the first."""
    first = ways[0]
    return max(i for i, way in enumerate(ways) if (way.tile, way.frames) in ((first.tile, first.frames), (first.tile, 1)))


def _changes(start: Fallback, costs: Costs, blocks: bool, fixed: bool) -> Iterator[dict[str, Any]]:
    if not costs.knows_time:
        yield {"frames": 1}  # they do not see each other
    for at_once in (2, 1):
        yield {"at_once": min(at_once, start.at_once)}
    if costs.cuda and costs.codec and start.offload == "none":
        yield {"offload": "codec"}
    if costs.tiles_codec:
        tile = CODEC_TILE * costs.spatial
        yield {"codec_tile": min(start.codec_tile or tile, tile)}
    if costs.cuda and blocks:
        yield {"offload": "blocks"}
    yield {"blend": "pixel"}
    if fixed:
        return
    chunks = [n for n in SMALLER_CHUNKS if n < start.frames] if costs.knows_time else []
    tiles = [side for side in SMALLER_TILES if side % costs.multiple == 0 and (side < start.tile or not start.tile)]
    for i in range(max(len(chunks), len(tiles))):
        if i < len(chunks):
            yield {"frames": chunks[i]}
        if i < len(tiles):
            yield {"tile": tiles[i], "overlap": _overlap(start, tiles[i], costs.multiple)}


def _overlap(start: Fallback, tile: int, multiple: int) -> int:
    wanted = start.overlap if start.tile else 64
    return min(wanted, tile // 2) // multiple * multiple


def _tiles(side: int, tile: int, overlap: int) -> int:
    return 1 if side <= tile else math.ceil((side - overlap) / (tile - overlap))


def _weights(costs: Costs, way: Fallback) -> int:
    if not costs.cuda:
        return costs.trunk + costs.codec
    trunk = costs.trunk - (costs.waiting if way.offload == "blocks" else 0)
    return trunk + (costs.codec if way.offload == "none" else 0)


def _latent(costs: Costs, batch: int, frames: int, height: int, width: int) -> int:
    cells = _latent_frames(costs, frames) * (height // costs.spatial) * (width // costs.spatial)
    return FLOAT * batch * costs.channels * cells


def _latent_frames(costs: Costs, frames: int) -> int:
    return 1 + math.ceil((frames - 1) / costs.temporal)


def _phases(costs: Costs, way: Fallback, batch: int, frames: int, height: int, width: int, at_once: int) -> int:
    """The worst of encoding, sampling and decoding; what goes in is not counted, what comes out is."""
    latent = _latent(costs, batch, frames, height, width)
    side_h, side_w = (min(side, way.tile or side) for side in (height, width))
    span = costs.spatial * costs.patch
    tokens = _latent_frames(costs, frames) * (side_h // span) * (side_w // span) + costs.text
    encode, decode = _coding(costs, way, batch, frames, height, width)
    waits = costs.codec if way.offload != "none" and costs.cuda else 0
    out = costs.pixel * batch * frames * height * width
    sampling = max(9 * latent, 6 * latent + at_once * batch * tokens * costs.token) + costs.rotary * tokens
    pool = sampling + GRAPHS * 3 * latent if costs.graphs and way.offload != "blocks" else 0  # with their inputs and results
    return int(max(pool + waits + encode + 2 * latent, sampling, pool + waits + 3 * latent + decode + out))


def _coding(costs: Costs, way: Fallback, batch: int, frames: int, height: int, width: int) -> tuple[float, float]:
    """Bytes that encoding and decoding need beside what goes in and out."""
    if not costs.tiles_codec:  # all at once
        return costs.encode * batch * frames * height * width, costs.decode * batch * frames * height * width
    group = 1.0 if frames > 1 else 1 / costs.temporal
    side = way.codec_tile
    if side is None:
        side = 0 if height * width <= costs.codec_whole else costs.codec_tile
    tiled = bool(side) and max(height, width) > side
    area = math.prod(min(length, side or length) for length in (height, width))
    kept = costs.feature * height * width * _latent_frames(costs, frames) if tiled and not costs.cuda else 0
    return group * costs.encode * area + kept, group * costs.decode * area + kept
