"""Frames of a video file: upright RGB in float32 with exact timestamps, decoded one at a time."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings.dolby import DolbyVision, dolby_vision
from ebr_engine.media.holdings.video import Watch, first_timecode, video_inventory
from ebr_engine.media.images import MAX_MEGAPIXELS
from ebr_engine.media.video.colour import RGB, alpha_of, layout_of, matrix_for, to_rgb
from ebr_engine.media.video.container import decoder_for, duration_of, first_video, frames_of, open_container
from ebr_engine.media.video.info import Colour, Frame, VideoInfo, pyav
from ebr_engine.media.video.light import light_of
from ebr_engine.media.video.messages import TIMECODE, messages_of, timecode_after, timecode_text
from ebr_engine.media.video.views import View, view_of

_CENTRED_CHROMA = ("mjpeg", "mjpegb", "mpeg1video")  # PyAV does not tell the siting; these have it by standard
_ANIMATIONS = ("gif", "apng", "webp_anim")
_PQ, _HLG, _UNSPECIFIED = 16, 18, 2
_FULL = 2
_TOLERANCE = Fraction(1, 2000)  # seconds: containers round a file's beginning, and people write 0.33
_SEEK_MARGINS = (0, 5, 30)  # seconds: where a container has no index, seeking may land too late


class VideoReader:
    """Iterates once over the frames of a video file; what `open_video` returns.

    `info` describes the frames as they come; `warnings` grows while reading. `origin` is the moment of the source, in
    seconds, that the frames' timestamps are counted from; `exhausted` tells whether all of its frames have been read;
    `tags` are the video stream's own, `holdings` all that the file holds beside its frames.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: float | None = None,
        limit: int | None = None,
        deinterlace: bool = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        if start is not None and not (math.isfinite(start) and start >= 0):
            raise MediaError(f"{path}: the start must be a number of seconds from 0, not {start}")
        if limit is not None and limit < 1:
            raise MediaError(f"{path}: the number of frames must be at least 1, not {limit}")
        self.path = path
        self.warnings: list[str] = []
        self.exhausted = False
        self._limit = limit
        self._broken = self._damaged = self._interlaced = 0
        self._max_megapixels = max_megapixels
        self._enter()
        try:
            self._open(start, deinterlace)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        """Frames in the order they are shown in. MediaError if their size changes on the way."""
        count, last, jump = 0, None, 0
        for decoded in self._decoded:
            if (decoded.width, decoded.height) != self._stored_size:
                was, now = ("{} x {}".format(*size) for size in (self._stored_size, (decoded.width, decoded.height)))
                raise MediaError(f"{self.path}: the picture changes from {was} to {now} pixels at frame {count + 1}")
            ticks = self._ticks(decoded)
            following = 0 if last is None else last + self._step
            ticks = following if ticks is None else ticks - self._origin_ticks + jump
            if last is not None and ticks <= last:
                if (last - ticks) * self.info.time_base > 1:  # a clock that was set back, as in cut broadcasts
                    jump += following - ticks
                    ticks = following
                    self.warnings.append(f"{self.path}: its clock jumps back at frame {count + 1}; sound may be off there")
                else:
                    ticks = last + 1
            last, count = ticks, count + 1
            duration = round(decoded.duration * decoded.time_base / self.info.time_base) if decoded.duration else None
            alpha = self._upright(alpha_of(decoded)) if self._alpha else None
            pixels = self._upright(to_rgb(decoded, self.info.colour, self._centred))
            yield Frame(pixels, ticks, self.info.time_base, duration, alpha=alpha, messages=messages_of(decoded))
            if count == self._limit:
                break
        else:
            self.exhausted = True
        self._report(count)

    def _enter(self) -> None:
        """Open the file at its beginning."""
        self._container = open_container(self.path)
        try:
            self._stream = first_video(self.path, self._container)
            self._check_size(self._stream.codec_context)
        except BaseException:
            self.close()
            raise
        self._decoder = decoder_for(self._stream)
        self._watch = Watch(self._stream)
        self._decoder.thread_type = "AUTO"
        self._decoder.options = {"max_pixels": str(int(self._max_megapixels * 1e6))}  # where sizes change later

    def _check_size(self, picture) -> None:
        megapixels = picture.width * picture.height / 1e6
        if megapixels > self._max_megapixels:
            limit = f"{megapixels:.0f} megapixels, more than the limit of {self._max_megapixels:g}"
            raise MediaError(f"{self.path}: {picture.width} x {picture.height} pixels are {limit}")

    def _open(self, start: float | None, deinterlace: bool) -> None:
        self._dolby = self._base_layer()
        begin = Fraction(max(0, self._container.start_time or 0), pyav().time_base)
        frames = self._decode() if start is None else self._decode_from(begin + Fraction(start))
        first = next(frames, None)
        if first is None:
            if start:
                raise MediaError(f"{self.path}: has no frame at or after {start:g} s")
            raise MediaError(f"{self.path}: no frame of it can be decoded; the data is damaged or cut short")
        self._check_size(first)
        self.holdings = video_inventory(self.path, self._container, self._watch.found)
        self._check_base_layer()
        stream = self._stream
        if first.interlaced_frame and not deinterlace:
            raise MediaError(f"{self.path}: is interlaced; deinterlace it by --deinterlace")
        frames = chain([first], frames)
        if deinterlace:
            frames = _deinterlaced(frames, first, stream.time_base)
        self.tags = dict(stream.metadata)
        self.container_tags = dict(self._container.metadata)
        self.view: View = view_of(first)
        self._decoded = frames
        self._deinterlace = deinterlace
        self._stored_size = (first.width, first.height)
        self._swap, self._flip_rows, self._flip_columns = _orientation(first)
        self._alpha = layout_of(first.format).alpha
        self._centred = stream.codec_context.name in _CENTRED_CHROMA
        begin = begin if start is None else (self._ticks(first) or 0) * stream.time_base
        self._origin_ticks = math.floor(begin / stream.time_base)
        self.origin = self._origin_ticks * stream.time_base
        self.info = self._describe(first, start)
        entered = start is not None and stream.codec_context.name in ("mpeg1video", "mpeg2video")
        self._group_timecode = first_timecode(self.path) if entered else self._watch.timecode
        self.timecode = self._timecode(first)
        self._step = max(1, round(1 / (self.info.fps * self.info.time_base)))
        if self.info.colour.transfer in (_PQ, _HLG):
            self.warnings.append(f"{self.path}: is HDR; its values are restored as they are")

    def _timecode(self, first) -> str | None:
        """That of the first frame that is read: the tags' own, which count from the beginning, or a message's."""
        if (message := messages_of(first).get(TIMECODE)) is not None:
            return timecode_text(message)
        tags = {key.lower(): value for key, value in (self.container_tags | self.tags).items()}
        begin = Fraction(max(0, self._container.start_time or 0), pyav().time_base)
        text = tags.get("timecode") or self._group_timecode
        return timecode_after(text, self.origin - begin, self.info.fps)

    def _describe(self, first, start: float | None) -> VideoInfo:
        stream, container = self._stream, self._container
        width, height = (first.height, first.width) if self._swap else (first.width, first.height)
        fps = next((Fraction(r) for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r), Fraction(25))
        seconds = duration_of(stream, container)
        frames = frames_of(stream, container, fps)
        if start is not None:
            frames = None
            seconds = seconds and max(0.0, seconds - start)
        if self._limit is not None:
            frames = frames and min(frames, self._limit)
            seconds = seconds and min(seconds, float(self._limit / fps))
        aspect = stream.sample_aspect_ratio or Fraction(1)
        swapped = 90 if self._flip_columns else 270
        return VideoInfo(
            width=width,
            height=height,
            fps=fps,
            time_base=stream.time_base,
            frames=frames,
            duration=seconds,
            bits=layout_of(first.format).bits,
            pix_fmt=first.format.name,
            codec=stream.codec_context.name,
            colour=self._colour(first),
            pixel_aspect=1 / aspect if self._swap else aspect,
            rotation=swapped if self._swap else 180 if self._flip_rows and self._flip_columns else 0,
            interlaced=bool(first.interlaced_frame),
            variable_rate=bool(stream.base_rate and abs(stream.base_rate / fps - 1) > Fraction(1, 100)),
            has_audio=bool(container.streams.audio),
            has_subtitles=bool(container.streams.subtitles),
            chapters=len(container.chapters()),
            light=light_of(first),
            profile=stream.codec_context.profile or "",
            pictures=container.format.name in _ANIMATIONS,
        )

    def _base_layer(self) -> DolbyVision | None:
        """Dolby Vision's record, where there is one."""
        try:
            return dolby_vision(self.path)
        except OSError:  # whoever reads it next says why
            return None

    def _check_base_layer(self) -> None:
        """MediaError where Dolby Vision's base layer is no picture by itself; without a record, where nothing says that it is."""
        found, context = self._dolby, self._stream.codec_context
        doubtful = found is None and context.name == "hevc" and context.color_trc == _UNSPECIFIED
        bare = doubtful and any(holding.kind == "Dolby Vision" for holding in self.holdings)
        if bare or (found is not None and not found.plain):
            what = f"of {found}, " if found is not None else ""
            way = "convert it to HDR10 first, as by ffmpeg -i IN -vf libplacebo=colorspace=bt2020nc:color_primaries=bt2020"
            way += ":color_trc=smpte2084:format=yuv420p10 -c:v libx265 -crf 14 OUT"
            raise MediaError(f"{self.path}: is Dolby Vision {what}without a base layer in plain colours; {way}")

    def _colour(self, first) -> Colour:
        context = self._stream.codec_context
        declared = {"primaries": context.color_primaries, "transfer": context.color_trc}
        if self._dolby is not None and (base := self._dolby.colours) != tuple(declared.values()):
            if _UNSPECIFIED not in declared.values():
                reason = "its colour tags are not those of its Dolby Vision base layer"
                self.warnings.append(f"{self.path}: {reason} ({self._dolby.base}), which are taken")
            declared = {"primaries": base[0], "transfer": base[1]}
        layout = layout_of(first.format)
        if layout.rgb:
            return Colour(**declared, matrix=RGB, full_range=True)
        try:
            matrix = matrix_for(1 if layout.grey else first.colorspace, first.width, first.height)
        except MediaError as error:
            raise MediaError(f"{self.path}: {error}") from error
        # FFmpeg takes grey without a declared range to be full.
        full = first.color_range == _FULL or first.format.name.startswith("yuvj") or (layout.grey and not first.color_range)
        return Colour(**declared, matrix=matrix, full_range=full)

    def _decode(self) -> Iterator:
        """Decoded frames; what cannot be decoded is counted and left out."""
        errors = pyav().error
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except errors.FFmpegError:
                self._broken += 1
                return
            if packet is None:
                return
            self._watch.see(packet)
            try:
                decoded = self._decoder.decode(packet)
            except errors.EOFError:
                return
            except errors.FFmpegError:
                self._broken += 1
                continue
            for frame in decoded:
                self._damaged += bool(frame.is_corrupt)
                self._interlaced += bool(frame.interlaced_frame)
                yield frame

    def _decode_from(self, moment: Fraction) -> Iterator:
        """Frames from the first one at or after a moment on the source's clock."""
        target = math.ceil((moment - _TOLERANCE) / self._stream.time_base)
        for margin in _SEEK_MARGINS:
            offset = target - math.ceil(margin / self._stream.time_base)
            if offset <= (self._stream.start_time or 0):
                break
            try:
                self._container.seek(offset, stream=self._stream)
                self._decoder.flush_buffers()
            except pyav().error.FFmpegError:
                break
            frames = dropwhile(lambda frame: not frame.key_frame, self._decode())
            first = next(frames, None)
            if first is not None and (self._ticks(first) or 0) <= target:
                return dropwhile(lambda frame: self._is_before(frame, target), chain([first], frames))
        self._container.close()
        self._enter()
        return dropwhile(lambda frame: self._is_before(frame, target), self._decode())

    def _is_before(self, frame, target: int) -> bool:
        ticks = self._ticks(frame)
        return ticks is not None and ticks < target

    def _ticks(self, frame) -> int | None:
        if self._container.format.name == "avi":  # of one constant rate, which knows when a picture is decoded, not shown
            ticks = frame.dts
        else:
            ticks = frame.pts if frame.pts is not None else frame.dts
        if ticks is None or frame.time_base == self._stream.time_base:
            return ticks
        return round(ticks * frame.time_base / self._stream.time_base)

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, 3] as it is shown."""
        if self._swap:
            pixels = pixels.swapaxes(0, 1)
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in (self._flip_rows, self._flip_columns))
        return np.ascontiguousarray(pixels[rows, columns])

    def _report(self, count: int) -> None:
        if self._broken:
            self.warnings.append(f"{self.path}: {self._broken} damaged pieces could not be decoded and are left out")
        if self._damaged:
            self.warnings.append(f"{self.path}: {self._damaged} frames are damaged")
        if self._interlaced and not self._deinterlace:
            self.warnings.append(f"{self.path}: {self._interlaced} frames are interlaced; consider --deinterlace")
        if self.exhausted and self.info.frames is not None and count < self.info.frames:
            self.warnings.append(f"{self.path}: ends after {count} of {self.info.frames} frames")


def _orientation(frame) -> tuple[bool, bool, bool]:
    """(swap rows and columns, then flip the rows, flip the columns) that make a frame upright, from its display matrix.

    The matrix takes the stored (x, y) to (a x + c y, b x + d y); a turn by no multiple of 90 degrees is taken to be the
    nearest one.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _deinterlaced(frames: Iterator, first, time_base: Fraction) -> Iterator:
    """One whole frame for every interlaced one, by FFmpeg's bwdif."""
    av = pyav()
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format.name, time_base=time_base)
    graph.link_nodes(source, graph.add("bwdif", "send_frame:auto:all"), graph.add("buffersink")).configure()
    for frame in chain(frames, [None]):
        if frame is not None and (frame.width, frame.height) != (first.width, first.height):
            yield frame  # the reader refuses it
            return
        graph.push(frame)
        while True:
            try:
                yield graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
