"""Where the entropy-coded data of a JPEG end, and how it was coded."""

from collections.abc import Iterator
from typing import NamedTuple

from ebr_engine.media.holdings.parts import Window

_BLOCK = 1 << 17  # what a core keeps close
# The example tables of the standard's annex K, which encoders scale by their quality; in the order of rows.
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_ZIGZAG = (
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
)  # fmt: skip


class Coding(NamedTuple):
    """How a JPEG was written."""

    quality: int  # of libjpeg's scale, whose tables come nearest
    subsampled: bool  # chroma at half the width and height
    progressive: bool


def marks(window: Window, place: int) -> Iterator[int]:
    """Places of markers in the data of a scan, from `place` on; restarts and stuffed bytes are none."""
    import numpy as np

    while place < window.size - 1:
        block = np.frombuffer(window.at(place, _BLOCK + 1), np.uint8)
        if len(block) < 2:
            return
        marked = (block[:-1] == 0xFF) & (block[1:] != 0)
        if marked.any():
            at = np.flatnonzero(marked)
            following = block[at + 1]
            for each in at[(following != 0xFF) & ((following < 0xD0) | (following > 0xD7))]:
                yield place + int(each)
        place += len(block) - 1


def segments(window: Window, begin: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(marker, place, content) of a picture from its first marker to its end, (0xD9, place behind it, b"") last.

    Scans are passed over, markers behind the first one found. Ends without 0xD9 where the file is cut short.
    """
    place = begin + 2
    while len(head := window.at(place, 4)) >= 2:
        if head[0] != 0xFF:
            return
        marker = head[1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == 0xD9:
            yield marker, place + 2, b""
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            place += 2
            continue
        length = int.from_bytes(head[2:4], "big")
        content = window.at(place + 4, length - 2) if length >= 2 else b""
        if len(content) < length - 2:
            return
        yield marker, place, content
        place += 2 + length
        if marker == 0xDA:
            place = next(marks(window, place), window.size)


def coding(window: Window) -> Coding | None:
    """Quality, subsampling and order of a JPEG, from its tables and its frame's header; None where they are missing."""
    tables: dict[int, list[int]] = {}
    frame, progressive = b"", False
    for marker, _, content in segments(window):
        if marker == 0xDB:
            _read_tables(content, tables)
        elif marker in (0xC0, 0xC1, 0xC2) and not frame:
            frame, progressive = content, marker == 0xC2
        elif marker == 0xDA:
            break
    if len(frame) < 9 or not tables:
        return None
    components = [frame[6 + 3 * index : 9 + 3 * index] for index in range(min(frame[5], (len(frame) - 6) // 3))]
    if not components or len(components[0]) < 3:
        return None
    luma = tables.get(components[0][2], next(iter(tables.values())))
    factors = [(each[1] >> 4, each[1] & 15) for each in components if len(each) == 3]
    subsampled = len(factors) > 1 and all(first > chroma for first, chroma in zip(*factors[:2]))
    return Coding(_quality(luma), subsampled, progressive)


def _read_tables(content: bytes, tables: dict[int, list[int]]) -> None:
    place = 0
    while place < len(content):
        wide, number = content[place] >> 4, content[place] & 15
        size = 128 if wide else 64
        data = content[place + 1 : place + 1 + size]
        if len(data) < size:
            return
        tables[number] = [int.from_bytes(data[2 * i : 2 * i + 2], "big") for i in range(64)] if wide else list(data)
        place += 1 + size


def _quality(table: list[int]) -> int:
    """The quality whose table is nearest, by libjpeg's scale; of equal ones the best."""
    best = (1 << 30, 0)
    for quality in range(100, 0, -1):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        wanted = (min(255, max(1, (_LUMA[_ZIGZAG[i]] * scale + 50) // 100)) for i in range(64))
        best = min(best, (sum(abs(a - b) for a, b in zip(table, wanted)), -quality))
    return -best[1]
