"""The part of `ebr-engine restore` that does clips: frames in, chunks through the engine, frames out."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.cli import auto
from ebr_engine.cli.clip_looks import compare, recoloured
from ebr_engine.cli.interrupts import Interrupts
from ebr_engine.cli.outcome import Outcome
from ebr_engine.cli.overlap import Behind, ahead
from ebr_engine.cli.progress import Progress
from ebr_engine.cli.recipe import Recipe

if TYPE_CHECKING:
    from ebr_engine.media.chunking import Chunk
    from ebr_engine.media.files import Job


def restore_clip(
    restorer: Any,
    job: "Job",
    recipe: Recipe,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
) -> Outcome:
    """Restore one clip. A file under the final name is always whole, and given it by `commit(part, path)`."""
    from ebr_engine.media.chunking import chunked, cross_fade
    from ebr_engine.media.video import open_video, write_video

    started = time.perf_counter()
    recipe = auto.settled(recipe, lambda: auto.frames_of(job.source, recipe.clips))
    options = recipe.clips
    length, overlap = restorer.chunk_size(options.chunk_frames, options.chunk_overlap)
    with open_video(job.source, start=options.start, frames=options.frames, deinterlace=options.deinterlace) as reader:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        total = reader.info.expected_frames
        total = total if options.frames is None or total is None else min(total, options.frames)
        restorer.expect(total or 0)
        target = write_video(
            job.target,
            reader,
            codec=options.codec,
            pix_fmt=options.pix_fmt,
            crf=options.crf,
            options=options.encoder_options,
            copy_audio=options.copy_audio,
            copy_subtitles=options.copy_subtitles,
            size=recipe.size,
            commit=commit,
        )
        chunks = ahead(chunked(reader, length, overlap, restorer.codec.frames))
        with target as writer, closing(chunks), Behind() as encoder:
            for frame in cross_fade(_restored(restorer, chunks, recipe, total, progress, interrupts)):
                encoder.call(writer.write, frame.pixels, frame)
    warnings = [*reader.warnings, *target.warnings]
    if job.compare:
        warnings += compare(job, recipe, total, progress, interrupts, commit)
    for warning in warnings:
        progress.error(warning, "warning")
    info, seconds = reader.info, time.perf_counter() - started
    return Outcome(job, seconds, info.width, info.height, info.bits, writer.frames, recipe.note)


def _restored(
    restorer: Any, chunks: "Iterator[Chunk]", recipe: Recipe, total: int | None, progress: Progress, interrupts: Interrupts
) -> "Iterator[tuple[Chunk, Any]]":
    import torch

    settings = dict(recipe.run) | ({"size": recipe.size} if recipe.size else {})
    started = time.perf_counter()
    for chunk in chunks:

        def told(index: int, steps: int, chunk: "Chunk" = chunk) -> None:
            interrupts.check()
            done = chunk.start + len(chunk.frames) * index / steps
            frames = f"frames {chunk.start + 1} to {chunk.start + len(chunk.frames)}" + (f" of {total}" if total else "")
            rate = done / (time.perf_counter() - started)
            progress.share(done / total if total else 0, f"{frames}, step {index}/{steps}, {rate:.2g} fps")

        clip = torch.from_numpy(chunk.pixels).movedim(-1, 0)[None]  # [1, 3, F, H, W]
        restored = restorer.run(clip, callback=told, first=chunk.start, **settings)
        yield chunk, recoloured(restored, clip, recipe)
