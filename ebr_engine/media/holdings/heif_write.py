"""Properties put into an AVIF that an encoder has written: what its colours mean, and how bright they get."""

import struct
from collections.abc import Sequence

from ebr_engine.media.holdings import av1
from ebr_engine.media.holdings.boxes import Box, boxes
from ebr_engine.media.holdings.heif import read_meta
from ebr_engine.media.holdings.parts import Window


def box(kind: bytes, content: bytes) -> bytes:
    """A box with its length."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def colour_box(primaries: int, transfer: int, matrix: int, full: int = 1) -> bytes:
    """Code points of H.273 as a property."""
    return box(b"colr", b"nclx" + struct.pack(">HHHB", primaries, transfer, matrix, 0x80 if full else 0))


def light_box(brightest: float, mean: float) -> bytes:
    """The brightest pixel and the brightest mean, in cd/m²."""
    return box(b"clli", struct.pack(">HH", *(min(65535, round(n)) for n in (brightest, mean))))


def mastering_box(value: Sequence[float]) -> bytes:
    """Chromaticities r g b white and the highest and lowest cd/m² of the display that a picture was made on."""
    red, green, blue, white = (value[at : at + 2] for at in (0, 2, 4, 6))
    numbers = (round(n * 5e4) for n in (*green, *blue, *red, *white))
    return box(b"mdcv", struct.pack(">8H2I", *numbers, *(round(n * 1e4) for n in value[8:10])))


def matrix_of(data: bytes) -> tuple[int, int]:
    """Matrix and range that the picture was coded with: of its colr property, or what libheif's encoder takes without."""
    meta = read_meta(Window(data))
    for each in meta.of(meta.primary, b"colr") if meta else []:
        if each[:4] == b"nclx":
            return struct.unpack_from(">H", each, 8)[0], each[10] >> 7
    return 6, 1


def with_parts(data: bytes, new: Sequence[bytes], items: Sequence[tuple[bytes, bytes, bytes]] = ()) -> bytes:
    """The file with more properties of its picture, in place of those of the same kind, and more items that describe it.

    `items`: (kind, MIME type, data). Data behind the meta box move, so that their places are corrected.
    """
    meta = next(each for each in boxes(data) if each.kind == b"meta")
    known = read_meta(Window(data))
    numbers = range(max(known.items) + 1, max(known.items) + 1 + len(items))
    shift = 0
    for _ in range(2):  # the second time the size is known
        starts, place = [], len(data) + shift + 8
        for _, _, content in items:
            starts.append((place, len(content)))
            place += len(content)
        inner = _inner(data, meta, known.primary, new, items, list(zip(numbers, starts)), shift)
        shift = len(inner) - (meta.end - meta.start)
    behind = box(b"mdat", b"".join(content for _, _, content in items)) if items else b""
    return data[: meta.start] + inner + data[meta.end :] + behind


def _inner(data: bytes, meta: Box, primary: int, new, items, places, shift: int) -> bytes:
    """The meta box with what is new."""
    rest, referred = b"", False
    for each in boxes(data, meta.body + 4, meta.end):
        body = data[each.body : each.end]
        if each.kind == b"iprp":
            rest += _properties(data, each, primary, new)
        elif each.kind == b"iloc":
            rest += box(b"iloc", _located(_moved(body, shift, meta.end), places))
        elif each.kind == b"iinf":
            rest += box(b"iinf", _named(body, [(n, kind, mime) for (n, _), (kind, mime, _) in zip(places, items)]))
        elif each.kind == b"iref":
            referred = True
            rest += box(b"iref", body + _described(body[0], [n for n, _ in places], primary))
        else:
            rest += _whole(data, each)
    if places and not referred:
        rest += box(b"iref", bytes(4) + _described(0, [n for n, _ in places], primary))
    return box(b"meta", data[meta.body : meta.body + 4] + rest)


def _properties(data: bytes, iprp: Box, primary: int, new: Sequence[bytes]) -> bytes:
    inner = {each.kind: each for each in boxes(data, iprp.body, iprp.end)}
    known = list(boxes(data, inner[b"ipco"].body, inner[b"ipco"].end))
    # One that is replaced becomes an empty one, so that the others keep their numbers.
    kept = b"".join(box(b"free", b"") if _same(data, each, new) else _whole(data, each) for each in known)
    associations = _associated(data, inner[b"ipma"], primary, range(len(known), len(known) + len(new)))
    return box(b"iprp", box(b"ipco", kept + b"".join(new)) + associations)


def _named(body: bytes, items: Sequence[tuple[int, bytes, bytes]]) -> bytes:
    """An item list with more items."""
    wide = 4 if body[0] else 2
    count = int.from_bytes(body[4 : 4 + wide], "big") + len(items)
    more = b""
    for number, kind, mime in items:
        more += box(b"infe", struct.pack(">IHH4s", 0x02000001, number, 0, kind) + b"\0" + (mime + b"\0" if mime else b""))
    return body[:4] + count.to_bytes(wide, "big") + body[4 + wide :] + more


