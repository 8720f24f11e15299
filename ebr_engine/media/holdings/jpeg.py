"""JPEG's markers, and what phones put behind the picture: gain maps, clips, more pictures."""

import struct
from dataclasses import replace

from ebr_engine.media.holdings import iptc, xmp
from ebr_engine.media.holdings.jpeg_scan import segments
from ebr_engine.media.holdings.parts import Density, Part, Window, damaged, words

EXIF, XMP, EXTENSION = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
ICC, MPF, ISO_GAIN_MAP = b"ICC_PROFILE\0", b"MPF\0", b"urn:iso:std:iso:ts:21496:-1\0"
_THUMBNAIL_TYPES = (0x010001, 0x010002)  # MPF's large thumbnails


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture; with `light`, without reading what lies behind it."""
    found, profiles, extension = [], {}, {}
    mpf: list[tuple[int, int, int]] = []
    end = None
    for marker, place, content in segments(window):
        where = f"APP{marker - 0xE0}" if 0xE0 <= marker <= 0xEF else "COM"
        if marker == 0xD9:
            end = place
        elif marker == 0xFE:
            text = content.rstrip(b"\0")
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                text = text.decode("latin-1").encode()
            found.append(Part("comment", where, text, words(text), raw=(where, content)))
        elif marker == 0xE2 and content.startswith(ICC) and len(content) > 14:
            profiles[content[12]] = content[14:], content[13]
        elif marker == 0xE1 and content.startswith(EXTENSION) and len(content) >= 75:
            extension[struct.unpack_from(">I", content, 71)[0]] = content[75:]
        elif marker == 0xE2 and content.startswith(MPF):
            mpf = _listed(content[4:], place + 8)
        elif 0xE0 <= marker <= 0xEF:
            found += _application(where, content)
    found += _profile(profiles)
    if extension:
        _extend(found, b"".join(extension[at] for at in sorted(extension)))
    if end is None:
        found.append(damaged("scan", "the end of the picture is missing"))
    else:
        found += _behind(window, end, mpf, light, [part.data for part in found if part.kind == "xmp"])
    return found


def _application(where: str, content: bytes) -> list[Part]:
    raw = (where, content)
    if content.startswith(EXIF):
        data = content[6:]
        if data[:2] not in (b"II", b"MM"):
            return [damaged(where, "no EXIF")]
        return [Part("exif", where, data)]
    if content.startswith(XMP):
        return [Part("xmp", where, content[len(XMP) :])]
    if content.startswith(b"JFIF\0") and len(content) >= 12:
        unit, x, y = struct.unpack_from(">BHH", content, 7)
        if unit in (1, 2) and x and y:
            scale = 1 / 0.0254 if unit == 1 else 100
            return [
                Part(
                    "density",
                    where,
                    content[7:12],
                    f"{x} a{'n inch' if unit == 1 else ' cm'}",
                    Density(x * scale, y * scale, True),
                )
            ]
        if unit == 0 and x and y and x != y:
            return [Part("pixel aspect", where, content[7:12], f"{y}:{x}", Density(x, y, False))]
        return []
    if content.startswith(b"JFXX\0"):
        return [Part("thumbnail", where, size=len(content))]
    if content.startswith(iptc.PHOTOSHOP):
        iim, others, thumbnails = iptc.taken_apart(content[len(iptc.PHOTOSHOP) :])
        found = [Part("iptc", where, iim, iptc.described(iim))] if iim else []
        found += [Part("photoshop resources", where, others)] if others else []
        return found + ([Part("thumbnail", where, size=thumbnails)] if thumbnails else [])
    if content.startswith(ISO_GAIN_MAP):
        return [Part("gain map", where, content, "its version", raw=raw)]
    if content.startswith(b"Adobe") and where == "APP14":
        return []  # how the colours are coded
    if where == "APP11" and content.startswith(b"JP"):
        return [Part("provenance", where, content, "content credentials")]
    return [Part("application data", where, content, words(content.split(b"\0")[0], 20), raw=raw)]


def _profile(profiles: dict[int, tuple[bytes, int]]) -> list[Part]:
    if not profiles:
        return []
    count = next(iter(profiles.values()))[1]
    data = b"".join(profiles[number][0] for number in sorted(profiles))
    whole = sorted(profiles) == list(range(1, count + 1)) and data[36:40] == b"acsp"
    return [Part("icc", "APP2", data) if whole else damaged("APP2", "parts of the colour profile are missing")]


def _extend(found: list[Part], extension: bytes) -> None:
    """Put extended XMP into the packet that it belongs to."""
    for index, part in enumerate(found):
        if part.kind == "xmp" and (whole := xmp.merged(part.data, extension)):
            found[index] = replace(part, data=whole, detail="with its extension")
            return
    found.append(damaged("APP1", "extended XMP without the packet that it extends"))


def _listed(content: bytes, begin: int) -> list[tuple[int, int, int]]:
    """(place, bytes, attribute) of the pictures that a multi-picture list names, but for the first."""
    from ebr_engine.media.holdings.ifd import Tiff

    try:
        tiff = Tiff(Window(content))
        entry = tiff.read(tiff.first)[0].get(0xB002)
    except (ValueError, struct.error):
        return []
    data = entry.data if entry else b""
    pictures = [struct.unpack_from(tiff.order + "III", data, at) for at in range(0, len(data) - 15, 16)]
    return [(begin + place, size, attribute) for attribute, size, place in pictures[1:] if place and size]


def _behind(window: Window, end: int, mpf: list[tuple[int, int, int]], light: bool, packets: list[bytes]) -> list[Part]:
    """What lies behind the picture's end."""
    found, place = [], end
    attributes = {at: attribute for at, _, attribute in mpf}
    while place < window.size:
        head = window.at(place, 64)
        if not head.strip(b"\0"):
            place += len(head)
        elif head.startswith(b"\xff\xd8\xff"):
            after = next((at for marker, at, _ in segments(window, place) if marker == 0xD9), window.size)
            kind = _kind(window, place, attributes.get(place, 0))
            data = b"" if light else window.at(place, after - place)
            found.append(Part(kind, "behind the picture", data, value=attributes.get(place, 0), size=after - place))
            place = after
        elif head[:1] == b"\0" and (zeros := len(head) - len(head.lstrip(b"\0"))) >= 4:
            place += zeros
        else:
            clip = head[4:8] == b"ftyp" or b"MotionPhoto_Data" in head or _promises_clip(packets, window.size - place)
            kind = "motion clip" if clip else "data behind the picture"
            data = b"" if light else window.at(place, window.size - place)
            found.append(Part(kind, "behind the picture", data, size=window.size - place))
            break
    return found


