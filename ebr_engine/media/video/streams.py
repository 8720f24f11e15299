"""What a video file holds beside its pictures, copied untouched: sound, subtitles, attachments, chapters, tags."""

from collections.abc import Iterator
from fractions import Fraction

from ebr_engine.media.holdings.video import data_kind
from ebr_engine.media.video.container import open_container
from ebr_engine.media.video.info import pyav
from ebr_engine.media.video.read import VideoReader

# Written by the muxer or the encoder, or true only of the old pictures.
_STALE_TAGS = (
    *("encoder", "major_brand", "minor_version", "compatible_brands"),
    *("duration", "rotate", "bps", "number_of_", "statistics_", "alpha_mode", "stereo_mode", "timecode"),
)
_OWN_PLACE = ("title", "artist", "album", "date", "comment", "copyright", "creation_time", "genre", "location", "description")
_MOV_PLACE = (*_OWN_PLACE, "make", "model", "keywords")
_MP4_PLACE = (*_OWN_PLACE, "album_artist", "composer", "track", "disc", "lyrics", "grouping", "show", "network", "synopsis")
_DATA = {"GPMF track": ("mp4", "mov"), "KLV track": ("mpegts",)}  # kinds of data streams, and the containers that hold them
_COVERS = {"png": ("cover.png", "image/png"), "mjpeg": ("cover.jpg", "image/jpeg")}  # as Matroska names them
_NO_TEXT = ("avi", "mpeg", "mpegts")  # containers that take subtitles as text and lose them


class StreamCopier:
    """Copies the other streams of a reader's file into an output, packet by packet, in step with the video."""

    def __init__(self, reader: VideoReader, output, *, audio: bool = True, subtitles: bool = True, tags: bool = True) -> None:
        self.warnings: list[str] = []
        self.refused: dict[int, str] = {}  # by the index in the source: why it is left out
        self._origin = reader.origin
        self._output = output
        self._container = open_container(reader.path)
        self._targets: dict[int, object] = {}  # by the index in the source
        self._covers: list = []
        self._last_dts: dict[int, int] = {}
        from av.stream import Disposition

        wanted = {"audio": audio, "subtitle": subtitles, "attachment": output.format.name == "matroska", "video": False}
        for stream in self._container.streams:
            if wanted.get(stream.type) or (tags and stream.type == "data" and self._takes(stream)):
                self._add(stream)
            elif tags and stream.type == "video" and stream.disposition & Disposition.attached_pic:
                self._add_cover(stream)
        if reader.origin and any(s.type == "audio" for s in self._container.streams):
            self._container.seek(int(reader.origin * pyav().time_base))
        self._packets = self._shifted()
        self._next = next(self._packets, None)
        if tags:
            copy_tags(self._container.metadata, output.metadata, output.format.name in ("mp4", "mov"))
        output.set_chapters(list(self._chapters()))

    @property
    def streams(self) -> list[int]:
        """The streams that are copied, by their index in the source."""
        return list(self._targets)

    def close(self) -> None:
        self._container.close()

    def advance(self, until: Fraction | None) -> None:
        """Copy what comes before `until`, seconds on the output's clock; all that is left for None."""
        while self._covers:
            self._output.mux_one(self._covers.pop())
        while self._next is not None and (until is None or self._next.dts * self._next.time_base < until):
            self._output.mux_one(self._next)
            self._next = next(self._packets, None)

    def _takes(self, stream) -> bool:
        """Whether the output has a place for a data stream."""
        return self._output.format.name in _DATA.get(data_kind(stream, self._container), ())

    def _add(self, stream) -> None:
        container = self._output.format.name
        if stream.type == "subtitle" and container in _NO_TEXT and stream.codec_context and stream.codec_context.codec.text_sub:
            self.refused[stream.index] = f"does not fit into {container}"
            return
        try:
            target = self._output.add_stream_from_template(stream)
        except (pyav().error.FFmpegError, ValueError):
            self.refused[stream.index] = f"does not fit into {container}"
            return
        target.disposition = stream.disposition
        copy_tags(stream.metadata, target.metadata)
        if stream.type != "attachment":  # which lies in the header
            self._targets[stream.index] = target

    def _add_cover(self, stream) -> None:
        """A cover picture: a stream of one packet in MP4, an attached file in Matroska."""
        codec = _codec_name(stream)
        packet = next((packet for packet in self._container.demux(stream) if packet.size), None)
        if packet is None or codec not in _COVERS:
            return
        if self._output.format.name == "matroska":
            self._output.add_attachment(*_COVERS[codec], bytes(packet))
        elif self._output.format.name == "mp4":
            target = self._output.add_stream_from_template(stream)
            target.disposition = stream.disposition
            packet.stream, packet.pts, packet.dts = target, 0, 0
            self._covers.append(packet)

    def _shifted(self) -> Iterator:
        """Packets on the output's clock, from its zero on where the source was entered in the middle."""
        if not self._targets:
            return
        try:
            for packet in self._container.demux([self._container.streams[index] for index in self._targets]):
                if packet.dts is None and packet.pts is None:
                    continue
                if self._place(packet):
                    yield packet
        except pyav().error.FFmpegError:
            self.warnings.append("sound or subtitles are damaged and end early")

    def _place(self, packet) -> bool:
        """Set the packet's stream and times; False when it lies before the beginning."""
        index = packet.stream.index
        shift = round(self._origin / packet.time_base)
        pts, dts = (packet.pts if other is None else other for other in (packet.pts, packet.dts))
        pts = (dts if pts is None else pts) - shift
        dts -= shift
        if pts < 0 and (shift or self._output.format.name == "avi"):  # whose clock cannot go below zero
            if packet.stream.type != "subtitle" or pts + (packet.duration or 0) <= 0:
                return False
            packet.duration += pts  # a line that is on when the clip begins
            pts = dts = 0
        last = self._last_dts.get(index)
        if last is not None and dts <= last:
            dts = last + 1
        self._last_dts[index] = dts
        packet.pts, packet.dts = max(pts, dts), dts
        packet.stream = self._targets[index]
        return True

    def _chapters(self) -> Iterator[dict]:
        for chapter in self._container.chapters():
            shift = round(self._origin / chapter["time_base"])
            start, end = chapter["start"] - shift, chapter["end"] - shift
            if end > 0:
                yield {**chapter, "start": max(start, 0), "end": end}


def copy_tags(source: dict[str, str], target: dict[str, str], quicktime: bool = False) -> None:
    """Add the tags of a container or stream to another, but for those that would no longer be true.

    `quicktime`: names in capitals, as Matroska has them, become small as MP4 and QuickTime have them.
    """
    for key, value in source.items():
        if not key.lower().lstrip("_").startswith(_STALE_TAGS) and not value.startswith(("Lavf", "Lavc")):
            small = key.lower().replace("iso6709", "ISO6709") if quicktime and key.isupper() else key
            target[small] = value


def needs_keys(tags: dict[str, str], container: str) -> bool:
    """Whether MP4 or QuickTime has no place of its own for some of the tags, so that all are written with their names."""
    places = _MOV_PLACE if container == "mov" else _MP4_PLACE
    kept: dict[str, str] = {}
    copy_tags(tags, kept, quicktime=True)
    return any(key.partition("-")[0] not in places for key in kept)


def _codec_name(stream) -> str:
    return stream.codec_context.name if stream.codec_context else "unknown"
