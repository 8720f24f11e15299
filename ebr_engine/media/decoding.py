"""Pixels of a picture file as they are stored: libvips where it reads the kind, other libraries where it does not."""

import os
import struct
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.media.holdings import heif, tiff
from ebr_engine.media.holdings.ifd import Tiff
from ebr_engine.media.holdings.parts import Window

KINDS = ("png", "jpeg", "webp", "tiff", "avif", "gif", "bmp", "heic", "jxl")
_D50 = (96.422, 100.0, 82.521)
_D50_TO_D65 = [
    [0.9555766, -0.0230393, 0.0631636],
    [-0.0282895, 1.0099416, 0.0210077],
    [0.0122982, -0.0204830, 1.3299098],
]  # Bradford
NAMES = {"jpeg": "JPEG", "webp": "WebP", "tiff": "TIFF", "jxl": "JPEG XL"}


class MediaError(EbrError):
    """A media file that cannot be read or written: one line, naming the file and the reason."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture's stored values, not yet turned upright."""

    stored: np.ndarray  # [H, W, 1 to 4] uint8 or uint16: grey or RGB, then alpha
    peak: int  # the value of full light
    profile: bytes | None = None  # of a picture that was converted, or that only the library knows
    converted: str = ""  # "CMYK" or "Lab", of which it is no longer


def vips():
    """pyvips, or MediaError with the way to install it."""
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise MediaError(f"libvips could not be loaded ({error}); pip install 'pyvips[binary]'") from error
    pyvips.cache_set_max(0)  # its cache of operations would keep decoded pictures in memory
    return pyvips


def name_of(kind: str) -> str:
    """A kind's name for people."""
    return NAMES.get(kind, kind.upper())


@cache
def reader_of(kind: str) -> str | None:
    """The library that reads a kind here; None where none does."""
    if kind in ("png", "jpeg", "webp", "tiff", "gif", "avif"):
        return "libvips"
    if kind == "bmp":
        return "FFmpeg" if find_spec("av") else None
    if kind == "jxl":
        return "libvips" if _has("jxlload") else "pillow-jxl-plugin" if find_spec("pillow_jxl") else None
    if kind == "heic":
        return "pillow-heif" if find_spec("pillow_heif") else None
    return None


def missing(kind: str) -> str:
    """What to do about a kind that no library here reads."""
    package = {"heic": "pillow-heif", "jxl": "pillow-jxl-plugin", "bmp": "av"}[kind]
    return f"{name_of(kind)} is not read by the libraries here; pip install {package}"


def _has(loader: str) -> bool:
    library = vips()
    return bool(library.type_find("VipsOperation", loader))


def decode(path: Path, kind: str, max_megapixels: float, page: int = 0) -> Decoded:
    """The stored values of one picture; MediaError for what is damaged, too large, or of a form that is not read."""
    library = reader_of(kind)
    if library is None:
        raise MediaError(f"{path}: {missing(kind)}")
    try:
        if library == "libvips":
            return _by_vips(path, kind, max_megapixels, page)
        if kind == "bmp":
            return _by_ffmpeg(path, max_megapixels)
        return _by_pillow(path, kind, max_megapixels)
    except MediaError:
        raise
    except vips().Error as error:
        why = f"the {name_of(kind)} data is damaged or cut short, or of a kind that is not read"
        raise MediaError(f"{path}: {why}") from error


def check_size(path: Path, width: int, height: int, max_megapixels: float) -> None:
    """Refuse a declared size above the limit."""
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        size = f"{width} x {height} pixels"
        raise MediaError(f"{path}: {size} are {megapixels:.0f} megapixels, more than the limit of {max_megapixels:g}")


def _by_vips(path: Path, kind: str, max_megapixels: float, page: int) -> Decoded:
    library = vips()
    loader = {"avif": "heif"}.get(kind, kind)
    options = {"page": page} if kind == "tiff" else {}
    lab = _lab8(path, page) if kind == "tiff" else None
    # "error" is what it takes: "truncated" lets a TIFF with broken strips pass as grey rows.
    if lab is not None:
        image = getattr(library.Image, f"{loader}load_buffer")(lab[0], memory=True, fail_on="error", **options)
    else:
        source = library.Source.new_from_file(os.fsencode(path))
        image = getattr(library.Image, f"{loader}load_source")(source, memory=True, fail_on="error", **options)
    check_size(path, image.width, image.height, max_megapixels)
    converted = ""
    if lab is not None:
        image, converted = _from_lab8(library, image, lab[1]), "Lab"
    elif image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        inks, rest = image.extract_band(0, n=4), [image[i] for i in range(4, image.bands)]
        image = inks.icc_transform("srgb", embedded=True, depth=depth, black_point_compensation=True).bandjoin(rest)
        converted = "CMYK"
    elif image.interpretation in ("lab", "labs"):
        space = "rgb16" if image.interpretation == "labs" else "srgb"
        rest = [image.colourspace(space)[i] for i in range(3, image.bands)]
        colours = _from_lab(image.extract_band(0, n=3).colourspace("lab"), space)
        image = colours.bandjoin(rest) if rest else colours
        converted = "Lab"
    if image.format not in ("uchar", "ushort"):
        raise MediaError(f"{path}: holds {image.format} values; save it with 8 or 16 bits a channel")
    if image.bands > 4:
        raise MediaError(f"{path}: has {image.bands} channels; only grey or RGB, with or without alpha, is supported")
    profile = image.get("icc-profile-data") if converted == "CMYK" and image.get_typeof("icc-profile-data") else None
    stored = image.numpy().reshape(image.height, image.width, image.bands)
    peak = int(np.iinfo(stored.dtype).max)
    if kind == "avif" and stored.dtype == np.uint16:  # libvips moves 10 and 12 bits up, which leaves white below the top
        with Window(path) as window:
            bits = heif.depth(heif.read_meta(window) or heif.Meta())
        peak = (2**bits - 1) << (16 - bits) if bits > 8 else peak
    return Decoded(stored, peak, profile, converted)


