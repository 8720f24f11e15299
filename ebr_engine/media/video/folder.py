"""A folder of pictures as a video: frames in the order of their numbers, 8 or 16 bit."""

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import format_of
from ebr_engine.media.holdings.boxes import read_xmp
from ebr_engine.media.images import SUFFIXES, check_can_hold, read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video.fates import Fates
from ebr_engine.media.video.frame_files import (
    aspect_of,
    colour_of,
    in_time,
    lengths,
    light_of_picture,
    parts_of_frame,
    read_times,
    without_pixels,
    write_times,
)
from ebr_engine.media.video.info import Frame, VideoInfo

_TOLERANCE = Fraction(1, 2000)  # seconds: people write 0.33
_PATTERN = re.compile(r"%(?:0(\d+))?d")


class FolderReader:
    """Iterates over the pictures of a folder as frames; what `open_video` returns for a folder.

    Their rate is constant, unless a timestamps file lies beside them.
    """

    def __init__(self, path: Path, *, fps: Fraction, start: float | None = None, limit: int | None = None) -> None:
        names = (n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and not n.startswith("."))
        files = [path / name for name in sorted(names, key=by_number)]
        if not files:
            raise MediaError(f"{path}: no frames in this folder (looked for {' '.join(SUFFIXES)})")
        if fps <= 0:
            raise MediaError(f"{path}: the frame rate must be above 0, not {fps}")
        stated = read_times(path, len(files))
        times = stated or [index / fps for index in range(len(files) + 1)]
        first = next((i for i, time in enumerate(times[:-1]) if time >= Fraction(start or 0) - _TOLERANCE), len(files))
        if first == len(files):
            raise MediaError(f"{path}: starting at {start:g} s is outside of its {float(times[-1]):g} s")
        self.path = path
        self.warnings: list[str] = []
        self._files = files[first:][:limit]
        self._times = times[first : first + len(self._files) + 1]
        picture = read_image(self._files[0])
        seconds = self._times[-1] - self._times[0]
        self.info = VideoInfo(
            width=picture.width,
            height=picture.height,
            fps=len(self._files) / seconds if stated else fps,
            time_base=Fraction(1, 1_000_000) if stated else 1 / fps,
            frames=len(self._files),
            duration=float(seconds),
            bits=picture.bits,
            pix_fmt=f"gbr{'p' if picture.alpha is None else 'ap'}{'' if picture.bits == 8 else '16le'}",
            codec=picture.format[1:],
            colour=colour_of(picture),
            pixel_aspect=aspect_of(picture),
            variable_rate=stated is not None,
            light=light_of_picture(picture),
        )
        self.holdings = [part.holding for part in picture.parts]

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(self, *error) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        base = self.info.time_base
        for file, time, length in zip(self._files, self._times, lengths(self._times)):
            picture = read_image(file)
            if (picture.height, picture.width) != (self.info.height, self.info.width):
                sizes = f"{picture.width} x {picture.height} pixels, not {self.info.width} x {self.info.height}"
                raise MediaError(f"{file}: has {sizes} as the frames before")
            begin, ticks = round((time - self._times[0]) / base), max(1, round(length / base))
            alpha, others = picture.alpha, without_pixels(picture)
            yield Frame(picture.pixels, begin, base, duration=ticks, name=file.stem, alpha=alpha, picture=others)


