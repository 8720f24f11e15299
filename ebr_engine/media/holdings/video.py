"""What a clip holds beside its frames, by its container, its streams and its first packets; nothing is decoded."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebr_engine.media.holdings import matroska
from ebr_engine.media.holdings.boxes import XMP, Box, boxes, entry_kinds, outer_boxes, read_header, read_xmp, tracks
from ebr_engine.media.holdings.coded import group_timecode, header_messages, messages
from ebr_engine.media.holdings.dolby import parse_record
from ebr_engine.media.holdings.types import Holding

PACKETS, BYTES = 16, 4_000_000  # of the first video that are looked at
_STREAM_TAGS = ("title", "stereo_mode", "creation_time", "_statistics")  # that have a place of their own
COMMON_TAGS = ("title", "artist", "album", "comment", "copyright", "date", "genre")
PHONE = ("com.", "make", "model", "location", "samsung", "xiaomi", "android")  # how a phone's tags begin
_SPHERICAL = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")
_IN_ENTRY = {  # boxes of a video's sample entry: kind of holding
    **{b"sv3d": "spherical", b"st3d": "stereo view", b"vexu": "second layer", b"lhvC": "second layer", b"clap": "cropping"},
    **{b"mdcv": "mastering display", b"SmDm": "mastering display", b"clli": "light level"},
    **{b"CoLL": "light level", b"amve": "ambient light", b"lvcC": "enhancement layer"},
}
_READ_TAGS = (  # user data that FFmpeg makes tags of
    *(b"meta", b"loci", b"name", b"titl", b"auth", b"cprt", b"dscp", b"gnre", b"albm", b"perf", b"yrrc"),
    *(b"chpl", b"kywd", b"XMP_"),
)
_STALE_TAGS = ("encoder", "major_brand", "minor_version", "compatible_brands", "handler_name", "vendor_id", "duration", "bps")
_STALE_TAGS += ("number_of_", "statistics_", "language", "alpha_mode", "rotate", "timecode", "creation_time", "software")


def video_inventory(path: Path, container: Any = None, found: Mapping[str, int] = MappingProxyType({})) -> list[Holding]:
    """The holdings of a clip: of its container's tags, its streams, its boxes or elements, and its first pictures.

    For who reads the clip anyway, `container` is the open file, and `found` what a `Watch` has seen in its packets; then it
    is not opened again. MediaError for what is no video.
    """
    from ebr_engine.media.video.container import open_container

    if container is not None:
        return _merged([*_own(path), *_streams(container), *_in_packets(found, container.streams.video[0])])
    with open_container(path) as opened:
        watch = Watch(opened.streams.video[0]) if opened.streams.video else None
        return _merged([*_own(path), *_streams(opened), *(_in_packets(watch.all(opened), watch.stream) if watch else [])])


class Watch:
    """Looks at the first packets of a stream for messages between pictures; `found` is their kinds and sizes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.found: dict[str, int] = {}
        self.timecode: str | None = None  # of the first picture of MPEG-1 and MPEG-2
        context = stream.codec_context
        self._codec = "" if context is None else "av1" if context.name == "libdav1d" else context.name
        self._extradata = (context.extradata or b"") if context is not None else b""
        self._packets, self._bytes = PACKETS, BYTES
        for kind, size in header_messages(self._codec, self._extradata):
            self.found.setdefault(kind, size)

    def see(self, packet: Any) -> bool:
        """Look at one more packet; whether it is worth while to look at another."""
        if self._packets <= 0 or self._bytes <= 0:
            return False
        self._packets, self._bytes = self._packets - 1, self._bytes - packet.size
        if self._codec in ("mpeg1video", "mpeg2video") and self._packets == PACKETS - 1:
            self.timecode = group_timecode(bytes(packet))
            if self.timecode:
                self.found["timecode message"] = 4
        if packet.has_sidedata("matroska_block_additional"):
            self.found.setdefault("alpha", 0)
        for kind, size in messages(self._codec, bytes(packet), self._extradata):
            self.found.setdefault(kind, size)
        return True

    def all(self, container: Any) -> Mapping[str, int]:
        """What the first packets hold."""
        with suppress(OSError):  # FFmpeg's errors are; whoever reads the clip tells of them
            for packet in container.demux(self.stream):
                if not self.see(packet):
                    break
        return self.found


def first_timecode(path: Path) -> str | None:
    """The timecode that the first picture of an MPEG-1 or MPEG-2 clip holds; None without one."""
    from ebr_engine.media.video.container import open_container

    with open_container(path) as opened:
        watch = Watch(opened.streams.video[0])
        with suppress(OSError):
            watch.see(next(opened.demux(watch.stream)))
        return watch.timecode


