"""Elements of a Matroska video track that FFmpeg's muxer writes only for who can reach its structures: aspect, projection.

They take the place of a filling that was put into the track's name, so that nothing else in the file moves.
"""

import struct
import zlib
from fractions import Fraction
from math import gcd
from pathlib import Path

from ebr_engine.media.holdings.matroska import MOST_READ, elements
from ebr_engine.media.video.views import View

_SEGMENT, _TRACKS, _TRACK, _VIDEO, _NAME, _CRC, _VOID = 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x536E, 0xBF, 0xEC
_FILLING = "~" * 256
_ASPECT_RATIO = 3  # a unit of the display's size


def filled(title: str) -> str:
    """A track's name with room for `add_to_video`."""
    return title + _FILLING


def display_size(width: int, height: int, aspect: Fraction) -> bytes:
    """DisplayWidth and DisplayHeight of pixels that are not square."""
    shown = width * aspect
    if shown.denominator == 1:
        return _number(0x54B0, int(shown)) + _number(0x54BA, height)
    across, down = width * aspect.numerator, height * aspect.denominator
    common = gcd(across, down)
    return _number(0x54B0, across // common) + _number(0x54BA, down // common) + _number(0x54B2, _ASPECT_RATIO)


def projection(view: View) -> bytes:
    """Projection, of FFmpeg's structure; nothing where there is none, or one that Matroska does not know."""
    found = view.projection
    if found is None:
        return b""
    kind, private, (yaw, pitch, roll) = found
    body = _number(0x7671, {b"equi": 1, b"cbmp": 2}[kind]) + (_element(0x7672, bytes(4) + private) if any(private) else b"")
    for number, angle in ((0x7673, yaw), (0x7674, pitch), (0x7675, roll)):
        body += _element(number, struct.pack(">f", angle / 65536)) if angle else b""
    return _element(0x7670, body)


def add_to_video(path: Path, added: bytes) -> bool:
    """Put elements into the description of a file's first video, in place of the filling in its track's name."""
    with open(path, "r+b") as file:
        data = file.read(MOST_READ)
        for number, body, end in elements(data, 0, len(data)):
            if number != _SEGMENT:
                continue
            for inner, start, stop in elements(data, body, end):
                if inner == _TRACKS:
                    made = _with(data[start:stop], added)
                    if made is not None:
                        file.seek(start)
                        file.write(made)
                    return made is not None
    return False


def _with(tracks: bytes, added: bytes) -> bytes | None:
    for number, body, end in elements(tracks, 0, len(tracks)):
        if number != _TRACK or not any(inner == _VIDEO for inner, _, _ in elements(tracks, body, end)):
            continue
        made, at = b"", body
        for inner, start, stop in elements(tracks, body, end):
            content, whole = tracks[start:stop], tracks[at:stop]
            at = stop
            if inner == _NAME:
                title = content.removesuffix(_FILLING.encode())
                whole = _element(_NAME, title) if title else b""
            elif inner == _VIDEO:
                whole = _element(_VIDEO, content + added)
            made += whole
        left = end - body - len(made)
        if left < 9:
            return None
        made += bytes([_VOID, 1]) + (left - 9).to_bytes(7, "big") + bytes(left - 9)
        return _checked(tracks[:body] + made + tracks[end:])
    return None


def _checked(tracks: bytes) -> bytes:
    """With a checksum that is right, where there is one: of all that follows it."""
    number, start, stop = next(elements(tracks, 0, len(tracks)))
    if number != _CRC:
        return tracks
    return tracks[:start] + zlib.crc32(tracks[stop:]).to_bytes(4, "little") + tracks[stop:]


def _element(number: int, content: bytes) -> bytes:
    name = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return name + (len(content) | 1 << 28).to_bytes(4, "big") + content


def _number(number: int, value: int) -> bytes:
    return _element(number, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))
