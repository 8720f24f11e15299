"""What a Matroska or WebM file says of its tracks that FFmpeg does not hand on, read without trust in its lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_READ = 4_000_000  # bytes: the tracks come before the pictures
_HOLDERS = {0x18538067: "segment", 0x1654AE6B: "tracks", 0xAE: "track", 0xE0: "video", 0x55B0: "colour"}
_HOLDERS |= {0x55D0: "mastering", 0x7670: "projection", 0x41E4: "mapping"}
_CLUSTER = 0x1F43B675
_NAMES = {
    **{0xD7: "number", 0x83: "type", 0x86: "codec", 0x53C0: "alpha mode", 0x53B8: "stereo mode"},
    **{0x55BC: "content light", 0x55BD: "content light", 0x41E7: "mapping type", 0x41ED: "mapping data"},
    **{0x54AA: "crop", 0x54BB: "crop", 0x54CC: "crop", 0x54DD: "crop"},
}


@dataclass(frozen=True)
class Element:
    """An element within a track: its name, what it lies in, and its bytes (of those that hold others, all of them)."""

    track: int  # counted from 0, in the order of the file
    name: str
    data: bytes

    @property
    def number(self) -> int:
        return int.from_bytes(self.data[:8], "big")


def read_tracks(path: Path) -> list[Element]:
    """The elements of all tracks that a file's first part describes. OSError where the file cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MOST_READ)
    found: list[Element] = []
    _read(data, 0, len(data), found, [-1], 0)
    return found


def _read(data: bytes, start: int, end: int, found: list[Element], count: list[int], depth: int) -> None:
    for number, body, stop in elements(data, start, end):
        if number == _CLUSTER:
            return
        name = _HOLDERS.get(number)
        if name == "track":
            count[0] += 1
        if name in ("mastering", "projection", "mapping", "video"):
            found.append(Element(count[0], name, data[body:stop]))
        if name is not None and depth < 8:
            _read(data, body, stop, found, count, depth + 1)
        elif number in _NAMES:
            found.append(Element(count[0], _NAMES[number], data[body:stop]))


def elements(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(identifier, begin of the content, its end) of elements one behind the other; one of unknown size ends with its holder."""
    while start < end:
        number, at = _variable(data, start, end, keep=True)
        if number is None:
            return
        size, at = _variable(data, at, end, keep=False)
        if size is None:
            return
        stop = end if size < 0 else min(end, at + size)
        yield number, at, stop
        start = stop


def _variable(data: bytes, at: int, end: int, keep: bool) -> tuple[int | None, int]:
    """A number of variable length and where it ends; -1 for "unknown", None where it is damaged. `keep` its length mark."""
    if at >= end or not data[at]:
        return None, at
    length = 9 - data[at].bit_length()
    if at + length > end:
        return None, at
    value = int.from_bytes(data[at : at + length], "big")
    if keep:
        return value, at + length
    value &= (1 << 7 * length) - 1
    return (-1 if value == (1 << 7 * length) - 1 else value), at + length