def _merged(found: Iterable[Holding]) -> list[Holding]:
    """Each kind once where it was found more than once by different ways: the first, which is the container's own word."""
    once: dict[tuple, Holding] = {}
    tracks_too = ("attachment", "sound", "subtitles", "data track", "KLV track", "GPMF track", "second video", "cover picture")
    repeated = (*tracks_too, "vendor data")
    for holding in found:
        once.setdefault((holding.kind, holding.where if holding.kind in repeated else ""), holding)
    return list(once.values())


def _own(path: Path) -> Iterator[Holding]:
    """By our own readers: what FFmpeg does not hand on."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        yield from _matroska(path)
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        yield from _movie(path)


def _movie(path: Path) -> Iterator[Holding]:
    header = read_header(path)
    if header is None:
        return
    videos = [paths for kind, paths in tracks(header) if kind == b"vide"]
    delay = _delay(header, videos[0]) if videos else 0
    for path_of in videos[0] if videos else []:
        box, within = path_of[-1], [each.kind for each in path_of]
        size = box.end - box.start
        where = "/".join(kind.decode("latin-1") for kind in within[-2:])
        if within[-2:-1] == [b"edts"] and box.kind == b"elst" and _cuts(header[box.body : box.end], delay):
            yield Holding("edit list", where, size=size)
        elif b"stsd" in within and box.kind in (b"dvcC", b"dvvC", b"dvwC"):
            record = parse_record(header[box.body : box.end])
            yield Holding("Dolby Vision", where, f"{record}, base layer {record.base}" if record else "damaged", size)
        elif b"stsd" in within and box.kind == b"colr" and header[box.body : box.body + 4] in (b"prof", b"rICC"):
            yield Holding("icc", where, size=size)
        elif len(within) > 2 and within[-3] == b"stsd" and box.kind in _IN_ENTRY:
            yield Holding(_IN_ENTRY[box.kind], where, size=size)
        elif box.kind == b"uuid" and header[box.body : box.body + 16] == _SPHERICAL:
            yield Holding("spherical", where, "as XML", size)
    for box in boxes(header):
        if box.kind == b"udta":
            yield from _vendor(header, box)
        elif box.kind in (b"uuid", b"meta") and not _known(header, box):
            yield Holding("vendor data", f"moov/{box.kind.decode()}", size=box.end - box.start)
    if (packet := read_xmp(path)) is not None:
        yield Holding("xmp", "uuid", size=len(packet))
    with open(path, "rb") as file:
        for kind, start, length in outer_boxes(file):
            file.seek(start)
            if kind == b"uuid" and length > 16 and (name := file.read(16)) not in (XMP, _SPHERICAL):
                yield Holding("vendor data", f"uuid {name.hex()}", size=length)


def _vendor(header: bytes, udta: Box) -> Iterator[Holding]:
    """User data in a form of its maker's own, which FFmpeg reads no tag from."""
    for box in boxes(header, udta.body, udta.end):
        name = box.kind.decode("latin-1")
        if box.kind[:1] != b"\xa9" and box.kind not in _READ_TAGS and box.end - box.body > 4:
            yield Holding("vendor data", f"udta/{name}", name, box.end - box.start)


def _known(header: bytes, box: Box) -> bool:
    """Whether a box of the header is a form of tags that FFmpeg reads."""
    if box.kind == b"uuid":
        return header[box.body : box.body + 16] in (XMP, _SPHERICAL)
    at = header.find(b"hdlr", box.body, box.end)
    return at >= 0 and header[at + 12 : at + 16] in (b"mdta", b"mdir")


def _delay(header: bytes, paths: Iterable[tuple[Box, ...]]) -> int:
    """The ticks by which a track's first picture is shown after it is decoded."""
    body = next((path[-1].body for path in paths if path[-1].kind == b"ctts"), None)
    return 0 if body is None else int.from_bytes(header[body + 12 : body + 16], "big", signed=True)


def _cuts(body: bytes, delay: int) -> bool:
    """Whether an edit list does more than to begin at the first picture: it waits, leaves out or repeats."""
    count, wide = int.from_bytes(body[4:8], "big"), body[:1] == b"\x01"
    at = 16 if wide else 12
    first = int.from_bytes(body[at : at + (8 if wide else 4)], "big", signed=True)
    return count > 1 or first not in (0, delay)


