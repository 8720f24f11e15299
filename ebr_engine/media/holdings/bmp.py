"""BMP's header: density and colour profile."""

import struct

from ebr_engine.media.holdings.parts import Density, Part, Window, damaged


def parts(window: Window, light: bool = False) -> list[Part]:
    """Everything but the picture."""
    header = window.at(14, 124)
    size = int.from_bytes(header[:4], "little")
    found = []
    if size >= 40 and len(header) >= 40:
        x, y = struct.unpack_from("<ii", header, 24)
        if x > 0 and y > 0:
            found.append(Part("density", "header", header[24:32], f"{x * 0.0254:.4g} an inch", Density(x, y, True)))
    if size >= 124 and len(header) >= 124 and header[56:60] == b"DEBM":
        place, length = struct.unpack_from("<II", header, 112)
        data = window.at(14 + place, length)
        found.append(Part("icc", "header", data) if data[36:40] == b"acsp" else damaged("header", "no colour profile"))
    return found
