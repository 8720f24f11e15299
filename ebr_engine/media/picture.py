"""A picture as it is in memory, with all that its file holds beside the pixels."""

from dataclasses import dataclass

import numpy as np

from ebr_engine.media.holdings.jpeg_scan import Coding
from ebr_engine.media.holdings.parts import Part


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright, and what is needed to write it back as it came."""

    pixels: np.ndarray  # [H, W, 3] float32 in [0, 1]: the stored values, scaled, or what is seen of them
    alpha: np.ndarray | None = None  # [H, W] float32 in [0, 1]
    bits: int = 8  # 8 or 16 a channel
    format: str = ".png"  # what the content is, whatever the file is called
    grey: bool = False  # stored with one colour channel; pixels repeats it
    parts: tuple[Part, ...] = ()  # everything else that the file holds
    coding: Coding | None = None  # of a JPEG
    seen: np.ndarray | None = None  # what is seen of each stored value, where that is another
    more: tuple["Picture", ...] = ()  # the pages that follow

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def icc(self) -> bytes | None:
        """The embedded colour profile."""
        return self.data("icc")

    @property
    def resolution(self) -> tuple[float, float] | None:
        """Pixels per millimetre, across and down."""
        found = next((part.value for part in self.parts if part.kind == "density"), None)
        return None if found is None else (found.x / 1000, found.y / 1000)

    def data(self, kind: str) -> bytes | None:
        """The first part of a kind: "icc", "exif", "xmp", "iptc" …"""
        return next((part.data for part in self.parts if part.kind == kind), None)
