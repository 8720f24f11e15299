"""Image files in and out, through libvips: 8 and 16 bit, colour and grey, alpha, and everything else that a file holds.

Pixel values stay in the space of the file's own colour profile or tags, which are written back; only CMYK and Lab, which
no restorer works in, are converted to sRGB, and values that are far from what is seen (linear light) are shown as seen
and written as they came. libvips is imported on first use.
"""

import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError, decode, name_of, vips
from ebr_engine.media.encoding import SUFFIXES, check_suffix, encode
from ebr_engine.media.holdings import format_of, not_kept_line
from ebr_engine.media.holdings.images import kind_of, parts_of
from ebr_engine.media.holdings.jpeg_scan import Coding, coding
from ebr_engine.media.holdings.parts import Part, Window
from ebr_engine.media.holdings.tiff import Page, pages
from ebr_engine.media.holdings.types import Outcome
from ebr_engine.media.picture import Picture
from ebr_engine.media.seen import seen_values, turned, turned_parts

__all__ = [
    "SUFFIXES",
    "MediaError",
    "Picture",
    "check_can_hold",
    "check_opaque",
    "opaque_pixels",
    "read_image",
    "resize_picture",
    "write_image",
]

MAX_MEGAPIXELS = 300
AS_CLIP = "write .gif, .png or .webp, or a video, as in -o out.mp4"

_SUFFIX = {"jpeg": ".jpg", "tiff": ".tif"}
_TURNED = ("jpeg", "png", "webp")  # whose EXIF says how they stand; TIFF has a tag, HEIF is turned by its decoder


def read_image(path: str | os.PathLike, max_megapixels: float = MAX_MEGAPIXELS, all_pages: bool = False) -> Picture:
    """Decode an image file, upright and complete, or raise MediaError.

    What the file is, is told by its content. A declared size above `max_megapixels` is refused before decoding; so are
    animations, floating-point values, data that is damaged or cut short, and files of several pages, but for `all_pages`.
    """
    path = Path(path)
    kind = _sniff(path)
    with Window(path) as window:
        parts = parts_of(window, kind)
        found = pages(window) if kind == "tiff" else [Page(1, -1, False)]
        how = coding(window) if kind == "jpeg" else None
    if frames := next((part.value for part in parts if part.kind == "animation"), 0):
        way = AS_CLIP if kind in ("gif", "png", "webp") else f"those of {name_of(kind)} are not read"
        raise MediaError(f"{path}: an animation of {frames} frames; {way}")
    full = [index for index, page in enumerate(found) if not page.reduced] or [0]
    if len(full) > 1 and not all_pages:
        raise MediaError(f"{path}: has {len(full)} pages; only single pictures can be restored")
    first, *rest = (_read(path, kind, parts, index, found, how, max_megapixels) for index in full)
    return replace(first, more=tuple(rest))


def _read(
    path: Path, kind: str, parts: list[Part], page: int, found: list[Page], how: Coding | None, max_megapixels: float
) -> Picture:
    decoded = decode(path, kind, max_megapixels, page)
    if page:
        with Window(path) as window:
            parts = parts_of(window, kind, page=page)
    parts = [replace(part, value=decoded.profile) if part.kind == "CMYK or Lab profile" else part for part in parts]
    if decoded.converted and not any(part.kind == "CMYK or Lab profile" for part in parts):
        parts = [part for part in parts if part.kind != "icc"]
        parts.append(Part("CMYK or Lab profile", "pixels", detail=decoded.converted, value=decoded.profile))
    elif decoded.profile and not any(part.kind in ("icc", "CMYK or Lab profile") for part in parts):
        parts.append(Part("icc", "picture", decoded.profile))
    exif = next((part.data for part in parts if part.kind == "exif"), b"") if kind in _TURNED else b""
    orientation = _orientation(exif) if exif else found[page].orientation if page < len(found) else 1
    stored = turned(decoded.stored, orientation)
    grey = stored.shape[2] < 3
    seen = seen_values(parts, decoded.peak)
    colours = stored[..., :1] if grey else stored[..., :3]
    scaled = (
        seen[np.minimum(colours, decoded.peak)] if seen is not None else colours.astype(np.float32) / np.float32(decoded.peak)
    )
    alpha = stored[..., -1].astype(np.float32) / np.float32(decoded.peak) if stored.shape[2] in (2, 4) else None
    return Picture(
        pixels=np.ascontiguousarray(np.broadcast_to(np.minimum(scaled, 1, dtype=np.float32), (*scaled.shape[:2], 3))),
        alpha=None if alpha is None else np.minimum(alpha, 1),
        bits=8 * stored.dtype.itemsize,
        format=_SUFFIX.get(kind, f".{kind}"),
        grey=grey,
        parts=tuple(turned_parts(parts, orientation)),
        coding=how,
        seen=seen,
    )


def _orientation(exif: bytes) -> int:
    from ebr_engine.media.holdings.exif import orientation

    return orientation(exif)


