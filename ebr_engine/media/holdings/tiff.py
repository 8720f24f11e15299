"""TIFF's tags and pages."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ebr_engine.media.holdings import exif as exif_
from ebr_engine.media.holdings import iptc
from ebr_engine.media.holdings.ifd import EXIF, GPS, INTEROP, ORIENTATION, Entry, Ifd, Tiff, packed
from ebr_engine.media.holdings.parts import Density, Gamma, Part, Window, damaged

ICC, XMP, IPTC, PHOTOSHOP = 0x8773, 0x02BC, 0x83BB, 0x8649
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
WHITE_POINT, PRIMARIES, BITS, PHOTOMETRIC, SUB_FILE = 0x013E, 0x013F, 0x0102, 0x0106, 0x00FE
CIELAB = (8, 9, 10)
_OFFSETS = (0x0111, 0x0144)  # of strips and tiles
_INVENTED = (X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, ORIENTATION)  # which libvips writes without being asked
_DESCRIPTIVE = {0x8298, 0x4746, 0x4749, *range(0x9C9B, 0x9CA0), 0xA401}  # of the tags above 0x8000, and Windows' own


@dataclass(frozen=True)
class Page:
    """A page's directory, as the reader of pictures needs it."""

    orientation: int
    photometric: int
    reduced: bool  # a smaller copy of another page


def pages(window: Window) -> list[Page]:
    """The pages of a file; empty where its directories cannot be read."""
    try:
        tiff = Tiff(window)
        return [_page(tiff, entries) for entries in tiff.pages(most=1 << 16)]
    except (ValueError, struct.error):
        return []


def _page(tiff: Tiff, entries: Ifd) -> Page:
    def number(tag: int, otherwise: int) -> int:
        values = entries[tag].numbers(tiff.order) if tag in entries else []
        return values[0] if values else otherwise

    orientation = number(ORIENTATION, 1)
    return Page(orientation if 1 <= orientation <= 8 else 1, number(PHOTOMETRIC, -1), bool(number(SUB_FILE, 0) & 1))


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture, of the first page; the others are counted."""
    try:
        tiff = Tiff(window)
        chain = tiff.pages()
    except (ValueError, struct.error):
        return [damaged("header", "no TIFF directory")]
    if not chain:
        return [damaged("directory", "no page can be read")]
    found = of_page(tiff, chain[0])
    full = sum(not _page(tiff, entries).reduced for entries in chain)
    if full > 1:
        found.append(Part("pages", "directories", detail=f"{full} pages", value=full))
    if full < len(chain):
        found.append(Part("thumbnail", "directories", detail=f"{len(chain) - full} smaller copies"))
    return found


def parts_of_page(window: Window, number: int) -> list[Part]:
    """Everything but the picture, of one page."""
    try:
        tiff = Tiff(window)
        chain = tiff.pages()
    except (ValueError, struct.error):
        return []
    return of_page(tiff, chain[number]) if number < len(chain) else []


def of_page(tiff: Tiff, page: Ifd) -> list[Part]:
    """Everything but the picture of one page."""
    found = []
    if profile := _data(page, ICC):
        kind = "CMYK or Lab profile" if _page(tiff, page).photometric in CIELAB else "icc"
        found.append(Part(kind, "tag 34675", profile) if profile[36:40] == b"acsp" else damaged("tag 34675", "no colour profile"))
    if packet := _data(page, XMP):
        found.append(Part("xmp", "tag 700", packet))
    iim, others, thumbnails = iptc.taken_apart(_data(page, PHOTOSHOP))
    if IPTC in page:
        iim = _iim(tiff, page[IPTC])
    found += [Part("iptc", "tag 33723", iim, iptc.described(iim))] if iim else []
    found += [Part("photoshop resources", "tag 34377", others)] if others else []
    found += [Part("thumbnail", "tag 34377", size=thumbnails)] if thumbnails else []
    known = {tag: entry for tag, entry in page.items() if tag < 0x8000 or tag in _DESCRIPTIVE or tag in (EXIF, GPS)}
    if block := exif_.from_tiff(tiff, known):
        found.append(Part("exif", "tags", block))
    if private := {t: e for t, e in page.items() if t >= 0x8000 and t not in (*known, ICC, IPTC, PHOTOSHOP) and e.data}:
        names = ", ".join(str(tag) for tag in sorted(private)[:6]) + (" …" if len(private) > 6 else "")
        found.append(
            Part(
                "private tags", "tags", detail=names, value=(tiff.order, private), size=sum(len(e.data) for e in private.values())
            )
        )
    if 0x014A in page:
        found.append(Part("inner picture", "tag 330", detail="directories below the page", size=len(page[0x014A].data)))
    found += _density(tiff, page)
    if ICC not in page and PRIMARIES in page:
        found += _primaries(tiff, page)
    if BITS in page and (depth := max(page[BITS].numbers(tiff.order), default=8)) > 8:
        found.append(Part("16 bit" if depth > 12 else "10 or 12 bit", "tag 258", detail=f"{depth} bit", value=depth))
    return found


def _data(page: Ifd, tag: int) -> bytes:
    return page[tag].data if tag in page else b""


def _iim(tiff: Tiff, entry: Entry) -> bytes:
    """IPTC's bytes; where a program has written them as long numbers in the wrong order, in the right one."""
    data = entry.data
    if data[:1] != b"\x1c" and entry.type == 4 and data[3:4] == b"\x1c":
        data = struct.pack(f">{len(data) // 4}I", *struct.unpack(f"<{len(data) // 4}I", data))
    return data.rstrip(b"\0") if data[:1] == b"\x1c" else b""


