"""WebP's chunks."""

import struct

from ebr_engine.media.holdings.parts import Part, Window, damaged

_PICTURE = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture."""
    found, place, frames = [], 12, 0
    end = min(window.size, 8 + window.number(4, 4, "little"))
    while len(head := window.at(place, 8)) == 8 and place < end:
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        where = kind.decode("latin-1").strip()
        data = window.at(place + 8, length) if kind not in _PICTURE else b""
        place += 8 + length + length % 2
        if kind == b"ANMF":
            frames += 1
        if kind in _PICTURE:
            continue
        if len(data) < length:
            found.append(damaged(where, "cut short"))
        elif kind == b"ICCP":
            found.append(Part("icc", where, data) if data[36:40] == b"acsp" else damaged(where, "no colour profile"))
        elif kind == b"EXIF":
            exif = data.removeprefix(b"Exif\0\0")
            found.append(Part("exif", where, exif) if exif[:2] in (b"II", b"MM") else damaged(where, "no EXIF"))
        elif kind == b"XMP ":
            found.append(Part("xmp", where, data))
        elif kind == b"C2PA":
            found.append(Part("provenance", where, data, "content credentials"))
        else:
            found.append(Part("unknown WebP chunk", where, data, raw=(kind.decode("latin-1"), data)))
    if end < window.size:
        found.append(Part("data behind the picture", "after RIFF", window.at(end, window.size - end), size=window.size - end))
    if frames > 1:
        found.append(Part("animation", "ANMF", detail=f"{frames} frames", value=frames))
    if lossless(window):
        found.append(Part("lossless coding", "VP8L", value=True))
    return found


def lossless(window: Window) -> bool:
    """Whether the first picture is coded without loss."""
    place = 12
    while len(head := window.at(place, 8)) == 8:
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        place += 8 + 16 if kind == b"ANMF" else 8 + length + length % 2
    return False


def with_chunks(
    data: bytes, profile: bytes | None, exif: bytes | None, xmp: bytes | None, others: list[tuple[str, bytes]]
) -> bytes:
    """A WebP with these chunks in place of those that it has, in the order of the specification."""
    kept, flags, size = [], 0, b""
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        content = data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
        if kind == b"VP8X":
            flags, size = content[0], content[4:10]
        elif kind in _PICTURE:
            kept.append((kind, content))
    if not (profile or exif or xmp or others or flags):
        return data
    if not size:
        kind, content = kept[0]
        if kind == b"VP8L":
            bits = int.from_bytes(content[1:5], "little")
            width, height, flags = bits & 0x3FFF, bits >> 14 & 0x3FFF, flags | (0x10 if bits >> 28 & 1 else 0)
        else:
            width, height = (struct.unpack_from("<H", content, at)[0] % 0x4000 - 1 for at in (6, 8))
        size = width.to_bytes(3, "little") + height.to_bytes(3, "little")
    flags = (flags & 0x12) | (0x20 if profile else 0) | (0x08 if exif else 0) | (0x04 if xmp else 0)
    out = [(b"VP8X", bytes([flags, 0, 0, 0]) + size), *([(b"ICCP", profile)] if profile else []), *kept]
    out += [(b"EXIF", exif)] if exif else []
    out += [(b"XMP ", xmp)] if xmp else []
    out += [(kind.encode("latin-1"), content) for kind, content in others]
    body = b"WEBP" + b"".join(struct.pack("<4sI", k, len(c)) + c + b"\0" * (len(c) % 2) for k, c in out)
    return b"RIFF" + struct.pack("<I", len(body)) + body
