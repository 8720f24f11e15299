"""A VAE from a folder, and run in bounded memory without visible seams: what the codecs of Wan 2.1 and FLUX.1 share.

Either network has two halves. The fine half, at the picture's resolution, takes nearly all memory and work and looks no
further than a hundred pixels. The coarse half, at the latent's, holds the attention over all positions. A large picture
goes through the fine half in tiles, whose outermost cells are computed and thrown away, and through the coarse half in one
piece.

Time goes frame group by frame group (one frame, then `temporal` at a time), with what the causal convolutions remember
carried over, which is exact.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ebr_engine.backbones.base import check_latent, check_pixels
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.sharding import WHOLE, Ulysses, Whole
from ebr_engine.backbones.vae_files import read_network
from ebr_engine.backbones.vae_layers import Cache
from ebr_engine.errors import BackboneError, EbrError
from ebr_engine.media.windows import Window, plan_windows

COARSE = -1  # the cache of the coarse half, which knows no tiles
log = logging.getLogger("ebr_engine")


@dataclass
class Stream:
    """What passes from one chunk of a clip to the next; `keep` is off where there is no next one."""

    generator: torch.Generator
    keep: bool = True
    started: bool = False
    caches: dict[tuple[int, int], Cache] = field(default_factory=dict)

    def cache(self, sample: int, window: int) -> Cache:
        """The cache of a tile (or of the coarse half) of one sample of the batch."""
        return self.caches.setdefault((sample, window), {}) if self.keep else {}

    def snapshot(self) -> dict[tuple[int, int], Cache]:
        """The caches as they are now; the networks replace their entries and never write into them."""
        return {key: cache.copy() for key, cache in self.caches.items()}


class VaeCodec(ABC):
    """A VAE behind the interface `base.Codec`; `load_codec` makes one.

    `dtype`: of the networks; None is bf16 on CUDA and float32 elsewhere. `sample_latents`: draw from the posterior with a CPU
    generator seeded by `seed`, anew for every clip, rather than take its mode. `tile` and `overlap`: pixels, multiples of
    `spatial`; a tile of 0 never tiles, None takes `default_tile` for pictures of more than `whole_area` pixels.
    """

    published: str  # diffusers' name of the class
    network: type[nn.Module]  # made of a `sizes`, which it has as its `config`
    sizes: type
    spatial: int
    temporal: int
    channels: int
    whole_area: int  # pixels that a picture coded in one piece has at most, by default and in two-byte dtypes
    default_tile: int
    default_overlap: int
    exchange: Whole | Ulysses = WHOLE  # with the other devices that share its tiles
    margin: float  # share of the overlap that either tile computes and throws away; the rest is blended

    def __init__(
        self,
        vae: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        dtype: torch.dtype | None = None,
        sample_latents: bool = False,
        seed: int = 42,
        tile: int | None = None,
        overlap: int | None = None,
    ):
        if not len(mean) == len(std) == self.channels:
            sizes = f"{len(mean)} and {len(std)} channels for {self.channels}"
            raise BackboneError(f"the VAE's config.json has statistics of {sizes}")
        self.vae = vae.eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std))
        self.asked_dtype, self.sample_latents, self.seed = dtype, sample_latents, seed
        self.asked_tile, self.asked_overlap = tile, overlap
        self.set_tile(tile)
        self.to("cpu")

    def set_tile(self, tile: int | None) -> None:
        """Take tiles of another side in pixels from now on; `EbrError` for one that cannot be."""
        side, overlap = tile or self.default_tile, self.asked_overlap
        overlap = min(self.default_overlap, side // 2 // self.spatial * self.spatial) if overlap is None else overlap
        if not 0 <= overlap < side or side % self.spatial or overlap % self.spatial:
            raise EbrError(
                f"the codec's tile and overlap must be multiples of {self.spatial} pixels, and the overlap the smaller: "
                f"got {side} and {overlap}"
            )
        self.tile, self.overlap = tile, overlap

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.asked_dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    @property
    def parameters_bytes(self) -> int:
        """Bytes that the weights take where they lie now."""
        return sum(weight.nbytes for weight in self.vae.state_dict().values())

    def to(self, device: torch.device | str) -> "VaeCodec":
        """Move the weights; returns the same object."""
        self.device = torch.device(device)
        self.vae.to(self.device, self.dtype)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights that are moved."""
        return self.vae.parameters()

    def frames(self, count: int) -> int:
        """The least number of frames, `count` or more, that can be encoded: 1 and a multiple of `temporal`."""
        return 1 + math.ceil((count - 1) / self.temporal) * self.temporal

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [0, 1] → [B, channels, f, H/spatial, W/spatial] float32 on the codec's device.

        f = 1 + (F − 1)/temporal. The pixels may lie on another device. Raises `EbrError` for a shape that does not fit, and
        where the networks give values that are not finite in float32 too.
        """
        return self._encode(pixels, Stream(self._generator(), keep=False))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, channels, f, h, w] → pixels [B, 3, F, H, W] float32 on the codec's device, not clamped; errors as `encode`."""
        return self._decode(latent, Stream(self._generator(), keep=False))

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The latent of a clip that comes in chunks, chunk by chunk: together what `encode` gives for the whole clip.

        The first chunk has 1 + n·temporal frames, the others n·temporal. What is remembered between chunks does not grow with
        the clip. (Sampled latents are drawn in the order of the chunks.)
        """
        stream = Stream(self._generator())
        for chunk in chunks:
            yield self._encode(chunk, stream)
            stream.started = True

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pixels of a latent that comes in chunks of any number of latent frames: together what `decode` gives."""
        stream = Stream(self._generator())
        for chunk in chunks:
            yield self._decode(chunk, stream)
            stream.started = True

    @torch.no_grad()
    def _encode(self, pixels: Tensor, stream: Stream) -> Tensor:
        check_pixels(pixels, self)
        count = pixels.shape[2] + stream.started  # what a clip begins with counts as one frame
        if count != self.frames(count):
            rule = "a multiple of" if stream.started else "one and a multiple of"
            raise EbrError(f"expected pixels [B, 3, F, H, W] with F {rule} {self.temporal}, got {tuple(pixels.shape)}")
        moments = self._retried(lambda: self._moments(pixels, stream), stream)
        mode, log_variance = moments.chunk(2, dim=1)
        if self.sample_latents:
            noise = torch.randn(mode.shape, generator=stream.generator).to(mode.device)
            mode = mode + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return (mode - self.mean.to(mode.device)) / self.std.to(mode.device)

    @torch.no_grad()
    def _decode(self, latent: Tensor, stream: Stream) -> Tensor:
        check_latent(latent, self)
        return self._retried(lambda: self._pixels(latent, stream), stream)

    def _moments(self, pixels: Tensor, stream: Stream) -> Tensor:
        """Mean and log-variance of the posterior, [B, 2·channels, f, h, w] float32."""
        groups = self._groups(math.ceil(pixels.shape[2] / self.temporal), stream.started)
        parts = []
        for sample, clip in enumerate(pixels.split(1)):
            cache = stream.cache(sample, COARSE)
            features = self._features(sample, clip, groups, stream)
            parts.append(torch.cat([self._encode_coarse(self._cast(x), cache).float() for x in features], dim=2))
        return torch.cat(parts)

    def _features(self, sample: int, clip: Tensor, groups: Sequence[slice], stream: Stream) -> Iterator[Tensor]:
        """What the fine half of the encoder makes of a clip [1, 3, F, H, W], latent frame by latent frame."""
        height, width = (side // self.spatial for side in clip.shape[-2:])
        windows = self._windows(height, width, self.spatial, 1)
        waiting: list[Tensor] = []  # in host memory: the device's share must not grow with the clip
        exchange = self.exchange if len(windows) > 1 else WHOLE
        mine = exchange.mine(len(windows))
        for index in mine or range(1):  # a device without tiles learns the features' shape all the same
            window, cache = windows[index], stream.cache(sample, index)
            for i, frames in enumerate(groups):
                part = self._encode_fine(self._cast(window.cut(clip[:, :, frames]).float() * 2 - 1), cache)
                if len(windows) == 1:
                    yield part
                    continue
                if len(waiting) == i:
                    waiting.append(torch.zeros(*part.shape[:3], height, width))
                if index in mine:
                    window.add(part, waiting[i])
        yield from map(exchange.summed, waiting)

    def _pixels(self, latent: Tensor, stream: Stream) -> Tensor:
        """Pixels [B, 3, F, H, W] of a normalised latent."""
        batch, _, count, height, width = latent.shape
        groups = self._groups(count, stream.started)
        windows = self._windows(height, width, 1, self.spatial)
        shape = (batch, 3, groups[-1].stop, height * self.spatial, width * self.spatial)
        out = torch.zeros(shape, device=self.device)
        exchange = self.exchange if len(windows) > 1 else WHOLE
        for sample, z in enumerate(latent.split(1)):
            coarse = self._coarse_frames(z, stream.cache(sample, COARSE))
            if len(windows) > 1:
                coarse = [frame.cpu() for frame in coarse]  # in host memory: the device's share must not grow with the clip
            for index in exchange.mine(len(windows)):
                window, cache = windows[index], stream.cache(sample, index)
                for frame, frames in zip(coarse, groups):
                    part = self._decode_fine(self._cast(window.cut(frame)), cache)
                    window.add(part, out[sample : sample + 1, :, frames])
        return exchange.summed(out).add_(1).div_(2)

    def _coarse_frames(self, z: Tensor, cache: Cache) -> Iterator[Tensor]:
        for frame in z.split(1, dim=2):
            raw = frame.float() * self.std.to(frame.device) + self.mean.to(frame.device)
            yield self._decode_coarse(self._cast(raw), cache)

    def _groups(self, count: int, started: bool) -> list[slice]:
        """The frames that each of `count` latent frames spans; a clip's first one spans one frame."""
        first = self.temporal if started else 1
        stops = [first + i * self.temporal for i in range(count)]
        return [slice(start, stop) for start, stop in zip([0, *stops], stops)]

    def _windows(self, height: int, width: int, read: int, write: int) -> list[Window]:
        """The windows of a grid of cells: one where it is coded in one piece. `read`, `write`: see `plan_windows`."""
        area = height * width * self.spatial**2
        fits = area * self.dtype.itemsize <= self.whole_area * torch.bfloat16.itemsize
        tile = self.tile if self.tile is not None else (0 if fits else self.default_tile)
        if tile == 0 or max(height, width) * self.spatial <= tile:
            return plan_windows(height, width, max(height, width), 0, 0, read, write)
        overlap = self.overlap // self.spatial
        return plan_windows(height, width, tile // self.spatial, overlap, int(overlap * self.margin), read, write)

    def has_tiles(self, height: int, width: int) -> bool:
        """Whether latents of so many cells are coded in more than one tile."""
        return len(self._windows(height, width, self.spatial, 1)) > 1

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _retried(self, run: Callable[[], Tensor], stream: Stream) -> Tensor:
        """The result of `run`, made again in float32 if it is not finite; the codec then stays in float32."""
        before = stream.snapshot() if self.dtype != torch.float32 else {}
        result = run()
        if not _finite(result) and self.dtype != torch.float32:
            log.warning("the codec gave values that are not finite in %s; it goes on in float32", self.dtype)
            self.asked_dtype = torch.float32
            self.to(self.device)
            stream.caches = {key: in_float32(cache) for key, cache in before.items()}
            result = run()
        if not _finite(result):
            raise EbrError("the codec gave values that are not finite, in float32 too: its input or its weights are damaged")
        return result

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels at the picture's resolution."""

    @abstractmethod
    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        """Pixels [1, 3, frames of a group, H, W] in [-1, 1] → features [1, C, 1, h, w]."""

    @abstractmethod
    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        """Features → mean and log-variance [1, 2·channels, 1, h, w]."""

    @abstractmethod
    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        """Latent [1, channels, 1, h, w], not normalised → features [1, C, 1, h, w]."""

    @abstractmethod
    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        """Features → pixels [1, 3, frames of the group, H, W] in about [-1, 1]."""


def in_float32(cache: Cache) -> Cache:
    """What a network remembers, for the same network in float32."""
    return {number: tuple(frame.float() for frame in frames) for number, frames in cache.items()}


def _finite(x: Tensor) -> bool:
    return bool(torch.stack(x.aminmax()).isfinite().all())


def load_codec(
    backbone: str,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    sample_latents: bool = False,
    seed: int = 42,
    tile: int | None = None,
    overlap: int | None = None,
) -> VaeCodec:
    """The codec of a backbone, by its name, from a folder in diffusers' layout (config.json and safetensors), on the CPU.

    Options as for `VaeCodec`. Raises `BackboneError` for a folder that is missing, incomplete, damaged or of another model.
    """
    codec = spec(backbone).codec
    vae = read_network(Path(folder), backbone, codec.published, codec.network, codec.sizes)
    return codec(vae, dtype=dtype, sample_latents=sample_latents, seed=seed, tile=tile, overlap=overlap)