def _density(tiff: Tiff, page: Ifd) -> list[Part]:
    values = []
    for tag in (X_RESOLUTION, Y_RESOLUTION):
        numbers = page[tag].numbers(tiff.order) if tag in page else []
        values.append(numbers[0] / numbers[1] if len(numbers) > 1 and numbers[1] else 0)
    unit = page[RESOLUTION_UNIT].numbers(tiff.order)[0] if RESOLUTION_UNIT in page else 2
    x, y = values
    if not (x and y):
        return []
    if unit not in (2, 3):
        return [Part("pixel aspect", "tag 282", detail=f"{y:g}:{x:g}", value=Density(x, y, False))] if x != y else []
    scale = 1 / 0.0254 if unit == 2 else 100
    return [
        Part(
            "density",
            "tag 282",
            detail=f"{x:g} a{'n inch' if unit == 2 else ' cm'}",
            value=Density(x * scale, y * scale, True),
            size=8,
        )
    ]


def _primaries(tiff: Tiff, page: Ifd) -> list[Part]:
    numbers = page[PRIMARIES].numbers(tiff.order)
    white = page[WHITE_POINT].numbers(tiff.order) if WHITE_POINT in page else [3127, 10000, 3290, 10000]
    pairs = [(a / b if b else 0) for a, b in zip([*white, *numbers][::2], [*white, *numbers][1::2])]
    if len(pairs) != 8 or not all(0 < value < 1 for value in pairs):
        return []
    return [Part("gamma", "tag 319", page[PRIMARIES].data, "primaries", Gamma(None, tuple(pairs)))]


@dataclass(frozen=True)
class Tags:
    """What a page is written with beside its picture."""

    icc: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    photoshop: bytes | None = None
    exif: bytes | None = None
    density: Density | None = None
    private: tuple[str, Ifd] | None = None


