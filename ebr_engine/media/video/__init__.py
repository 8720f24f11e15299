"""Video files in and out, through FFmpeg's libraries (PyAV): frames as arrays, and everything else kept as it came.

`open_video` iterates over frames, `write_video` takes frames; both are context managers and hold a few frames at a time,
however long the film is. A folder of frames stands for a video in both directions. Pixels are RGB, float32, in the space
of the stream's own primaries and transfer; only the matrix and the range are undone, and put back on writing.
PyAV is imported on first use.
"""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from ebr_engine.media.images import MAX_MEGAPIXELS, is_animation
from ebr_engine.media.video.folder import FolderReader, FolderWriter, is_frame_target
from ebr_engine.media.video.formats import CONTAINERS
from ebr_engine.media.video.info import Colour, Frame, VideoInfo
from ebr_engine.media.video.read import VideoReader
from ebr_engine.media.video.write import VideoWriter

__all__ = ["Colour", "Frame", "VideoInfo", "VideoReader", "VideoWriter", "open_video", "video_suffixes", "write_video"]

_ONLY_READ = (".3gp", ".flv", ".mxf", ".ogv", ".vob", ".wmv")


def open_video(
    path: str | os.PathLike,
    *,
    start: float | None = None,
    frames: int | None = None,
    deinterlace: bool = False,
    fps: float | Fraction = 24,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> VideoReader | FolderReader:
    """Open a video file, an animated picture, or a folder of frames, for iterating over its frames once; a context manager.

    `start` (seconds from the beginning) drops the frames before it and `frames` ends after so many; `deinterlace` makes
    whole frames of interlaced ones, one of each, where otherwise they are refused. `fps` is for folders, which know no
    time. Raises MediaError for what is no video, is damaged beyond its first frame, or has frames above `max_megapixels`.
    """
    if os.path.isdir(path):
        return FolderReader(Path(path), fps=Fraction(fps).limit_denominator(1001), start=start, limit=frames)
    if is_animation(Path(path)):
        from ebr_engine.media.animation import AnimationReader

        return AnimationReader(Path(path), start=start, limit=frames, max_megapixels=max_megapixels)
    return VideoReader(Path(path), start=start, limit=frames, deinterlace=deinterlace, max_megapixels=max_megapixels)


def write_video(
    path: str | os.PathLike,
    source: VideoReader | FolderReader | VideoInfo,
    *,
    codec: str | None = None,
    pix_fmt: str | None = None,
    crf: float | None = None,
    options: dict[str, str] | None = None,
    copy_audio: bool = True,
    copy_subtitles: bool = True,
    size: tuple[int, int] | None = None,
    commit: Callable[[Path, Path], None] | None = None,
    strict: bool = False,
    keep: bool = True,
) -> VideoWriter | FolderWriter:
    """Make a video, or a folder of frames, in the manner of `source`: its rate, colour, depth, tags and other streams.

    The container follows from the suffix; a path that ends in `/`, is a folder, or holds a pattern such as
    `out/%06d.tif` makes PNG or TIFF frames. Without `codec`, an editor's or archive's source keeps its own where the
    container holds it, else H.264 for 8 bit and HEVC for more; `pix_fmt` is then the source's, and for pictures 4:2:0, or
    4:4:4 where a side is odd. `crf` 0 is lossless where the encoder can be; `options` are the encoder's own.
    `size` is (height, width) where it differs from the source's. `keep`: also keep what the source holds beside its frames
    and streams. Entering opens the file under a temporary name beside `path`; only a clean exit gives it its name, by
    `commit(part, path)` where that is given. `warnings` then tells what could not be kept; with `strict` that is a MediaError,
    as is what the container or the encoder refuses.
    """
    if is_frame_target(path):
        left_out = [kind for kind, wanted in (("sound", copy_audio), ("subtitles", copy_subtitles)) if not wanted]
        return FolderWriter(path, source, strict=strict, keep=keep, left_out=left_out)
    if Path(path).suffix.lower() not in CONTAINERS and getattr(source, "delays", None):
        from ebr_engine.media.animation import AnimationWriter

        return AnimationWriter(path, source, size=size, commit=commit, strict=strict)
    return VideoWriter(
        Path(path),
        source,
        codec=codec,
        pix_fmt=pix_fmt,
        crf=crf,
        options=options or {},
        copy_audio=copy_audio,
        copy_subtitles=copy_subtitles,
        size=size,
        commit=commit,
        strict=strict,
        keep=keep,
    )


def video_suffixes(writable: bool = False) -> tuple[str, ...]:
    """The suffixes that say "video", in lower case: those found in folders, or those that can be written."""
    return tuple(CONTAINERS) if writable else (*CONTAINERS, *_ONLY_READ)
