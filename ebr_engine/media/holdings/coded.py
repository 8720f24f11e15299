"""What lies in coded pictures beside them: messages of H.264, HEVC, MPEG-2 and AV1, found without decoding."""

import re
from collections.abc import Iterator

from ebr_engine.media.holdings.av1 import units

_START = re.compile(rb"\x00\x00\x01")
_SEI_H264, _SEI_HEVC, _RPU = (6,), (39, 40), 62
_TYPES = {  # of an SEI message: kind of holding
    **{5: "user data", 45: "stereo view", 136: "timecode message", 137: "mastering display", 144: "light level"},
    **{148: "ambient light", 165: "alpha"},
}
_T35 = (  # how a T.35 message begins: kind of holding
    (b"\xb5\x00\x31GA94\x03", "captions"),
    (b"\xb5\x00\x31DTG1", "active format"),
    (b"\xb5\x00\x3c\x00\x01\x04", "HDR10+"),
    (b"\x26\x00\x04\x00\x05", "HDR Vivid"),
    (b"\xb4\x00\x50", "enhancement layer"),
)
_ENCODERS = (bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef"), bytes.fromhex("2ca2de09b51747dbbb55a4fe7fc2fc4e"))
MOST_MESSAGES = 256  # a packet


def messages(codec: str, packet: bytes, extradata: bytes = b"") -> Iterator[tuple[str, int]]:
    """(kind of holding, bytes) of the messages in a packet of a stream; nothing for other codecs and damaged ones."""
    if codec in ("h264", "hevc"):
        for unit in _units(codec, packet, extradata):
            yield from _in_unit(codec, unit)
    elif codec == "mpeg2video":
        for match in re.finditer(rb"\x00\x00\x01\xb2(GA94\x03|DTG1)", packet):
            yield ("captions" if match[1][0] == 0x47 else "active format"), 0
    elif codec == "av1":
        yield from _in_av1(packet)


def group_timecode(packet: bytes) -> str | None:
    """The timecode of the first group of pictures in a packet of MPEG-1 or MPEG-2; None where it counts from zero, or not."""
    at = packet.find(b"\0\0\1\xb8")
    if at < 0 or at + 8 > len(packet):
        return None
    code = int.from_bytes(packet[at + 4 : at + 8], "big") >> 7
    hours, minutes, seconds, pictures = code >> 19 & 31, code >> 13 & 63, code >> 6 & 63, code & 63
    if not (hours or minutes or seconds or pictures):
        return None
    return f"{hours:02}:{minutes:02}:{seconds:02}{';' if code >> 24 & 1 else ':'}{pictures:02}"


def header_messages(codec: str, extradata: bytes) -> Iterator[tuple[str, int]]:
    """(kind of holding, bytes) of the messages in the header of an HEVC stream in MP4 or Matroska (`hvcC`)."""
    if codec != "hevc" or extradata[:1] != b"\x01" or len(extradata) < 23:
        return
    at = 23
    for _ in range(extradata[22]):  # arrays of units of one kind
        count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size, at = int.from_bytes(extradata[at : at + 2], "big"), at + 2
            if at >= len(extradata):
                return
            yield from _in_unit(codec, extradata[at : at + size])
            at += size


def _units(codec: str, packet: bytes, extradata: bytes) -> Iterator[bytes]:
    """Units of H.264 or HEVC: behind start codes, or behind their lengths where the stream's header says so."""
    if extradata[:1] != b"\x01":
        ends = [match.start() for match in _START.finditer(packet)]
        for start, end in zip(ends, [*ends[1:], len(packet)]):
            yield packet[start + 3 : end]
        return
    at = 4 if codec == "h264" else 21
    length = (extradata[at] & 3) + 1 if len(extradata) > at else 4
    at = 0
    while at + length < len(packet):
        size = int.from_bytes(packet[at : at + length], "big")
        yield packet[at + length : at + length + size]
        at += length + size


def _in_unit(codec: str, unit: bytes) -> Iterator[tuple[str, int]]:
    if len(unit) < 3:
        return
    number = unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63
    if codec == "hevc" and number == _RPU:
        yield "Dolby Vision", len(unit)
    if codec == "hevc" and (unit[0] & 1) << 5 | unit[1] >> 3 and number < 32:
        yield "second layer", len(unit)
    if number not in (_SEI_H264 if codec == "h264" else _SEI_HEVC):
        return
    data = unit[1 if codec == "h264" else 2 :].replace(b"\x00\x00\x03", b"\x00\x00")
    at = 0
    for _ in range(MOST_MESSAGES):
        values = []
        for _ in range(2):  # the type, the size: each a run of 255 and a last byte
            value = 0
            while at < len(data) and data[at] == 255:
                value, at = value + 255, at + 1
            if at >= len(data):
                return
            values.append(value + data[at])
            at += 1
        kind, size = values
        yield from _message(kind, data[at : at + size])
        at += size
        if at >= len(data) - 1:
            return


def _message(number: int, data: bytes) -> Iterator[tuple[str, int]]:
    if number == 4:
        yield from _t35(data)
    elif number == 5 and data[:16] in _ENCODERS:
        return
    elif number in _TYPES:
        yield _TYPES[number], len(data)


def _t35(data: bytes) -> Iterator[tuple[str, int]]:
    kind = next((kind for head, kind in _T35 if data.startswith(head)), "registered message")
    yield kind, len(data)


def _in_av1(packet: bytes) -> Iterator[tuple[str, int]]:
    for unit in units(packet):
        body = packet[unit.body : unit.body + unit.size]
        if unit.kind == 5 and body:
            if body[0] == 4:
                yield from _t35(body[1:])
            elif body[0] in (1, 2):
                yield ("light level", "mastering display")[body[0] - 1], unit.size
