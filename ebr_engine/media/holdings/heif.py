"""HEIF's items and properties, which are AVIF's and HEIC's too."""

import struct
from dataclasses import dataclass, field

from ebr_engine.media.holdings import av1
from ebr_engine.media.holdings.boxes import boxes, head_of
from ebr_engine.media.holdings.parts import Density, Part, Window, damaged
from ebr_engine.media.holdings.png import tag_words

_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
_GAIN_MAPS = (b"urn:com:apple:photo:2020:aux:hdrgainmap",)
_CODED = (b"av01", b"hvc1", b"grid", b"iden", b"tmap", b"j2k1", b"jpeg", b"unci", b"avc1", b"iovl")


@dataclass
class Item:
    """An item of the meta box."""

    kind: bytes
    mime: bytes = b""
    places: list[tuple[int, int]] = field(default_factory=list)
    inside: bool = False  # its data lie in the meta box's idat
    properties: list[int] = field(default_factory=list)
    hidden: bool = False


@dataclass
class Meta:
    """The meta box: items by number, properties, references."""

    primary: int = 0
    items: dict[int, Item] = field(default_factory=dict)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    references: list[tuple[bytes, int, list[int]]] = field(default_factory=list)
    idat: bytes = b""

    def of(self, item: int, kind: bytes) -> list[bytes]:
        """An item's properties of a kind."""
        chosen = self.items[item].properties if item in self.items else []
        return [self.properties[n][1] for n in chosen if 0 <= n < len(self.properties) and self.properties[n][0] == kind]


def read_meta(window: Window) -> Meta | None:
    """The file's meta box; None where there is none."""
    place = 0
    while len(start := window.at(place, 16)) >= 8 and (head := head_of(start, window.size - place)) is not None:
        kind, body, size = head
        if kind == b"meta":
            return _meta(window.at(place + body, size - body))
        place += size
    return None


def _meta(data: bytes) -> Meta:
    meta = Meta()
    for box in boxes(data, 4):
        body = data[box.body : box.end]
        try:
            if box.kind == b"pitm":
                meta.primary = int.from_bytes(body[4:8] if body[0] else body[4:6], "big")
            elif box.kind == b"iinf":
                _infos(meta, data, box)
            elif box.kind == b"iloc":
                _locations(meta, body)
            elif box.kind == b"iref":
                _references(meta, data, box, body[0])
            elif box.kind == b"idat":
                meta.idat = body
            elif box.kind == b"iprp":
                for inner in boxes(data, box.body, box.end):
                    if inner.kind == b"ipco":
                        meta.properties = [(each.kind, data[each.body : each.end]) for each in boxes(data, inner.body, inner.end)]
                    elif inner.kind == b"ipma":
                        _associations(meta, data[inner.body : inner.end])
        except (struct.error, IndexError):
            continue
    return meta


def _item(meta: Meta, number: int) -> Item:
    return meta.items.setdefault(number, Item(b""))


def _infos(meta: Meta, data: bytes, box) -> None:
    start = box.body + (8 if data[box.body] else 6)
    for inner in boxes(data, start, box.end):
        body = data[inner.body : inner.end]
        if inner.kind != b"infe" or len(body) < 12 or body[0] < 2:
            continue
        wide = body[0] == 3
        number = int.from_bytes(body[4 : 8 if wide else 6], "big")
        rest = body[10 if wide else 8 :]
        item = _item(meta, number)
        item.kind, item.hidden = rest[:4], bool(body[3] & 1)
        if item.kind == b"mime":
            texts = rest[4:].split(b"\0")
            item.mime = texts[1] if len(texts) > 1 else b""


def _locations(meta: Meta, body: bytes) -> None:
    version, sizes = body[0], struct.unpack_from(">H", body, 4)[0]
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    at = 6

    def number(width: int) -> int:
        nonlocal at
        at += width
        if at > len(body):
            raise IndexError
        return int.from_bytes(body[at - width : at], "big")

    for _ in range(number(4 if version == 2 else 2)):
        item = _item(meta, number(4 if version == 2 else 2))
        item.inside = version in (1, 2) and number(2) & 15 == 1
        number(2)
        start = number(base)
        for _ in range(number(2)):
            if version in (1, 2) and index:
                number(index)
            item.places.append((start + number(offset), number(length)))