def _located(body: bytes, places: Sequence[tuple[int, tuple[int, int]]]) -> bytes:
    """A location box with more items, each in one piece."""
    version, sizes = body[0], struct.unpack_from(">H", body, 4)[0]
    offset, length, base, index = (sizes >> turn & 15 for turn in (12, 8, 4, 0))
    wide = 4 if version == 2 else 2
    count = int.from_bytes(body[6 : 6 + wide], "big") + len(places)
    more = b""
    for number, (start, size) in places:
        more += (
            number.to_bytes(wide, "big")
            + (bytes(2) if version in (1, 2) else b"")
            + bytes(2)
            + (0 if offset else start).to_bytes(base, "big")
        )
        more += b"\0\1" + bytes(index if version in (1, 2) else 0) + (start if offset else 0).to_bytes(offset, "big")
        more += size.to_bytes(length, "big")
    return body[:6] + count.to_bytes(wide, "big") + body[6 + wide :] + more


def _described(version: int, numbers: Sequence[int], primary: int) -> bytes:
    """References from items to the picture that they describe."""
    form = ">IHI" if version else ">HHH"
    return b"".join(box(b"cdsc", struct.pack(form, number, 1, primary)) for number in numbers)


def _whole(data: bytes, each: Box) -> bytes:
    return data[each.start : each.end]


def _same(data: bytes, each: Box, new: Sequence[bytes]) -> bool:
    """Whether a property is replaced: one of the same kind, and of the same form of colour."""
    return any(each.kind == one[4:8] and (each.kind != b"colr" or data[each.body : each.body + 4] == one[8:12]) for one in new)


def _associated(data: bytes, ipma: Box, primary: int, numbers: range) -> bytes:
    """The association box with the picture's new properties (counted from 0)."""
    body = data[ipma.body : ipma.end]
    wide_item, wide = 4 if body[0] else 2, bool(body[3] & 1)
    out, at = body[:8], 8
    for _ in range(struct.unpack_from(">I", body, 4)[0]):
        item, count = body[at : at + wide_item], body[at + wide_item]
        length = count * (2 if wide else 1)
        entry = body[at + wide_item + 1 : at + wide_item + 1 + length]
        at += wide_item + 1 + length
        if int.from_bytes(item, "big") == primary:
            count += len(numbers)
            entry += b"".join(struct.pack(">H" if wide else ">B", n + 1) for n in numbers)
        out += item + bytes([count]) + entry
    return box(b"ipma", out)


def _moved(body: bytes, shift: int, behind: int) -> bytes:
    """A location box whose places behind the meta box have moved by `shift` bytes."""
    version, sizes = body[0], struct.unpack_from(">H", body, 4)[0]
    offset, length, base, index = (sizes >> turn & 15 for turn in (12, 8, 4, 0))
    out, at = bytearray(body), 6
    number = 4 if version == 2 else 2
    items = int.from_bytes(body[at : at + number], "big")
    at += number
    for _ in range(items):
        at += number
        inside = version in (1, 2) and int.from_bytes(body[at : at + 2], "big") & 15 == 1
        at += (2 if version in (1, 2) else 0) + 2
        start, start_at = int.from_bytes(body[at : at + base], "big"), at
        at += base
        extents = int.from_bytes(body[at : at + 2], "big")
        at += 2
        if base and start >= behind and not inside:
            out[start_at : start_at + base] = (start + shift).to_bytes(base, "big")
        for _ in range(extents):
            at += index if version in (1, 2) else 0
            place = int.from_bytes(body[at : at + offset], "big")
            if offset and not inside and not (base and start >= behind) and start + place >= behind:
                out[at : at + offset] = (place + shift).to_bytes(offset, "big")
            at += offset + length
    return bytes(out)


def with_stream_colours(data: bytes, primaries: int, transfer: int) -> bytes:
    """The file with the same code points in the coded picture's own header, where some programs look."""
    meta = read_meta(Window(data))
    item = meta.items.get(meta.primary) if meta else None
    if item is None or item.kind != b"av01" or not item.places:
        return data
    start, changed = item.places[0][0], bytearray(data)
    at = av1.colours_at(data[start : start + 64])
    if at is not None:
        for number, value in enumerate((primaries, transfer)):
            _put(changed, start * 8 + at + 8 * number, value)
    return bytes(changed)


def _put(data: bytearray, bit: int, value: int) -> None:
    """Eight bits at any place."""
    byte, shift = divmod(bit, 8)
    pair = int.from_bytes(data[byte : byte + 2], "big")
    pair = pair & ~(0xFF << (8 - shift)) | value << (8 - shift)
    data[byte : byte + 2] = pair.to_bytes(2, "big")
