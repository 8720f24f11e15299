"""The last step of writing a picture: an encoder's bytes become a file that holds what was prepared for it."""

import struct
import zlib
from collections.abc import Sequence

from ebr_engine.media.holdings import gif, heif_write, iptc, jpeg, png, tiff, webp
from ebr_engine.media.holdings.writing import Prepared


def finished(pages: Sequence[tuple[bytes, Prepared]], format: str, bits: int = 8) -> bytes:
    """The file of a picture (or, for TIFF, of pages) that an encoder has written without any metadata."""
    if format == "tiff":
        return tiff.assembled([(data, _tags(prepared)) for data, prepared in pages])
    data, prepared = pages[0]
    data = {"png": _png, "jpeg": _jpeg, "webp": _webp, "avif": _avif, "gif": _gif}[format](data, prepared)
    behind = [] if format in ("jpeg", "avif") else prepared.all("data behind the picture")
    return data + b"".join(part.data for part in behind)


def _tags(prepared: Prepared) -> tiff.Tags:
    density, private = prepared.first("density", "pixel aspect"), prepared.first("private tags")
    return tiff.Tags(
        icc=prepared.icc,
        xmp=prepared.xmp,
        iptc=prepared.iim or None,
        photoshop=prepared.resources or None,
        exif=prepared.exif,
        density=density.value if density else None,
        private=private.value if private else None,
    )


def _png(data: bytes, prepared: Prepared) -> bytes:
    before = _png_colours(prepared)
    for part in prepared.parts:
        if part.kind in ("light level", "mastering display"):
            before.append(_png_light(part))
        elif part.kind in ("density", "pixel aspect"):
            x, y, unit = part.value
            whole = part.raw[1] if part.raw and part.raw[0] == "pHYs" else struct.pack(">IIB", round(x) or 1, round(y) or 1, unit)
            before.append(("pHYs", whole))
        elif part.kind in ("text", "caption text", "time of change", "unknown chunk", "stereo") and part.raw:
            before.append(part.raw)
        elif part.kind == "comment":
            before.append(png.text_chunk("Comment", part.data.decode("utf-8", "replace")))
    if prepared.exif:
        before.append(("eXIf", prepared.exif))
    if prepared.xmp:
        before.append(("iTXt", png.XMP_NAME.encode() + b"\0\0\0\0\0" + prepared.xmp))
    if prepared.iim or prepared.resources:
        before.append(_raw_profile("iptc", iptc.put_together(prepared.iim, prepared.resources)))
    background = prepared.first("background")
    after = [("bKGD", _background(background.value, data))] if background is not None and background.value else []
    return png.with_chunks(data, before, after)


def _png_colours(prepared: Prepared) -> list[tuple[str, bytes]]:
    """The chunks that say what the colours are: the same as before, or the ones of equal meaning."""
    kinds = ("colour tags", "gamma", "sRGB", "second colour description")
    found = [part.raw for part in prepared.parts if part.kind in kinds and part.raw and part.raw[0] != "iCCP"]
    tags, gamma, intent = prepared.first("colour tags"), prepared.first("gamma"), prepared.first("sRGB")
    if tags is not None and tags.raw is None:
        found.append(("cICP", bytes([tags.value[0] & 255, tags.value[1] & 255, 0, 1])))
    if gamma is not None and gamma.raw is None and gamma.value.primaries:
        found.append(("cHRM", struct.pack(">8I", *(round(n * 1e5) for n in gamma.value.primaries))))
    if intent is not None and intent.raw is None and prepared.icc is None:
        found.append(("sRGB", b"\0"))
    if prepared.icc:
        found.append(("iCCP", b"ICC Profile\0\0" + zlib.compress(prepared.icc)))
    return found


def _png_light(part) -> tuple[str, bytes]:
    if part.kind == "light level":
        return "cLLI", struct.pack(">II", *(round(n * 1e4) for n in part.value))
    return "mDCV", struct.pack(">8H2I", *(round(n * 5e4) for n in part.value[:8]), *(round(n * 1e4) for n in part.value[8:]))


