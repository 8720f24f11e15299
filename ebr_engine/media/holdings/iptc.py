"""IPTC's data sets (IIM) and Photoshop's resource blocks, in which JPEG and TIFF keep them."""

import struct
from collections.abc import Iterator

PHOTOSHOP = b"Photoshop 3.0\0"
IPTC_BLOCK = 0x0404
_THUMBNAILS = (0x0409, 0x040C)
_EXIF_BLOCKS = (0x0422, 0x0423, 0x0424)  # copies of EXIF and XMP, which are written on their own


def blocks(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole block, its content) of resource blocks one after the other; ends at what is none."""
    place = 0
    while data[place : place + 4] in (b"8BIM", b"8B64", b"MeSa") and place + 12 <= len(data):
        number = struct.unpack_from(">H", data, place + 4)[0]
        name = data[place + 6]
        start = place + 6 + name + 1 + (name + 1) % 2
        if start + 4 > len(data):
            return
        size = struct.unpack_from(">I", data, start)[0]
        content = data[start + 4 : start + 4 + size]
        if len(content) < size:
            return
        end = start + 4 + size + size % 2
        yield number, data[place:end].ljust(end - place, b"\0"), content
        place = end


def taken_apart(data: bytes) -> tuple[bytes, bytes, int]:
    """IIM, the other blocks that are kept, and the bytes of thumbnails that are not, from resource blocks."""
    iim, others, thumbnails = b"", b"", 0
    for number, whole, content in blocks(data):
        if number == IPTC_BLOCK:
            iim += content
        elif number in _THUMBNAILS:
            thumbnails += len(content)
        elif number not in _EXIF_BLOCKS:
            others += whole
    return iim, others, thumbnails


def put_together(iim: bytes, others: bytes) -> bytes:
    """Resource blocks of IIM and the others."""
    block = b""
    if iim:
        block = b"8BIM" + struct.pack(">HHI", IPTC_BLOCK, 0, len(iim)) + iim + b"\0" * (len(iim) % 2)
    return block + others


def data_sets(iim: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(record, number, value) of IIM; ends at what is none."""
    place = 0
    while place + 5 <= len(iim) and iim[place] == 0x1C:
        record, number, size = struct.unpack_from(">BBH", iim, place + 1)
        place += 5
        if size & 0x8000:  # the length of the length
            width = size & 0x7FFF
            size = int.from_bytes(iim[place : place + width], "big") if width <= 4 else len(iim)
            place += width
        if place + size > len(iim):
            return
        yield record, number, iim[place : place + size]
        place += size


def texts(iim: bytes) -> dict[int, list[str]]:
    """Number → values of record 2, decoded: UTF-8 where it says so or is it, Latin-1 otherwise."""
    found: dict[int, list[str]] = {}
    for record, number, value in data_sets(iim):
        if record == 2 and number:
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                text = value.decode("latin-1")
            found.setdefault(number, []).append(text)
    return found


def described(iim: bytes) -> str:
    """A few words of it for a person."""
    found = texts(iim)
    names = {5: "title", 25: "keywords", 90: "city", 101: "country", 120: "caption", 116: "copyright", 80: "author"}
    return ", ".join(name for number, name in names.items() if number in found)
