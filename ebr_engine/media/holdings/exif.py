"""EXIF: what of it has to change with a picture that was turned and restored, and its way into and out of TIFF files."""

import struct
from collections.abc import Mapping

from ebr_engine.media.holdings.ifd import EXIF, GPS, INTEROP, ORIENTATION, Entry, Ifd, Tiff, number_entry, packed, swapped
from ebr_engine.media.holdings.parts import Window

WIDTH, HEIGHT, USER_COMMENT = 0xA002, 0xA003, 0x9286
# Tags of IFD0 that say how a TIFF's pixels are stored, or point to what is kept on its own.
_STRUCTURE = {
    *range(0x00FE, 0x0104), 0x0106, 0x0107, 0x0108, 0x0109, 0x010A, 0x0111, ORIENTATION, *range(0x0115, 0x011A), 0x011A,
    0x011B, 0x011C, 0x011D, 0x0120, 0x0121, 0x0122, 0x0123, 0x0124, 0x0125, 0x0128, 0x0129, 0x012D, 0x013D, 0x013E, 0x013F,
    0x0140, 0x0141, 0x0142, 0x0143, 0x0144, 0x0145, 0x0146, 0x0147, 0x0148, 0x014A, 0x014C, 0x014D, 0x014E, 0x0150, 0x0151,
    0x0152, 0x0153, 0x0154, 0x0155, 0x0156, 0x015B, *range(0x0200, 0x020A), 0x0211, 0x0212, 0x0213, 0x0214, 0x02BC, 0x83BB,
    0x8649, 0x8773, EXIF, GPS,
}  # fmt: skip


def orientation(exif: bytes) -> int:
    """1 to 8; 1 where it is not said, or nonsense."""
    try:
        tiff = Tiff(Window(exif))
        return _orientation(tiff, tiff.read(tiff.first)[0])
    except (ValueError, struct.error):
        return 1


def _orientation(tiff: Tiff, entries: Ifd) -> int:
    numbers = entries[ORIENTATION].numbers(tiff.order) if ORIENTATION in entries else []
    return numbers[0] if numbers and 1 <= numbers[0] <= 8 else 1


def upright(exif: bytes, width: int, height: int) -> bytes:
    """The same EXIF for a picture that stands upright and has this size, without its thumbnail, which shows it as it was.

    Nothing is moved: the numbers are overwritten in place, the thumbnail's bytes cleared.
    """
    try:
        tiff = Tiff(Window(exif))
        entries, following = tiff.read(tiff.first)
        changed = bytearray(exif)
        _overwrite(changed, tiff, entries, {ORIENTATION: 1})
        _overwrite(changed, tiff, tiff.below(entries, EXIF), {WIDTH: width, HEIGHT: height})
        if following:
            _clear_thumbnail(changed, tiff, following)
            _end_chain(changed, tiff)
    except (ValueError, struct.error):
        return exif
    return bytes(changed).rstrip(b"\0") + b"\0\0" if following else bytes(changed)


def _overwrite(changed: bytearray, tiff: Tiff, entries: Ifd, numbers: Mapping[int, int]) -> None:
    for tag, number in numbers.items():
        if (entry := entries.get(tag)) and entry.count == 1 and entry.type in (3, 4):
            struct.pack_into(tiff.order + ("H" if entry.type == 3 else "I"), changed, entry.place, number)


def _clear_thumbnail(changed: bytearray, tiff: Tiff, place: int) -> None:
    entries, _ = tiff.read(place)
    for start, length in ((0x0201, 0x0202), (0x0111, 0x0117)):
        if start in entries and length in entries:
            for at, size in zip(entries[start].numbers(tiff.order), entries[length].numbers(tiff.order)):
                if 8 <= at < len(changed):
                    changed[at : min(at + size, len(changed))] = bytes(min(size, len(changed) - at))


def _end_chain(changed: bytearray, tiff: Tiff) -> None:
    count = struct.unpack_from(tiff.order + "H", changed, tiff.first)[0]
    struct.pack_into(tiff.order + "I", changed, tiff.first + 2 + 12 * count, 0)


def with_thumbnail(exif: bytes, picture: bytes) -> bytes:
    """EXIF whose thumbnail is this JPEG, in place of the one that it had."""
    tiff = Tiff(Window(exif))
    count = tiff.window.number(tiff.first, 2, "little" if tiff.order == "<" else "big")
    changed = bytearray(exif + b"\0" * (len(exif) % 2))
    place = len(changed)
    struct.pack_into(tiff.order + "I", changed, tiff.first + 2 + 12 * count, place)
    entries = {0x0103: number_entry(6, tiff.order, 3), 0x0202: number_entry(len(picture), tiff.order)}
    entries[0x0201] = number_entry(place + 2 + 12 * 3 + 4, tiff.order)
    return bytes(changed) + packed(entries, tiff.order, False, place) + picture


