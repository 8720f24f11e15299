"""Frames into a video file: encoded with the source's colour and times, its other streams beside them."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import format_of
from ebr_engine.media.holdings.boxes import add_to_video_track, add_xmp, read_xmp
from ebr_engine.media.seen import stored_values
from ebr_engine.media.video.colour import RGB, from_rgb, layout_of
from ebr_engine.media.video.fates import Fates
from ebr_engine.media.video.folder import FolderReader
from ebr_engine.media.video.formats import CONTAINERS, CRF, choose_encoder, choose_format
from ebr_engine.media.video.frame_files import profile_of
from ebr_engine.media.video.info import Colour, Frame, VideoInfo, pyav
from ebr_engine.media.video.light import Light
from ebr_engine.media.video.matroska_video import add_to_video, display_size, filled, projection
from ebr_engine.media.video.messages import insert
from ebr_engine.media.video.profiles import to_srgb
from ebr_engine.media.video.read import VideoReader
from ebr_engine.media.video.streams import StreamCopier, copy_tags, needs_keys
from ebr_engine.media.video.threads import THREADS, ordinary_priority, own_settings
from ebr_engine.media.video.views import view_boxes

_CONSTANT_RATE = ("mpeg1video", "mpeg2video", "mpeg4")  # encoders with few clocks
_GROUPS = ("mpeg1video", "mpeg2video")  # of pictures, with a timecode each
_SCALE = {"mpeg1video": 2, "mpeg2video": 2, "mpeg4": 2, "mjpeg": 2}  # quantiser; their default is a bit rate for telephones
_LAMBDA = 118  # FFmpeg's unit of it
_MATRICES = {5: 5, 6: 6, 9: 9}  # that RGB of these primaries is coded by; else BT.709's
_LIMITED, _FULL = 1, 2
_NO_WORD = "the container has no word for this kind of it"
_HOUR = 3600  # seconds


class VideoWriter:
    """Encodes frames into a file that appears whole on a clean exit; what `write_video` returns."""

    def __init__(
        self,
        path: Path,
        source: VideoReader | FolderReader | VideoInfo,
        *,
        codec: str | None,
        pix_fmt: str | None,
        crf: float | None,
        options: dict[str, str],
        copy_audio: bool,
        copy_subtitles: bool,
        size: tuple[int, int] | None,
        commit: Callable[[Path, Path], None] | None = None,
        strict: bool = False,
        keep: bool = True,
    ) -> None:
        self.path = path
        self._commit = commit or os.replace
        self.warnings: list[str] = []
        self.frames = 0
        self._drained = False
        self.info = source if isinstance(source, VideoInfo) else source.info
        self._reader = source if isinstance(source, VideoReader) else None
        suffix = path.suffix.lower()
        if suffix not in CONTAINERS:
            raise MediaError(f"{path}: cannot write {suffix or 'a file without suffix'}; choose from {' '.join(CONTAINERS)}")
        self._format = CONTAINERS[suffix]
        self.height, self.width = size or (self.info.height, self.info.width)
        choice = choose_encoder(self._format, self.info, pix_fmt, crf)
        self.codec = codec or choice.encoder
        notes = [f"{path}: {choice.note}"] if choice.note and codec is None else []
        preset = choice.options if codec is None and pix_fmt is None else {}
        self._options = {**preset, **{str(key): str(value) for key, value in options.items()}}
        self._crf = crf
        self._copy = {"sound": copy_audio, "subtitles": copy_subtitles}
        self._encoder = self._find_encoder()
        self.codec_id = self._encoder.canonical_name  # FFmpeg's name of what is written
        name, lost = choose_format(path, self._encoder, self.info, (self.height, self.width), pix_fmt)
        self._pixel_format = pyav().VideoFormat(name, self.width, self.height)
        self.warnings += notes + lost
        self._keep = keep and self._reader is not None
        self._light = self.info.light if keep else Light()
        has_alpha, left_out = layout_of(self._pixel_format).alpha, [kind for kind, kept in self._copy.items() if not kept]
        origin = source if keep else self.info
        self.fates = Fates(path, format_of(path), origin, self.codec_id, has_alpha, strict, left_out)

    def __enter__(self) -> "VideoWriter":
        # Not tempfile: it would make the result unreadable to others, whatever the umask says.
        self._part = self.path.with_name(f".ebr-{secrets.token_hex(6)}.part")
        self._output = self._copier = None
        try:
            try:
                self._start(*self._copy.values())
            except _StreamsRefused:
                self._close()
                for index in self._copier_streams:
                    self.fates.lose_stream(index, f"{self._format} does not take it")
                self._start(False, False)
        except BaseException:
            self._abandon()
            raise
        return self

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name of what the encoder gets."""
        return self._pixel_format.name

    def write(self, pixels: np.ndarray, frame: Frame | None = None) -> None:
        """Encode [H, W, 3] float32 RGB in [0, 1], shown at the time of `frame`, or after the one before without."""
        self.write_prepared(self.prepare(pixels, frame), frame)

    def prepare(self, pixels: np.ndarray, frame: Frame | None = None):
        """[H, W, 3] float32 RGB in [0, 1], with the alpha of `frame`, as the encoder gets it."""
        if pixels.shape != (self.height, self.width, 3):
            raise ValueError(f"the video is made for {(self.height, self.width, 3)}, not {pixels.shape}")
        if not np.isfinite(pixels).all():
            raise MediaError(f"{self.path}: not written: frame {self.frames + 1} has values that are not finite numbers")
        if frame is not None and frame.picture is not None and (profile := profile_of(frame.picture)) is not None:
            pixels = to_srgb(stored_values(pixels, frame.picture.seen), profile)
        alpha = None if frame is None else self.fates.alpha(frame.alpha, (self.height, self.width))
        return from_rgb(pixels, self._pixel_format, self._colour, centred=self._centred, alpha=alpha)

    def write_prepared(self, picture, frame: Frame | None = None) -> None:
        """Encode what `prepare` made."""
        time = self.frames / self.info.fps if frame is None else frame.time
        tick = round(time / self._time_base)
        picture.pts = tick if self._last is None else max(tick, self._last + 1)
        picture.time_base = self._time_base
        picture.colorspace, picture.color_range = self._colour.matrix, _FULL if self._colour.full_range else _LIMITED
        length = frame.duration * frame.time_base if frame is not None and frame.duration else 1 / self.info.fps
        self._durations[picture.pts] = max(1, round(length / self._time_base))
        self._last, self._end = picture.pts, time + length
        if frame is not None and (kept := self.fates.messages(frame.messages)):
            self._messages[picture.pts] = kept
        self._encode(picture)
        self.frames += 1

    def drain(self) -> None:
        """Encode what the encoder holds back: after the last frame, and before the exit, which does it otherwise."""
        if self.frames and not self._drained:
            self._drained = True
            self._encode(None)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()
            self.warnings += self.fates.warnings()

    def _start(self, audio: bool, subtitles: bool) -> None:
        av = pyav()
        try:
            open(self._part, "wb").close()  # FFmpeg would find out later, and not say why
            name, settings = f"file:{os.fspath(self._part)}", {"fflags": "+bitexact"}  # no random identifiers
            if self._keep and self._format in ("mp4", "mov") and needs_keys(self._reader.container_tags, self._format):
                settings["movflags"] = "+use_metadata_tags"
            self._output = av.open(name, "w", format=self._format, container_options=settings)
        except UnicodeEncodeError as error:
            raise MediaError(f"{str(self.path)!a}: its name is not valid text; choose another") from error
        except OSError as error:
            raise MediaError(f"{self.path}: cannot write there: {error.strerror}") from error
        self._add_video()
        if self._reader is not None:
            self._copier = StreamCopier(self._reader, self._output, audio=audio, subtitles=subtitles, tags=self._keep)
            self._copier_streams = self._copier.streams
            for index, why in self._copier.refused.items():
                self.fates.lose_stream(index, why)
            copy_tags(self._reader.tags, self._stream.metadata)
        if self._keep:
            self._say_timecode()
            if self._format in ("matroska", "webm"):
                self._say_stereo_mode()
        self._video_elements = self._elements() if self._format in ("matroska", "webm") else b""
        if self._video_elements:
            self._stream.metadata["title"] = filled(self._stream.metadata.get("title", ""))
        try:
            self._output.start_encoding()
        except av.error.FFmpegError as error:
            if self._copier is not None and self._copier.streams:
                raise _StreamsRefused from error
            raise MediaError(f"{self.path}: {self._format} does not take {self.codec} with these settings") from error

    def _add_video(self) -> None:
        av = pyav()
        rate = self.info.fps.limit_denominator(1001)
        try:
            stream = self._output.add_stream(self._encoder.name, rate=rate)
        except ValueError as error:
            raise MediaError(f"{self.path}: {self._format} cannot hold {self.codec}; choose another suffix or codec") from error
        constant = self._format == "avi" or self.codec in _CONSTANT_RATE
        if constant and self.info.variable_rate and not any(each.holding.kind == "frame times" for each in self.fates.outcomes):
            self.warnings.append(f"{self.path}: the frame rate varies, which {self._format} or {self.codec} cannot keep")
        self._time_base = 1 / rate if constant else self.info.time_base
        self._colour = self._output_colour()
        self._centred = self.codec in ("mjpeg", "mpeg1video")
        self._last, self._end, self._durations, self._messages = None, Fraction(0), {}, {}
        context = stream.codec_context
        context.thread_count = THREADS
        if "264" in self.codec:
            context.thread_type = "FRAME"  # else it cuts each picture into slices
        context.width, context.height, context.pix_fmt = self.width, self.height, self._pixel_format.name
        context.time_base = stream.time_base = self._time_base
        context.sample_aspect_ratio = self.info.pixel_aspect
        context.colorspace, context.color_range = self._colour.matrix, _FULL if self._colour.full_range else _LIMITED
        context.color_primaries, context.color_trc = self._colour.primaries, self._colour.transfer
        if self._format in ("mp4", "mov") and any(name in self.codec for name in ("265", "hevc")):
            context.codec_tag = "hvc1"  # Apple's players ask for it
        context.options = self._encoder_options()
        try:
            with ordinary_priority():
                context.open()
        except (av.error.FFmpegError, ValueError) as error:
            what = f"{self._pixel_format.name}, {self.width} x {self.height} pixels, {float(rate):g} fps and these options"
            raise MediaError(f"{self.path}: {self.codec} refuses {what}") from error
        unknown = sorted(set(context.options) & (set(self._options) | {"crf"}))
        if unknown:
            raise MediaError(f"{self.path}: {self.codec} has no option {', '.join(unknown)}")
        self._stream = stream

    def _encoder_options(self) -> dict[str, str]:
        options = {"bf": "0"} if self._format == "avi" else {}  # AVI holds one timestamp a frame
        own = self._light.options(self.codec)
        if self.codec in _SCALE and not {"b", "global_quality"} & set(self._options):
            options |= {"flags": "+qscale", "global_quality": str(_SCALE[self.codec] * _LAMBDA)}
        crf = CRF.get(self.codec) if self._crf is None and not {"b", "qp", "crf"} & set(self._options) else self._crf
        if crf is not None:
            options["crf"] = f"{crf:g}"
        if self.codec == "libvpx" and layout_of(self._pixel_format).alpha:
            options["auto-alt-ref"] = "0"  # else it refuses
        if crf == 0 and self.codec == "libvpx-vp9":
            options["lossless"] = "1"
        if self.codec in _GROUPS and self._keep and self._reader.timecode and self._counts(self._reader.timecode):
            options["gop_timecode"] = self._reader.timecode
        options |= self._options
        own |= own_settings(self.codec)
        if self.codec == "libx265":  # it writes to the terminal
            own |= {"log-level": "error"} | ({"lossless": "1"} if crf == 0 else {})
        if own:
            name = {"libx265": "x265-params", "libsvtav1": "svtav1-params"}.get(self.codec, "x264-params")
            given = [f"{key}={value}" for key, value in own.items()]
            options[name] = ":".join([*given, *filter(None, [self._options.get(name)])])
        return options

    def _find_encoder(self):
        from av.codec import Codec

        try:
            encoder = Codec(self.codec, "w")
        except ValueError as error:
            known = "libx264, libx265, libvpx-vp9, libsvtav1, prores_ks, ffv1"
            raise MediaError(f"unknown video encoder {self.codec!r}; try {known}") from error
        if encoder.type != "video":
            raise MediaError(f"{self.codec} is no video encoder")
        return encoder

    def _output_colour(self) -> Colour:
        source, layout = self.info.colour, layout_of(self._pixel_format)
        if layout.rgb:
            return Colour(source.primaries, source.transfer, RGB, full_range=True)
        matrix = _MATRICES.get(source.primaries, 1) if source.matrix == RGB else source.matrix
        full = self.codec == "mjpeg" or (source.full_range and source.matrix != RGB)
        return Colour(source.primaries, source.transfer, matrix, full)

    def _encode(self, picture) -> None:
        """Encode a picture, or what the encoder holds back for None, and copy what belongs before it."""
        error_type = pyav().error.FFmpegError
        try:
            for packet in self._stream.encode(picture):
                packet.duration = self._durations.pop(packet.pts, packet.duration)
                if not 0 <= packet.pts - packet.dts <= _HOUR / self._time_base:
                    packet.dts = packet.pts  # x265 gives a random one to clips of one or two frames
                if self._copier is not None:
                    self._copier.advance(packet.dts * packet.time_base)
                self._output.mux_one(self._with_messages(packet))
        except error_type as error:
            raise MediaError(f"{self.path}: could not be written: {error.strerror}") from error

    def _with_messages(self, packet):
        """The packet with the messages of its picture, which encoders do not take from us."""
        messages = self._messages.pop(packet.pts, None)
        if not messages:
            return packet
        made = pyav().Packet(insert(bytes(packet), self.codec_id, messages))
        for name in ("pts", "dts", "time_base", "duration", "is_keyframe", "stream"):
            setattr(made, name, getattr(packet, name))
        return made

    def _finish(self) -> None:
        if not self.frames:
            raise MediaError(f"{self.path}: not written: there are no frames")
        self.drain()
        try:
            if self._copier is not None:
                self._copier.advance(None if self._reader.exhausted else self._end)
            self._output.close()
        except pyav().error.FFmpegError as error:
            raise MediaError(f"{self.path}: could not be written: {error.strerror}") from error
        if self._format in ("mp4", "mov"):
            self._add_boxes()
        elif self._video_elements and not add_to_video(self._part, self._video_elements):
            self.fates.lose_kinds(("pixel aspect", "spherical"), "the file's header is too large")
        self._commit(self._part, self.path)

    def _counts(self, timecode: str) -> bool:
        """Whether a timecode goes with the rate; FFmpeg refuses to leave out numbers at others than 30 and 60."""
        return timecode[8] == ":" or round(self.info.fps) % 30 == 0

    def _say_timecode(self) -> None:
        timecode = self._reader.timecode
        if timecode is None or self._format == "avi":
            return
        if not self._counts(timecode):
            self.fates.lose_kinds(("timecode", "timecode message"), "it leaves out numbers as 30 frames a second do")
        else:
            self._stream.metadata["timecode"] = timecode

    def _say_stereo_mode(self) -> None:
        mode = self._reader.tags.get("stereo_mode", self._reader.view.stereo_mode)
        if mode is None:
            self.fates.lose_kinds(("stereo view",), _NO_WORD)
        else:
            self._stream.metadata["stereo_mode"] = mode

    def _elements(self) -> bytes:
        """What FFmpeg's Matroska muxer does not take from us."""
        aspect = self.info.pixel_aspect
        size = display_size(self.width, self.height, aspect) if aspect != 1 else b""
        sphere = projection(self._reader.view) if self._keep else b""
        if not sphere:
            self.fates.lose_kinds(("spherical",), _NO_WORD)
        return size + sphere

    def _add_boxes(self) -> None:
        """What FFmpeg's muxer of MP4 and QuickTime does not take from us."""
        in_entry, in_track = view_boxes(self._reader.path, self._reader.view) if self._keep else (b"", b"")
        lost = [kind for kind, box in (("spherical", b"sv3d"), ("stereo view", b"st3d")) if box not in in_entry]
        self.fates.lose_kinds([kind for kind in lost if kind != "spherical" or not in_track], _NO_WORD)
        in_entry += self._light.boxes()
        if (in_entry or in_track) and not add_to_video_track(self._part, in_entry, in_track):
            self.fates.lose_kinds(("spherical", "stereo view"), "the file's header is too large")
        if self._keep and (packet := read_xmp(self._reader.path)) is not None:
            add_xmp(self._part, packet)

    def _close(self) -> None:
        if self._copier is not None:
            self.warnings += self._copier.warnings
            self._copier.close()
        if self._output is not None:
            with suppress(pyav().error.FFmpegError):
                self._output.close()
        self._output = self._copier = None

    def _abandon(self) -> None:
        self._close()
        self._part.unlink(missing_ok=True)


class _StreamsRefused(Exception):
    """The container takes the video, but not what is to be copied beside it."""
