"""Image files in and out, through libvips: 8 and 16 bit, colour and grey, alpha, and the metadata that must survive.

Pixel values stay in the space of the file's own colour profile, and the profile is written back; only CMYK and Lab,
which no restorer works in, are converted to sRGB. libvips is imported on first use.
"""

import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ebr_engine.errors import EbrError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".avif")
MAX_MEGAPIXELS = 300

_MAX_SIDE = {".jpg": 65535, ".jpeg": 65535, ".webp": 16383, ".avif": 16384}
_KEPT_FIELDS = ("icc-profile-data", "exif-data", "xmp-data", "iptc-data", "image-description", "resolution-unit")
_NAMES = {".jpg": "JPEG", ".webp": "WebP", ".tif": "TIFF"}
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # Rec. 709


class MediaError(EbrError):
    """A media file that cannot be read or written: one line, naming the file and the reason."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright, and what is needed to write it back as it came."""

    pixels: np.ndarray  # [H, W, 3] float32 in [0, 1]: the stored values, scaled
    alpha: np.ndarray | None = None  # [H, W] float32 in [0, 1]
    bits: int = 8  # 8 or 16 a channel
    format: str = ".png"  # what the content is, whatever the file is called
    grey: bool = False  # stored with one colour channel; pixels repeats it
    metadata: Mapping[str, bytes | str] = field(default_factory=dict)  # by libvips' names: profile, EXIF, XMP, texts
    resolution: tuple[float, float] | None = None  # pixels per millimetre, across and down

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def icc(self) -> bytes | None:
        """The embedded colour profile."""
        return self.metadata.get("icc-profile-data")


AS_CLIP = "write a video to restore it as a clip, as in -o out.mp4"


def read_image(path: str | os.PathLike, max_megapixels: float = MAX_MEGAPIXELS) -> Picture:
    """Decode an image file, upright and complete, or raise MediaError.

    What the file is, is told by its content. A declared size above `max_megapixels` is refused before decoding; so are
    animations and multi-page files, floating-point values, and data that is damaged or cut short.
    """
    path = Path(path)
    kind = _sniff(path)
    vips = _vips()
    try:
        source = vips.Source.new_from_file(os.fsencode(path))
        # "error" is what it takes: "truncated" lets a TIFF with broken strips pass as grey rows.
        image = vips.Image.new_from_source(source, "", memory=True, fail_on="error")
        _check_header(path, kind, image, max_megapixels)
        image = _to_rgb_or_grey(path, image.autorot())
        stored = image.numpy()
    except vips.Error as error:
        name = _NAMES.get(kind, kind[1:].upper())
        raise MediaError(f"{path}: the {name} data is damaged or cut short, or of a kind that is not read") from error
    stored = stored.reshape(image.height, image.width, image.bands)
    scaled = stored.astype(np.float32) / np.float32(np.iinfo(stored.dtype).max)
    grey = image.bands < 3
    colours = scaled[..., :1] if grey else scaled[..., :3]
    return Picture(
        pixels=np.ascontiguousarray(np.broadcast_to(colours, (*scaled.shape[:2], 3))),
        alpha=np.ascontiguousarray(scaled[..., -1]) if image.bands in (2, 4) else None,
        bits=8 * stored.dtype.itemsize,
        format=kind,
        grey=grey,
        metadata=_metadata(image),
        resolution=(image.xres, image.yres) if image.xres > 1 else None,  # libvips says 1 for "unknown"
    )