def thumbnail(exif: bytes) -> int:
    """Bytes of the thumbnail inside; 0 for none."""
    try:
        tiff = Tiff(Window(exif))
        _, following = tiff.read(tiff.first)
        entries = tiff.read(following)[0] if following else {}
        return sum(entries[0x0202].numbers(tiff.order)) if 0x0202 in entries else 0
    except (ValueError, struct.error):
        return 0


def amended(exif: bytes | None, first: Mapping[int, Entry], details: Mapping[int, Entry]) -> bytes:
    """EXIF with these tags added to IFD0 and to the EXIF directory where it has none of them; values are little-endian."""
    exif = exif or struct.pack("<2sHIHI", b"II", 42, 8, 0, 0)
    tiff = Tiff(Window(exif))
    known, following = tiff.read(tiff.first)
    inner = tiff.below(known, EXIF)
    native = (lambda entry: entry) if tiff.order == "<" else swapped
    more = {tag: native(entry) for tag, entry in details.items() if tag not in inner}
    outer = {tag: native(entry) for tag, entry in first.items() if tag not in known}
    changed = bytearray(exif + b"\0" * (len(exif) % 2))
    if more:
        outer[EXIF] = number_entry(len(changed), tiff.order)
        changed += _placed({**inner, **more}, more, tiff.order, len(changed))
    if outer:
        struct.pack_into(tiff.order + "I", changed, 4, len(changed))
        changed += _placed({**known, **outer}, outer, tiff.order, len(changed), following)
    return bytes(changed)


def _placed(entries: Mapping[int, Entry], new: Mapping[int, Entry], order: str, place: int, following: int = 0) -> bytes:
    """A directory at `place` whose old values stay where they are."""
    kept = {
        tag: entry
        if tag in new or len(entry.data) <= 4
        else Entry(entry.type, entry.count, struct.pack(order + "I", entry.place))
        for tag, entry in entries.items()
    }
    return packed(kept, order, False, place, following)


def from_tiff(tiff: Tiff, page: Ifd) -> bytes | None:
    """What a TIFF page says of its origin, as EXIF; None where it says nothing."""
    first = {tag: entry for tag, entry in page.items() if tag not in _STRUCTURE and entry.data and tag < 0xC000}
    details, place = tiff.below(page, EXIF), tiff.below(page, GPS)
    if not (first or details or place):
        return None
    return _built(tiff.order, first, details, place, tiff.below(details, INTEROP))


def into_tiff(exif: bytes, order: str) -> tuple[Ifd, Ifd, Ifd, Ifd]:
    """IFD0's tags that are no structure, and the directories of EXIF, GPS and interoperability, in a byte order."""
    try:
        tiff = Tiff(Window(exif))
        page = tiff.read(tiff.first)[0]
        details, place = tiff.below(page, EXIF), tiff.below(page, GPS)
        found = ({t: e for t, e in page.items() if t not in _STRUCTURE}, details, place, tiff.below(details, INTEROP))
    except (ValueError, struct.error):
        return {}, {}, {}, {}
    if tiff.order == order:
        return found
    return tuple({tag: swapped_into(entry, tiff.order) for tag, entry in ifd.items()} for ifd in found)


def swapped_into(entry: Entry, order: str) -> Entry:
    """The value in the byte order that is not `order`."""
    return swapped(entry) if entry.type != 7 else entry


def _built(order: str, first: Ifd, details: Ifd, place: Ifd, interop: Ifd) -> bytes:
    """EXIF from its directories, all values in `order`."""
    data = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    first, details = dict(first), {tag: entry for tag, entry in details.items() if tag != INTEROP}
    empty = number_entry(0, order)
    pointers = {tag: empty for tag, ifd in ((EXIF, details or interop), (GPS, place)) if ifd}
    at = 8 + len(packed({**first, **pointers}, order, False, 8))
    if interop:
        details[INTEROP] = empty
    if details:
        size = len(packed(details, order, False, at))
        if interop:
            details[INTEROP] = number_entry(at + size, order)
        behind = packed(details, order, False, at) + (packed(interop, order, False, at + size) if interop else b"")
        first[EXIF] = number_entry(at, order)
        at += len(behind)
    else:
        behind = b""
    if place:
        first[GPS] = number_entry(at, order)
        behind += packed(place, order, False, at)
    return data + packed(first, order, False, 8) + behind


def has_user_comment(exif: bytes) -> bool:
    """Whether there is a user comment that says something."""
    try:
        tiff = Tiff(Window(exif))
        entry = tiff.below(tiff.read(tiff.first)[0], EXIF).get(USER_COMMENT)
    except (ValueError, struct.error):
        return False
    return entry is not None and bool(entry.data[8:].strip(b"\0 "))
