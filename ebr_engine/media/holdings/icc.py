"""Colour profiles: small ones made of primaries and a transfer curve, and what there is to know of a profile that came."""

import struct
from functools import lru_cache

import numpy as np

# CIE x, y of red, green, blue and white, by H.273's code points.
PRIMARIES = {
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, 0.3127, 0.3290),
}
PQ, HLG, LINEAR, SRGB = 16, 18, 8, 13
_D50 = (0.96422, 1.0, 0.82521)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """Light of sRGB values in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: np.ndarray) -> np.ndarray:
    """sRGB values of light in [0, 1]."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def curve(transfer: int, values: np.ndarray) -> np.ndarray | None:
    """Light, 1 at the peak, of stored values by a code point of H.273; None for one that is not known."""
    if transfer in (SRGB, 2):
        return srgb_to_linear(values)
    if transfer in (1, 6, 7, 14, 15):
        return np.where(values < 0.081, values / 4.5, ((np.maximum(values, 0.081) + 0.099) / 1.099) ** (1 / 0.45))
    if transfer in (4, 5, LINEAR):
        return values ** {4: 2.2, 5: 2.8, LINEAR: 1.0}[transfer]
    if transfer == PQ:
        power = values ** (32 / 2523)
        return (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)
    if transfer == HLG:
        return np.where(
            values <= 0.5, values**2 / 3, (np.exp((np.maximum(values, 0.5) - 0.55991073) / 0.17883277) + 0.28466892) / 12
        )
    return None


@lru_cache
def from_tags(primaries: int, transfer: int, grey: bool = False) -> bytes | None:
    """A profile that means the same as code points, and says so by them; None for those that are not known."""
    chroma = PRIMARIES.get(1 if primaries == 2 else primaries)
    light = curve(transfer, np.linspace(0, 1, 2 if transfer == LINEAR else 4096 if transfer in (PQ, HLG) else 1024))
    if chroma is None or light is None:
        return None
    return _profile(chroma, _table(light), f"H.273 {primaries}/{transfer}", (primaries, transfer), grey)


@lru_cache
def from_gamma(gamma: float | None, primaries: tuple[float, ...] | None, grey: bool = False) -> bytes:
    """A profile that means the same as PNG's gAMA and cHRM (white, red, green, blue)."""
    chroma = (*primaries[2:], *primaries[:2]) if primaries and all(0 < n < 1 for n in primaries[1::2]) else PRIMARIES[1]
    light = None if gamma else _table(srgb_to_linear(np.linspace(0, 1, 1024)))
    return _profile(chroma, light or _power(1 / gamma), f"gamma {1 / gamma:.4g}" if gamma else "primaries", None, grey)


def _table(light: np.ndarray) -> bytes:
    numbers = np.rint(np.clip(light, 0, 1) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(numbers)) + numbers.tobytes()


def _power(gamma: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HHi", 0, 0, round(gamma * 65536))


def _profile(chroma: tuple[float, ...], tone: bytes, name: str, tags: tuple[int, int] | None, grey: bool) -> bytes:
    colours, white = _to_d50(chroma)
    text = name.encode("utf-16-be")
    described = b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, len(text), 28) + text
    free = "no copyright".encode("utf-16-be")
    rights = b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, len(free), 28) + free
    blocks = {b"desc": described, b"cprt": rights, b"wtpt": _xyz(_D50), b"chad": b"sf32\0\0\0\0" + _fixed(white.flatten())}
    if grey:
        blocks[b"kTRC"] = tone
    else:
        blocks |= {key: _xyz(colours[:, i]) for i, key in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
        blocks |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone)
    if tags:
        blocks[b"cicp"] = b"cicp\0\0\0\0" + bytes([*tags, 0, 1])
    table, body, places = b"", b"", {}
    start = 128 + 4 + 12 * len(blocks)
    for key, content in blocks.items():
        if content not in places:
            places[content] = start + len(body)
            body += content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", key, places[content], len(content))
    size = start + len(body)
    space = b"GRAY" if grey else b"RGB "
    head = struct.pack(">I4xI4s4s4s", size, 0x04400000, b"mntr", space, b"XYZ ") + b"\x07\xe8\0\1\0\1" + bytes(6) + b"acsp"
    head = head.ljust(68, b"\0") + _fixed(_D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(blocks)) + table + body


def _to_d50(chroma: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The primaries' XYZ as columns, adapted to D50 by Bradford's way, and the matrix that adapts."""
    x, y = np.array(chroma[0::2]), np.array(chroma[1::2])
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    white = xyz[:, 3]
    colours = xyz[:, :3] * np.linalg.solve(xyz[:, :3], white)
    cones = _BRADFORD @ np.array(_D50) / (_BRADFORD @ white)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD
    return adapt @ colours, adapt


def _fixed(numbers) -> bytes:
    return b"".join(struct.pack(">i", round(float(n) * 65536)) for n in numbers)


def _xyz(numbers) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(numbers)


def tags_of(profile: bytes) -> dict[bytes, bytes]:
    """A profile's tags; without those that lie beyond its end."""
    count = int.from_bytes(profile[128:132], "big") if len(profile) >= 132 else 0
    found = {}
    for at in range(132, 132 + 12 * min(count, 200), 12):
        if at + 12 <= len(profile):
            key, place, size = struct.unpack_from(">4sII", profile, at)
            if place + size <= len(profile):
                found[key] = profile[place : place + size]
    return found


def code_points(profile: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of a profile that says them as code points."""
    tag = tags_of(profile).get(b"cicp", b"")
    return (tag[8], tag[9]) if len(tag) >= 12 else None


def tone(profile: bytes) -> np.ndarray | None:
    """Light for 1025 stored values from 0 to 1, of an RGB or grey profile with one curve for all channels; None otherwise."""
    tags = tags_of(profile)
    curves = {tags[key] for key in (b"rTRC", b"gTRC", b"bTRC", b"kTRC") if key in tags}
    if len(curves) != 1:
        return None
    data, values = curves.pop(), np.linspace(0, 1, 1025)
    if data[:4] == b"curv" and len(data) >= 12:
        count = struct.unpack_from(">I", data, 8)[0]
        if count == 0:
            return values
        if count == 1 and len(data) >= 14:
            return values ** (struct.unpack_from(">H", data, 12)[0] / 256)
        if len(data) >= 12 + 2 * count:
            return np.interp(values, np.linspace(0, 1, count), np.frombuffer(data, ">u2", count, 12) / 65535)
    if data[:4] == b"para" and len(data) >= 16 and struct.unpack_from(">H", data, 8)[0] == 0:
        return values ** (struct.unpack_from(">i", data, 12)[0] / 65536)
    return None