def _references(meta: Meta, data: bytes, box, version: int) -> None:
    wide = 4 if version else 2
    for inner in boxes(data, box.body + 4, box.end):
        body = data[inner.body : inner.end]
        numbers = [int.from_bytes(body[at : at + wide], "big") for at in (0, *range(wide + 2, len(body) - wide + 1, wide))]
        meta.references.append((inner.kind, numbers[0], numbers[1:]))


def _associations(meta: Meta, body: bytes) -> None:
    wide_item, wide_index = 4 if body[0] else 2, 2 if body[3] & 1 else 1
    at = 8
    for _ in range(struct.unpack_from(">I", body, 4)[0]):
        item = _item(meta, int.from_bytes(body[at : at + wide_item], "big"))
        count = body[at + wide_item]
        at += wide_item + 1
        for _ in range(count):
            item.properties.append(
                (int.from_bytes(body[at : at + wide_index], "big") & (0x7FFF if wide_index == 2 else 0x7F)) - 1
            )
            at += wide_index
        if at > len(body):
            return


def content(window: Window, meta: Meta, item: Item) -> bytes:
    """An item's data."""
    if item.inside:
        return b"".join(meta.idat[at : at + length] for at, length in item.places)
    return b"".join(window.at(at, length or window.size - at) for at, length in item.places)


def depth(meta: Meta) -> int:
    """Bits a channel of the picture; 8 where it is not said."""
    coded = meta.primary
    for kind, source, targets in meta.references:
        if kind == b"dimg" and source == meta.primary and targets:
            coded = targets[0]
    for record in meta.of(coded, b"av1C"):
        if len(record) > 2:
            return 12 if record[2] & 0x20 else 10 if record[2] & 0x40 else 8
    for record in meta.of(coded, b"hvcC"):
        if len(record) > 17:
            return 8 + (record[17] & 7)
    return 8


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture."""
    meta = read_meta(window)
    if meta is None:
        return [Part("animation", "moov", value=2)] if b"avis" in window.at(8, 24) else [damaged("meta", "no items can be read")]
    found = _colours(meta) or _coded_colours(window, meta)
    for kind, number, targets in meta.references:
        if kind == b"cdsc" and meta.primary in targets and number in meta.items:
            found += _description(window, meta, meta.items[number])
        elif kind == b"thmb" and meta.primary in targets:
            found.append(Part("thumbnail", f"item {number}", size=_size(meta, number)))
        elif kind == b"auxl" and meta.primary in targets:
            found += _auxiliary(meta, number)
    named = {number for _, source, targets in meta.references for number in (source, *targets)}
    for number, item in meta.items.items():
        if item.kind == b"tmap":
            found.append(Part("HEIF gain map", f"item {number}", detail="tone map", size=_size(meta, number)))
        elif item.kind in _CODED and number != meta.primary and number not in named and not item.hidden:
            found.append(Part("inner picture", f"item {number}", size=_size(meta, number)))
        elif item.kind in (b"Exif", b"mime") and number not in named:
            found += _description(window, meta, item)
    if (bits := depth(meta)) > 8:
        found.append(Part("10 or 12 bit", "coded picture", detail=f"{bits} bit", value=bits))
    if b"avis" in window.at(8, 24) and _frames(window) > 1:
        found.append(Part("animation", "moov", value=_frames(window), detail=f"{_frames(window)} frames"))
    if lossless(meta):
        found.append(Part("lossless coding", "colr", value=True))
    return found


def lossless(meta: Meta) -> bool:
    """Whether the picture is coded as RGB in full resolution, as only lossless encoders do."""
    matrices = [box[8:10] for box in meta.of(meta.primary, b"colr") if box[:4] == b"nclx"]
    whole = any(len(record) > 2 and not record[2] & 0x0C for record in meta.of(meta.primary, b"av1C"))
    return whole and matrices in ([b"\0\0"], [b"\0\x10"], [b"\0\x11"])


def _frames(window: Window) -> int:
    """The frames of an image sequence, by the size table of its track."""
    place = window.at(0, 1 << 20).find(b"stsz")
    return window.number(place + 12, 4) if place > 0 else 1


def _colours(meta: Meta) -> list[Part]:
    found = []
    tags = profile = None
    for box in meta.of(meta.primary, b"colr"):
        if box[:4] == b"nclx" and len(box) >= 11:
            tags = (*struct.unpack_from(">HHH", box, 4), box[10] >> 7)
        elif box[:4] in (b"prof", b"rICC"):
            profile = box[4:]
    if profile and profile[36:40] == b"acsp":
        found.append(Part("icc", "colr", profile))
    elif profile is not None:
        found.append(damaged("colr", "no colour profile"))
    if tags and tags[:2] != (2, 2):
        detail, data = tag_words(*tags[:2]), bytes(n & 0xFF for n in tags)
        plain = tags[0] in (1, 2) and tags[1] in (13, 2)
        kind = "coded colour tags" if found and found[0].kind == "icc" else "sRGB" if plain else "colour tags"
        found.append(Part(kind, "colr", data, detail, 0 if kind == "sRGB" else tags))
    for box in meta.of(meta.primary, b"clli"):
        if len(box) >= 4:
            found.append(Part("light level", "clli", box, value=tuple(map(float, struct.unpack_from(">HH", box)))))
    for box in meta.of(meta.primary, b"mdcv"):
        if len(box) >= 24:
            numbers = struct.unpack_from(">8H", box)
            green, blue, red, white = (numbers[at : at + 2] for at in (0, 2, 4, 6))
            numbers = (*red, *green, *blue, *white)
            value = (*(n / 5e4 for n in numbers), *(n / 1e4 for n in struct.unpack_from(">2I", box, 16)))
            found.append(Part("mastering display", "mdcv", box, value=value))
    for box in meta.of(meta.primary, b"pasp"):
        across, down = struct.unpack_from(">II", box) if len(box) >= 8 else (1, 1)
        if across and down and across != down:
            found.append(Part("pixel aspect", "pasp", box, f"{across}:{down}", Density(down, across, False)))
    for kind in (b"amve", b"cclv", b"rloc"):
        found += [Part("viewing hints", kind.decode(), box) for box in meta.of(meta.primary, kind)]
    return found


def _coded_colours(window: Window, meta: Meta) -> list[Part]:
    """The colours that the coded picture's own header says, which count where no property does."""
    item = meta.items.get(meta.primary)
    tags = av1.colours(window.at(item.places[0][0], 64)) if item is not None and item.kind == b"av01" and item.places else None
    if tags is None or tags[:2] in ((2, 2), (1, 13)):  # as it is meant without
        return []
    return [Part("colour tags", "AV1 header", bytes(tags), tag_words(*tags[:2]), (*tags, 1))]


