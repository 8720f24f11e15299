"""Planes of a video frame to RGB and back, in float32, with the stream's own matrix, range, depth and chroma siting.

FFmpeg's scaler is left to repack exotic layouts (packed, semi-planar), which loses nothing. The rest is done here, since
it has to be exact: chroma is interpolated linearly, and taken back by the filter that is dual to that (the low-pass of the
5/3 wavelet where samples coincide, (-1, 3, 3, -1)/4 where they lie between), so that reading and writing again changes
no stored value of a colour that RGB can hold. Values beyond black and white are clipped.
"""

import re
from dataclasses import dataclass

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video.info import Colour, pyav

MATRICES = {  # H.273 code point: (Kr, Kb)
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.601, 625 lines
    6: (0.299, 0.114),  # BT.601, 525 lines
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020, non-constant luminance
}
RGB, UNSPECIFIED = 0, 2

_SHIFTS = {"444": (0, 0), "422": (0, 1), "420": (1, 1), "440": (1, 0), "411": (0, 2), "410": (2, 2)}  # down, across
_PLANAR = re.compile(r"(?:yuv[aj]?(4\d\d)p|(gbra?p)|gray)(\d*)(le|be)?")
_DEPTHS = (8, 9, 10, 12, 14, 16)
_ALPHA_DEPTHS = (8, 10, 16)  # that every planar format with alpha has


@dataclass(frozen=True)
class Layout:
    """A planar pixel format: one array a channel."""

    name: str
    bits: int
    dtype: np.dtype
    rgb: bool = False
    grey: bool = False
    alpha: bool = False
    shifts: tuple[int, int] = (0, 0)  # chroma is lower and narrower by these powers of two


def layout_of(pixel_format) -> Layout:
    """The planar layout of an av.VideoFormat, or the one that it can be repacked to without loss."""
    match = _PLANAR.fullmatch(pixel_format.name)
    if not match or int(match[3] or 8) not in _DEPTHS:
        match = _PLANAR.fullmatch(_planar_name(pixel_format))
    bits = int(match[3] or 8)
    return Layout(
        name=match[0],
        bits=bits,
        dtype=np.dtype("u1" if bits == 8 else ">u2" if match[4] == "be" else "<u2"),
        rgb=match[2] is not None,
        grey=match[0].startswith("gray"),
        alpha=match[0].startswith(("yuva", "gbra")),
        shifts=_SHIFTS[match[1]] if match[1] else (0, 0),
    )


def matrix_for(declared: int, width: int, height: int) -> int:
    """The matrix that a stream is read with. Where it declares none, by size as players guess: BT.709 from 1280 pixels
    wide or more than 576 high, BT.601 below. MediaError for one that is no plain matrix (YCgCo, ICtCp, constant luminance)."""
    if declared == UNSPECIFIED:
        return 1 if width >= 1280 or height > 576 else 5 if height == 576 else 6
    if declared not in MATRICES:
        raise MediaError(f"its colours are coded in a way that is not supported (matrix {declared} of H.273)")
    return declared


def to_rgb(frame, colour: Colour, centred: bool = False) -> np.ndarray:
    """The pixels of an av.VideoFrame: [H, W, 3] float32 RGB in [0, 1], without alpha.

    `centred`: chroma lies between the pixels across too (JPEG, MPEG-1), and not on every second one.
    """
    layout = layout_of(frame.format)
    if frame.format.name != layout.name:
        frame = _repacked(frame, layout.name)
    planes = [_plane(frame, index, layout).astype(np.float32) for index in range(1 if layout.grey else 3)]
    black, white, neutral, span = _levels(layout.bits, colour.full_range or layout.rgb)
    rgb = np.empty((frame.height, frame.width, 3), np.float32)
    if layout.rgb:
        for plane, channel in zip(planes, (1, 2, 0)):
            np.divide(plane, white, out=rgb[..., channel])
        return rgb
    luma = (planes[0] - black) / (white - black)
    if layout.grey:
        rgb[...] = luma[..., None]
        return rgb.clip(0, 1, out=rgb)
    cb, cr = (_upsample((plane - neutral) / span, layout, luma.shape, centred) for plane in planes[1:])
    kr, kb = MATRICES[colour.matrix]
    kg = 1 - kr - kb
    rgb[..., 0] = luma + np.float32(2 - 2 * kr) * cr
    rgb[..., 1] = luma - np.float32(kb * (2 - 2 * kb) / kg) * cb - np.float32(kr * (2 - 2 * kr) / kg) * cr
    rgb[..., 2] = luma + np.float32(2 - 2 * kb) * cb
    return rgb.clip(0, 1, out=rgb)


def alpha_of(frame) -> np.ndarray:
    """The alpha of an av.VideoFrame that has one: [H, W] float32 in [0, 1]; its range is always full."""
    layout = layout_of(frame.format)
    if frame.format.name != layout.name:
        frame = _repacked(frame, layout.name)
    return _plane(frame, 3, layout) / np.float32(2**layout.bits - 1)