def assembled(files: Sequence[tuple[bytes, Tags]]) -> bytes:
    """One TIFF of pages that are TIFF files of their own, as an encoder made them: each with its tags, in this order."""
    first = Tiff(Window(files[0][0]))
    order, big = first.order, first.big
    mark = b"II" if order == "<" else b"MM"
    out = [mark + (struct.pack(order + "HHHQ", 43, 8, 0, 0) if big else struct.pack(order + "HI", 42, 0))]
    length = len(out[0])
    word, links = ("Q" if big else "I"), [8 if big else 4]  # links: where the place of each next directory is written
    for data, tags in files:
        tiff = Tiff(Window(data))
        page = {tag: entry for tag, entry in tiff.read(tiff.first)[0].items() if tag not in _INVENTED}
        for tag in _OFFSETS:
            if tag in page:
                places = [place + length for place in page[tag].numbers(order)]
                page[tag] = Entry(16 if big else 4, len(places), struct.pack(f"{order}{len(places)}{word}", *places))
        out.append(data + b"\0" * (len(data) % 2))
        length += len(out[-1])
        page |= _entries(tags, order)
        directory, behind = _with_directories(page, tags, order, big, length)
        links.append(length + (8 + 20 * len(page) if big else 2 + 12 * len(page)))
        out.append(directory + behind)
        length += len(out[-1])
    whole = bytearray(b"".join(out))
    place = len(out[0])
    for index, link in enumerate(links[:-1]):
        place += len(out[1 + 2 * index])
        struct.pack_into(order + word, whole, link, place)
        place += len(out[2 + 2 * index])
    return bytes(whole)


def _count(page: Ifd) -> int:
    return len(page)


def _with_directories(page: Ifd, tags: Tags, order: str, big: bool, place: int) -> tuple[bytes, bytes]:
    """The page's directory to be written at `place`, and EXIF's behind it; their pointers are put into `page`."""
    _, details, where, interop = exif_.into_tiff(tags.exif, order) if tags.exif else ({}, {}, {}, {})
    kind = 18 if big else 4
    word = order + ("Q" if big else "I")
    empty = Entry(kind, 1, struct.pack(word, 0))
    details = {tag: entry for tag, entry in details.items() if tag != INTEROP}
    page |= {tag: empty for tag, ifd in ((EXIF, details or interop), (GPS, where)) if ifd}
    at = place + len(packed(page, order, big, place))
    behind = b""
    if details or interop:
        if interop:
            details[INTEROP] = empty
        size = len(packed(details, order, big, at))
        if interop:
            details[INTEROP] = Entry(kind, 1, struct.pack(word, at + size))
        page[EXIF] = Entry(kind, 1, struct.pack(word, at))
        behind = packed(details, order, big, at) + (packed(interop, order, big, at + size) if interop else b"")
    if where:
        page[GPS] = Entry(kind, 1, struct.pack(word, at + len(behind)))
        behind += packed(where, order, big, at + len(behind))
    return packed(page, order, big, place), behind


def _entries(tags: Tags, order: str) -> Ifd:
    """The tags as entries of a directory."""
    page: Ifd = {}
    if tags.private:
        source, entries = tags.private
        page |= entries if source == order else {tag: exif_.swapped_into(entry, source) for tag, entry in entries.items()}
    if tags.exif:
        page |= exif_.into_tiff(tags.exif, order)[0]
    for tag, data in ((ICC, tags.icc), (XMP, tags.xmp), (IPTC, tags.iptc), (PHOTOSHOP, tags.photoshop)):
        if data:
            page[tag] = Entry(1 if tag == XMP else 7, len(data), data)
    if tags.density:
        unit, scale = (2, 0.0254) if tags.density.unit else (1, 1)
        for tag, value in ((X_RESOLUTION, tags.density.x), (Y_RESOLUTION, tags.density.y)):
            page[tag] = Entry(5, 1, struct.pack(order + "II", *_ratio(value * scale)))
        page[RESOLUTION_UNIT] = Entry(3, 1, struct.pack(order + "H", unit))
    return page


def _ratio(value: float) -> tuple[int, int]:
    if abs(value - round(value)) < 1e-3 * min(1, value):
        return round(value), 1
    return min(round(value * 1000), 0xFFFFFFFF), 1000
