"""GIF's extensions."""

from ebr_engine.media.holdings.parts import MOST, Part, Window, damaged, words

_BLOCK = 1 << 16
_XMP_TRAILER = 258  # bytes of the "magic" end of an XMP packet, which no reader of sub-blocks stumbles over


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the pictures."""
    found, frames = [], 0
    place = 13 + _table(window.number(10, 1))
    while head := window.at(place, 2):
        if head[0] == 0x3B:
            place += 1
            break
        if head[0] == 0x2C:
            frames += 1
            place += 11 + _table(window.number(place + 9, 1))
            place = _skip(window, place)
        elif head[0] == 0x21 and len(head) == 2:
            name, start = b"", place + 2
            if head[1] == 0xFF:
                name = window.at(place + 3, 11)
                start = place + 3 + window.number(place + 2, 1)
            place = _skip(window, start)
            if head[1] == 0xFE:
                text = _joined(window, start).rstrip(b"\0")
                found.append(Part("comment", "comment extension", text, words(text)))
            elif name == b"XMP DataXMP":
                found.append(Part("xmp", "application extension", window.at(start, place - start)[:-_XMP_TRAILER]))
            elif name == b"ICCRGBG1012":
                data = _joined(window, start)
                known = data[36:40] == b"acsp"
                found.append(Part("icc", "application extension", data) if known else damaged("ICCRGBG1012", "no colour profile"))
            elif head[1] == 0x01:
                found.append(Part("plain text", "text extension", size=place - start))
            elif name and name not in (b"NETSCAPE2.0", b"ANIMEXTS1.0"):
                whole = window.at(start - 14, place - start + 14)
                found.append(Part("application extension", "application extension", whole, name.decode("latin-1")))
        else:
            found.append(damaged("blocks", "not the end of a GIF"))
            break
    if place < window.size and window.at(place, 64).strip(b"\0"):
        found.append(Part("data behind the picture", "after the trailer", window.at(place, window.size - place)))
    if frames > 1:
        found.append(Part("animation", "images", detail=f"{frames} frames", value=frames))
    return found


def _table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip(window: Window, place: int) -> int:
    """Behind the sub-blocks that begin at `place`; most are full, and those are passed over many at a time."""
    while True:
        block = window.at(place, _BLOCK)
        at = 0
        while at < len(block):
            full = block[at::256]
            at += 256 * (len(full) - len(full.lstrip(b"\xff")))
            if at < len(block):
                size = block[at]
                at += 1 + size
                if not size:
                    return place + at
        if not block:
            return place + 1
        place += at


def _joined(window: Window, place: int) -> bytes:
    pieces, total = [], 0
    while (size := window.number(place, 1)) and total < MOST:
        pieces.append(window.at(place + 1, size))
        total += size
        place += 1 + size
    return b"".join(pieces)


def with_extensions(data: bytes, comments: list[bytes], xmp: bytes | None, profile: bytes | None, others: list[bytes]) -> bytes:
    """A GIF with comments, XMP, a profile and whole extensions before its first picture."""
    place = 13 + _table(data[10])
    extra = b"".join(b"\x21\xfe" + _blocks(text) for text in comments)
    if profile:
        extra += b"\x21\xff\x0bICCRGBG1012" + _blocks(profile)
    if xmp:
        extra += b"\x21\xff\x0bXMP DataXMP" + xmp + b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    extra += b"".join(others)
    # Behind the loop count, which some programs expect first.
    if data[place : place + 2] == b"\x21\xff" and data[place + 3 : place + 14] == b"NETSCAPE2.0":
        place += 19
    return data[:place] + extra + data[place:]


def _blocks(data: bytes) -> bytes:
    return b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)) + b"\0"