class FolderWriter:
    """Writes frames as pictures named by number, or as their source was; what `write_video` returns for a folder.

    A frame that was a picture keeps what its file held; one of a clip gets what the clip says of all. Where their rate
    varies, a timestamps file lies beside them.
    """

    codec_id = None  # pictures have formats

    def __init__(
        self, target: str | os.PathLike, source, *, strict: bool = False, keep: bool = True, left_out: Collection[str] = ()
    ) -> None:
        name = Path(target).name
        self._pattern = name if _PATTERN.search(name) else None
        self.path = Path(target).parent if self._pattern else Path(target)
        self.info: VideoInfo = getattr(source, "info", source)
        self._names: list[str] = []
        self._times: list[tuple[Fraction, Fraction]] = []
        self._strict = strict
        xmp = read_xmp(source.path) if keep and hasattr(source, "container_tags") else None
        self._parts = parts_of_frame(self.info, xmp) if keep else ()
        if self._pattern:
            check_can_hold(target, Picture(np.zeros((1, 1, 3), np.float32)))
        origin = source if keep and not isinstance(source, FolderReader) else self.info  # pictures tell of themselves
        format = format_of(name) if self._pattern else "png"
        self.fates = Fates(self.path, format, origin, None, True, strict, left_out)
        self.warnings: list[str] = []

    def __enter__(self) -> "FolderWriter":
        self._part = self.path.parent / f".ebr-{secrets.token_hex(6)}.part"
        try:
            self._part.mkdir()
        except OSError as error:
            raise MediaError(f"{self.path}: cannot write there: {error.strerror}") from error
        return self

    def write(self, pixels: np.ndarray, frame: Frame | None = None) -> None:
        """Write [H, W, 3] float32 RGB in [0, 1] as the next picture; 16 bit where the source has more than 8."""
        number = len(self._names) + 1
        if self._pattern:
            name = _PATTERN.sub(lambda match: f"{number:0{match[1] or 1}d}", self._pattern)
        else:
            name = f"{(frame and frame.name) or f'{number:06d}'}.png"
        if name in self._names[-1:]:
            raise MediaError(f"{self.path}: two frames would both be written to {name}")
        self._write(self._part / name, np.asarray(pixels, np.float32), frame)
        self._names.append(name)
        self._times.append(in_time(frame, number - 1, self.info.fps))

    def _write(self, path: Path, pixels: np.ndarray, frame: Frame | None) -> None:
        alpha = None if frame is None else self.fates.alpha(frame.alpha, pixels.shape[:2])
        bits = 8 if self.info.bits == 8 else 16
        if frame is not None and frame.picture is not None:
            picture = replace(frame.picture, pixels=pixels, alpha=alpha, bits=bits)
        else:
            picture = Picture(pixels, alpha, bits=bits, parts=self._parts)
            if frame is not None:
                self.fates.messages(frame.messages)
        self.fates.add(write_image(path, picture, strict=self._strict))

    @property
    def frames(self) -> int:
        """How many have been written."""
        return len(self._names)

    def prepare(self, pixels: np.ndarray, frame: Frame | None = None) -> np.ndarray:
        """As `VideoWriter.prepare`; pictures need no preparation."""
        return pixels

    def write_prepared(self, pixels: np.ndarray, frame: Frame | None = None) -> None:
        """As `VideoWriter.write_prepared`."""
        self.write(pixels, frame)

    def drain(self) -> None:
        """As `VideoWriter.drain`; nothing waits."""

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.path.mkdir(exist_ok=True)
                for name in self._names:
                    os.replace(self._part / name, self.path / name)
                if self._times:
                    write_times(self.path, self._times, self.info.fps)
        finally:
            shutil.rmtree(self._part, ignore_errors=True)
            self.warnings += self.fates.warnings()


def names_frames(path: str | os.PathLike) -> bool:
    """Whether an output path holds a number pattern, as in `out/%06d.png`."""
    return _PATTERN.search(os.path.basename(os.fspath(path))) is not None


def frames_of(pattern: Path) -> list[Path]:
    """The files that are there already under names that a pattern gives."""
    parts = (re.escape(part) for part in _PATTERN.split(pattern.name)[::2])
    name = re.compile(r"\d+".join(parts))
    return sorted(path for path in pattern.parent.glob("*") if name.fullmatch(path.name))


def is_frame_target(path: str | os.PathLike) -> bool:
    """Whether an output path means a folder of frames: it ends in a slash, is a folder, or holds a number pattern."""
    text = os.fspath(path)
    return text.endswith(("/", os.sep)) or os.path.isdir(text) or names_frames(text)


def by_number(name: str) -> list:
    """frame2 before frame10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name.lower())]
