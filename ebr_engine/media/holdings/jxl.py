"""JPEG XL's boxes; a bare code stream holds nothing beside its picture."""

from ebr_engine.media.holdings.boxes import head_of
from ebr_engine.media.holdings.parts import Part, Window, damaged

_PICTURE = (b"JXL ", b"ftyp", b"jxlc", b"jxlp", b"jxll", b"jxli", b"jbrd")


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture. Boxes that are compressed are told, not read."""
    found, place = [], 0
    if window.at(0, 2) == b"\xff\x0a":
        return found
    while len(start := window.at(place, 16)) >= 8:
        head = head_of(start, window.size - place)
        if head is None or place + head[2] > window.size:
            found.append(damaged("box", "cut short"))
            break
        kind, body, size = head
        if kind not in _PICTURE:
            found.append(_part(kind, window, place + body, size - body))
        place += size
    return found


def _part(kind: bytes, window: Window, place: int, size: int) -> Part:
    where = kind.decode("latin-1").strip()
    data = window.at(place, size)
    if kind == b"Exif":
        block = data[4 + int.from_bytes(data[:4], "big") :].removeprefix(b"Exif\0\0")
        return Part("exif", where, block) if block[:2] in (b"II", b"MM") else damaged(where, "no EXIF")
    if kind == b"xml ":
        return Part("xmp", where, data)
    if kind == b"jumb":
        return Part("provenance", where, data, "content credentials")
    if kind == b"jhgm":
        return Part("HEIF gain map", where, size=size)
    inner = data[:4].decode("latin-1").strip() + ", compressed" if kind == b"brob" else where
    return Part("unknown item", where, detail=inner, size=size)
