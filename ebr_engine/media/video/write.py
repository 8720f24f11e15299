"""Frames into a video file: encoded with the source's colour and times, its other streams beside them."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np

from ebr_engine.media.images import MediaError
from ebr_engine.media.video.colour import RGB, from_rgb, layout_of, matrix_for
from ebr_engine.media.video.folder import FolderReader
from ebr_engine.media.video.info import Colour, Frame, VideoInfo, pyav
from ebr_engine.media.video.read import VideoReader
from ebr_engine.media.video.streams import StreamCopier, copy_tags

CONTAINERS = {  # FFmpeg's muxers by suffix
    ".mp4": "mp4",
    ".mkv": "matroska",
    ".mov": "mov",
    ".webm": "webm",
    ".avi": "avi",
    ".m4v": "mp4",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".ts": "mpegts",
    ".m2ts": "mpegts",
    ".mts": "mpegts",
}
_CODECS = {".webm": ("libvpx-vp9", "libvpx-vp9"), ".mpg": ("mpeg2video", "mpeg2video"), ".mpeg": ("mpeg2video", "mpeg2video")}
_CRF = {"libx264": 17, "libx264rgb": 17, "libx265": 18, "libvpx-vp9": 20, "libsvtav1": 20, "libaom-av1": 20}
_CONSTANT_RATE = ("mpeg1video", "mpeg2video", "mpeg4")  # encoders with few clocks
_SCALE = {"mpeg1video": 2, "mpeg2video": 2, "mpeg4": 2, "mjpeg": 2}  # quantiser; their default is a bit rate for telephones
_LAMBDA = 118  # FFmpeg's unit of it
_MATCH_SOURCE = (  # encoders for editors and archives, which are given what the source holds
    *("ffv1", "prores_ks", "prores", "prores_aw", "dnxhd"),
    *("huffyuv", "ffvhuff", "utvideo", "mjpeg", "rawvideo", "v210"),
)
_LIMITED, _FULL = 1, 2
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
        high = self.info.bits > 8
        self.codec = codec or _CODECS.get(suffix, ("libx264", "libx265"))[high]
        self._options = {str(key): str(value) for key, value in options.items()}
        self._crf = crf
        self._copy = {"audio": copy_audio, "subtitles": copy_subtitles}
        self._encoder = self._find_encoder()
        self._pixel_format = pyav().VideoFormat(self._choose_format(pix_fmt), self.width, self.height)

    def __enter__(self) -> "VideoWriter":
        # Not tempfile: it would make the result unreadable to others, whatever the umask says.
        self._part = self.path.with_name(f".ebr-{secrets.token_hex(6)}.part")
        self._output = self._copier = None
        try:
            try:
                self._start(**self._copy)
            except _StreamsRefused:
                self._close()
                self.warnings = [f"{self.path}: {self._format} does not take the other streams; they are left out"]
                self._start(audio=False, subtitles=False)
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
        self.write_prepared(self.prepare(pixels), frame)

    def prepare(self, pixels: np.ndarray):
        """[H, W, 3] float32 RGB in [0, 1] as the encoder gets it."""
        if pixels.shape != (self.height, self.width, 3):
            raise ValueError(f"the video is made for {(self.height, self.width, 3)}, not {pixels.shape}")
        if not np.isfinite(pixels).all():
            raise MediaError(f"{self.path}: not written: frame {self.frames + 1} has values that are not finite numbers")
        return from_rgb(pixels, self._pixel_format, self._colour, centred=self._centred)

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

    def _start(self, audio: bool, subtitles: bool) -> None:
        av = pyav()
        try:
            open(self._part, "wb").close()  # FFmpeg would find out later, and not say why
            name, reproducible = f"file:{os.fspath(self._part)}", {"fflags": "+bitexact"}  # no random identifiers
            self._output = av.open(name, "w", format=self._format, container_options=reproducible)
        except UnicodeEncodeError as error:
            raise MediaError(f"{str(self.path)!a}: its name is not valid text; choose another") from error
        except OSError as error:
            raise MediaError(f"{self.path}: cannot write there: {error.strerror}") from error
        self._add_video()
        if self._reader is not None:
            self._copier = StreamCopier(self._reader, self._output, audio=audio, subtitles=subtitles)
            copy_tags(self._reader.tags, self._stream.metadata)
        try:
            self._output.start_encoding()
        except av.error.FFmpegError as error:
            if self._copier is not None and self._copier.copies:
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
        if constant and self.info.variable_rate:
            self.warnings.append(f"{self.path}: the frame rate varies, which {self._format} or {self.codec} cannot keep")
        self._time_base = 1 / rate if constant else self.info.time_base
        self._colour = self._output_colour()
        self._centred = self.codec in ("mjpeg", "mpeg1video")
        self._last, self._end, self._durations = None, Fraction(0), {}
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, self._pixel_format.name
        context.time_base = stream.time_base = self._time_base
        context.sample_aspect_ratio = self.info.pixel_aspect
        context.colorspace, context.color_range = self._colour.matrix, _FULL if self._colour.full_range else _LIMITED
        context.color_primaries, context.color_trc = self._colour.primaries, self._colour.transfer
        if self._format in ("mp4", "mov") and any(name in self.codec for name in ("265", "hevc")):
            context.codec_tag = "hvc1"  # Apple's players ask for it
        context.options = self._encoder_options()
        try:
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
        if self.codec in _SCALE and not {"b", "global_quality"} & set(self._options):
            options |= {"flags": "+qscale", "global_quality": str(_SCALE[self.codec] * _LAMBDA)}
        crf = _CRF.get(self.codec) if self._crf is None and not {"b", "qp", "crf"} & set(self._options) else self._crf
        if crf is not None:
            options["crf"] = f"{crf:g}"
        if crf == 0 and self.codec == "libvpx-vp9":
            options["lossless"] = "1"
        options |= self._options
        if self.codec == "libx265":
            own = ["log-level=error", *(["lossless=1"] if crf == 0 else [])]  # it writes to the terminal
            options["x265-params"] = ":".join([*own, *filter(None, [self._options.get("x265-params")])])
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

    def _choose_format(self, wanted: str | None) -> str:
        """The pixel format: the one that is asked for, or the encoder's nearest to what the source or players want."""
        av = pyav()
        offered = {f.name: f for f in self._encoder.video_formats or [] if f.components}  # else one on a graphics card
        odd = self.width % 2 or self.height % 2
        size = f"{self.width} x {self.height} pixels"
        if wanted is not None:
            try:
                layout = layout_of(av.VideoFormat(wanted))
            except ValueError as error:
                raise MediaError(f"unknown pixel format {wanted!r}") from error
            if offered and wanted not in offered:
                raise MediaError(f"{self.codec} does not take {wanted}; choose from {' '.join(sorted(offered))}")
            if odd and any(layout.shifts):
                raise MediaError(f"{self.path}: {wanted} needs even sides, and {size} are not; use a 4:4:4 format")
            return wanted
        if self.codec in _MATCH_SOURCE:
            ideal = layout_of(av.VideoFormat(self.info.pix_fmt)).name
        else:
            ideal = "yuv420p" if self.info.bits == 8 else "yuv420p10le"
        if odd and any(layout_of(av.VideoFormat(ideal)).shifts):
            depth = layout_of(av.VideoFormat(ideal)).bits
            ideal = "yuv444p" if depth == 8 else f"yuv444p{depth}le"
            self.warnings.append(f"{self.path}: {size} are odd, so it is written as 4:4:4, which some players cannot show")
        if not offered or ideal in offered:
            return ideal
        target = layout_of(av.VideoFormat(ideal))
        layouts = {name: layout_of(f) for name, f in offered.items()}
        fitting = [name for name, layout in layouts.items() if not (odd and any(layout.shifts))]
        if not fitting:
            raise MediaError(f"{self.path}: {self.codec} needs even sides, and {size} are not")
        return min(fitting, key=lambda name: _distance(layouts[name], target, name))

    def _output_colour(self) -> Colour:
        source, layout = self.info.colour, layout_of(self._pixel_format)
        if layout.rgb:
            return Colour(source.primaries, source.transfer, RGB, full_range=True)
        matrix = matrix_for(2, 1280, 720) if source.matrix == RGB else source.matrix
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
                self._output.mux_one(packet)
        except error_type as error:
            raise MediaError(f"{self.path}: could not be written: {error.strerror}") from error

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
        self._commit(self._part, self.path)

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


def _distance(layout, target, name: str) -> tuple:
    """How much worse than a target a pixel format is: lost depth, colour model, lost chroma, then what is wasted."""
    coarser = sum(max(0, a - b) for a, b in zip(layout.shifts, target.shifts))
    finer = sum(max(0, b - a) for a, b in zip(layout.shifts, target.shifts))
    lost, spare = max(0, target.bits - layout.bits), max(0, layout.bits - target.bits)
    model = layout.grey and not target.grey, layout.rgb != target.rgb
    return lost, *model, coarser, spare, finer, layout.alpha, name != layout.name
