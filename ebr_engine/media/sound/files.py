"""Sound files in and out, block by block: WAV and FLAC, with the rate, channels and depth that they have.

libsndfile decodes and encodes (soundfile, extra `audio`). Samples are float64 here: every integer of 32 bits is one exactly,
so that what is not changed is written as it was.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import not_kept_line
from ebr_engine.media.holdings.sound import carry_over, sound_outcomes

BLOCK = 65536  # samples of a channel that are read together
DEPTHS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}  # others are floats, or lossy
FLOATS = {"FLOAT": 32, "DOUBLE": 64}
FLAC_CHANNELS = 8
FLAC_RATE = 655350


def needed(package: str) -> Any:
    """A package of the extra `audio`; `EbrError` with the line that installs it."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # OSError: without the library that it binds
        raise EbrError(f"sound needs {package}: pip install 'ebr-engine[audio]' ({error})") from error


@dataclass(frozen=True)
class SoundInfo:
    """What a file holds: samples of a channel, samples a second, channels, and how they are stored."""

    length: int
    rate: int
    channels: int
    stored: str  # libsndfile's name: PCM_16, PCM_24, FLOAT …
    container: str  # WAV, WAVEX, RF64 or FLAC

    @property
    def bits(self) -> int:
        """Of a sample; of a lossy form those that it is decoded to."""
        return DEPTHS.get(self.stored) or FLOATS.get(self.stored, 16)

    @property
    def seconds(self) -> float:
        return self.length / self.rate


class SoundReader:
    """A sound file that can be read; `MediaError` for one that is none, or damaged."""

    def __init__(self, path: Path):
        self.path, self._library = path, needed("soundfile")
        with self._opened() as file:
            self.info = SoundInfo(file.frames, file.samplerate, file.channels, file.subtype, file.format)
            if file.format not in ("WAV", "WAVEX", "RF64", "FLAC"):
                raise MediaError(f"{path}: is {file.format_info}, and only WAV and FLAC are restored")
        if not self.info.length:
            raise MediaError(f"{path}: holds no samples")

    def _opened(self) -> Any:
        try:
            return self._library.SoundFile(self.path)
        except (self._library.SoundFileError, OSError) as error:
            raise MediaError(f"{self.path}: cannot be read as sound: {_said(error)}") from error

    def blocks(self) -> Iterator[np.ndarray]:
        """All samples, [n, channels] float64 in ±1; each call reads the file anew.

        `MediaError` where they end too early or are not finite.
        """
        left = self.info.length
        with self._opened() as file:
            while left:
                try:
                    block = file.read(min(left, BLOCK), dtype="float64", always_2d=True)
                except self._library.SoundFileError as error:
                    raise MediaError(f"{self.path}: is damaged: {_said(error)}") from error
                if not len(block):
                    raise MediaError(f"{self.path}: is damaged: ends {left} samples too early")
                if not np.isfinite(block).all():
                    raise MediaError(f"{self.path}: holds samples that are not finite")
                left -= len(block)
                yield block


class SoundWriter(AbstractContextManager):
    """Writes a sound file like the one that `reader` has open, under a name of its own until it is whole.

    Rate, channels and depth are the reader's, as far as the format of `path` can (FLAC: integers of at most 24 bits), and so is
    all that the file holds beside its samples; `outcomes` tells of each. `commit(part, path)` gives it its name.
    """

    def __init__(
        self,
        path: Path,
        reader: SoundReader,
        commit: Callable[[Path, Path], None] | None = None,
        strict: bool = False,
    ):
        self.path, self.reader, self._suffix = path, reader, path.suffix.lower()
        self.stored, self.note = check_can_hold(path, reader.info)
        self.outcomes = sound_outcomes(reader.path, self._suffix)
        if strict and (line := not_kept_line(self.outcomes)):
            raise MediaError(f"{path}: not written, as not everything can be kept (--strict); {line}")
        self._commit = commit or (lambda part, target: part.replace(target))
        self._part = path.with_name(f".ebr-{path.name}.part")
        info, container = reader.info, reader.info.container
        if self._suffix == ".flac" or container == "FLAC":
            container = self._suffix[1:].upper()
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"samplerate": info.rate, "channels": info.channels, "subtype": self.stored, "format": container}
        self._file = needed("soundfile").SoundFile(self._part, "w", **settings)

    def write(self, samples: np.ndarray) -> None:
        """Samples [n, channels] float64; what leaves ±1 is cut off where integers are stored."""
        bits = DEPTHS.get(self.stored)
        if bits is None:
            self._file.write(samples)
            return
        # libsndfile scales floats by 2^(b-1) - 1 and reads them by 2^(b-1); as integers they stay what they are.
        top = 2.0 ** (bits - 1)
        whole = np.clip(np.rint(samples * top), -top, top - 1).astype(np.int64)
        self._file.write((whole << (32 - bits)).astype(np.int32))

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                carry_over(self.reader.path, self._part, self._suffix)
                self._commit(self._part, self.path)
        finally:
            self._part.unlink(missing_ok=True)


def check_can_hold(path: Path, info: SoundInfo) -> tuple[str, str]:
    """How an output stores samples like these, and what of them that changes ("" for nothing).

    Raises `MediaError` where its format cannot hold them.
    """
    if path.suffix.lower() != ".flac":
        return (info.stored if info.stored != "PCM_S8" else "PCM_U8"), ""
    if info.channels > FLAC_CHANNELS or info.rate > FLAC_RATE:
        raise MediaError(f"{path}: FLAC holds no {info.channels} channels at {info.rate} Hz; name a .wav")
    if info.stored in FLOATS or info.stored == "PCM_32":
        return "PCM_24", "24 bit, which is what FLAC holds; .wav keeps all"
    return {"PCM_U8": "PCM_S8"}.get(info.stored, info.stored) if info.stored in DEPTHS else "PCM_16", ""


def _said(error: BaseException) -> str:
    """libsndfile's own words, without the file's name."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")
