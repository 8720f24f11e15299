"""Boxes of MP4 and QuickTime files, read without trust in their lengths, and added to a file's header."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
MOST_HEADER = 256_000_000  # bytes of a header that is read
_DEEP = 12  # boxes within boxes
_BEFORE = {b"stsd": 8, b"meta": 4, b"dref": 8}  # bytes before the boxes within
_VISUAL = 78  # of a video's sample entry
_HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"edts", b"udta", b"meta", b"ilst", b"sv3d", b"proj"}


@dataclass(frozen=True)
class Box:
    """A box in bytes: it begins at `start`, its content at `body`, and it ends at `end`."""

    kind: bytes
    start: int
    body: int
    end: int


def head_of(head: bytes, left: int) -> tuple[bytes, int, int] | None:
    """What a box's first 8 to 16 bytes say: its kind, bytes of the head, and of the whole box; None for an impossible length.

    `left`: bytes from its beginning to the end of what holds it, for a box that goes up to there. Source: ISO/IEC 14496-12, 4.2.
    """
    size, kind = struct.unpack_from(">I4s", head)
    body = 8
    if size == 1 and len(head) >= 16:
        size, body = struct.unpack_from(">Q", head, 8)[0], 16
    elif size == 0:
        size = left
    return (kind, body, size) if size >= body else None


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """The boxes that lie one behind the other in `data[start:end]`; ends at the first one that is damaged."""
    end = len(data) if end is None else min(end, len(data))
    while start + 8 <= end:
        head = head_of(data[start : min(start + 16, end)], end - start)
        if head is None or start + head[2] > end:
            return
        kind, body, size = head
        yield Box(kind, start, start + body, start + size)
        start += size


def tracks(header: bytes) -> Iterator[tuple[bytes, list[tuple[Box, ...]]]]:
    """Of each track in a movie header (the content of `moov`): its kind (`vide`, `soun`, …), and the path to each box in it."""
    for box in boxes(header):
        if box.kind == b"trak":
            paths = list(_below(header, (box,)))
            handler = next((path[-1] for path in paths if path[-1].kind == b"hdlr" and path[-2].kind == b"mdia"), None)
            yield (header[handler.body + 8 : handler.body + 12] if handler else b""), paths


def entry_kinds(path: Path) -> list[bytes]:
    """What each track of a file says that its samples are (`avc1`, `gpmd`, …); b"" where it does not."""
    header = read_header(path) or b""
    starts = (next((p[-1].body for p in paths if p[-1].kind == b"stsd"), None) for _, paths in tracks(header))
    return [b"" if start is None else header[start + 12 : start + 16] for start in starts]


def _below(data: bytes, path: tuple[Box, ...]) -> Iterator[tuple[Box, ...]]:
    holder = path[-1]
    inside = holder.body + _BEFORE.get(holder.kind, 0)
    if len(path) > 1 and path[-2].kind == b"stsd":
        inside = holder.body + _VISUAL
    elif holder.kind not in _HOLDERS:
        return
    if holder.kind == b"meta" and data[holder.body + 4 : holder.body + 8] in (b"hdlr", b"keys"):  # QuickTime's has no version
        inside = holder.body
    if len(path) < _DEEP:
        for box in boxes(data, inside, holder.end):
            yield (*path, box)
            yield from _below(data, (*path, box))


def outer_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset and length of the content of each box that an open file consists of."""
    at, end = 0, file.seek(0, 2)
    while at + 8 <= end:
        file.seek(at)
        head = head_of(file.read(16), end - at)
        if head is None:
            return
        kind, body, size = head
        yield kind, at + body, min(size, end - at) - body
        at += size


def find_header(file: BinaryIO) -> tuple[int, int] | None:
    """Where the content of the first `moov` box lies in an open file: (offset, length); None where there is none."""
    return next(((start, length) for kind, start, length in outer_boxes(file) if kind == b"moov"), None)


def read_xmp(path: Path) -> bytes | None:
    """The XMP packet of an MP4 file (a `uuid` box of its own) or of a QuickTime file (user data); None without."""
    with open(path, "rb") as file:
        for kind, start, length in outer_boxes(file):
            if kind == b"uuid" and 16 < length < MOST_HEADER:
                file.seek(start)
                if file.read(16) == XMP:
                    return file.read(length - 16)
    header = read_header(path) or b""
    for box in boxes(header):
        if box.kind == b"udta":
            for inner in boxes(header, box.body, box.end):
                if inner.kind == b"XMP_":
                    return header[inner.body : inner.end]
    return None


def add_xmp(path: Path, packet: bytes) -> None:
    """Put an XMP packet behind a file's last box."""
    with open(path, "ab") as file:
        file.write(struct.pack(">I4s", 24 + len(packet), b"uuid") + XMP + packet)


def read_header(path: Path) -> bytes | None:
    """The content of a file's `moov` box; None for a file without one. OSError where the file cannot be read."""
    with open(path, "rb") as file:
        if (found := find_header(file)) is None or found[1] > MOST_HEADER:
            return None
        file.seek(found[0])
        return file.read(found[1])


def add_to_video_track(path: Path, in_entry: bytes = b"", in_track: bytes = b"") -> bool:
    """Add boxes to the sample entry and to the track of a file's first video, in place; False where it cannot be done.

    The header has to be the last box of the file, so that nothing that it points to moves.
    """
    with open(path, "r+b") as file:
        found = find_header(file)
        if found is None or found[0] + found[1] != file.seek(0, 2) or found[1] > MOST_HEADER:
            return False
        file.seek(found[0] - 8)
        data = bytearray(file.read(found[1] + 8))
        header = bytes(data[8:])
        paths = next((paths for kind, paths in tracks(header) if kind == b"vide"), [])
        entry = next((path for path in paths if len(path) > 1 and path[-2].kind == b"stsd"), None)
        if entry is None:
            return False
        for added, holders in ((in_track, entry[:1]), (in_entry, entry)):  # the track ends behind its sample entry
            if added:
                at = holders[-1].end + 8
                data[at:at] = added
                for start in (0, *(box.start + 8 for box in holders)):
                    struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + len(added))
        file.seek(found[0] - 8)
        file.write(data)
    return True
