"""Latents of samples: encoded on the fly, or kept on disk by the content of the files, the codec and the crop."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebr_engine.backbones.base import Backbone, Codec
from ebr_engine.errors import EbrError
from ebr_engine.media.deconvolution import deconvolved
from ebr_engine.media.sizes import enlarged
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import BadDataError, PairSamples, Samples, View
from ebr_engine.training.pairs import Pair

log = logging.getLogger("ebr_engine")
INDEX = "files.json"


class LatentSamples:
    """Degraded and clean latents of samples; what a cache lacks is encoded and added to it.

    The batch that follows is made in a thread while one is learned from; use as a context manager, so that it ends.
    """

    def __init__(self, config: LearnConfig, samples: Samples, backbone: Backbone):
        self.samples, self.backbone, self.config = samples, backbone, config
        cached = config.cache and isinstance(samples, PairSamples)
        self.cache = LatentCache(Path(config.cache), config, backbone.codec) if cached else None
        self._thread = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, ...], Future] = {}

    def batch(self, numbers: Sequence[int], following: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Degraded and clean latents [B, C, f, h, w] float32 of the samples `numbers`; begins with those of `following`."""
        ahead = self._ahead.pop(tuple(numbers), None)
        ready = ahead.result() if ahead else self._batch(numbers)
        if following:
            self._ahead[tuple(following)] = self._thread.submit(self._batch, following)
        return ready

    def __enter__(self) -> "LatentSamples":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self.cache:
            self.cache.close()

    @torch.no_grad()
    def _batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        return tuple(torch.stack(part) for part in zip(*map(self.latents, numbers)))

    @torch.no_grad()
    def latents(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded and clean latent [C, f, h, w] of sample `number`; one by one, so that a sample does not know its batch."""
        if not isinstance(self.samples, PairSamples):
            return self._encoded(*self.samples.pixels(number))
        index, view = self.samples.choose(number)
        return self.samples.first_good(index, lambda i: self.pair(self.samples.pairs[i], view))

    def pair(self, pair: Pair, view: View) -> tuple[Tensor, Tensor]:
        """The latents of a view; `BadDataError` for a pair that cannot be used."""
        key = self.cache.key(pair, view) if self.cache else ""
        if self.cache and (found := self.cache.read(key)) is not None:
            return tuple(latent.to(self.backbone.device) for latent in found)
        latents = self._encoded(*self.samples.crops(pair, view))
        if not all(latent.isfinite().all() for latent in latents):
            raise BadDataError(f"{pair.clean[0]}: the codec makes values of it or of its degraded form that are not finite")
        if self.cache:
            self.cache.write(key, latents)
        return latents

    def _encoded(self, degraded: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.deconvolve:
            degraded = deconvolved(degraded.transpose(0, 1)).transpose(0, 1)
        clips = (enlarged(pixels[None].to(self.backbone.device), self.config.supersample) for pixels in (degraded, clean))
        return tuple(self.backbone.codec.encode(clip)[0] for clip in clips)


class LatentCache:
    """Latents in a folder, a file each, named by everything that decides them; files are hashed once while they do not change.

    `codec`: or its fingerprint.
    """

    def __init__(self, folder: Path, config: LearnConfig, codec: Codec | str):
        self.folder = folder
        crop = {"size": config.crop, "frames": config.frames, "task": config.task if config.synthetic else None}
        crop |= {"supersample": config.supersample} if config.supersample > 1 else {}
        crop |= {"deconvolve": True} if config.deconvolve else {}
        self.settings = {"codec": codec if isinstance(codec, str) else fingerprint(codec), **crop}
        try:
            self.files = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError):
            self.files = {}
        self._changed = False

    def key(self, pair: Pair, view: View) -> str:
        """What a view's file is named; `BadDataError` for a file that cannot be read."""
        contents = [[self.digest(path) for path in source] for source in (pair.clean, pair.degraded or ())]
        drawn = asdict(view) if pair.degraded is None else {k: v for k, v in asdict(view).items() if k != "seed"}
        return hashlib.sha256(json.dumps([self.settings, contents, drawn], sort_keys=True).encode()).hexdigest()

    def digest(self, path: Path) -> str:
        """The SHA-256 of a file's content."""
        try:
            status = path.stat()
            known = self.files.get(str(path.absolute()))
            if known and known[:2] == [status.st_size, status.st_mtime_ns]:
                return known[2]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
        except OSError as error:
            raise BadDataError(f"{path}: {error.strerror}") from error
        self.files[str(path.absolute())] = [status.st_size, status.st_mtime_ns, digest.hexdigest()]
        self._changed = True
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Where the latents of a key lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Degraded and clean latent; None where there are none, or a damaged file, which is told and made again."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                latents = file.get_tensor("degraded"), file.get_tensor("clean")
                stored = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError):
            stored = None
        if stored is None or stored != checksum(latents):
            log.warning("%s: damaged, made again", path)
            return None
        return latents

    def write(self, key: str, latents: tuple[Tensor, Tensor]) -> None:
        """Keep the latents of a key."""
        latents = tuple(latent.float().cpu().contiguous() for latent in latents)
        write_tensors(self.path(key), dict(zip(("degraded", "clean"), latents)), {"checksum": checksum(latents)})

    def close(self) -> None:
        """Keep the files' hashes."""
        if self._changed:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{INDEX}.{id(self)}.partial"
            partial.write_text(json.dumps(self.files))
            partial.replace(self.folder / INDEX)