def _promises_clip(packets: list[bytes], size: int) -> bool:
    return any(
        meaning == "MotionPhoto" and length >= size > 0 for packet in packets for meaning, length in xmp.item_lengths(packet)
    )


def _kind(window: Window, place: int, attribute: int) -> str:
    for marker, _, content in segments(window, place):
        if marker == 0xDA:
            break
        named = content.startswith(XMP) and any(name in content for name in (b"hdr-gain-map", b"HDRGainMap"))
        if named or content.startswith(ISO_GAIN_MAP):
            return "gain map"
    return "preview" if attribute & 0xFFFFFF in _THUMBNAIL_TYPES else "second picture"


def segment(marker: int, content: bytes) -> bytes:
    """A marker with its content, which has to be below 64 kB."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def profile_segments(profile: bytes) -> bytes:
    """A colour profile in as many markers as it needs."""
    pieces = [profile[at : at + 65519] for at in range(0, len(profile), 65519)]
    return b"".join(segment(0xE2, ICC + bytes([number, len(pieces)]) + piece) for number, piece in enumerate(pieces, 1))


def xmp_segments(packet: bytes) -> bytes:
    """A packet, with an extension where it is larger than a marker."""
    if len(packet) + len(XMP) <= 65533:
        return segment(0xE1, XMP + packet)
    main, extension, name = xmp.split(packet)
    head = EXTENSION + name.encode()
    pieces = range(0, len(extension), 65000)
    return segment(0xE1, XMP + main) + b"".join(
        segment(0xE1, head + struct.pack(">II", len(extension), at) + extension[at : at + 65000]) for at in pieces
    )


def density_segment(density: Density | None) -> bytes:
    """JFIF's marker, whose density is none where nothing is known."""
    unit, x, y = 0, 1, 1
    if density is not None:
        inch = density.x * 0.0254, density.y * 0.0254
        whole = all(abs(n - round(n)) < 0.013 for n in inch)  # PNG counts whole pixels a metre
        unit, (x, y) = (0, density[:2]) if not density.unit else (1, inch) if whole else (2, (density.x / 100, density.y / 100))
        x, y = (min(65535, max(1, round(n))) for n in (x, y))
    return segment(0xE0, b"JFIF\0" + struct.pack(">BBBHHBB", 1, 1, unit, x, y, 0, 0))


def picture_list(before: int, rest: int, pictures: list[tuple[int, int]]) -> bytes:
    """A multi-picture marker, in a picture with `before` bytes in front of it and `rest` behind it; (bytes, attribute) follow."""
    count = len(pictures) + 1
    size = 4 + len(MPF) + 8 + 42 + 16 * count  # marker, name, header, directory of three tags, entries
    offset = before + size + rest - (before + 8)
    entries = struct.pack(">IIIHH", 0x030000, before + size + rest, 0, 0, 0)
    for length, attribute in pictures:
        entries += struct.pack(">IIIHH", attribute & 0x00FFFFFF, length, offset, 0, 0)
        offset += length
    head = struct.pack(">2sHIH", b"MM", 42, 8, 3)
    head += struct.pack(">HHI4s", 0xB000, 7, 4, b"0100") + struct.pack(">HHII", 0xB001, 4, 1, count)
    head += struct.pack(">HHII", 0xB002, 7, 16 * count, 8 + 2 + 36 + 4) + struct.pack(">I", 0)
    return segment(0xE2, MPF + head + entries)


def with_applications_of(original: bytes, encoded: bytes) -> bytes:
    """A JPEG that was encoded anew, with the application markers that the original had."""
    head = b"".join(segment(marker, content) for marker, _, content in segments(Window(original)) if 0xE1 <= marker <= 0xEF)
    return encoded[:2] + head + encoded[2:]