def _matroska(path: Path) -> Iterator[Holding]:
    mapping = 0
    for element in matroska.read_tracks(path):
        where, size = f"track {element.track + 1}", len(element.data)
        if element.name == "projection" and size > 4:
            yield Holding("spherical", f"{where}: Projection", size=size)
        elif element.name == "stereo mode" and element.number:
            yield Holding("stereo view", f"{where}: StereoMode", size=size)
        elif element.name == "alpha mode" and element.number:
            yield Holding("alpha", f"{where}: AlphaMode", size=size)
        elif element.name == "mastering":
            yield Holding("mastering display", f"{where}: MasteringMetadata", size=size)
        elif element.name == "content light":
            yield Holding("light level", f"{where}: Colour", size=size)
        elif element.name == "crop" and element.number:
            yield Holding("cropping", f"{where}: PixelCrop", size=size)
        elif element.name == "mapping type":
            mapping = element.number
        elif element.name == "mapping data" and mapping.to_bytes(8, "big")[4:6] == b"dv":
            record = parse_record(element.data)
            yield Holding("Dolby Vision", where, f"{record}, base layer {record.base}" if record else "damaged", size)


def _streams(container: Any) -> Iterator[Holding]:
    """Tags, chapters and streams, as FFmpeg tells them."""
    from av.stream import Disposition

    tags = {key: value for key, value in container.metadata.items() if not key.lower().startswith(_STALE_TAGS)}
    for kind, names in _sorted_tags(tags).items():
        yield Holding(kind, "container", ", ".join(sorted(names)), sum(len(tags[name]) for name in names))
    for key, value in container.metadata.items():
        if key.lower() in ("creation_time", "timecode"):
            yield Holding("creation time" if key.lower() == "creation_time" else "timecode", "container", value)
    if chapters := container.chapters():
        yield Holding("chapters", "container", f"{len(chapters)}")
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    for stream in container.streams:
        where = f"stream {stream.index}"
        codec = stream.codec_context.name if stream.codec_context else "unknown"
        if stream.type == "video" and stream.disposition & Disposition.attached_pic:
            yield Holding("cover picture", where, codec)
        elif stream.type == "video" and stream is not videos[0]:
            yield Holding("second video", where, codec)
        elif stream.type == "video":
            yield from _video(stream, where)
        elif stream.type == "audio":
            yield Holding("sound", where, codec)
        elif stream.type == "subtitle":
            yield Holding("subtitles", where, codec)
        elif stream.type == "attachment":
            yield Holding("attachment", where, stream.metadata.get("filename", ""), len(stream.data or b""))
        elif stream.type == "data" and "timecode" in stream.metadata:
            yield Holding("timecode", where, stream.metadata["timecode"])
        elif stream.type != "data" or not (stream.name == "bin_data" and chapters):  # QuickTime's chapters
            name = stream.metadata.get("handler_name") or getattr(stream, "name", None) or stream.type
            yield Holding(data_kind(stream, container), where, name.strip("\b\0 "))


def data_kind(stream: Any, container: Any) -> str:
    """The kind of a data stream: those that some containers take, or any other."""
    if stream.type == "data" and stream.name == "klv":
        return "KLV track"
    if stream.type == "data" and stream.name == "bin_data" and "mov" in container.format.name:
        entries = entry_kinds(Path(container.name.removeprefix("file:")))
        if entries[stream.index : stream.index + 1] == [b"gpmd"]:
            return "GPMF track"
    return "data track"


def _video(stream: Any, where: str) -> Iterator[Holding]:
    context = stream.codec_context
    if any("alpha" in key.lower() for key in stream.metadata) or (
        context is not None and context.format is not None and any(c.is_alpha for c in context.format.components)
    ):
        yield Holding("alpha", where)
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        yield Holding("pixel aspect", where, f"{aspect.numerator}:{aspect.denominator}")
    if context is not None and (context.color_primaries, context.color_trc) not in ((2, 2), (1, 1)):
        yield Holding("colour tags", where, f"{context.color_primaries}/{context.color_trc}/{context.colorspace}")
    rate, base = stream.average_rate, stream.base_rate
    if rate and base and abs(base / rate - 1) > Fraction(1, 100):
        yield Holding("frame times", where, "the rate varies")
    own = [key for key in stream.metadata if not key.lower().startswith((*_STALE_TAGS, *_STREAM_TAGS))]
    if own:
        yield Holding("stream tags", where, ", ".join(sorted(own)))
    if timecode := next((v for k, v in stream.metadata.items() if k.lower() == "timecode"), None):
        yield Holding("timecode", where, timecode)


def _in_packets(found: Mapping[str, int], stream: Any) -> list[Holding]:
    # The second layer of a stream with alpha is its alpha.
    kinds = [kind for kind in found if not (kind == "second layer" and "alpha" in found)]
    return [Holding(kind, f"stream {stream.index}: messages", size=found[kind]) for kind in kinds]


def _sorted_tags(tags: dict[str, str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in tags:
        small = name.lower().partition("-")[0]
        kind = "tags" if small in COMMON_TAGS else "phone tags" if small.startswith(PHONE) else "own tags"
        kinds.setdefault(kind, []).append(name)
    return kinds
