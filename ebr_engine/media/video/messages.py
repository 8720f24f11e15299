"""Messages that lie in the coded stream between pictures: captions, active format, user data, timecodes.

A decoder hands them over with each frame; here they are put back into what an encoder made, since encoders do not take
them. H.264 and HEVC hold them in SEI messages, MPEG-2 in user data, AV1 in metadata units (ATSC A/53, SCTE 128, ITU-T T.35).
"""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction

from ebr_engine.media.holdings.av1 import units
from ebr_engine.media.holdings.video_fates import MESSAGES

CAPTIONS, ACTIVE_FORMAT, USER_DATA, TIMECODE = "captions", "active format", "user data", "timecode"

Messages = Mapping[str, bytes]  # kind (the second of a kind ends in "#1") → payload as FFmpeg gives it with a frame

_ATSC = b"\xb5\x00\x31"  # country and provider of a T.35 message
_REGISTERED, _UNREGISTERED = 4, 5  # types of SEI message
_ENCODERS = (  # whose messages tell how they were set; they would not be true of another stream
    bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef"),  # x264
    bytes.fromhex("2ca2de09b51747dbbb55a4fe7fc2fc4e"),  # x265
)
_START = re.compile(rb"\x00\x00\x01")


def carries(codec: str, kind: str) -> bool:
    """Whether a stream of a codec (FFmpeg's name of it, not of the encoder) can hold messages of a kind."""
    return codec in MESSAGES.get(kind.partition("#")[0], ())


def messages_of(frame) -> dict[str, bytes]:
    """The messages that came with a decoded av.VideoFrame."""
    from av.sidedata.sidedata import Type

    kinds = {Type.A53_CC: CAPTIONS, Type.AFD: ACTIVE_FORMAT, Type.SEI_UNREGISTERED: USER_DATA, Type.S12M_TIMECODE: TIMECODE}
    found: dict[str, bytes] = {}
    for data in frame.side_data:
        kind = kinds.get(data.type)
        if kind == USER_DATA and (bytes(data)[:16] in _ENCODERS or len(bytes(data)) < 16):
            continue
        if kind is not None:
            again = sum(known.partition("#")[0] == kind for known in found)
            found[f"{kind}#{again}" if again else kind] = bytes(data)
    return found


def timecode_text(payload: bytes) -> str:
    """hh:mm:ss:ff of FFmpeg's SMPTE 12M timecode: four 32-bit numbers, the second the first timecode, in BCD."""
    code = int.from_bytes(payload[4:8], "little")
    frames, seconds, minutes, hours = ((code >> shift) & mask for shift, mask in ((24, 0x3F), (16, 0x7F), (8, 0x7F), (0, 0x3F)))
    drop = ";" if code >> 30 & 1 else ":"
    return f"{hours:02x}:{minutes:02x}:{seconds:02x}{drop}{frames:02x}"


def timecode_after(text: str | None, seconds: Fraction, fps: Fraction) -> str | None:
    """The timecode so many seconds after another one, hh:mm:ss:ff; None where that is none. `;` or `.` counts by dropping."""
    match = re.fullmatch(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d+)", text or "")
    if match is None:
        return None
    rate, drop = round(fps), match[4] != ":"
    dropped = round(rate / 15) if drop else 0  # two of the frame numbers at 30 a second, in nine of ten minutes
    hours, minutes, second, frame = (int(match[i]) for i in (1, 2, 3, 5))
    total = 60 * hours + minutes
    count = (total * 60 + second) * rate + frame - dropped * (total - total // 10) + round(seconds * fps)
    if drop:
        tens, rest = divmod(count, 600 * rate - 9 * dropped)
        count += dropped * (9 * tens + max(0, (rest - dropped) // (60 * rate - dropped)))
    second, frame = divmod(count, rate)
    return f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}{match[4]}{frame:02}"


def insert(packet: bytes, codec: str, messages: Messages) -> bytes:
    """A coded picture with messages in front of its first slice; as it is where it has none or they do not fit in."""
    payloads = [(kind, payload) for kind, payload in sorted(messages.items()) if carries(codec, kind)]
    if not payloads:
        return packet
    if codec == "av1":
        return _insert_units(packet, b"".join(_unit(_t35(kind, payload)) for kind, payload in payloads))
    if codec == "mpeg2video":
        added = b"".join(b"\x00\x00\x01\xb2" + _atsc(kind, payload) for kind, payload in payloads)
        at = next((m.start() for m in _START.finditer(packet) if 1 <= packet[m.end()] <= 0xAF), None)
    else:
        added = b"\x00\x00\x00\x01" + _sei(codec, payloads)
        at = next((start for start, first in _units(packet) if _is_slice(codec, first)), None)
    return packet if at is None else packet[:at] + added + packet[at:]


def _units(packet: bytes) -> Iterator[tuple[int, int]]:
    """Where each unit begins in a stream with start codes, and its first byte."""
    for match in _START.finditer(packet):
        start = match.start() - (match.start() > 0 and packet[match.start() - 1] == 0)
        if match.end() < len(packet):
            yield start, packet[match.end()]


def _is_slice(codec: str, first: int) -> bool:
    return 1 <= first & 31 <= 5 if codec == "h264" else first >> 1 & 63 < 32


def _sei(codec: str, payloads: list[tuple[str, bytes]]) -> bytes:
    body = b""
    for kind, payload in payloads:
        own = kind.partition("#")[0] == USER_DATA
        number, data = (_UNREGISTERED, payload) if own else (_REGISTERED, _t35(kind, payload))
        body += bytes([number, *[255] * (len(data) // 255), len(data) % 255]) + data
    body = re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\x00\x00\x03", body + b"\x80")  # no start code within
    return (b"\x06" if codec == "h264" else b"\x4e\x01") + body


def _t35(kind: str, payload: bytes) -> bytes:
    return _ATSC + _atsc(kind, payload)


def _atsc(kind: str, payload: bytes) -> bytes:
    if kind == ACTIVE_FORMAT:
        return b"DTG1\x41" + bytes([0xF0 | payload[0] & 15])
    count = min(len(payload) // 3, 31)
    return b"GA94\x03" + bytes([0x40 | count, 0xFF]) + payload[: 3 * count] + b"\xff"


def _unit(message: bytes) -> bytes:
    """An AV1 metadata unit of a T.35 message."""
    body = b"\x04" + message + b"\x80"
    return b"\x2a" + _leb128(len(body)) + body


def _insert_units(packet: bytes, added: bytes) -> bytes:
    """Put units before the first one that holds a picture (a frame, or the header of one)."""
    at = next((unit.start for unit in units(packet) if unit.kind in (3, 6)), None)
    return packet if at is None else packet[:at] + added + packet[at:]


def _leb128(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
