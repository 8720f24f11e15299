"""Parts of a file: what the readers of containers give and the writers take, and the bounded view that they read by.

`Part.data` is the payload in the form that is common to all formats:

    icc           the profile                        exif        a TIFF structure, without "Exif\\0\\0"
    xmp           the packet, UTF-8                  iptc        IIM data sets, without Photoshop's wrapping
    photoshop resources    8BIM blocks, but for IPTC and thumbnails
    comment       UTF-8                              text        UTF-8; `value` is a `Text`
    colour tags   `value`: code points of H.273 and the range (primaries, transfer, matrix, full)
    gamma         `value`: a `Gamma`                 density     `value`: a `Density`
    light level   `value`: (brightest, mean) in cd/m²
    mastering display      `value`: 8 chromaticities r g b white as x, y, then the highest and lowest cd/m²

Everything else is kept as the bytes of its chunk, marker or tag, where the format stays the same.
"""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from ebr_engine.media.holdings.types import Holding

MOST = 64 << 20  # bytes of one part that are read; a longer one is told by its size and left where it is


class Text(NamedTuple):
    """A text with a name."""

    name: str
    text: str


class Gamma(NamedTuple):
    """PNG's gAMA (1 is linear, 0.45455 a monitor) and cHRM (white, red, green, blue as x, y), each where it is there."""

    gamma: float | None
    primaries: tuple[float, ...] | None


class Density(NamedTuple):
    """Pixels per metre across and down; `unit` False where only their relation is meant."""

    x: float
    y: float
    unit: bool


@dataclass(frozen=True, eq=False)
class Part:
    """One thing beside the pixels, with its payload."""

    kind: str
    where: str
    data: bytes = b""
    detail: str = ""
    value: Any = None
    size: int | None = None  # where it is not the length of `data`
    raw: tuple[str, bytes] | None = None  # ("png:tEXt", its bytes): to write it back into the same format

    @property
    def holding(self) -> Holding:
        return Holding(self.kind, self.where, self.detail, len(self.data) if self.size is None else self.size)


class Window:
    """A file, or bytes, by place: a read never goes beyond the end, and never takes more than `MOST`."""

    def __init__(self, content: Path | bytes) -> None:
        self._file = BytesIO(content) if isinstance(content, bytes) else open(content, "rb", buffering=0)  # noqa: SIM115
        self.size = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def at(self, place: int, length: int) -> bytes:
        """At most `length` bytes from `place`; fewer at the end of the file."""
        if not 0 <= place < self.size:
            return b""
        self._file.seek(place)
        return self._file.read(min(length, self.size - place, MOST)) or b""

    def number(self, place: int, length: int, order: str = "big") -> int:
        """An unsigned number; 0 beyond the end."""
        return int.from_bytes(self.at(place, length), order)


def damaged(where: str, why: str) -> Part:
    """A part that cannot be read as what it says it is."""
    return Part("damaged part", where, detail=why)


def words(data: bytes, most: int = 40) -> str:
    """The beginning of a text for a person, on one line."""
    line = " ".join(data[: 4 * most].decode("utf-8", "replace").split())
    return line if len(line) <= most else line[: most - 1] + "…"
