"""What a stream tells of the display that it was graded on, and of its own light: SMPTE ST 2086 and CTA 861.3.

Read from the structures that FFmpeg gives with a frame or from PNG chunks; written as an encoder's options, as boxes of
MP4, or as PNG chunks.
"""

import struct
from dataclasses import dataclass

_CHROMATICITY, _LUMINANCE = 50_000, 10_000  # units of both standards
_RED, _GREEN, _BLUE = 0, 1, 2


@dataclass(frozen=True)
class Light:
    """Both, each None where it is not told. Numbers in the standards' units: 0.00002, 0.0001 cd/m², and cd/m²."""

    primaries: tuple[tuple[int, int], ...] | None = None  # (x, y) of red, green, blue, white
    luminance: tuple[int, int] | None = None  # least, greatest
    content: tuple[int, int] | None = None  # of the brightest pixel, of the brightest frame's mean

    def __bool__(self) -> bool:
        return self.mastering or self.content is not None

    @property
    def mastering(self) -> bool:
        """Whether the display is told as a whole, as every form of it asks for."""
        return self.primaries is not None and self.luminance is not None

    def options(self, encoder: str) -> dict[str, str]:
        """As an encoder's own parameters: name → value, of libx264, libx265 and libsvtav1; none for others."""
        if encoder not in ("libx264", "libx265", "libsvtav1"):
            return {}
        found = {}
        if self.mastering:
            exact = encoder == "libsvtav1"  # which takes decimal numbers
            points = [
                "{}({},{})".format(name, *(f"{v / _CHROMATICITY:.5f}" if exact else v for v in self.primaries[i]))
                for name, i in (("G", _GREEN), ("B", _BLUE), ("R", _RED), ("WP", 3))
            ]
            least, most = (f"{v / _LUMINANCE:.4f}" if exact else v for v in self.luminance)
            found["mastering-display" if encoder != "libx265" else "master-display"] = f"{''.join(points)}L({most},{least})"
        if self.content is not None:
            name = {"libx264": "cll", "libx265": "max-cll", "libsvtav1": "content-light"}[encoder]
            found[name] = "{},{}".format(*self.content)
        return found

    def boxes(self) -> bytes:
        """As boxes of an MP4 sample entry."""
        made = b""
        if self.mastering:
            order = [self.primaries[i] for i in (_GREEN, _BLUE, _RED, 3)]
            body = b"".join(struct.pack(">HH", *point) for point in order)
            made += struct.pack(">I4s", 32, b"mdcv") + body + struct.pack(">II", self.luminance[1], self.luminance[0])
        if self.content is not None:
            made += struct.pack(">I4sHH", 12, b"clli", *(min(v, 65535) for v in self.content))
        return made

    def chunks(self) -> list[tuple[bytes, bytes]]:
        """As PNG chunks: name and data."""
        made = []
        if self.mastering:
            body = b"".join(struct.pack(">HH", *point) for point in self.primaries)
            made.append((b"mDCV", body + struct.pack(">II", self.luminance[1], self.luminance[0])))
        if self.content is not None:
            made.append((b"cLLI", struct.pack(">II", *(v * _LUMINANCE for v in self.content))))
        return made


def light_of(frame) -> Light:
    """What a decoded av.VideoFrame tells."""
    from av.sidedata.sidedata import Type

    primaries = luminance = content = None
    if (data := frame.side_data.get(Type.MASTERING_DISPLAY_METADATA)) is not None and len(bytes(data)) >= 88:
        *ratios, has_primaries, has_luminance = struct.unpack("<22i", bytes(data)[:88])
        values = [n / d if d else 0.0 for n, d in zip(ratios[::2], ratios[1::2])]
        if has_primaries:
            points = [round(v * _CHROMATICITY) for v in values[:8]]
            primaries = tuple(zip(points[::2], points[1::2]))
        if has_luminance:
            luminance = round(values[8] * _LUMINANCE), round(values[9] * _LUMINANCE)
    if (data := frame.side_data.get(Type.CONTENT_LIGHT_LEVEL)) is not None and len(bytes(data)) >= 8:
        content = struct.unpack("<II", bytes(data)[:8])
    return Light(primaries, luminance, content)


def light_of_chunks(chunks: dict[bytes, bytes]) -> Light:
    """What a PNG's chunks tell."""
    primaries = luminance = content = None
    if len(data := chunks.get(b"mDCV", b"")) == 24:
        *points, most, least = struct.unpack(">8H2I", data)
        primaries, luminance = tuple(zip(points[::2], points[1::2])), (least, most)
    if len(data := chunks.get(b"cLLI", b"")) == 8:
        content = tuple(round(v / _LUMINANCE) for v in struct.unpack(">II", data))
    return Light(primaries, luminance, content)