def size_of_image(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image file as it is shown, from its header alone; MediaError for what is none."""
    library = vips()
    try:
        image = library.Image.new_from_source(library.Source.new_from_file(os.fsencode(path)), "")
        on_its_side = image.get_typeof("orientation") and image.get("orientation") >= 5
    except library.Error as error:
        raise MediaError(f"{path}: its size cannot be read") from error
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def opaque_pixels(path: str | os.PathLike) -> np.ndarray:
    """The pixels [H, W, 3] of a picture that is to be learned from or measured; MediaError where it is transparent."""
    picture = read_image(path)
    check_opaque(path, picture.alpha)
    return picture.pixels


def check_opaque(path: str | os.PathLike, alpha: np.ndarray | None) -> None:
    """Raise MediaError for an alpha [H, W] that hides something: what lies beneath it is nobody's picture."""
    if alpha is not None and alpha.min() < 1:
        raise MediaError(f"{path}: is transparent in parts, and what lies beneath would count; flatten it first")


def write_image(
    path: str | os.PathLike,
    picture: Picture | np.ndarray,
    quality: int | None = None,
    commit: Callable[[Path, Path], None] | None = None,
    strict: bool = False,
) -> list[Outcome]:
    """Encode a picture (or an [H, W, 3] array in [0, 1]) by the path's suffix, with all that it holds; what became of that.

    `quality` (1 to 100) is for JPEG, WebP and AVIF; without it a JPEG keeps its own, a lossless file stays lossless, and
    others take 95. Depth falls to 8 bit where the format holds no more (12 for AVIF). The file appears whole or not at
    all, by `commit` (see `write_atomically`). Raises MediaError for what the format cannot hold, with `strict` for
    anything that is not kept; OSError when the file cannot be written.
    """
    path = Path(path)
    if not isinstance(picture, Picture):
        picture = Picture(np.asarray(picture, dtype=np.float32))
    check_can_hold(path, picture)
    if not all(np.isfinite(page.pixels).all() for page in (picture, *picture.more)):
        raise MediaError(f"{path}: not written: the picture has values that are not finite numbers")
    library = vips()
    try:
        data, outcomes = encode(picture, format_of(path), quality)
    except library.Error as error:
        raise MediaError(f"{path}: could not encode the picture: {_last_line(error)}") from error
    if strict and (line := not_kept_line(outcomes)):
        raise MediaError(f"{path}: not written, as not everything can be kept (--strict); {line}")
    write_atomically(path, data, commit)
    return outcomes


def check_can_hold(path: str | os.PathLike, picture: Picture) -> None:
    """Raise MediaError when the format that the path's suffix names cannot hold the picture."""
    limit = check_suffix(path)
    suffix = Path(path).suffix.lower()
    if format_of(path) == "jpeg" and picture.alpha is not None and picture.alpha.min() < 1:
        raise MediaError(f"{path}: JPEG cannot hold transparency; write .png, .webp or .tif")
    if limit and max(picture.height, picture.width) > limit:
        raise MediaError(f"{path}: {suffix[1:]} cannot hold sides above {limit} pixels; write .png or .tif")


def write_atomically(path: str | os.PathLike, data: bytes, commit: Callable[[Path, Path], None] | None = None) -> None:
    """Write bytes to a new file beside `path`, then rename it there; on any failure nothing is left.

    `commit(part, path)` does the renaming where somebody else has to know of it.
    """
    path = Path(path)
    # Not tempfile: it would make the result unreadable to others, whatever the umask says.
    part = path.with_name(f".ebr-{secrets.token_hex(6)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        (commit or os.replace)(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # the part's name tells nobody anything
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def resize_picture(picture: Picture, height: int, width: int) -> Picture:
    """The picture at another size, by libvips' bicubic kernel (averaging where it shrinks)."""
    channels = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha[..., None]]
    image = vips().Image.new_from_array(np.concatenate(channels, axis=2, dtype=np.float32))
    resized = image.resize(width / picture.width, vscale=height / picture.height, kernel="cubic").numpy().clip(0, 1)
    more = tuple(resize_picture(page, height, width) for page in picture.more)
    return replace(picture, pixels=resized[..., :3], alpha=None if picture.alpha is None else resized[..., 3], more=more)


def _sniff(path: Path) -> str:
    """The kind by content; MediaError for what no decoder should be shown."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise MediaError(f"{path}: is a folder, not a picture")
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise MediaError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error
    if not head:
        raise MediaError(f"{path}: the file is empty")
    kind = kind_of(head)
    if kind is None:
        raise MediaError(f"{path}: not a PNG, JPEG, WebP, TIFF or AVIF picture")
    return kind


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF, PNG or WebP of several frames; False where it cannot be read."""
    try:
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and _moves(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return False


@lru_cache(4096)
def _moves(path: Path, *_: int) -> bool:
    try:
        with Window(path) as window:
            kind = kind_of(window.at(0, 32))
            return kind in ("gif", "png", "webp") and any(part.kind == "animation" for part in parts_of(window, kind, light=True))
    except (OSError, MediaError):  # whoever reads the file says what is wrong with it
        return False


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
