"""Animated PNG: its frames composed as they are shown, and frames put together as one."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError, vips
from ebr_engine.media.holdings.parts import Window
from ebr_engine.media.holdings.png import SIGNATURE, chunk, chunks

_KEEP, _CLEAR, _RESTORE = 0, 1, 2  # what becomes of a frame before the next one


@dataclass
class _Control:
    """A frame's place, time and way into the picture."""

    width: int
    height: int
    left: int
    top: int
    delay: Fraction
    disposal: int
    over: bool
    pieces: list[tuple[int, int]] = field(default_factory=list)  # places and lengths of its data


class ApngFrames:
    """The frames of an animated PNG, with RGB and alpha."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._head: list[tuple[bytes, bytes]] = []  # chunks that every frame's picture needs
        self._controls: list[_Control] = []
        self.loop = 0
        with Window(path) as window:
            self._scan(window)
        if not self._controls:
            raise MediaError(f"{path}: the PNG data is damaged: an animation without frames")
        self.delays = [control.delay for control in self._controls]
        self.alpha = self._header[9] in (4, 6) or any(kind == b"tRNS" for kind, _ in self._head)

    def _scan(self, window: Window) -> None:
        place = 8
        while len(head := window.at(place, 8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IHDR":
                header = window.at(place + 8, 13)
                self.width, self.height = struct.unpack_from(">II", header)
                self.bits = 16 if header[8] == 16 else 8
                self._header = header
            elif kind in (b"PLTE", b"tRNS"):
                self._head.append((kind, window.at(place + 8, length)))
            elif kind == b"acTL":
                self.loop = window.number(place + 12, 4)
            elif kind == b"fcTL" and length >= 26:
                _, width, height, left, top, num, den, disposal, blend = struct.unpack(">5I2H2B", window.at(place + 8, 26))
                delay = Fraction(num, den or 100)
                self._controls.append(_Control(width, height, left, top, delay, disposal, blend == 1))
            elif kind in (b"IDAT", b"fdAT") and self._controls:  # data before the first control are no frame
                skipped = 4 if kind == b"fdAT" else 0
                self._controls[-1].pieces.append((place + 8 + skipped, length - skipped))
            place += 12 + length

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Frames [H, W, 4] of uint8 or uint16 as they are shown."""
        kind = np.uint16 if self.bits == 16 else np.uint8
        canvas = np.zeros((self.height, self.width, 4), kind)
        with Window(self._path) as window:
            for index, control in enumerate(self._controls[: first + count]):
                if control.left + control.width > self.width or control.top + control.height > self.height:
                    raise MediaError(f"{self._path}: the PNG data is damaged: a frame lies outside of the picture")
                part = (slice(control.top, control.top + control.height), slice(control.left, control.left + control.width))
                before = canvas[part].copy()
                frame = self._decoded(window, control).astype(kind)
                canvas[part] = _over(before, frame) if control.over else frame
                if index >= first:
                    yield canvas.copy()
                if control.disposal == _CLEAR or (control.disposal == _RESTORE and index == 0):
                    canvas[part] = 0
                elif control.disposal == _RESTORE:
                    canvas[part] = before

    def _decoded(self, window: Window, control: _Control) -> np.ndarray:
        header = struct.pack(">II", control.width, control.height) + self._header[8:]
        data = b"".join(window.at(*piece) for piece in control.pieces)
        head = b"".join(chunk(*each) for each in self._head)
        file = SIGNATURE + chunk(b"IHDR", header) + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        image = vips().Image.pngload_buffer(file, fail_on="error")
        if image.bands < 3:
            image = image.colourspace("rgb16" if self.bits == 16 else "srgb")
        if not image.hasalpha():
            image = image.bandjoin(2**self.bits - 1)
        return image.numpy().reshape(control.height, control.width, 4)


def _over(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """One picture over another, as the specification of PNG composes them."""
    peak = np.iinfo(below.dtype).max
    top, bottom = above.astype(np.float64) / peak, below.astype(np.float64) / peak
    alpha = top[..., 3:] + bottom[..., 3:] * (1 - top[..., 3:])
    colours = top[..., :3] * top[..., 3:] + bottom[..., :3] * bottom[..., 3:] * (1 - top[..., 3:])
    mixed = np.concatenate([np.divide(colours, alpha, out=np.zeros_like(colours), where=alpha > 0), alpha], axis=2)
    return np.rint(mixed * peak).astype(below.dtype)


def apng(frames: Sequence[bytes], delays: Sequence[Fraction], loop: int) -> bytes:
    """An animated PNG of whole frames, which are PNGs of one size and form."""
    first = chunks(frames[0])
    header = first[0][1]
    size = header[:8]
    out = [SIGNATURE, chunk(b"IHDR", header), chunk(b"acTL", struct.pack(">II", len(frames), loop))]
    number = 0
    for index, (data, delay) in enumerate(zip(frames, delays)):
        control = struct.pack(">I", number) + size + bytes(8) + struct.pack(">HHBB", *_ratio(delay), _KEEP, 0)
        out.append(chunk(b"fcTL", control))
        number += 1
        pieces = [content for kind, content in chunks(data) if kind == b"IDAT"]
        if index == 0:
            out += [chunk(b"IDAT", piece) for piece in pieces]
            continue
        for piece in pieces:
            out.append(chunk(b"fdAT", struct.pack(">I", number) + piece))
            number += 1
    return b"".join([*out, chunk(b"IEND", b"")])


def _ratio(delay: Fraction) -> tuple[int, int]:
    """Seconds as two numbers of 16 bits."""
    close = delay.limit_denominator(65535)
    return (close.numerator, close.denominator) if close.numerator <= 65535 else (min(65535, round(delay)), 1)
