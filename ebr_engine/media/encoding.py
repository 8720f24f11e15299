"""Pictures to the bytes of a file: libvips encodes the pixels, the holdings are put around them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebr_engine.media.decoding import MediaError, vips
from ebr_engine.media.holdings.encoded import finished
from ebr_engine.media.holdings.image_fates import IMAGE_FATES
from ebr_engine.media.holdings.types import Fate, Holding, Outcome
from ebr_engine.media.holdings.writing import Preparation
from ebr_engine.media.seen import stored_values

if TYPE_CHECKING:
    from ebr_engine.media.picture import Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".avif", ".gif")
QUALITY = 95
THUMBNAIL = 160  # longer side

_MAX_SIDE = {".jpg": 65535, ".jpeg": 65535, ".jfif": 65535, ".webp": 16383, ".avif": 16384, ".gif": 65535}
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # Rec. 709
_BIG_TIFF = 1 << 31  # bytes of pixels above which TIFF's numbers are 64 bits wide


def check_suffix(path: str | os.PathLike) -> int | None:
    """The longest side that the format of a path's suffix holds; MediaError for one that is not written."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise MediaError(f"{path}: cannot write {suffix or 'a file without suffix'}; choose from {' '.join(SUFFIXES)}")
    return _MAX_SIDE.get(suffix)


def encode(picture: "Picture", format: str, quality: int | None = None) -> tuple[bytes, list[Outcome]]:
    """The file of a picture in a format ("png", "jpeg", …), and what became of what it holds."""
    pages = (picture, *picture.more) if format == "tiff" else (picture,)
    size = sum(page.pixels.nbytes // 4 * (page.bits // 8) * 4 // 3 for page in pages)
    files, outcomes = [], []
    for page in pages:
        image = _image(page, _bits(page, format), format)
        thumbnail = _thumbnail(image) if any(part.kind == "thumbnail" for part in page.parts) else None
        prepared = Preparation(page.parts, format, page.width, page.height, page.grey, thumbnail)
        data = image.write_to_buffer(f".{_loader(format)}", keep="none", **_options(page, format, quality, size > _BIG_TIFF))
        files.append((data, prepared.result))
        if format == "gif" and page.alpha is not None and ((page.alpha > 0) & (page.alpha < 1)).any():
            outcomes.append(Outcome(Holding("partial transparency", "alpha"), *IMAGE_FATES["partial transparency"]["gif"]))
        outcomes += [_asked(outcome, format, quality) for outcome in prepared.outcomes]
    return finished(files, format), outcomes


def encode_frame(picture: "Picture", format: str, how: dict) -> bytes:
    """One frame of an animation: a whole still picture, or for GIF, whose encoder wants all at once, its RGBA values."""
    image = _image(picture, 16 if picture.bits > 8 and format == "png" else 8, format)
    if format == "gif":
        return image.write_to_memory()
    if format == "png":
        return image.pngsave_buffer(compression=6, filter="all", keep="none")
    return image.webpsave_buffer(keep="none", **(how if "lossless" in how else {**how, "smart_subsample": True, "alpha_q": 100}))


def _asked(outcome: Outcome, format: str, quality: int | None) -> Outcome:
    """The outcome, where an option asks for something else than the table has."""
    if outcome.holding.kind == "lossless coding" and format in ("webp", "avif") and quality is not None:
        return Outcome(outcome.holding, Fate.NOT_KEPT, "--quality asks for a lossy file")
    return outcome


def _loader(format: str) -> str:
    return {"jpeg": "jpg", "tiff": "tif"}.get(format, format)


def _bits(page: "Picture", format: str) -> int:
    """Bits a channel of what is encoded: those of the picture, or as many as the format holds."""
    if page.bits == 8 or format in ("jpeg", "webp", "gif"):
        return 8
    if format == "avif":
        return next((part.value for part in page.parts if part.kind == "10 or 12 bit"), 12)
    return 16


def _image(page: "Picture", bits: int, format: str):
    colours = stored_values(page.pixels, page.seen)
    if page.grey and format != "gif":
        colours = (colours @ _LUMA.astype(colours.dtype))[..., None]
    if page.alpha is not None and format != "jpeg":
        colours = np.concatenate([colours, page.alpha[..., None]], axis=2)
    stored = np.rint(np.clip(colours, 0, 1) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    if 8 < bits < 16:
        stored <<= 16 - bits  # libvips takes the upper bits
    height, width, bands = stored.shape
    image = vips().Image.new_from_memory(stored.tobytes(), width, height, bands, "uchar" if bits == 8 else "ushort")
    interpretation = ("b-w", "srgb") if bits == 8 else ("grey16", "rgb16")
    return image.copy(interpretation=interpretation[bands > 2])


def _thumbnail(image) -> bytes:
    """A small JPEG of the picture, for EXIF."""
    small = image.flatten() if image.hasalpha() else image
    small = small.thumbnail_image(THUMBNAIL, height=THUMBNAIL, size="down").colourspace("b-w" if small.bands < 3 else "srgb")
    return small.jpegsave_buffer(Q=80, keep="none")


def _options(page: "Picture", format: str, quality: int | None, big: bool) -> dict:
    lossless = quality is None and any(part.kind == "lossless coding" for part in page.parts)
    if format == "jpeg":
        how = page.coding
        chosen = quality or (how.quality if how else QUALITY)
        subsampled, progressive = (how.subsampled, how.progressive) if how else (False, False)
        return {
            "Q": chosen,
            "subsample_mode": "on" if subsampled else "off",
            "interlace": progressive,
            "optimize_coding": True,
        }
    if format == "webp":
        if lossless:
            return {"lossless": True, "exact": True}
        return {"Q": quality or QUALITY, "smart_subsample": True, "alpha_q": 100}
    if format == "avif":
        options = {"lossless": True} if lossless else {"Q": quality or QUALITY}
        return {**options, "bitdepth": _bits(page, format), "subsample_mode": "off", "compression": "av1", "effort": 3}
    if format == "png":
        return {"compression": 6, "filter": "all"}
    if format == "gif":
        return {"dither": 0.5}
    return {"compression": "deflate", "predictor": "horizontal", "bigtiff": big}