def _raw_profile(name: str, data: bytes) -> tuple[str, bytes]:
    """A profile as lines of hexadecimal numbers, as ImageMagick and exiftool write and read it."""
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    text = f"\n{name}\n{len(data):8}\n{lines}\n"
    return "zTXt", f"Raw profile type {name}".encode() + b"\0\0" + zlib.compress(text.encode())


def _background(value: Sequence[float], data: bytes) -> bytes:
    depth, colour = data[24], data[25]
    if colour in (0, 4):
        value = [sum(value) / len(value)]
    elif len(value) == 1:
        value = [value[0]] * 3
    return b"".join(struct.pack(">H", round(n * (2**depth - 1))) for n in value)


def _jpeg(data: bytes, prepared: Prepared) -> bytes:
    density = prepared.first("density", "pixel aspect")
    head = jpeg.density_segment(density.value if density else None)
    if prepared.exif:
        head += jpeg.segment(0xE1, jpeg.EXIF + prepared.exif)
    if prepared.xmp:
        head += jpeg.xmp_segments(prepared.xmp)
    if prepared.icc:
        head += jpeg.profile_segments(prepared.icc)
    if prepared.iim or prepared.resources:
        head += jpeg.segment(0xED, iptc.PHOTOSHOP + iptc.put_together(prepared.iim, prepared.resources))
    behind = []
    for part in prepared.parts:
        if part.kind == "application data" or (part.kind == "gain map" and part.where == "APP2"):
            head += jpeg.segment(0xE0 + int(part.raw[0][3:]), part.raw[1])
        elif part.kind == "comment":
            head += jpeg.segment(0xFE, part.raw[1] if part.raw and part.raw[0] == "COM" else part.data)
        elif part.kind in ("gain map", "second picture"):
            behind.append((part.data, part.value or 0))
    rest = data[2:]
    while rest[:1] == b"\xff" and 0xE0 <= rest[1] <= 0xEF and rest[1] != 0xEE:  # what the encoder itself said
        rest = rest[2 + int.from_bytes(rest[2:4], "big") :]
    if behind:
        head += jpeg.picture_list(2 + len(head), len(rest), [(len(picture), kind) for picture, kind in behind])
    last = [part.data for kind in ("motion clip", "data behind the picture") for part in prepared.all(kind)]
    return b"\xff\xd8" + head + rest + b"".join(picture for picture, _ in behind) + b"".join(last)


def _webp(data: bytes, prepared: Prepared) -> bytes:
    others = [part.raw for part in prepared.all("unknown WebP chunk") if part.raw]
    return webp.with_chunks(data, prepared.icc, prepared.exif, prepared.xmp, others)


def _gif(data: bytes, prepared: Prepared) -> bytes:
    comments, others = ([part.data for part in prepared.all(kind)] for kind in ("comment", "application extension"))
    return gif.with_extensions(data, comments, prepared.xmp, prepared.icc, others)


def _avif(data: bytes, prepared: Prepared) -> bytes:
    matrix, full = heif_write.matrix_of(data)
    tags = prepared.first("colour tags")
    primaries, transfer = tags.value[:2] if tags else (2, 2) if prepared.icc else (1, 13)
    new = [heif_write.colour_box(primaries, transfer, matrix, full)]
    if prepared.icc:
        new.append(heif_write.box(b"colr", b"prof" + prepared.icc))
    for part in prepared.parts:
        if part.kind == "light level":
            new.append(heif_write.light_box(*part.value))
        elif part.kind == "mastering display":
            new.append(heif_write.mastering_box(part.value))
        elif part.kind == "pixel aspect":
            new.append(heif_write.box(b"pasp", struct.pack(">II", round(part.value.y) or 1, round(part.value.x) or 1)))
    items = [(b"Exif", b"", bytes(4) + prepared.exif)] if prepared.exif else []
    items += [(b"mime", b"application/rdf+xml", prepared.xmp)] if prepared.xmp else []
    data = heif_write.with_parts(data, new, items)
    return heif_write.with_stream_colours(data, primaries, transfer) if tags else data