def _description(window: Window, meta: Meta, item: Item) -> list[Part]:
    data = content(window, meta, item)
    if item.kind == b"Exif":
        start = 4 + int.from_bytes(data[:4], "big")
        block = data[start:].removeprefix(b"Exif\0\0")
        if block[:2] not in (b"II", b"MM"):
            block = data[4:].removeprefix(b"Exif\0\0")
        return [Part("exif", "Exif item", block) if block[:2] in (b"II", b"MM") else damaged("Exif item", "no EXIF")]
    if item.mime == b"application/rdf+xml":
        return [Part("xmp", "mime item", data)]
    name = item.mime.decode("latin-1") or item.kind.decode("latin-1")
    kind = "provenance" if "c2pa" in name.lower() or "jumbf" in name.lower() else "unknown item"
    return [Part(kind, "item", detail=name, size=len(data))]


def _auxiliary(meta: Meta, number: int) -> list[Part]:
    names = [box[4:].split(b"\0")[0] for box in meta.of(number, b"auxC")]
    if not names or names[0] in _ALPHA:
        return []
    kind = "HEIF gain map" if names[0] in _GAIN_MAPS else "inner picture"
    return [Part(kind, f"item {number}", detail=names[0].decode("latin-1").rsplit(":", 1)[-1], size=_size(meta, number))]


def _size(meta: Meta, number: int) -> int:
    return sum(length for _, length in meta.items[number].places) if number in meta.items else 0
