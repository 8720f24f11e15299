"""How much memory a run takes, computed from sizes alone, and the ladder of ways to run, from the fastest to the smallest.

Everything here is arithmetic. What a transformer needs for a token and a codec for a pixel was counted from what is alive at
the worst moment of a forward pass; `benchmarks/memory.py` holds the sums against measured peaks on a CPU. For a GPU they are
computed only.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ebr_engine.errors import EngineError

FLOAT = 4  # bytes: latents, the state and pixels are float32
PIXEL = 3 * FLOAT
SMALLER_TILES = (1024, 768, 512, 384, 256, 192, 128)  # pixels
SMALLER_CHUNKS = (33, 17, 9, 5, 1)  # frames
CODEC_TILE = 256  # pixels; below, what tiles throw away is most of what they compute
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Bytes that live at the worst moment of a forward pass, a token: of the width, and of the feed-forward layer's width.
# Each is a list, of which the largest counts. On a CPU the kernels are plain torch, with float32 copies.
TOKEN = {
    ("wan", "cpu", "fp32"): ((44, 0), (20, 8)),
    ("wan", "cpu", "bf16"): ((30, 0), (10, 4)),
    ("wan", "cpu", "fp8"): ((41, 0), (10, 12)),
    ("wan", "cuda", "bf16"): ((20, 0), (10, 4)),
    ("wan", "cuda", "fp8"): ((20, 0), (10, 3)),
    ("flux", "cpu", "fp32"): ((72, 0),),
    ("flux", "cpu", "bf16"): ((56, 0),),
    ("flux", "cpu", "fp8"): ((80, 0),),
    ("flux", "cuda", "bf16"): ((26, 0), (10, 4)),
    ("flux", "cuda", "fp8"): ((26, 0), (10, 3)),
}


@dataclass(frozen=True)
class Costs:
    """What of a loaded backbone decides how much memory a run takes, in bytes; a latent cell spans `spatial`² pixels."""

    trunk: int  # the transformer's weights
    waiting: int  # of those, what can wait on the CPU but for two blocks (`offload` blocks)
    codec: int  # the codec's weights
    token: float  # of one token at the worst moment of a step
    text: int  # tokens beside the picture's
    encode: float  # of one pixel that is coded at once, for as many frames as a latent frame spans
    decode: float
    feature: float  # of one pixel between the codec's halves, where it tiles
    codec_whole: int  # pixels that the codec takes in one piece unless told otherwise; 0 is any number
    codec_tile: int  # and the side of its tiles beyond
    channels: int
    spatial: int
    temporal: int
    patch: int
    multiple: int  # pixels that a tile's side has to be a multiple of
    cuda: bool = False

    @property
    def tiles_codec(self) -> bool:
        """Whether the codec can be told to take smaller pieces."""
        return self.codec_tile > 0


@dataclass(frozen=True)
class Rung:
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


def told(size: float) -> str:
    """A size for people: 1.5 GB (of 2³⁰ bytes, as graphics cards have them), rounded up: so much is enough."""
    for unit in ("G", "M", "K"):
        if (count := size / UNITS[unit]) >= 1:
            scale = 10 ** max(0, 2 - int(math.log10(count)))  # three digits
            return f"{math.ceil(count * scale) / scale:g} {unit}B"
    return f"{math.ceil(size)} bytes"


def token_bytes(family: str, device: str, precision: str, width: int, hidden: int) -> float:
    """Bytes of a token at the worst moment of a step of Wan's (`mini`'s too) or FLUX's transformer.

    `device`: cpu or cuda; `precision`: fp32, fp16, bf16 or fp8; `hidden`: width of the feed-forward layer.
    """
    wide = precision == "fp32" and device == "cuda"
    kind = "bf16" if wide or precision == "fp16" else precision
    bytes_ = max(of_width * width + of_hidden * hidden for of_width, of_hidden in TOKEN[family, device, kind])
    return 2 * bytes_ if wide else bytes_


def peak(costs: Costs, rung: Rung, work: Work) -> int:
    """Bytes at the worst moment of a run, weights included: of the device, and on a CPU of all that it holds."""
    frames = min(work.frames, rung.frames)
    height, width = (math.ceil(side / costs.multiple) * costs.multiple for side in (work.height, work.width))
    sides = [min(side, rung.tile or side) for side in (height, width)]
    count = math.prod(_tiles(side, rung.tile, rung.overlap) for side in (height, width)) if rung.tile else 1
    whole, part = (
        _phases(costs, rung, work.batch, frames, *size, at_once)
        for size, at_once in (((height, width), min(rung.at_once, count)), (tuple(sides), 1))
    )
    pixels = PIXEL * work.batch * frames * height * width
    given = 0 if costs.cuda else PIXEL * math.prod((work.batch, work.frames, work.height, work.width)) + pixels
    if count == 1:
        run = whole
    elif rung.blend == "pixel":
        run = part + (0 if costs.cuda else pixels) + _latent(costs, work.batch, frames, height, width)
    else:
        run = whole
    matched = 0 if costs.cuda or count == 1 else 4 * pixels
    return _weights(costs, rung) + given + max(run, matched)


def choose(rungs: list[Rung], costs: Costs, work: Work, limit: int | None, first: int = 0) -> int:
    """The first rung from `first` on that fits into `limit` bytes (None: any); `EngineError` says the least that would do."""
    if limit is None:
        return first
    needs = [peak(costs, rung, work) for rung in rungs[first:]]
    for index, need in enumerate(needs, first):
        if need <= limit:
            return index
    raise EngineError(f"{work} need {told(min(needs))} at least, more than the {told(limit)} that are allowed")


def ladder(start: Rung, costs: Costs, blocks: bool = True, fixed: bool = False) -> list[Rung]:
    """The ways to run below `start`, fastest first: the first ones change nothing but time, the last ones what is seen too.

    `blocks`: whether the transformer's blocks can wait on the CPU; `fixed`: it takes tiles and chunks of one size only.
    """
    rungs = [start]
    for change in _changes(start, costs, blocks, fixed):
        rung = replace(rungs[-1], **change)
        if rung != rungs[-1]:
            rungs.append(rung)
    return rungs


def below(rungs: list[Rung], limits: tuple[float, ...]) -> int:
    """The first rung that keeps to the `limits_of` rungs of other ladders; the last where there is none."""
    return next((i for i, rung in enumerate(rungs) if all(a <= b for a, b in zip(_asks(rung), limits))), len(rungs) - 1)


def limits_of(rungs: list[Rung], index: int) -> tuple[float, ...]:
    """What a rung has less of than the ladder's first, and infinity for the rest."""
    return tuple(after if after < before else math.inf for before, after in zip(_asks(rungs[0]), _asks(rungs[index])))


