"""Clips that hold one thing beside their frames, made by PyAV and by writers of bytes that share nothing with the engine's."""

import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

SIZE = (48, 64)
RATE = 25
CAPTION = b"\xfc\x94\x20"  # CEA-608: resume caption loading
UNREGISTERED = bytes(range(16)) + b"a camera's own words"
X265 = "log-level=error:pools=1:frame-threads=1"
LIGHT = X265 + ":master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
HDR = {"color_primaries": 9, "color_trc": 16, "colorspace": 9, "color_range": 1}
PHONE = {"com.apple.quicktime.make": "ACME", "com.apple.quicktime.location.ISO6709": "+10.0000+020.0000/"}
PHONE["com.apple.quicktime.creationdate"] = "2020-01-02T03:04:05+0200"
ATSC = b"\xb5\x00\x31"


def picture(index, height=SIZE[0], width=SIZE[1]):
    y, x = np.mgrid[:height, :width]
    made = np.stack([x * 200 // width + 30, y * 200 // height + 30, np.full_like(x, 90)], axis=-1)
    made[10:18, 4 + 2 * index : 12 + 2 * index] = 230
    return made.astype(np.uint8)


def write_clip(
    path,
    codec="libx264",
    *,
    frames=5,
    pix_fmt="yuv420p",
    options=None,
    context=None,
    tags=None,
    stream_tags=None,
    settings=None,
    ticks=None,
    inserted=b"",
    appended=b"",
    alpha=False,
    before=None,
    other=None,
):
    """A small clip, with bytes `inserted` in front of each picture's slices and `appended` behind them.

    `before(output)` adds other streams, `other(output, what it gave)` their packets.
    """
    import av

    with av.open(str(path), "w", container_options={"fflags": "+bitexact", **(settings or {})}) as output:
        output.metadata.update(tags or {})
        stream = output.add_stream(codec, rate=RATE, options=options or ({"x265-params": X265} if codec == "libx265" else {}))
        stream.height, stream.width, stream.pix_fmt = *SIZE, pix_fmt
        stream.metadata.update(stream_tags or {})
        stream.codec_context.max_b_frames = 0
        if codec == "mpeg2video":
            stream.codec_context.options = {"b": "2M", **(options or {})}
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        added = before(output) if before else None
        output.start_encoding()
        if other:
            other(output, added)
        for index in range(frames):
            rgb = picture(index)
            if alpha:
                ramp = np.broadcast_to(np.arange(SIZE[1], dtype=np.uint8) * 4, SIZE)[..., None]
                frame = av.VideoFrame.from_ndarray(np.concatenate([rgb, ramp], axis=2), "rgba")
            else:
                frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
            frame = frame.reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = (ticks or range(frames))[index], Fraction(1, RATE)
            for packet in stream.encode(frame):
                output.mux_one(_with(packet, inserted, appended))
        for packet in stream.encode(None):
            output.mux_one(_with(packet, inserted, appended))
    return path


def _with(packet, inserted, appended):
    """The packet with bytes in front of its first slice (of H.264, HEVC or MPEG-2), and at its end."""
    import av

    if not (inserted or appended):
        return packet
    data = bytes(packet)
    codec = packet.stream.codec_context.codec.canonical_name
    first = {"h264": lambda b: 1 <= b & 31 <= 5, "hevc": lambda b: b >> 1 & 63 < 32, "mpeg2video": lambda b: 1 <= b <= 0xAF}[
        codec
    ]
    at = next(m.start() for m in re.finditer(rb"\x00\x00\x01", data) if first(data[m.end()]))
    if codec != "mpeg2video" and at and data[at - 1] == 0:
        at -= 1
    made = av.Packet(data[:at] + inserted + data[at:] + appended)
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe", "stream"):
        setattr(made, name, getattr(packet, name))
    return made


def sei(number, payload, hevc=False):
    """An SEI message as a unit with a start code."""
    body, zeros = bytearray(), 0
    for byte in bytes([number, len(payload)]) + payload + b"\x80":
        if zeros == 2 and byte < 4:
            body.append(3)
            zeros = 0
        body.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + (b"\x4e\x01" if hevc else b"\x06") + bytes(body)


def box(kind, *content):
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _find(data, path, start, end):
    """The positions of a path of boxes in the first track that has it."""
    positions = []
    for kind in path:
        while start < end and data[start + 4 : start + 8] != kind:
            start += struct.unpack_from(">I", data, start)[0]
        assert start < end, kind
        positions.append(start)
        end = start + struct.unpack_from(">I", data, start)[0]
        start += 8 + {b"stsd": 8, b"avc1": 78, b"hvc1": 78, b"hev1": 78}.get(kind, 0)
    return positions


def add_box(path, where, added):
    """Put a box at the end of the one that a path such as (b"moov", b"trak") leads to; b"entry" is the video's sample entry."""
    data = bytearray(Path(path).read_bytes())
    entry = next(kind for kind in (b"avc1", b"hvc1", b"hev1") if kind in data)
    way = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", entry) if where == "entry" else where
    positions = _find(data, way, 0, len(data))
    end = positions[-1] + struct.unpack_from(">I", data, positions[-1])[0]
    for position in positions:
        struct.pack_into(">I", data, position, struct.unpack_from(">I", data, position)[0] + len(added))
    data[end:end] = added
    Path(path).write_bytes(data)
    return path


def _bits(*fields):
    """Bytes of (value, width) fields, filled up with zeros."""
    text = "".join(f"{value:0{width}b}" for value, width in fields)
    return int(text.ljust(-len(text) % 8 + len(text), "0"), 2).to_bytes((len(text) + 7) // 8, "big")


TIMECODE = _bits(
    (1, 2), (1, 1), (0, 1), (0, 5), (1, 1), (0, 1), (0, 1), (4, 9), (3, 6), (2, 6), (1, 5), (0, 5), (1, 1)
)  # 01:02:03:04
AFD = ATSC + b"DTG1\x41\xfa"
CC = ATSC + b"GA94\x03\x41\xff" + CAPTION + b"\xff"
SPHERICAL_XML = bytes.fromhex("ffcc8263f8554a938814587a02521fdd") + b'<?xml version="1.0"?><rdf:SphericalVideo/>'
XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
SV3D = box(b"sv3d", box(b"svhd", bytes(4), b"x\0"), box(b"proj", box(b"prhd", bytes(16)), box(b"equi", bytes(20))))
ST3D = box(b"st3d", bytes(4), b"\1")


def dolby_record(profile, compatibility):
    return box(b"dvvC", b"\1\0", struct.pack(">H", profile << 9 | 1 << 3 | 0b101), bytes([compatibility << 4]), bytes(19))


def _chapters(output):
    output.set_chapters([{"id": 0, "start": 0, "end": 100, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}}])


def _sound(output):
    return output.add_stream("aac", rate=48000, layout="mono")


def _tone(output, stream):
    import av

    for index in range(9):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 1024 * index, Fraction(1, 48000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _klv(output):
    stream = output.add_data_stream("klv")
    stream.time_base = Fraction(1, 90000)
    return stream


def _klv_packets(output, stream):
    import av

    packet = av.Packet(b"\x06\x0e+4\x02\x0b\x01\x01\x0e\x01\x03\x01\x01\0\0\0\x04abcd")
    packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 90000)
    output.mux(packet)


def _cover(output):
    from av.stream import Disposition

    stream = output.add_stream("png", rate=1)
    stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
    stream.disposition = Disposition.attached_pic
    return stream


def _cover_packets(output, stream):
    import av

    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 90, np.uint8), "rgb24")
    frame.pts = 0
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _second(output):
    stream = output.add_stream("mpeg4", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    return stream


def _second_packets(output, stream):
    import av

    frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), "rgb24").reformat(format="yuv420p")
    frame.pts, frame.time_base = 0, Fraction(1, RATE)
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _early(folder):
    """A clip of nine frames of which an edit list shows the last five, from the middle of a group on."""
    import av

    source = write_clip(folder / "long.mp4", frames=9, options={"g": "9"})
    with (
        av.open(str(source)) as long,
        av.open(str(folder / "edit.mp4"), "w", container_options={"fflags": "+bitexact"}) as output,
    ):
        stream = output.add_stream_from_template(long.streams.video[0], opaque=True)
        for packet in long.demux(video=0):
            if packet.dts is not None:
                shift = round(4 / RATE / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                output.mux(packet)
    return folder / "edit.mp4"


X264_TOO = {"libx264": {}}
CLIPS = {  # kind of holding: how to make a clip in a folder that holds it
    "tags": lambda f: write_clip(f / "a.mp4", tags={"title": "A film", "artist": "someone", "comment": "so so"}),
    "own tags": lambda f: write_clip(f / "a.mkv", tags={"MY_TAG": "mine"}),
    "stream tags": lambda f: write_clip(f / "a.mkv", stream_tags={"LENS": "50 mm"}),
    "phone tags": lambda f: write_clip(f / "a.mov", tags=PHONE, settings={"movflags": "+use_metadata_tags"}),
    "creation time": lambda f: write_clip(f / "a.mp4", tags={"creation_time": "2020-01-02T01:04:05Z"}),
    "chapters": lambda f: write_clip(f / "a.mkv", before=_chapters),
    "attachment": lambda f: write_clip(
        f / "a.mkv", before=lambda o: o.add_attachment("font.ttf", "application/x-truetype-font", b"letters")
    ),
    "sound": lambda f: write_clip(f / "a.mp4", before=_sound, other=_tone),
    "cover picture": lambda f: write_clip(f / "a.mp4", before=_cover, other=_cover_packets),
    "second video": lambda f: write_clip(f / "a.mkv", before=_second, other=_second_packets),
    "KLV track": lambda f: write_clip(f / "a.ts", before=_klv, other=_klv_packets),
    "vendor data": lambda f: add_box(write_clip(f / "a.mp4"), (b"moov",), box(b"udta", box(b"CAME", b"a camera's number"))),
    "xmp": lambda f: (path := write_clip(f / "a.mp4")).write_bytes(path.read_bytes() + box(b"uuid", XMP)) and path,
    "timecode": lambda f: write_clip(f / "a.mov", stream_tags={"timecode": "01:02:03:04"}),
    "timecode message": lambda f: write_clip(f / "a.mp4", "libx265", inserted=sei(136, TIMECODE, hevc=True)),
    "captions": lambda f: write_clip(f / "a.mp4", inserted=sei(4, CC)),
    "active format": lambda f: write_clip(f / "a.mp4", inserted=sei(4, AFD)),
    "user data": lambda f: write_clip(f / "a.mp4", inserted=sei(5, UNREGISTERED)),
    "mastering display": lambda f: write_clip(
        f / "a.mp4", "libx265", pix_fmt="yuv420p10le", context=HDR, options={"x265-params": LIGHT}
    ),
    "light level": lambda f: write_clip(
        f / "a.mkv", "libx265", pix_fmt="yuv420p10le", context=HDR, options={"x265-params": LIGHT}
    ),
    "ambient light": lambda f: add_box(write_clip(f / "a.mp4"), "entry", box(b"amve", bytes.fromhex("0000c3503d134042"))),
    "HDR10+": lambda f: write_clip(f / "a.mp4", "libx265", inserted=sei(4, b"\xb5\0\x3c\0\1\4\1" + bytes(20), hevc=True)),
    "Dolby Vision": lambda f: add_box(
        write_clip(f / "a.mp4", "libx265", pix_fmt="yuv420p10le", context=HDR), "entry", dolby_record(8, 1)
    ),
    "second layer": lambda f: write_clip(f / "a.mp4", "libx265", inserted=b"\0\0\0\1\x02\x09\xd0\x10\x20\x30"),
    "spherical": lambda f: add_box(write_clip(f / "a.mp4"), "entry", SV3D),
    "stereo view": lambda f: add_box(write_clip(f / "a.mp4"), "entry", ST3D),
    "cropping": lambda f: add_box(write_clip(f / "a.mp4"), "entry", box(b"clap", struct.pack(">8I", 60, 1, 40, 1, 0, 1, 0, 1))),
    "pixel aspect": lambda f: write_clip(f / "a.mp4", context={"sample_aspect_ratio": Fraction(4, 3)}),
    "colour tags": lambda f: write_clip(f / "a.mp4", context={"color_primaries": 12, "color_trc": 13, "colorspace": 1}),
    "frame times": lambda f: write_clip(f / "a.mp4", ticks=[0, 1, 5, 6, 9]),
    "edit list": _early,
    "alpha": lambda f: write_clip(f / "a.webm", "libvpx-vp9", pix_fmt="yuva420p", alpha=True),
}
