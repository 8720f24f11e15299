"""What a picture holds beside its pixels, whatever its container."""

import struct
from dataclasses import replace
from pathlib import Path

from ebr_engine.media.holdings import bmp, exif, gif, heif, jpeg, jxl, png, tiff, webp
from ebr_engine.media.holdings.parts import Part, Window, damaged
from ebr_engine.media.holdings.types import Holding

_READERS = {
    "png": png.parts,
    "jpeg": jpeg.parts,
    "webp": webp.parts,
    "tiff": tiff.parts,
    "gif": gif.parts,
    "avif": heif.parts,
    "heic": heif.parts,
    "bmp": bmp.parts,
    "jxl": jxl.parts,
}
_CONVERTED = (b"CMYK", b"Lab ")  # spaces of profiles whose pictures are converted when they are read
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"mif2", b"avif", b"avis")


def kind_of(head: bytes) -> str | None:
    """The kind of a picture by its first 32 bytes: "png", "jpeg", "webp", "tiff", "gif", "avif", "heic", "bmp" or "jxl"."""
    if head.startswith(png.SIGNATURE):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head.startswith(b"GIF8"):
        return "gif"
    if head[4:8] == b"ftyp":
        brands = {head[at : at + 4] for at in range(8, len(head), 4)}
        if brands & {b"avif", b"avis"}:
            return "avif"
        return "heic" if head[8:12] in _HEIF else None
    if head.startswith(b"BM") and head[14:18] in (
        b"\x0c\0\0\0",
        b"\x28\0\0\0",
        b"\x34\0\0\0",
        b"\x38\0\0\0",
        b"\x6c\0\0\0",
        b"\x7c\0\0\0",
    ):
        return "bmp"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "jxl"
    return None


def parts_of(window: Window, kind: str, light: bool = False, page: int = 0) -> list[Part]:
    """Everything that a picture of a kind holds; with `light`, without the data of clips and more pictures.

    `page`: of a TIFF, whose pages have tags of their own.
    """
    reader = _READERS.get(kind)
    try:
        found = tiff.parts_of_page(window, page) if page else reader(window, light) if reader else []
    except (IndexError, ValueError, OverflowError, struct.error):  # a way of being damaged that no reader has thought of
        found = [damaged("container", "cannot be read to its end")]
    found += [Part("thumbnail", "EXIF", size=size) for p in found if p.kind == "exif" and (size := exif.thumbnail(p.data))]
    return [replace(p, kind="CMYK or Lab profile") if p.kind == "icc" and p.data[16:20] in _CONVERTED else p for p in found]


def kind_of_file(path: Path) -> str | None:
    """The kind of a picture file by its content; None for what is none, or cannot be read."""
    try:
        with Window(path) as window:
            return kind_of(window.at(0, 32))
    except OSError:
        return None


def image_inventory(path: Path) -> list[Holding] | None:
    """The holdings of a picture, read from its container; None for what is no picture by its content."""
    with Window(path) as window:
        kind = kind_of(window.at(0, 32))
        return None if kind is None else [part.holding for part in parts_of(window, kind, light=True)]