def unseen(limits: tuple[float, ...]) -> tuple[float, ...]:
    """The limits of `limits_of` that change nothing in a picture: what waits on the CPU, and how many tiles run at once."""
    return tuple(limit if index in (2, 4, 5) else math.inf for index, limit in enumerate(limits))


def _asks(rung: Rung) -> tuple[float, ...]:
    """All that a rung can have less of."""
    tile, codec_tile = rung.tile or math.inf, rung.codec_tile or math.inf
    keeps = rung.offload == "none", rung.offload != "blocks", rung.blend == "latent"
    return tile, codec_tile, rung.at_once, rung.frames, *keeps


def gentle(rungs: list[Rung]) -> int:
    """The last rung that sees as much of a picture and of a clip at once as the first."""
    first = rungs[0]
    return max(i for i, rung in enumerate(rungs) if (rung.tile, rung.frames) in ((first.tile, first.frames), (first.tile, 1)))


def _changes(start: Rung, costs: Costs, blocks: bool, fixed: bool) -> Iterator[dict[str, Any]]:
    if costs.temporal == 1:
        yield {"frames": 1}  # they do not see each other
    for at_once in (2, 1):
        yield {"at_once": min(at_once, start.at_once)}
    if costs.cuda and start.offload == "none":
        yield {"offload": "codec"}
    if costs.tiles_codec:
        yield {"codec_tile": min(start.codec_tile or CODEC_TILE, CODEC_TILE)}
    if costs.cuda and blocks:
        yield {"offload": "blocks"}
    yield {"blend": "pixel"}
    if fixed:
        return
    chunks = [n for n in SMALLER_CHUNKS if n < start.frames] if costs.temporal > 1 else []
    tiles = [side for side in SMALLER_TILES if side % costs.multiple == 0 and (side < start.tile or not start.tile)]
    for i in range(max(len(chunks), len(tiles))):
        if i < len(chunks):
            yield {"frames": chunks[i]}
        if i < len(tiles):
            yield {"tile": tiles[i], "overlap": _overlap(start, tiles[i], costs.multiple)}


def _overlap(start: Rung, tile: int, multiple: int) -> int:
    wanted = start.overlap if start.tile else 64
    return min(wanted, tile // 2) // multiple * multiple


def _tiles(side: int, tile: int, overlap: int) -> int:
    return 1 if side <= tile else math.ceil((side - overlap) / (tile - overlap))


def _weights(costs: Costs, rung: Rung) -> int:
    if not costs.cuda:
        return costs.trunk + costs.codec
    trunk = costs.trunk - (costs.waiting if rung.offload == "blocks" else 0)
    return trunk + (costs.codec if rung.offload == "none" else 0)


def _latent(costs: Costs, batch: int, frames: int, height: int, width: int) -> int:
    cells = _latent_frames(costs, frames) * (height // costs.spatial) * (width // costs.spatial)
    return FLOAT * batch * costs.channels * cells


def _latent_frames(costs: Costs, frames: int) -> int:
    return 1 + math.ceil((frames - 1) / costs.temporal)


def _phases(costs: Costs, rung: Rung, batch: int, frames: int, height: int, width: int, at_once: int) -> int:
    """The worst of encoding, sampling and decoding; what goes in is not counted, what comes out is."""
    latent = _latent(costs, batch, frames, height, width)
    side_h, side_w = (min(side, rung.tile or side) for side in (height, width))
    if rung.blend == "pixel":
        side_h, side_w = height, width
    span = costs.spatial * costs.patch
    tokens = _latent_frames(costs, frames) * (side_h // span) * (side_w // span) + costs.text
    encode, decode = _coding(costs, rung, batch, frames, height, width)
    waits = costs.codec if rung.offload != "none" and costs.cuda else 0
    out = PIXEL * batch * frames * height * width
    sampling = max(9 * latent, 6 * latent + at_once * batch * tokens * costs.token)
    return int(max(waits + encode + 2 * latent, sampling, waits + 3 * latent + decode + out))


def _coding(costs: Costs, rung: Rung, batch: int, frames: int, height: int, width: int) -> tuple[float, float]:
    """Bytes that encoding and decoding need beside what goes in and out."""
    if not costs.tiles_codec:  # all at once
        return costs.encode * batch * frames * height * width, costs.decode * batch * frames * height * width
    group = 1.0 if frames > 1 else 1 / costs.temporal
    side = rung.codec_tile
    if side is None:
        side = 0 if height * width <= costs.codec_whole else costs.codec_tile
    tiled = bool(side) and max(height, width) > side
    area = math.prod(min(length, side or length) for length in (height, width))
    kept = costs.feature * height * width * _latent_frames(costs, frames) if tiled and not costs.cuda else 0
    return group * costs.encode * area + kept, group * costs.decode * area + kept
