"""What is seen of stored values: upright, and with the light that a viewer would show."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ebr_engine.media.holdings import icc, jpeg
from ebr_engine.media.holdings.parts import Density, Part

# Light at half the stored value: a display's gamma lies about 2.2. Beyond these, values are not what a viewer shows.
_PROFILE_RANGE = (0.5**2.9, 0.5**1.6)
_GAMMA_RANGE = (0.4, 0.5)  # of PNG's gAMA, which viewers apply though it be small


def seen_values(parts: Sequence[Part], peak: int) -> np.ndarray | None:
    """What is seen, in sRGB's curve, of every stored value: [peak + 1] float32; None where values are seen as they are.

    PQ and HLG are no display's curves either, but pictures in them are restored as they are.
    """
    part = next((p for p in parts if p.kind in ("colour tags", "icc", "gamma")), None)
    if part is None:
        return None
    values = np.arange(peak + 1) / peak
    if part.kind == "gamma":
        gamma = part.value.gamma
        if gamma is None or _GAMMA_RANGE[0] <= gamma <= _GAMMA_RANGE[1] or not 0.05 < gamma < 20:
            return None
        return icc.linear_to_srgb(values ** (1 / gamma)).astype(np.float32)
    if part.kind == "colour tags":
        points = part.value[:2]
        knots = None if points[1] in (icc.PQ, icc.HLG) else icc.curve(points[1], np.linspace(0, 1, 1025))
    else:
        points = icc.code_points(part.data) or (2, 2)
        knots = None if points[1] in (icc.PQ, icc.HLG) else icc.tone(part.data)
    if knots is None or _PROFILE_RANGE[0] <= knots[512] <= _PROFILE_RANGE[1] or not (np.diff(knots) > 0).all():
        return None
    light = np.interp(values, np.linspace(0, 1, len(knots)), knots)
    return icc.linear_to_srgb(light).astype(np.float32)


def stored_values(pixels: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """The stored values, scaled to [0, 1], that are seen as `pixels`."""
    if seen is None:
        return pixels
    known, first = np.unique(seen, return_index=True)
    return np.interp(pixels, known, first / (len(seen) - 1))


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] as EXIF's orientation says that it is to be shown."""
    if orientation >= 5:
        stored = stored.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    return np.ascontiguousarray(stored)


def turned_parts(parts: Iterable[Part], orientation: int) -> Iterator[Part]:
    """The parts of a picture that was turned: density, gain map."""
    for part in parts:
        if orientation >= 5 and part.kind in ("density", "pixel aspect"):
            yield replace(part, value=Density(part.value.y, part.value.x, part.value.unit), raw=None)
        elif orientation > 1 and part.kind == "gain map" and part.where != "APP2" and part.data:
            yield _turned_map(part, orientation)
        else:
            yield part


def _turned_map(part: Part, orientation: int) -> Part:
    from ebr_engine.media.decoding import vips

    library = vips()
    try:
        image = library.Image.jpegload_buffer(part.data)
        pixels = turned(image.numpy().reshape(image.height, image.width, -1), orientation)
        height, width, bands = pixels.shape
        image = library.Image.new_from_memory(pixels.tobytes(), width, height, bands, "uchar")
        image = image.copy(interpretation="srgb" if bands > 2 else "b-w")
        encoded = image.jpegsave_buffer(Q=95, subsample_mode="off", keep="none")
    except library.Error:
        return replace(part, data=b"")  # which is told as not kept
    data = jpeg.with_applications_of(part.data, encoded)
    return replace(part, data=data, size=len(data))