def checksum(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors' bytes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(codec: Codec) -> str:
    """What tells codecs apart whose latents differ: class, weights in their precision, statistics, sampling."""
    network = getattr(codec, "vae", codec)
    tensors = [value for _, value in sorted(network.state_dict().items())]
    tensors += [getattr(codec, name) for name in ("mean", "std") if hasattr(codec, name)]
    drawn = codec.seed if getattr(codec, "sample_latents", False) else None
    return f"{type(codec).__name__} {checksum(tensors)} {drawn}"


@dataclass(frozen=True)
class Encode:
    """A view that a cache lacks."""

    index: int  # of its pair
    pair: Pair
    view: View
    key: str


# What encodes views: each with its latents, or with the `BadDataError` of a pair that cannot be used, in any order.
Encoder = Callable[[Iterator[Encode]], Iterator[tuple[Encode, tuple[Tensor, Tensor] | BadDataError]]]


def fill_cache(config: LearnConfig, samples: PairSamples, backbone: Backbone, callback=None) -> tuple[int, int]:
    """Encode every view of every pair that the cache lacks; how many were made and how many were there.

    `callback(done, total)` after each view. Interrupted, it goes on where it stopped.
    """
    if not config.cache:
        raise EbrError("name the folder of the cache")
    with LatentSamples(replace(config, cache=""), samples, backbone) as latents, torch.no_grad():

        def encoded(todo: Iterator[Encode]) -> Iterator[tuple[Encode, tuple[Tensor, Tensor] | BadDataError]]:
            for one in todo:
                try:
                    found = latents.pair(one.pair, one.view)
                except BadDataError as error:
                    found = error
                yield one, found

        return fill(config, samples, LatentCache(Path(config.cache), config, backbone.codec), encoded, callback)


def fill(config: LearnConfig, samples: PairSamples, cache: "LatentCache", encoder: Encoder, callback=None) -> tuple[int, int]:
    """As `fill_cache`, by any encoder."""
    made = there = 0
    total = len(samples) * config.views

    def skipped(index: int, error: BadDataError) -> None:
        nonlocal total
        if config.bad_data == "refuse":
            raise error
        if index not in samples.bad:
            log.warning("skipped: %s", error)
        samples.bad[index] = str(error)
        total -= 1

    def lacking() -> Iterator[Encode]:
        nonlocal there
        for index in range(len(samples)):
            for number in range(config.views):
                view = samples.view(index, number)
                try:
                    key = cache.key(samples.pairs[index], view)
                except BadDataError as error:
                    skipped(index, error)
                    continue
                if cache.read(key) is None:
                    yield Encode(index, samples.pairs[index], view, key)
                    continue
                there += 1
                if callback is not None:
                    callback(made + there, total)

    try:
        for one, latents in encoder(lacking()):
            if isinstance(latents, BadDataError):
                skipped(one.index, latents)
                continue
            cache.write(one.key, latents)
            made += 1
            if callback is not None:
                callback(made + there, total)
    finally:
        cache.close()
    return made, there