def size_of_image(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image file as it is shown, from its header alone; MediaError for what is none."""
    vips = _vips()
    try:
        image = vips.Image.new_from_source(vips.Source.new_from_file(os.fsencode(path)), "")
        turned = image.get_typeof("orientation") and image.get("orientation") >= 5
    except vips.Error as error:
        raise MediaError(f"{path}: its size cannot be read") from error
    return (image.width, image.height) if turned else (image.height, image.width)


def write_image(
    path: str | os.PathLike, picture: Picture | np.ndarray, quality: int = 95, commit: Callable[[Path, Path], None] | None = None
) -> None:
    """Encode a picture (or an [H, W, 3] array in [0, 1]) by the path's suffix, with its depth, alpha and metadata.

    `quality` (1 to 100) is for JPEG, WebP and AVIF; PNG and TIFF are lossless. Depth falls to 8 bit where the format
    holds no more (12 for AVIF). The file appears whole or not at all, by `commit` (see `write_atomically`). Raises MediaError
    for what the format cannot hold, OSError when the file cannot be written.
    """
    path = Path(path)
    if not isinstance(picture, Picture):
        picture = Picture(np.asarray(picture, dtype=np.float32))
    check_can_hold(path, picture)
    if not np.isfinite(picture.pixels).all():
        raise MediaError(f"{path}: not written: the picture has values that are not finite numbers")
    vips = _vips()
    try:
        data = _encode(vips, picture, path.suffix.lower(), quality)
    except vips.Error as error:
        raise MediaError(f"{path}: could not encode the picture: {_last_line(error)}") from error
    write_atomically(path, data, commit)


def check_can_hold(path: str | os.PathLike, picture: Picture) -> None:
    """Raise MediaError when the format that the path's suffix names cannot hold the picture."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise MediaError(f"{path}: cannot write {suffix or 'a file without suffix'}; choose from {' '.join(SUFFIXES)}")
    if suffix in (".jpg", ".jpeg") and picture.alpha is not None and picture.alpha.min() < 1:
        raise MediaError(f"{path}: JPEG cannot hold transparency; write .png, .webp or .tif")
    limit = _MAX_SIDE.get(suffix)
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


def _vips():
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise MediaError(f"libvips could not be loaded ({error}); pip install 'pyvips[binary]'") from error
    pyvips.cache_set_max(0)  # its cache of operations would keep decoded pictures in memory
    return pyvips


def resize_picture(picture: Picture, height: int, width: int) -> Picture:
    """The picture at another size, by libvips' bicubic kernel (averaging where it shrinks)."""
    channels = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha[..., None]]
    image = _vips().Image.new_from_array(np.concatenate(channels, axis=2, dtype=np.float32))
    resized = image.resize(width / picture.width, vscale=height / picture.height, kernel="cubic").numpy().clip(0, 1)
    return replace(picture, pixels=resized[..., :3], alpha=None if picture.alpha is None else resized[..., 3])


