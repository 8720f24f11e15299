"""A folder of pictures as a video: frames in the order of their numbers, 8 or 16 bit."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.images import SUFFIXES, MediaError, Picture, check_can_hold, read_image, write_image
from ebr_engine.media.video.info import Colour, Frame, VideoInfo

_PATTERN = re.compile(r"%(?:0(\d+))?d")


class FolderReader:
    """Iterates over the pictures of a folder as frames of a constant rate; what `open_video` returns for a folder."""

    def __init__(self, path: Path, *, fps: Fraction, start: float | None = None, limit: int | None = None) -> None:
        names = (n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and not n.startswith("."))
        files = [path / name for name in sorted(names, key=by_number)]
        if not files:
            raise MediaError(f"{path}: no frames in this folder (looked for {' '.join(SUFFIXES)})")
        if fps <= 0:
            raise MediaError(f"{path}: the frame rate must be above 0, not {fps}")
        first = 0 if start is None else -int(-Fraction(start) * fps // 1)
        if not 0 <= first < len(files):
            raise MediaError(f"{path}: starting at {start:g} s is outside of its {float(len(files) / fps):g} s")
        self.path = path
        self.warnings: list[str] = []
        self._files = files[first:][:limit]
        picture = read_image(self._files[0])
        self.info = VideoInfo(
            width=picture.width,
            height=picture.height,
            fps=fps,
            time_base=1 / fps,
            frames=len(self._files),
            duration=float(len(self._files) / fps),
            bits=picture.bits,
            pix_fmt="gbrp" if picture.bits == 8 else "gbrp16le",
            codec=picture.format[1:],
            colour=Colour(matrix=0, full_range=True),
        )

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(self, *error) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        for index, file in enumerate(self._files):
            picture = read_image(file)
            if (picture.height, picture.width) != (self.info.height, self.info.width):
                sizes = f"{picture.width} x {picture.height} pixels, not {self.info.width} x {self.info.height}"
                raise MediaError(f"{file}: has {sizes} as the frames before")
            yield Frame(picture.pixels, index, self.info.time_base, duration=1, name=file.stem)


class FolderWriter:
    """Writes frames as pictures named by number, or as their source was; what `write_video` returns for a folder."""

    def __init__(self, target: str | os.PathLike, source, *, strict: bool = False, keep: bool = True) -> None:
        name = Path(target).name
        self._pattern = name if _PATTERN.search(name) else None
        self.path = Path(target).parent if self._pattern else Path(target)
        self.info: VideoInfo = getattr(source, "info", source)
        self.warnings: list[str] = []
        self._names: list[str] = []
        if self._pattern:
            check_can_hold(target, Picture(np.zeros((1, 1, 3), np.float32)))

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
        write_image(self._part / name, Picture(np.asarray(pixels, np.float32), bits=8 if self.info.bits == 8 else 16))
        self._names.append(name)

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
        finally:
            shutil.rmtree(self._part, ignore_errors=True)


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
