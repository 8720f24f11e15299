"""What a clip says once and each of its frames has to say as a picture, and the other way round; and a file of their times."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from ebr_engine.media.holdings import icc
from ebr_engine.media.holdings.parts import Density, Part
from ebr_engine.media.picture import Picture
from ebr_engine.media.video.info import Colour, Frame, VideoInfo
from ebr_engine.media.video.light import Light

TIMES = "timestamps.txt"  # in the format that mkvmerge and x264 read
_HEAD = "# timestamp format v2"
_SAME = Fraction(3, 2000)  # seconds: containers count milliseconds, or finer
_SEEN_AS_SRGB = ((1, 2), (1, 2, 6, 13))  # primaries and transfers that nobody tells of pictures


def parts_of_frame(info: VideoInfo, xmp: bytes | None = None) -> tuple[Part, ...]:
    """What every frame of a clip holds as a picture: its colour tags where they are not sRGB's, aspect, light, XMP."""
    parts = []
    colour, aspect, light = info.colour, info.pixel_aspect, info.light
    if colour.primaries not in _SEEN_AS_SRGB[0] or colour.transfer not in _SEEN_AS_SRGB[1]:
        points = [1 if number == 2 else number for number in (colour.primaries, colour.transfer)]
        parts.append(Part("colour tags", "stream", value=(*points, 0, 1), size=4))
    if aspect != 1:
        small = aspect.limit_denominator(10_000)
        parts.append(Part("pixel aspect", "stream", value=Density(small.denominator, small.numerator, False), size=9))
    if light.mastering:
        points = [number / 50_000 for point in light.primaries for number in point]
        numbers = (*points, light.luminance[1] / 10_000, light.luminance[0] / 10_000)
        parts.append(Part("mastering display", "stream", value=numbers, size=24))
    if light.content is not None:
        parts.append(Part("light level", "stream", value=tuple(float(number) for number in light.content), size=8))
    if xmp is not None:
        parts.append(Part("xmp", "uuid", xmp))
    return tuple(parts)


def colour_of(picture: Picture) -> Colour:
    """The colours of a clip of such pictures: their tags', else those that everybody takes untagged ones to have."""
    tags = _value(picture, "colour tags")
    if tags is None:
        return Colour(matrix=0, full_range=True)
    return Colour(tags[0], 13 if picture.seen is not None else tags[1], matrix=0, full_range=True)


def profile_of(picture: Picture) -> bytes | None:
    """The colour profile by which a picture's pixels are converted for a clip, which has none; None where tags say it."""
    if _value(picture, "colour tags") is not None:
        return None
    gamma = _value(picture, "gamma")
    if picture.icc is None and gamma is not None and gamma.primaries is not None:
        return icc.from_gamma(*gamma, False)
    return picture.icc


def aspect_of(picture: Picture) -> Fraction:
    """A pixel's width by its height."""
    density = _value(picture, "pixel aspect") or _value(picture, "density")
    if not density or not density.x or not density.y or abs(density.y / density.x - 1) < 0.01:
        return Fraction(1)
    return Fraction(density.y / density.x).limit_denominator(1000)


def light_of_picture(picture: Picture) -> Light:
    """What it tells of the display that it was graded on, and of its light."""
    mastering, content = _value(picture, "mastering display"), _value(picture, "light level")
    primaries = luminance = None
    if mastering is not None:
        points = [round(number * 50_000) for number in mastering[:8]]
        primaries = tuple(zip(points[::2], points[1::2]))
        luminance = round(mastering[9] * 10_000), round(mastering[8] * 10_000)
    return Light(primaries, luminance, None if content is None else tuple(round(number) for number in content))


def without_pixels(picture: Picture) -> Picture:
    """What else a picture's file held, to hold on to."""
    return replace(picture, pixels=picture.pixels[:0, :0].copy(), alpha=None)


def write_times(folder: Path, frames: Sequence[tuple[Fraction, Fraction]], fps: Fraction) -> bool:
    """Write the times of frames, (begin, length) in seconds, beside them where their rate varies; whether it does."""
    if all(abs(begin - index / fps) <= _SAME for index, (begin, _) in enumerate(frames)):
        (folder / TIMES).unlink(missing_ok=True)
        return False
    ends = [begin + length for begin, length in frames[-1:]]  # a last line says when the last frame ends
    lines = [f"{float(1000 * time):.6f}" for time in (*(begin for begin, _ in frames), *ends)]
    (folder / TIMES).write_text("\n".join([_HEAD, *lines]) + "\n")
    return True


def read_times(folder: Path, count: int) -> list[Fraction] | None:
    """When each of `count` frames begins, and the last one ends, in seconds; None without a file that says so."""
    try:
        lines = (folder / TIMES).read_text(encoding="ascii").split("\n")
        times = [Fraction(line.strip()) / 1000 for line in lines[1:] if line.strip() and not line.startswith("#")]
    except (OSError, ValueError, ZeroDivisionError):
        return None
    if not lines[0].startswith("# time") or len(times) < count or any(b <= a for a, b in zip(times, times[1:])):
        return None
    times = times[: count + 1]
    if len(times) == count:
        times.append(times[-1] + (times[-1] - times[-2] if count > 1 else Fraction(1, 24)))
    return times


def lengths(times: Sequence[Fraction]) -> list[Fraction]:
    """Between each moment and the next one."""
    return [b - a for a, b in zip(times, times[1:])]


def in_time(frame: Frame | None, index: int, fps: Fraction) -> tuple[Fraction, Fraction]:
    """When a frame begins, and how long it is shown, in seconds."""
    if frame is None:
        return index / fps, 1 / fps
    return frame.time, frame.duration * frame.time_base if frame.duration else 1 / fps


def _value(picture: Picture, kind: str):
    return next((part.value for part in picture.parts if part.kind == kind), None)