def _lab8(path: Path, page: int) -> tuple[bytes, int] | None:
    """An 8-bit CIELab TIFF whose tag says RGB, and what it said; None for any other. libvips 8.18 refuses the tag itself."""
    with Window(path) as window:
        try:
            structure = Tiff(window)
            directories = structure.pages(most=1 << 16)
        except (ValueError, struct.error):
            return None
        if page >= len(directories) or tiff.PHOTOMETRIC not in directories[page]:
            return None
        entry = directories[page][tiff.PHOTOMETRIC]
        kind = (entry.numbers(structure.order) or [0])[0]
        bits = directories[page][tiff.BITS].numbers(structure.order) if tiff.BITS in directories[page] else [1]
        if kind not in tiff.CIELAB or max(bits) != 8 or len(bits) < 3:
            return None
        data = bytearray(window.at(0, window.size))
    if len(data) <= entry.place + 2:
        return None
    struct.pack_into(structure.order + "H", data, entry.place, 2)
    return bytes(data), kind


def _from_lab8(library, image, kind: int):
    """sRGB of an image whose bands are L from 0 to 255 and a, b as TIFF stores them: signed, or with 128 added."""
    lightness = image[0].cast("float") * (100 / 255)
    signs = [image[i].cast("float") for i in (1, 2)]
    signs = [(each > 127).ifthenelse(each - 256, each) if kind == 8 else each - 128 for each in signs]
    lab = lightness.bandjoin(signs).cast("float").copy(interpretation="lab")
    rest = [image[i] for i in range(3, image.bands)]
    colours = _from_lab(lab, "srgb")
    return colours.bandjoin(rest) if rest else colours


def _from_lab(lab, space: str):
    """sRGB of CIELab under D50, as TIFF files and profiles mean it; libvips by itself takes it to be under D65."""
    under = lab.Lab2XYZ(temp=list(_D50))
    return under.recomb(_D50_TO_D65).copy(interpretation="xyz").colourspace(space)


def _by_ffmpeg(path: Path, max_megapixels: float) -> Decoded:
    import av

    try:
        with av.open(str(path), format="bmp_pipe") as container:
            stream = container.streams.video[0]
            check_size(path, stream.width, stream.height, max_megapixels)
            frame = next(container.decode(stream))
            alpha = frame.format.name in ("bgra", "rgba", "argb", "abgr")
            grey = frame.format.name.startswith("gray") or frame.format.name.startswith("mono")
            stored = frame.to_ndarray(format="rgba" if alpha else "gray" if grey else "rgb24")
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise MediaError(f"{path}: the BMP data is damaged or cut short, or of a kind that is not read") from error
    return Decoded(stored.reshape(*stored.shape[:2], -1), 255)


def _by_pillow(path: Path, kind: str, max_megapixels: float) -> Decoded:
    """A kind that a plugin of Pillow reads."""
    try:
        if kind == "heic":
            import pillow_heif

            image = pillow_heif.open_heif(path, convert_hdr_to_8bit=False)
            check_size(path, *image.size, max_megapixels)
            stored, profile = np.asarray(image), image.info.get("icc_profile")
        else:
            import pillow_jxl  # noqa: F401 (registers itself)
            from PIL import Image

            with Image.open(path) as image:
                check_size(path, *image.size, max_megapixels)
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    raise MediaError(f"{path}: an animation of {frames} frames; those of JPEG XL are not read")
                if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
                    image = image.convert("RGB")
                stored, profile = np.asarray(image), image.info.get("icc_profile")
    except MediaError:
        raise
    except Exception as error:  # the plugins raise many kinds
        raise MediaError(f"{path}: the {name_of(kind)} data is damaged or cut short, or of a kind that is not read") from error
    stored = stored.reshape(*stored.shape[:2], -1)
    return Decoded(stored, int(np.iinfo(stored.dtype).max), profile)
