"""Animated GIF, PNG and WebP: their frames with alpha and times, and frames written as the same kind.

Frames are whole pictures, as they are shown; equal neighbours stay two frames. Everything else that the file holds goes
the way of a picture's holdings.
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.apng import ApngFrames, apng
from ebr_engine.media.decoding import MediaError, check_size, vips
from ebr_engine.media.encoding import QUALITY, encode_frame
from ebr_engine.media.holdings import format_of, not_kept_line
from ebr_engine.media.holdings.encoded import finished
from ebr_engine.media.holdings.images import kind_of, parts_of
from ebr_engine.media.holdings.parts import Part, Window
from ebr_engine.media.holdings.types import Outcome
from ebr_engine.media.holdings.writing import Preparation
from ebr_engine.media.images import MAX_MEGAPIXELS, write_atomically
from ebr_engine.media.picture import Picture
from ebr_engine.media.seen import seen_values
from ebr_engine.media.video.info import Colour, Frame, VideoInfo

_MILLISECOND = Fraction(1, 1000)
_MOST = 4_000_000_000  # bytes of frames that a writer holds until it knows them all


class AnimationReader:
    """Iterates over the frames of an animated picture; what `open_video` returns for one."""

    def __init__(
        self, path: Path, *, start: float | None = None, limit: int | None = None, max_megapixels: float = MAX_MEGAPIXELS
    ) -> None:
        self.path = path
        self.warnings: list[str] = []
        with Window(path) as window:
            self.kind = kind_of(window.at(0, 32))
            self.parts = [part for part in parts_of(window, self.kind) if part.kind != "animation"]
        self.holdings = [part.holding for part in self.parts if part.kind != "lossless coding"]
        try:
            self._frames = ApngFrames(path) if self.kind == "png" else _VipsFrames(path, self.kind)
        except vips().Error as error:
            raise MediaError(f"{path}: the animation is damaged or cut short") from error
        check_size(path, self._frames.width, self._frames.height, max_megapixels)
        delays = [max(Fraction(0), delay) for delay in self._frames.delays]  # seconds
        begins = [sum(delays[:index], Fraction(0)) for index in range(len(delays))]
        self._first = next((i for i, begin in enumerate(begins) if begin >= Fraction(start or 0)), len(begins))
        if self._first == len(begins):
            raise MediaError(f"{path}: starting at {start:g} s is outside of its {float(sum(delays)):g} s")
        self._delays = delays[self._first :][:limit]
        total = sum(self._delays, Fraction(0))
        self.loop: int = self._frames.loop  # how often it is shown; 0 for ever
        self.seen = seen_values(self.parts, 2**self._frames.bits - 1)
        self.info = VideoInfo(
            width=self._frames.width,
            height=self._frames.height,
            fps=len(self._delays) / total if total else Fraction(24),
            time_base=_MILLISECOND,
            frames=len(self._delays),
            duration=float(total),
            bits=self._frames.bits,
            pix_fmt=f"gbr{'ap' if self._frames.alpha else 'p'}{'' if self._frames.bits == 8 else '16le'}",
            codec=self.kind,
            colour=Colour(matrix=0, full_range=True),
            variable_rate=len(set(self._delays)) > 1,
        )

    def __enter__(self) -> "AnimationReader":
        return self

    def __exit__(self, *error) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        time = Fraction(0)
        peak = 2**self._frames.bits - 1
        try:
            for index, stored in enumerate(self._frames.read(self._first, len(self._delays))):
                colours = stored[..., :1] if stored.shape[2] < 3 else stored[..., :3]
                pixels = self.seen[colours] if self.seen is not None else colours.astype(np.float32) / np.float32(peak)
                alpha = stored[..., -1].astype(np.float32) / np.float32(peak) if stored.shape[2] in (2, 4) else None
                pixels = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
                begin, time = time, time + self._delays[index]
                # The time that each is shown for is kept exactly: GIF counts hundredths, PNG whatever it wants.
                yield Frame(
                    pixels, round(begin * 1000), _MILLISECOND, duration=round(time * 1000) - round(begin * 1000), alpha=alpha
                )
        except vips().Error as error:
            raise MediaError(f"{self.path}: the animation is damaged or cut short") from error

    @property
    def delays(self) -> list[Fraction]:
        """Seconds that each frame is shown for."""
        return self._delays


class _VipsFrames:
    """The frames of a GIF or WebP, composed by libvips, from the first to the last."""

    bits = 8

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        image = self._open()
        self.width, self.height, self.alpha = image.width, image.get("page-height"), image.bands in (2, 4)
        count = image.height // self.height
        delays = image.get("delay") if image.get_typeof("delay") else []
        self.delays = [Fraction(delay, 1000) for delay in (*delays, *[100] * count)[:count]]
        self.loop = image.get("loop") if image.get_typeof("loop") else 0

    def _open(self):
        loader = getattr(vips().Image, f"{self._kind}load_source")
        source = vips().Source.new_from_file(os.fsencode(self._path))
        return loader(source, n=-1, access="sequential", fail_on="error")

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        image = self._open()
        for index in range(first + count):
            frame = image.crop(0, index * self.height, self.width, self.height).numpy()
            if index >= first:
                yield frame.reshape(self.height, self.width, -1)


class AnimationWriter:
    """Writes frames as an animated picture that appears whole on a clean exit; what `write_video` returns for one."""

    pixel_format = "rgba"

    def __init__(
        self,
        target: str | os.PathLike,
        source: AnimationReader,
        *,
        size: tuple[int, int] | None = None,
        commit: Callable[[Path, Path], None] | None = None,
        strict: bool = False,
        quality: int | None = None,
    ) -> None:
        self.path = Path(target)
        self.info = source.info
        self.height, self.width = size or (source.info.height, source.info.width)
        self.warnings: list[str] = []
        self.outcomes: list[Outcome] = []
        self._source, self._commit, self._strict, self._quality = source, commit, strict, quality
        self._format = format_of(self.path)
        self._frames: list[bytes] = []  # encoded, or as GIF's encoder takes them
        self._held = 0
        self._delays: list[Fraction] = []
        lossless = any(part.kind == "lossless coding" for part in source.parts)
        self._how = {"lossless": True, "exact": True} if lossless and quality is None else {"Q": quality or QUALITY}
        self._bands = 4
        self._prepared = self._prepare(source.parts)

    def _prepare(self, parts: list[Part]) -> Preparation:
        prepared = Preparation(parts, self._format, self.width, self.height, False)
        self.outcomes = prepared.outcomes
        if line := not_kept_line(self.outcomes):
            if self._strict:
                raise MediaError(f"{self.path}: not written, as not everything can be kept (--strict); {line}")
            self.warnings.append(f"{self._source.path}: {line}")
        return prepared

    def __enter__(self) -> "AnimationWriter":
        return self

    @property
    def fates(self) -> "AnimationWriter":
        """As `VideoWriter.fates`: what has `outcomes`."""
        return self

    @property
    def frames(self) -> int:
        """How many have been written."""
        return len(self._frames)

    def write(self, pixels: np.ndarray, frame: Frame | None = None) -> None:
        """Take [H, W, 3] float32 RGB in [0, 1] as the next picture, with the alpha of `frame`."""
        if not np.isfinite(pixels).all():
            raise MediaError(f"{self.path}: not written: frame {self.frames + 1} has values that are not finite numbers")
        alpha = frame.alpha if frame is not None and frame.alpha is not None else np.ones(pixels.shape[:2], np.float32)
        picture = Picture(pixels, alpha=alpha, bits=self.info.bits, seen=self._source.seen)
        if alpha.shape != pixels.shape[:2]:
            from ebr_engine.media.images import resize_picture

            resized = resize_picture(Picture(np.repeat(alpha[..., None], 3, axis=2)), *pixels.shape[:2])
            picture = replace(picture, alpha=resized.pixels[..., 0])
        self._frames.append(encode_frame(picture, self._format, self._how))
        self._held += len(self._frames[-1])
        if self._held > _MOST:
            raise MediaError(f"{self.path}: not written: the animation is too long for its format; write a video")
        index = len(self._delays)
        known = self._source.delays
        self._delays.append(known[index] if index < len(known) else Fraction(1, 10))

    def prepare(self, pixels: np.ndarray, frame: Frame | None = None) -> np.ndarray:
        """As `VideoWriter.prepare`; pictures need no preparation."""
        return pixels

    def write_prepared(self, pixels: np.ndarray, frame: Frame | None = None) -> None:
        """As `VideoWriter.write_prepared`."""
        self.write(pixels, frame)

    def drain(self) -> None:
        """As `VideoWriter.drain`; nothing waits."""

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None or not self._frames:
            return
        data = {"gif": self._gif, "png": self._png, "webp": self._webp}[self._format]()
        write_atomically(self.path, finished([(data, self._prepared.result)], self._format), self._commit)

    def _gif(self) -> bytes:
        library = vips()
        stack = b"".join(self._frames)
        image = library.Image.new_from_memory(stack, self.width, self.height * self.frames, 4, "uchar").copy(
            interpretation="srgb"
        )
        image.set_type(library.GValue.gint_type, "page-height", self.height)
        image.set_type(library.GValue.array_int_type, "delay", [round(delay * 1000) for delay in self._delays])
        image.set_type(library.GValue.gint_type, "loop", self._source.loop)
        return image.gifsave_buffer(keep_duplicate_frames=True, keep="none")

    def _png(self) -> bytes:
        return apng(self._frames, self._delays, self._source.loop)

    def _webp(self) -> bytes:
        """Each frame whole: WebP's own encoder of animations would make one frame of equal neighbours."""
        size = (self.width - 1).to_bytes(3, "little") + (self.height - 1).to_bytes(3, "little")
        out = [(b"VP8X", bytes([0x12, 0, 0, 0]) + size), (b"ANIM", struct.pack("<IH", 0xFFFFFFFF, self._source.loop))]
        for data, delay in zip(self._frames, self._delays):
            shown = min(round(delay * 1000), 0xFFFFFF).to_bytes(3, "little")
            out.append((b"ANMF", bytes(6) + size + shown + b"\x02" + _picture_chunks(data)))
        body = b"WEBP" + b"".join(struct.pack("<4sI", k, len(c)) + c + b"\0" * (len(c) % 2) for k, c in out)
        return b"RIFF" + struct.pack("<I", len(body)) + body


def _picture_chunks(data: bytes) -> bytes:
    """The chunks of a still WebP that hold its picture."""
    place, found = 12, b""
    while place + 8 <= len(data):
        size = 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        size += size % 2
        if data[place : place + 4] in (b"VP8 ", b"VP8L", b"ALPH"):
            found += data[place : place + size]
        place += size
    return found
