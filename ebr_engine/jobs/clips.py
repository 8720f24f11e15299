"""The part of `ebr-engine restore` that does clips: frames in, chunks through the engine, frames out."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs.interrupts import Interrupts
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.overlap import Behind, ahead
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipe, Recipes
from ebr_engine.request import RUN
from ebr_engine.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ebr_engine.jobs.files import Job
    from ebr_engine.media.chunking import Chunk
    from ebr_engine.media.video import Frame
    from ebr_engine.media.video.parts import Parts
    from ebr_engine.request import RestoreRequest

Shown = Callable[["Chunk"], Callable[[int, int], None]]  # of a chunk: what is called after each step on it
Through = Callable[["Iterator[Chunk]", Recipe, Shown], "Iterator[tuple[Chunk, np.ndarray]]"]  # chunks with their restorations

LOOKS = 3  # frames of a clip that task auto looks at, from its beginning on


def restore_clip(
    restorer: Any,
    recipes: Recipes,
    job: "Job",
    recipe: Recipe,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
    through: Through | None = None,
) -> Outcome:
    """Restore one clip. A file under the final name is always whole, and given it by `commit(part, path)`.

    `through` restores chunks, in order; one by one by `restorer` where nobody else does.
    """
    from ebr_engine.media.chunking import blend, chunked
    from ebr_engine.media.video import open_video, write_video
    from ebr_engine.media.video.parts import Parts

    started = time.perf_counter()
    recipe = recipes.seen(recipe, lambda: some_frames(job.source, recipe.request))
    options = recipe.request
    with open_video(job.source, **reading(options)) as reader:
        frame = recipe.size or (reader.info.height, reader.info.width)
        length, overlap = restorer.chunk_size(
            options.chunk_frames, options.chunk_overlap, frame, recipe.plan, **options.part(RUN)
        )
        job.target.parent.mkdir(parents=True, exist_ok=True)
        total = reader.info.expected_frames
        total = total if options.frames is None or total is None else min(total, options.frames)
        restorer.expect([frame] * (total or 0))
        target = write_video(
            f"{job.target}/" if job.frames and not job.target.suffix else job.target,
            reader,
            codec=options.codec,
            pix_fmt=options.pix_fmt,
            crf=options.crf,
            options=options.encoder_options,
            copy_audio=options.copy_audio,
            copy_subtitles=options.copy_subtitles,
            size=recipe.size,
            commit=commit,
            strict=options.strict,
        )
        keep = recipe.keep_parts and not (job.frames or job.source.is_dir() or job.is_animation)
        parts = Parts(job.target, _key(job, recipe, target, length, overlap), total) if keep else None
        warnings = [reader.warnings, target.warnings, parts.warnings if parts else []]
        chunks = ahead(chunked(reader, length, overlap, restorer.codec.frames))
        try:
            with target as writer, closing(chunks), Behind() as encoder:
                tail = []
                if parts and parts.chunks:
                    progress.line(f"{job.source}: goes on at frame {parts.frames + 1}")
                    _write_stored(parts, writer, encoder, interrupts)
                    tail = parts.tail(reader.info.time_base)

                def write(frame: "Frame") -> None:
                    picture = writer.prepare(frame.pixels, frame)
                    writer.write_prepared(picture, frame)
                    if parts:
                        parts.add(picture, frame)

                done, before = (parts.chunks, parts.frames) if parts else (0, 0)
                shown = partial(_shown, total, time.perf_counter(), before, progress, interrupts)
                for chunk, pixels in (through or partial(_one_by_one, restorer))(islice(chunks, done, None), recipe, shown):
                    finished, tail = blend(chunk, pixels, tail)
                    del chunk, pixels  # before the next ones are waited for
                    while finished:
                        encoder.call(write, finished.popleft())
                    done += 1
                    if parts:
                        encoder.call(parts.settle, done, tail)
                for frame in tail:
                    encoder.call(write, frame)
                encoder.call(writer.drain)
        except EbrError as error:
            if parts and not isinstance(error.__cause__, OSError):  # which another run may not meet
                parts.remove()
            raise
        if parts:
            parts.remove()
    if job.compare:
        warnings.append(compare(job, recipe, total, progress, interrupts, commit))
    for warning in chain(*warnings):
        progress.error(warning, "warning")
    info, seconds = reader.info, time.perf_counter() - started
    held = tuple(target.fates.outcomes)
    return Outcome(job, seconds, info.width, info.height, info.bits, writer.frames, recipe.note, holdings=held)


def compare_only(
    job: "Job",
    recipe: Recipe,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
) -> Outcome:
    """Only the comparison of a clip that an earlier run has restored, and then was killed."""
    from ebr_engine.media.video import open_video

    started = time.perf_counter()
    with open_video(job.target) as reader:
        info = reader.info
    for warning in compare(job, recipe, info.expected_frames, progress, interrupts, commit):
        progress.error(warning, "warning")
    return Outcome(job, time.perf_counter() - started, info.width, info.height, info.bits, info.expected_frames, recipe.note)


def _key(job: "Job", recipe: Recipe, target: Any, length: int, overlap: int) -> str:
    """What has to agree for the parts of an earlier run to be those of this one."""
    status = job.source.stat()
    source = [job.source.name, status.st_size, status.st_mtime_ns]
    return json.dumps([__version__, recipe.digest, source, length, overlap, target.pixel_format, target.height, target.width])


def _write_stored(parts: "Parts", writer: Any, encoder: Behind, interrupts: Interrupts) -> None:
    for picture, frame in parts.stored(writer.width, writer.height, writer.pixel_format, writer.info.time_base):
        interrupts.check()
        encoder.call(writer.write_prepared, picture, frame)


def _one_by_one(restorer: Any, chunks: "Iterator[Chunk]", recipe: Recipe, shown: Shown) -> "Iterator[tuple[Chunk, np.ndarray]]":
    for chunk in chunks:
        yield chunk, restore_chunk(restorer, chunk.pixels, chunk.start, recipe, shown(chunk))
        del chunk  # before the next one is waited for


def restore_chunk(
    restorer: Any, pixels: "np.ndarray", start: int, recipe: Recipe, callback: Callable[[int, int], None]
) -> "np.ndarray":
    """The restoration [F, H, W, 3] of the pixels of a chunk, whose first frame is number `start` of its clip."""
    import torch

    size = {"size": recipe.size} if recipe.size else {}
    clip = torch.from_numpy(pixels).movedim(-1, 0)[None]  # [1, 3, F, H, W]
    restored = restorer.run(clip, callback=callback, first=start, **recipe.run, **size)
    return recoloured(restored, clip, recipe)


def _shown(
    total: int | None, begun: float, before: int, progress: Progress, interrupts: Interrupts, chunk: "Chunk"
) -> Callable[[int, int], None]:
    """What is called after each step on a chunk: shows where the clip is, and stops there when that is asked for."""
    frames = f"frames {chunk.start + 1} to {chunk.start + len(chunk.frames)}" + (f" of {total}" if total else "")

    def on_step(index: int, steps: int) -> None:
        interrupts.check()
        done = chunk.start + len(chunk.frames) * index / steps
        rate = max(0.0, done - before) / (time.perf_counter() - begun)
        progress.share(done / total if total else 0, f"{frames}, step {index}/{steps}, {rate:.2g} fps")

    return on_step


def recoloured(restored: "Tensor", clip: "Tensor", recipe: Recipe) -> "np.ndarray":
    """The frames [F, H, W, 3] of a restored chunk [1, 3, F, H, W], with the colours of its input where the recipe asks for it."""
    frames = restored[0].movedim(0, -1).numpy()
    if recipe.colour_fix in (None, "none"):
        return frames

    from ebr_engine.media.colour_fix import fix_colours
    from ebr_engine.media.sizes import resized

    source = resized(clip, *recipe.size) if recipe.size else clip
    return fix_colours(frames, source[0].movedim(0, -1).numpy(), recipe.colour_fix)


def compare(
    job: "Job",
    recipe: Recipe,
    total: int | None,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
) -> list[str]:
    """Write the input and the finished output of a job as one clip; what of it could not be kept."""
    from ebr_engine.media.compare import compare_clips

    def on_frame(frame: int) -> None:
        interrupts.check()
        progress.share(1, f"comparing, frame {frame}" + (f" of {total}" if total else ""))

    options = recipe.request
    writing = {"copy_audio": options.copy_audio, "copy_subtitles": False, "commit": commit}
    return compare_clips(job.source, job.target, job.compare, options.compare, reading(options), writing, on_frame)


def reading(options: "RestoreRequest") -> dict[str, Any]:
    """What of a request says which frames are read, as `open_video` takes it."""
    return {"start": options.start, "frames": options.frames, "deinterlace": options.deinterlace, "fps": options.fps}


def some_frames(clip: Path, options: "RestoreRequest") -> "list[np.ndarray]":
    """A few frames [H, W, 3] of the part of a clip that is to be restored, at equal distances."""
    from ebr_engine.media.video import open_video

    with open_video(clip, **reading(options)) as reader:
        pictures = [next(iter(reader)).pixels]
        length = reader.info.duration or 0.0
    begin = options.start or 0.0
    for index in range(1, LOOKS if length else 1):
        there = options.with_(start=begin + length * index / LOOKS, frames=1)
        with suppress(EbrError), open_video(clip, **reading(there)) as reader:
            pictures += [frame.pixels for frame in reader]
    return pictures