def _sniff(path: Path) -> str:
    """The format by content, as a suffix; MediaError for what no decoder should be shown."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise MediaError(f"{path}: is a folder, not a picture")
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise MediaError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            head = file.read(32)
            frames = _apng_frames(file) if head.startswith(b"\x89PNG\r\n\x1a\n") else 1
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error
    if not head:
        raise MediaError(f"{path}: the file is empty")
    if frames > 1:
        raise MediaError(f"{path}: an animation of {frames} frames; {AS_CLIP}")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ".webp"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return ".tif"
    if head.startswith(b"GIF8"):
        return ".gif"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:] or b"avis" in head[8:]):
        return ".avif"
    raise MediaError(f"{path}: not a PNG, JPEG, WebP, TIFF or AVIF picture")


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF or PNG of several frames, which can be restored as a clip; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(32)
            if head.startswith(b"\x89PNG\r\n\x1a\n"):
                return _apng_frames(file) > 1
        return head.startswith(b"GIF8") and _vips().Image.gifload(str(path), access="sequential").get("n-pages") > 1
    except Exception:  # libvips' own error, or the system's; whoever reads the file says what is wrong with it
        return False


def _apng_frames(file) -> int:
    """The frames an animated PNG declares; 1 for a plain one. libvips shows only the first and does not tell."""
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
        length = int.from_bytes(header[:4], "big")
        if header[4:] == b"acTL":
            return int.from_bytes(file.read(4), "big")
        file.seek(length + 4, os.SEEK_CUR)
    return 1


def _check_header(path: Path, kind: str, image, max_megapixels: float) -> None:
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        size = f"{image.width} x {image.height} pixels"
        raise MediaError(f"{path}: {size} are {megapixels:.0f} megapixels, more than the limit of {max_megapixels:g}")
    frames = image.get("n-pages") if image.get_typeof("n-pages") else 1
    if frames > 1:
        what = "pages" if kind == ".tif" else "frames"
        way = AS_CLIP if kind == ".gif" else "only single pictures can be restored"
        raise MediaError(f"{path}: has {frames} {what}; {way}")


def _to_rgb_or_grey(path: Path, image):
    """An 8- or 16-bit image with 1 to 4 bands: grey, grey and alpha, RGB, RGB and alpha."""
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        inks, rest = image.extract_band(0, n=4), [image[i] for i in range(4, image.bands)]
        image = inks.icc_transform("srgb", embedded=True, depth=depth, black_point_compensation=True).bandjoin(rest)
    elif image.interpretation in ("lab", "labs"):
        image = image.colourspace("rgb16" if image.interpretation == "labs" else "srgb")
        image = image.copy()
        image.remove("icc-profile-data")
    if image.format not in ("uchar", "ushort"):
        raise MediaError(f"{path}: holds {image.format} values; save it with 8 or 16 bits a channel")
    if image.bands > 4:
        raise MediaError(f"{path}: has {image.bands} channels; only grey or RGB, with or without alpha, is supported")
    return image


def _metadata(image) -> dict[str, bytes | str]:
    names = [n for n in image.get_fields() if n in _KEPT_FIELDS or n.startswith("png-comment-")]
    metadata = {name: image.get(name) for name in names}
    if "xmp-data" in metadata:  # the pixels are upright now; EXIF's own tag is reset on writing
        metadata["xmp-data"] = re.sub(rb'(tiff:Orientation(?:=["\']|>))[2-8]', rb"\g<1>1", metadata["xmp-data"])
    return metadata


def _encode(vips, picture: Picture, suffix: str, quality: int) -> bytes:
    colours = picture.pixels
    if picture.grey:
        colours = (colours @ _LUMA)[..., None]
    bits = 8 if suffix in (".jpg", ".jpeg", ".webp") else picture.bits
    if picture.alpha is not None and suffix not in (".jpg", ".jpeg"):
        colours = np.concatenate([colours, picture.alpha[..., None]], axis=2)
    peak = 2**bits - 1
    stored = np.rint(np.clip(colours, 0, 1) * peak).astype(np.uint8 if bits == 8 else np.uint16)
    height, width, bands = stored.shape
    image = vips.Image.new_from_memory(stored.tobytes(), width, height, bands, "uchar" if bits == 8 else "ushort")
    xres, yres = picture.resolution or (72 / 25.4, 72 / 25.4)
    interpretation = ("b-w", "srgb") if bits == 8 else ("grey16", "rgb16")
    image = image.copy(interpretation=interpretation[bands > 2], xres=xres, yres=yres)
    for name, value in picture.metadata.items():
        image.set_type(vips.GValue.blob_type if isinstance(value, bytes) else vips.GValue.gstr_type, name, value)
    image.set_type(vips.GValue.gint_type, "orientation", 1)
    image.remove("jpeg-thumbnail-data")  # EXIF's thumbnail shows the picture before the restoration
    return image.write_to_buffer(suffix, **_save_options(suffix, quality, stored.nbytes))


def _save_options(suffix: str, quality: int, size: int) -> dict:
    if suffix in (".jpg", ".jpeg"):
        return {"Q": quality, "subsample_mode": "off", "optimize_coding": True}
    if suffix == ".webp":
        return {"Q": quality, "smart_subsample": True, "alpha_q": 100}
    if suffix == ".avif":
        return {"Q": quality, "subsample_mode": "off", "compression": "av1", "effort": 3}
    if suffix == ".png":
        return {"compression": 6, "filter": "all"}
    return {"compression": "deflate", "predictor": "horizontal", "bigtiff": size > 2**31}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
