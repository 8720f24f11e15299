"""Opening a media file: its container, its first video, the decoder that reads all of it, and how many frames it shows."""

import os
import stat
from fractions import Fraction
from pathlib import Path
from typing import Any

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video.info import pyav

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these leave the transparency out


def open_container(path: Path):
    """Open a media file for reading, which follows no links to other files or hosts; MediaError with the reason."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise MediaError(f"{path}: not a regular file")
        if not path.stat().st_size:
            raise MediaError(f"{path}: the file is empty")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error
    av = pyav()
    try:
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{os.fspath(path)}", "r", container_options=options, metadata_errors="replace")
    except UnicodeEncodeError as error:
        raise MediaError(f"{str(path)!a}: its name is not valid text; rename it") from error
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{path}: not a video, or damaged beyond reading") from error
    kind = container.format.name
    if kind == "tty" or kind == "image2" or kind.endswith("_pipe"):
        container.close()
        raise MediaError(f"{path}: {'a text' if kind == 'tty' else 'a single picture'}, not a video")
    return container


def first_video(path: Path, container: Any):
    """The first video stream that is no cover picture."""
    from av.stream import Disposition

    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise MediaError(f"{path}: has no video stream")
    if videos[0].codec_context is None:
        raise MediaError(f"{path}: there is no decoder for its video")
    return videos[0]


def decoder_for(stream: Any):
    """What decodes a video stream: its own decoder, but for VP8 and VP9 with transparency, which lies beside the pictures."""
    name = _WITH_ALPHA.get(stream.codec_context.name)
    alpha = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
    if name is None or not alpha:
        return stream.codec_context
    try:
        decoder = pyav().CodecContext.create(name, "r")
    except ValueError:  # FFmpeg without libvpx
        return stream.codec_context
    decoder.extradata = stream.codec_context.extradata
    return decoder


def duration_of(stream: Any, container: Any) -> float | None:
    """Seconds, where the container tells."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / pyav().time_base if container.duration else None


def frames_of(stream: Any, container: Any, fps: Fraction) -> int | None:
    """The frames that are shown, where the container counts them; an edit list may leave out some of those that are stored."""
    stored = stream.frames or None
    seconds = duration_of(stream, container)
    if stored is None or "mov" not in container.format.name or not seconds or seconds * fps > stored - 1:
        return stored
    return sum(not entry.is_discard for entry in stream.index_entries) or stored
