"""PNG's chunks: what they hold beside the picture, and a picture written with them."""

import struct
import zlib
from collections.abc import Sequence

from ebr_engine.media.holdings import iptc
from ebr_engine.media.holdings.parts import MOST, Density, Gamma, Part, Text, Window, damaged, words

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PICTURE = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"fcTL", b"fdAT", b"acTL")
_RAW_PROFILE = "Raw profile type "
XMP_NAME = "XML:com.adobe.xmp"
CAPTIONS = ("Title", "Author", "Description", "Copyright", "Software", "Comment", "parameters")  # which EXIF and XMP know too


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture, from chunks before and after it."""
    found: list[Part] = []
    colours: dict[bytes, bytes] = {}
    animated = 1
    place, header, palette = 8, b"", b""
    while len(head := window.at(place, 8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        data = window.at(place + 8, length) if kind not in (b"IDAT", b"fdAT") else b""
        place += 12 + length
        where = kind.decode("latin-1")
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            header = data
        elif kind == b"PLTE":
            palette = data
        elif kind == b"acTL" and len(data) >= 8:
            animated = max(1, int.from_bytes(data[:4], "big"))
        if kind in _PICTURE:
            continue
        if len(data) < min(length, MOST):
            found.append(damaged(where, "cut short"))
            break
        if kind in (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"iCCP"):
            colours.setdefault(kind, data)
        else:
            found += _part(kind, where, data, header, palette)
    if place < window.size:
        found.append(
            Part("data behind the picture", "after IEND", window.at(place, window.size - place), size=window.size - place)
        )
    if animated > 1:
        found.append(Part("animation", "acTL", detail=f"{animated} frames", value=animated, size=8))
    if len(header) >= 10 and header[8] == 16:
        found.append(Part("16 bit", "IHDR", value=16, size=1))
    return [*_colours(colours, any(part.kind == "icc" for part in found)), *_unique(found)]


def _unique(found: list[Part]) -> list[Part]:
    """Without the raw profiles that say again what a chunk of its own does."""
    own = {part.kind for part in found if part.raw and part.raw[0] in ("eXIf", "iTXt", "iCCP")}
    return [part for part in found if not (part.where.startswith(_RAW_PROFILE) and part.kind in own)]


def _colours(chunks: dict[bytes, bytes], raw_profile: bool) -> list[Part]:
    """The chunks that say what the colours are, in their order of precedence: only the first one counts."""
    found: list[Part] = []

    def add(kind: bytes, part: Part) -> None:
        outranked = bool(found) or (raw_profile and kind != b"cICP")
        if outranked:
            part = Part("second colour description", part.where, part.data, part.detail, part.value)
        found.append(Part(part.kind, part.where, part.data, part.detail, part.value, raw=(kind.decode(), chunks[kind])))

    if len(cicp := chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full = cicp
        add(b"cICP", Part("colour tags", "cICP", cicp, tag_words(primaries, transfer), (primaries, transfer, matrix, full)))
    if b"iCCP" in chunks:
        profile = _inflated(chunks[b"iCCP"].split(b"\0", 1)[-1][1:])
        if len(profile) >= 132 and profile[36:40] == b"acsp":
            add(b"iCCP", Part("icc", "iCCP", profile, chunks[b"iCCP"].split(b"\0")[0].decode("latin-1")))
        else:
            found.append(damaged("iCCP", "no colour profile"))
    if len(intent := chunks.get(b"sRGB", b"")) == 1:
        add(b"sRGB", Part("sRGB", "sRGB", intent, "rendering intent", intent[0]))
    gamma = struct.unpack(">I", chunks[b"gAMA"])[0] / 1e5 if len(chunks.get(b"gAMA", b"")) == 4 else None
    chroma = None
    if len(chunks.get(b"cHRM", b"")) == 32:
        chroma = tuple(number / 1e5 for number in struct.unpack(">8I", chunks[b"cHRM"]))
    if gamma or chroma:
        detail = (f"1/{1 / gamma:.3g}" if gamma else "") + (
            " and primaries" if gamma and chroma else "primaries" if chroma else ""
        )
        first = not found and not raw_profile
        names = [name for name, there in ((b"gAMA", gamma), (b"cHRM", chroma)) if there]
        for name in names:
            kind = "gamma" if first else "second colour description"
            found.append(Part(kind, name.decode(), chunks[name], detail, Gamma(gamma, chroma), raw=(name.decode(), chunks[name])))
    return found


def _part(kind: bytes, where: str, data: bytes, header: bytes, palette: bytes) -> list[Part]:
    raw = (where, data)
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        return _text(kind, where, data)
    if kind == b"eXIf":
        exif = data.removeprefix(b"Exif\0\0")
        return [Part("exif", where, exif, raw=raw)] if exif[:2] in (b"II", b"MM") else [damaged(where, "no EXIF")]
    if kind == b"pHYs" and len(data) == 9:
        x, y, unit = struct.unpack(">IIB", data)
        detail = f"{x * 0.0254:.4g} an inch" if unit else f"{y}:{x}"
        if not (x and y) or (not unit and x == y):
            return []
        return [Part("density" if unit else "pixel aspect", where, data, detail, Density(x, y, unit == 1), raw=raw)]
    if kind == b"cLLI" and len(data) == 8:
        return [Part("light level", where, data, value=tuple(n / 1e4 for n in struct.unpack(">II", data)), raw=raw)]
    if kind == b"mDCV" and len(data) == 24:
        numbers = struct.unpack(">8H2I", data)
        value = (*(n / 5e4 for n in numbers[:8]), *(n / 1e4 for n in numbers[8:]))
        return [Part("mastering display", where, data, value=value, raw=raw)]
    if kind == b"bKGD":
        return [Part("background", where, data, value=_background(data, header, palette))]
    if kind == b"tIME" and len(data) == 7:
        return [Part("time of change", where, data, "{:04}-{:02}-{:02}".format(*struct.unpack(">HBB", data[:4])), raw=raw)]
    if kind == b"sBIT":
        return [Part("significant bits", where, data)]
    if kind in (b"hIST", b"sPLT"):
        return [Part("palette hints", where, data)]
    if kind == b"caBX":
        return [Part("provenance", where, data, "content credentials")]
    if kind == b"sTER":
        return [Part("stereo", where, data, raw=raw)]
    return [Part("unknown chunk" if kind[3:4].islower() else "unsafe chunk", where, data, raw=raw)]


def _text(kind: bytes, where: str, data: bytes) -> list[Part]:
    """A text chunk, or what programs hide in one: XMP, and profiles as hexadecimal lines."""
    key, _, rest = data.partition(b"\0")
    name = key.decode("latin-1")
    if kind == b"tEXt":
        text = rest.decode("latin-1")
    elif kind == b"zTXt":
        text = _inflated(rest[1:]).decode("latin-1")
    else:
        flags, _, rest = rest[:2], rest[:2], rest[2:]
        body = rest.split(b"\0", 2)[-1]
        text = (_inflated(body) if flags[:1] == b"\1" else body).decode("utf-8", "replace")
    if name == XMP_NAME:
        return [Part("xmp", where, text.encode(), raw=(where, data))]
    if name.startswith(_RAW_PROFILE):
        return _raw_profile(name, text, (where, data))
    content = text.encode("utf-8", "replace")
    kind = "caption text" if name in CAPTIONS else "text"
    return [Part(kind, where, content, f"{name}: {words(content)}", Text(name, text), raw=(where, data))]


def _raw_profile(name: str, text: str, raw: tuple[str, bytes]) -> list[Part]:
    lines = text.strip().split("\n")
    try:
        data = bytes.fromhex("".join(lines[2:]))
    except ValueError:
        return [damaged(name, "no hexadecimal lines")]
    kind = name.removeprefix(_RAW_PROFILE).lower()
    if kind in ("exif", "app1"):
        if data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            return [Part("xmp", name, data.split(b"\0", 1)[1])]
        exif = data.removeprefix(b"Exif\0\0")
        return [Part("exif", name, exif)] if exif[:2] in (b"II", b"MM") else [damaged(name, "no EXIF")]
    if kind == "xmp":
        return [Part("xmp", name, data)]
    if kind in ("iptc", "8bim"):
        data = data.removeprefix(iptc.PHOTOSHOP)
        iim, others, _ = iptc.taken_apart(data) if data[:4] == b"8BIM" else (data, b"", 0)
        found = [Part("iptc", name, iim, iptc.described(iim))] if iim else []
        return found + ([Part("photoshop resources", name, others)] if others else [])
    if kind in ("icc", "icm"):
        return [Part("icc", name, data)] if data[36:40] == b"acsp" else [damaged(name, "no colour profile")]
    return [Part("text", name, text.encode(), name, Text(name, text), raw=raw)]


def _background(data: bytes, header: bytes, palette: bytes) -> tuple[float, ...] | None:
    """The background colour, as one number or three in [0, 1]."""
    if len(header) < 10:
        return None
    depth, colour = header[8], header[9]
    if colour == 3:
        rgb = palette[3 * data[0] : 3 * data[0] + 3] if data else b""
        return tuple(value / 255 for value in rgb) if len(rgb) == 3 else None
    numbers = struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2])
    return tuple(n / (2**depth - 1) for n in numbers) if len(numbers) == (1 if colour in (0, 4) else 3) else None


def _inflated(data: bytes) -> bytes:
    """At most `MOST` bytes; what comes before damage where there is any."""
    engine = zlib.decompressobj()
    try:
        return engine.decompress(data, MOST)
    except zlib.error:
        return b""


def tag_words(primaries: int, transfer: int) -> str:
    """Code points for a person."""
    names = {1: "BT.709", 5: "BT.601", 6: "BT.601", 9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
    transfers = {1: "BT.709", 4: "gamma 2.2", 5: "gamma 2.8", 8: "linear", 13: "sRGB", 16: "PQ", 18: "HLG"}
    return f"{names.get(primaries, f'primaries {primaries}')}, {transfers.get(transfer, f'transfer {transfer}')}"


def chunk(kind: str | bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    kind = kind.encode("latin-1") if isinstance(kind, str) else kind
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of a well-formed file."""
    found, place = [], 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        found.append((kind, data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def text_chunk(name: str, text: str) -> tuple[str, bytes]:
    """The chunk of a text: Latin-1 where it can be, UTF-8 otherwise."""
    key = name.encode("latin-1", "replace")[:79].strip() or b"Comment"
    try:
        return "tEXt", key + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return "iTXt", key + b"\0\0\0\0\0" + text.encode()


def with_chunks(data: bytes, before: Sequence[tuple[str, bytes]], after: Sequence[tuple[str, bytes]]) -> bytes:
    """A PNG with chunks put before its palette, and others before its picture; chunks that are no picture are taken out."""
    out = [SIGNATURE]
    placed = [False, False]
    for kind, content in chunks(data):
        if kind not in _PICTURE:
            continue
        if kind != b"IHDR" and not placed[0]:
            placed[0] = True
            out += [chunk(*each) for each in before]
        if kind in (b"IDAT", b"IEND", b"acTL", b"fcTL") and not placed[1]:
            placed[1] = True
            out += [chunk(*each) for each in after]
        out.append(chunk(kind, content))
    return b"".join(out)