def from_rgb(rgb: np.ndarray, pixel_format, colour: Colour, centred: bool = False, alpha: np.ndarray | None = None):
    """An av.VideoFrame of the given av.VideoFormat from [H, W, 3] RGB in [0, 1]; the inverse of `to_rgb`.

    `alpha` [H, W] in [0, 1] is for formats that have it; without, they are opaque.
    """
    layout = layout_of(pixel_format)
    frame = pyav().VideoFrame(rgb.shape[1], rgb.shape[0], layout.name)
    black, white, neutral, span = _levels(layout.bits, colour.full_range or layout.rgb)
    rgb = np.clip(rgb, 0, 1).astype(np.float32, copy=False)
    if layout.rgb:
        stored = [rgb[..., channel] * white for channel in (1, 2, 0)]
    else:
        kr, kb = MATRICES[colour.matrix]
        weights = [np.float32(k) for k in (kr, 1 - kr - kb, kb)]
        luma = rgb[..., 0] * weights[0] + rgb[..., 1] * weights[1] + rgb[..., 2] * weights[2]  # no BLAS: the same everywhere
        stored = [luma * (white - black) + black]
        if not layout.grey:
            for channel, k in ((2, kb), (0, kr)):
                chroma = (rgb[..., channel] - luma) * np.float32(span / (2 - 2 * k))
                stored.append(_downsample(chroma, layout, centred) + neutral)
    peak = 2**layout.bits - 1
    for index, values in enumerate(stored):
        _plane(frame, index, layout)[...] = np.rint(values).clip(0, peak)
    if layout.alpha:
        _plane(frame, 3, layout)[...] = peak if alpha is None else np.rint(np.clip(alpha, 0, 1) * peak)
    if layout.name != pixel_format.name:
        frame = _repacked(frame, pixel_format.name)
    return frame


def _repacked(frame, name: str):
    """The same values in another layout. On one thread: on several, FFmpeg 8 loses rows of chroma at their borders."""
    return frame.reformat(format=name, threads=1)


def _planar_name(pixel_format) -> str:
    """The name of the planar format that holds all that a packed, semi-planar, palette or Bayer format does."""
    name, components = pixel_format.name, pixel_format.components
    floating = any(word in name for word in ("f16", "f32"))
    bits = 16 if floating or pixel_format.is_bayer else max((c.bits for c in components if not c.is_alpha), default=8)
    alpha = "a" if any(c.is_alpha for c in components) else ""
    depth = next((d for d in (_ALPHA_DEPTHS if alpha else _DEPTHS) if d >= bits), 16)
    ending = "" if depth == 8 else f"{depth}le"
    rgb = pixel_format.is_rgb or pixel_format.has_palette or pixel_format.is_bayer or name.startswith("xyz")
    if rgb or (alpha and len(components) < 3):  # there is no planar grey with alpha
        return f"gbr{alpha}p{ending}"
    if sum(not c.is_alpha for c in components) < 3:
        return f"gray{ending}"
    shifts = tuple(64 // size // 2 for size in (pixel_format.chroma_height(64), pixel_format.chroma_width(64)))
    subsampling = next(key for key, value in _SHIFTS.items() if value == shifts)
    return f"yuv{alpha}{subsampling}p{ending}"


def _levels(bits: int, full_range: bool) -> tuple[float, float, float, float]:
    """The stored values of black, white and no colour, and the span of chroma."""
    neutral = 2 ** (bits - 1)
    if full_range:
        peak = 2**bits - 1
        return 0, peak, neutral, peak
    unit = 2 ** (bits - 8)
    return 16 * unit, 235 * unit, neutral, 224 * unit


def _plane(frame, index: int, layout: Layout) -> np.ndarray:
    """A view [h, w] of a plane, writable."""
    plane = frame.planes[index]
    rows = np.frombuffer(plane, layout.dtype).reshape(plane.height, -1)
    return rows[:, : plane.width]


def _upsample(chroma: np.ndarray, layout: Layout, shape: tuple[int, ...], centred: bool) -> np.ndarray:
    for axis, shift in enumerate(layout.shifts):
        for _ in range(shift):
            chroma = _double(chroma, axis, between=axis == 0 or centred)
    return chroma[: shape[0], : shape[1]]


def _downsample(chroma: np.ndarray, layout: Layout, centred: bool) -> np.ndarray:
    for axis, shift in enumerate(layout.shifts):
        for _ in range(shift):
            chroma = _halve(chroma, axis, between=axis == 0 or centred)
    return chroma


def _double(x: np.ndarray, axis: int, between: bool) -> np.ndarray:
    """Twice the samples, linearly interpolated: the old ones lie on the even new ones, or between two new ones."""
    x = np.moveaxis(x, axis, 0)
    padded = np.pad(x, ((1, 1), (0, 0)), mode="edge")
    before, after = padded[:-2], padded[2:]
    doubled = np.empty((2 * len(x), x.shape[1]), np.float32)
    if between:
        doubled[0::2] = 0.75 * x + 0.25 * before
        doubled[1::2] = 0.75 * x + 0.25 * after
    else:
        doubled[0::2] = x
        doubled[1::2] = 0.5 * (x + after)
    return np.moveaxis(doubled, 0, axis)


def _halve(x: np.ndarray, axis: int, between: bool) -> np.ndarray:
    """Half the samples (rounded up), low-passed so that `_halve(_double(x))` is x."""
    x = np.moveaxis(x, axis, 0)
    padded = np.pad(x, ((2, 2 + len(x) % 2), (0, 0)), mode="edge")
    n = (len(x) + 1) // 2
    tap = [padded[offset : offset + 2 * n : 2] for offset in range(5)]  # at -2 ... 2 from the even samples
    if between:
        halved = 0.75 * (tap[2] + tap[3]) - 0.25 * (tap[1] + tap[4])
    else:
        halved = 0.75 * tap[2] + 0.25 * (tap[1] + tap[3]) - 0.125 * (tap[0] + tap[4])
    return np.moveaxis(halved, 0, axis)
