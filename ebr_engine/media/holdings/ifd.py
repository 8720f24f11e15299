"""TIFF's directories: those of TIFF files and those inside EXIF. Reading is bounded; writing adds, and moves nothing.

A changed directory is appended as a new one and its pointer set to it, so that values stay where they are: camera makers'
notes hold offsets of their own, which would be wrong elsewhere.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ebr_engine.media.holdings.parts import MOST, Window

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SWAPPED = {3: "H", 4: "I", 5: "I", 8: "H", 9: "I", 10: "I", 11: "I", 12: "Q", 13: "I", 16: "Q", 17: "Q", 18: "Q"}
MOST_ENTRIES = 4096
EXIF, GPS, INTEROP, SUB_IFDS, MAKER_NOTE = 0x8769, 0x8825, 0xA005, 0x014A, 0x927C
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Entry:
    """A tag's value as it is stored, in the byte order of its file."""

    type: int
    count: int
    data: bytes
    place: int = 0  # of the value in the file

    def numbers(self, order: str) -> list[int]:
        """The value as whole numbers; of a rational, numerators and denominators in turn."""
        code = _SWAPPED.get(self.type, "B")
        size = struct.calcsize(code)
        return list(struct.unpack(f"{order}{len(self.data) // size}{code}", self.data[: len(self.data) // size * size]))

    def text(self) -> str:
        """The value as text, up to its end mark."""
        return self.data.split(b"\0")[0].decode("utf-8", "replace").strip()


Ifd = dict[int, Entry]


class Tiff:
    """The directories of a TIFF structure, in a file or in bytes. ValueError for what is none."""

    def __init__(self, window: Window, begin: int = 0) -> None:
        self.window, self.begin = window, begin
        head = window.at(begin, 16)
        if head[:2] not in (b"II", b"MM") or len(head) < 8:
            raise ValueError("no TIFF header")
        self.order = "<" if head[:2] == b"II" else ">"
        version = struct.unpack(self.order + "H", head[2:4])[0]
        if version not in (42, 43, 85):
            raise ValueError("no TIFF header")
        self.big = version == 43
        if self.big and len(head) < 16:
            raise ValueError("no TIFF header")
        self.first = struct.unpack(self.order + "Q", head[8:16])[0] if self.big else struct.unpack(self.order + "I", head[4:8])[0]

    def read(self, place: int, most: int = MOST) -> tuple[Ifd, int]:
        """The directory at `place`, and where the next one is (0: none). Entries beyond the file's end are left out.

        A value of more than `most` bytes is left where it is, with empty data.
        """
        word, step, inline = ("Q", 20, 8) if self.big else ("I", 12, 4)
        count_size = 8 if self.big else 2
        window, begin = self.window, self.begin
        count = struct.unpack(
            self.order + ("Q" if self.big else "H"), window.at(begin + place, count_size).ljust(count_size, b"\0")
        )[0]
        count = min(count, MOST_ENTRIES)
        block = window.at(begin + place + count_size, count * step + inline)
        entries: Ifd = {}
        for at in range(0, min(count * step, len(block) - step + 1), step):
            tag, kind = struct.unpack_from(self.order + "HH", block, at)
            number = struct.unpack_from(self.order + word, block, at + 4)[0]
            size = SIZES.get(kind, 0) * number
            if not size:
                continue
            value = at + step - inline
            if size <= inline:
                entries[tag] = Entry(kind, number, block[value : value + size], place + count_size + value)
                continue
            where = struct.unpack_from(self.order + word, block, value)[0]
            if begin + where + size > window.size:
                continue
            entries[tag] = Entry(kind, number, window.at(begin + where, size) if size <= most else b"", where)
        rest = block[count * step :]
        following = struct.unpack(self.order + word, rest)[0] if len(rest) == inline else 0
        return entries, following

    def pages(self, most: int = MOST) -> list[Ifd]:
        """The chain of directories from the first one; a chain that bites its tail ends there."""
        found, seen, place = [], set(), self.first
        while place and place not in seen and len(found) < 10000:
            seen.add(place)
            entries, place = self.read(place, most)
            if not entries:
                break
            found.append(entries)
        return found

    def below(self, entries: Ifd, tag: int) -> Ifd:
        """The directory that a tag points to; empty where there is none."""
        if tag not in entries or not (places := entries[tag].numbers(self.order)):
            return {}
        return self.read(places[0])[0] if places[0] else {}


def swapped(entry: Entry) -> Entry:
    """The same value in the other byte order."""
    code = _SWAPPED.get(entry.type)
    if code is None:
        return entry
    count = len(entry.data) // struct.calcsize(code)
    numbers = struct.unpack(f"<{count}{code}", entry.data[: count * struct.calcsize(code)])
    return Entry(entry.type, entry.count, struct.pack(f">{count}{code}", *numbers))


def packed(entries: Mapping[int, Entry], order: str, big: bool, place: int, following: int = 0) -> bytes:
    """A directory with its values behind it, as it is to be written at `place` (which is even)."""
    word, step, inline = ("Q", 20, 8) if big else ("I", 12, 4)
    head = struct.pack(order + ("Q" if big else "H"), len(entries))
    behind = place + len(head) + len(entries) * step + inline
    values = b""
    for tag in sorted(entries):
        entry = entries[tag]
        head += struct.pack(f"{order}HH{word}", tag, entry.type, entry.count)
        if len(entry.data) <= inline:
            head += entry.data.ljust(inline, b"\0")
        else:
            head += struct.pack(order + word, behind + len(values))
            values += entry.data + b"\0" * (len(entry.data) % 2)
    return head + struct.pack(order + word, following) + values


def text_entry(text: str) -> Entry:
    """A text as a tag's value."""
    data = text.encode("utf-8") + b"\0"
    return Entry(2, len(data), data)


def number_entry(number: int, order: str, type: int = 4) -> Entry:
    """A whole number as a tag's value."""
    return Entry(type, 1, struct.pack(order + {3: "H", 4: "I", 13: "I", 16: "Q"}[type], number))
