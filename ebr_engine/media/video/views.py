"""How a clip is to be looked at: a projection of a sphere, two eyes in one picture. Boxes of Google's spherical video (v2)."""

import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ebr_engine.media.holdings.boxes import read_header, tracks

_SPHERICAL_XML = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")
_STEREO_MODES = {  # by FFmpeg's number, and whether the right eye comes first; Matroska's words
    **{(1, 0): "left_right", (1, 1): "right_left", (2, 0): "top_bottom", (2, 1): "bottom_top"},
    **{(3, 0): "block_lr", (3, 1): "block_rl", (4, 0): "checkerboard_lr", (4, 1): "checkerboard_rl"},
    **{(6, 0): "row_interleaved_lr", (6, 1): "row_interleaved_rl", (7, 0): "col_interleaved_lr", (7, 1): "col_interleaved_rl"},
}
_IN_BOX = {"left_right": 2, "top_bottom": 1}  # of st3d
_EQUIRECTANGULAR, _CUBEMAP, _TILE = 0, 1, 2


@dataclass(frozen=True)
class View:
    """FFmpeg's structures of a stream, each None where it is not told."""

    stereo: bytes | None = None
    spherical: bytes | None = None

    def __bool__(self) -> bool:
        return self.stereo_mode is not None or self.projection is not None

    @property
    def stereo_mode(self) -> str | None:
        """Two eyes in one picture, in Matroska's words; None for one eye, and for other arrangements."""
        if self.stereo is None or len(self.stereo) < 8:
            return None
        kind, flags = struct.unpack_from("<ii", self.stereo)
        return _STEREO_MODES.get((kind, flags & 1))

    @property
    def projection(self) -> tuple[bytes, bytes, tuple[int, int, int]] | None:
        """Of a sphere: `equi` or `cbmp` with its numbers as boxes hold them, and yaw, pitch and roll in 1/65536 degrees."""
        if self.spherical is None or len(self.spherical) < 36:
            return None
        kind, yaw, pitch, roll, left, top, right, bottom, padding = struct.unpack_from("<4i5I", self.spherical)
        known = {
            _EQUIRECTANGULAR: (b"equi", bytes(16)),
            _TILE: (b"equi", struct.pack(">4I", top, bottom, left, right)),
            _CUBEMAP: (b"cbmp", struct.pack(">II", 0, padding)),
        }
        return (*known[kind], (yaw, pitch, roll)) if kind in known else None

    def boxes(self) -> bytes:
        """As boxes of an MP4 sample entry."""
        made = b""
        if self.stereo_mode in _IN_BOX:
            made += _box(b"st3d", bytes(4) + bytes([_IN_BOX[self.stereo_mode]]))
        if (found := self.projection) is not None:
            kind, private, angles = found
            head = _box(b"prhd", bytes(4) + struct.pack(">3i", *angles))
            proj = _box(b"proj", head + _box(kind, bytes(4) + private))
            made += _box(b"sv3d", _box(b"svhd", bytes(5)) + proj)
        return made


def view_of(frame) -> View:
    """How a decoded av.VideoFrame is to be looked at."""
    from av.sidedata.sidedata import Type

    stereo, spherical = (frame.side_data.get(kind) for kind in (Type.STEREO3D, Type.SPHERICAL))
    return View(None if stereo is None else bytes(stereo), None if spherical is None else bytes(spherical))


def view_boxes(path: Path, view: View) -> tuple[bytes, bytes]:
    """The boxes for a video's sample entry, and for its track: those of an MP4 or QuickTime file, else made of `view`."""
    header = None
    with suppress(OSError):
        header = read_header(path)
    paths = next((paths for kind, paths in tracks(header) if kind == b"vide"), []) if header else []
    entry = [p[-1] for p in paths if len(p) > 2 and p[-3].kind == b"stsd" and p[-1].kind in (b"st3d", b"sv3d")]
    xml = [p[-1] for p in paths if p[-1].kind == b"uuid" and header[p[-1].body : p[-1].body + 16] == _SPHERICAL_XML]
    if entry or xml:
        return tuple(b"".join(header[box.start : box.end] for box in group) for group in (entry, xml))
    return view.boxes(), b""


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body
