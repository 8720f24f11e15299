"""The part of `ebr-engine restore` that does clips: frames in, chunks through the engine, frames out."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebr_engine.cli.progress import Progress
from ebr_engine.errors import EbrError

if TYPE_CHECKING:
    from ebr_engine.media.chunking import Chunk
    from ebr_engine.media.files import Job


@dataclass(frozen=True)
class ClipOptions:
    """How clips are read, cut into chunks and written; None leaves a choice to the backbone or the encoder."""

    start: float | None = None  # seconds
    frames: int | None = None
    chunk_frames: int | None = None
    chunk_overlap: int | None = None
    deinterlace: bool = False
    codec: str | None = None
    pix_fmt: str | None = None
    crf: float | None = None
    encoder: tuple[str, ...] = ()  # KEY=VALUE each
    copy_audio: bool = True
    copy_subtitles: bool = True

    @property
    def encoder_options(self) -> dict[str, str]:
        """The encoder's options as a dict; `EbrError` for one that is not KEY=VALUE."""
        pairs = [text.partition("=") for text in self.encoder]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise EbrError(f"-e {wrong[0]}: an encoder option is written KEY=VALUE")
        return {key: value for key, _, value in pairs}


def restore_clip(restorer: Any, job: "Job", settings: dict[str, Any], options: ClipOptions, progress: Progress) -> str:
    """Restore one clip; the line that tells of it. A file under the final name is always whole."""
    from ebr_engine.media.chunking import chunked, cross_fade
    from ebr_engine.media.video import open_video, write_video

    started = time.perf_counter()
    length, overlap = restorer.chunk_size(options.chunk_frames, options.chunk_overlap)
    with open_video(job.source, start=options.start, frames=options.frames, deinterlace=options.deinterlace) as reader:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        total = reader.info.expected_frames
        total = total if options.frames is None or total is None else min(total, options.frames)
        target = write_video(
            job.target,
            reader,
            codec=options.codec,
            pix_fmt=options.pix_fmt,
            crf=options.crf,
            options=options.encoder_options,
            copy_audio=options.copy_audio,
            copy_subtitles=options.copy_subtitles,
            size=settings.get("size"),
        )
        with target as writer:
            chunks = chunked(reader, length, overlap, restorer.codec.frames)
            for frame in cross_fade(_restored(restorer, chunks, settings, total, progress)):
                writer.write(frame.pixels, frame)
    for warning in (*reader.warnings, *target.warnings):
        progress.error(warning, "warning")
    info, seconds = reader.info, time.perf_counter() - started
    rate = f"{writer.frames} frames  {seconds:.1f} s  {writer.frames / seconds:.2g} fps"
    return f"{job.source} -> {job.target}  {info.width} x {info.height}  {info.bits} bit  {rate}"


def _restored(
    restorer: Any, chunks: "Iterator[Chunk]", settings: dict[str, Any], total: int | None, progress: Progress
) -> "Iterator[tuple[Chunk, Any]]":
    import torch

    for chunk in chunks:

        def told(index: int, steps: int, chunk: "Chunk" = chunk) -> None:
            done = chunk.start + len(chunk.frames) * index / steps
            frames = f"frames {chunk.start + 1} to {chunk.start + len(chunk.frames)}" + (f" of {total}" if total else "")
            progress.share(done / total if total else 0, f"{frames}, step {index}/{steps}")

        clip = torch.from_numpy(chunk.pixels).movedim(-1, 0)[None]  # [1, 3, F, H, W]
        restored = restorer.run(clip, callback=told, **settings)
        yield chunk, restored[0].movedim(0, -1).numpy()
