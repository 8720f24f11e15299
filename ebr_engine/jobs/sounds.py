"""The part of `ebr-engine restore` that does sound: samples in, chunks of frames through the engine, samples out.

A model works at one rate and one level. So a file is read twice: first for its level, then in chunks that are resampled, brought
to the model's level and restored. What comes back is the difference that the model makes, at the file's own rate and level, which
is added to the file's samples: what lies above the model's band, and what it leaves alone, stays as it was.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.backbones.registry import medium_of, restores
from ebr_engine.errors import EbrError
from ebr_engine.jobs.interrupts import Interrupts
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipe
from ebr_engine.media import SOUND
from ebr_engine.request import CLIP, FIELDS, RestoreRequest

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.jobs.files import Job

AUTO = "auto"
OF_SOUND = ("chunk_frames", "chunk_overlap", "strict")
OF_PICTURES = (
    "guess",
    "copy_clean",
    "color_fix",
    "quality",
    "compare",
    "size",
    "detail",
    "deconvolve",
    "tile",
    "tile_overlap",
    "tile_blend",
    "temporal_window",
)
GATE = 0.01  # share of the mean power below which a block counts as silence: 20 dB
SILENCE = 1e-6  # level at and below which there is nothing to restore


@dataclass(frozen=True)
class Piece:
    """A frame of sound: `pixels` [channels, hop], which chunks are cut from and blended to as a clip's are."""

    pixels: "np.ndarray"


def check_options(request: RestoreRequest) -> None:
    """`EbrError` for an option that says something of pictures or clips only, and for task auto, which looks at pictures."""
    if request.task == AUTO:
        raise EbrError("task auto looks at pictures; name what is wrong with a sound, for example --task noise")
    clips = [name for name, one in FIELDS.items() if one.metadata["stage"] == CLIP and name not in OF_SOUND]
    for name in (*clips, *OF_PICTURES):
        if getattr(request, name) != FIELDS[name].default:
            raise EbrError(f"{FIELDS[name].metadata['flags'][0]} is for pictures and clips; leave it out for sound")


def restore_sound(
    restorer: Any,
    job: "Job",
    recipe: Recipe,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
) -> Outcome:
    """Restore one sound file. A file under the final name is always whole, and given it by `commit(part, path)`."""
    from ebr_engine.media.holdings import not_kept_line
    from ebr_engine.media.sound.files import SoundReader, SoundWriter

    started = time.perf_counter()
    name = restorer.backbone.name
    if medium_of(name) != SOUND:
        raise EbrError(f"{job.source}: is sound, which {name} does not restore; {' or '.join(restores(SOUND))} does")
    reader = SoundReader(job.source)
    info = reader.info

    def shown(done: int, index: int, steps: int) -> None:
        interrupts.check()
        second = done * restorer.codec.hop / restorer.codec.rate
        progress.share(min(1.0, second / info.seconds), f"second {second:.0f} of {info.seconds:.0f}, step {index}/{steps}")

    level = level_of(resampled(reader.blocks(), info.rate, restorer.codec.rate, info.channels))
    with SoundWriter(job.target, reader, commit, recipe.request.strict) as writer:
        if level <= SILENCE:
            changes: Iterable[np.ndarray] = iter(())
        else:
            changes = differences(restorer, reader.blocks(), info.rate, info.channels, level, recipe, shown)
        for block in added(reader.blocks(), changes):
            interrupts.check()
            writer.write(block)
    if line := not_kept_line(writer.outcomes):
        progress.error(f"{job.source}: {line}", "warning")
    note = "  ".join(filter(None, (recipe.note, writer.note, "silent, copied as it is" if level <= SILENCE else "")))
    return Outcome(
        job,
        time.perf_counter() - started,
        bits=info.bits,
        rate=info.rate,
        channels=info.channels,
        length=info.length,
        note=note,
        holdings=tuple(writer.outcomes),
    )


def resampled(blocks: "Iterable[np.ndarray]", rate: int, wanted: int, channels: int) -> "Iterator[np.ndarray]":
    """Blocks [n, channels] at another rate, [m, channels] float32, aligned with what goes in."""
    import numpy as np

    if rate == wanted:
        yield from (block.astype(np.float32) for block in blocks)
        return

    from ebr_engine.media.sound.files import needed

    stream = needed("soxr").ResampleStream(rate, wanted, channels, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block.astype(np.float32)).reshape(-1, channels)
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels)


def level_of(blocks: "Iterable[np.ndarray]", length: int = 4096) -> float:
    """The root mean square of samples [n, channels] in blocks, over those stretches that are not silent."""
    import numpy as np

    powers = [
        float(np.square(block[first : first + length]).mean()) for block in blocks for first in range(0, len(block), length)
    ]
    mean = sum(powers) / max(1, len(powers))
    loud = [power for power in powers if power >= GATE * mean]
    return (sum(loud) / max(1, len(loud))) ** 0.5


def differences(
    restorer: Any,
    blocks: "Iterable[np.ndarray]",
    rate: int,
    channels: int,
    level: float,
    recipe: Recipe,
    shown: Callable[[int, int, int], None],
) -> "Iterator[np.ndarray]":
    """What restoring adds to samples [n, channels] of a level, in blocks [m, channels] at the same rate.

    `shown(frames, index, steps)` is called after each step.
    """
    from ebr_engine.media.chunking import blend, chunked

    codec = restorer.codec
    options = recipe.request
    length, overlap = restorer.chunk_size(options.chunk_frames, options.chunk_overlap)
    gain = codec.level / level
    pieces = framed(resampled(blocks, rate, codec.rate, channels), codec.hop, channels)

    def changed() -> "Iterator[np.ndarray]":
        tail: list[Piece] = []
        for chunk in chunked(pieces, length, overlap, codec.frames, cuts=False):
            pixels = chunk.pixels  # [F, channels, hop]
            settled, tail = blend(chunk, change(pixels, chunk.start), tail)
            yield from whole([piece.pixels for piece in settled])
        yield from whole([piece.pixels for piece in tail])

    def change(pixels: "np.ndarray", start: int) -> "np.ndarray":
        import torch

        samples = torch.from_numpy(pixels).movedim(1, 0).flatten(1) * gain  # [channels, F·hop]
        frames = len(pixels)
        callback = lambda index, steps: shown(start + frames * index // steps, index, steps)  # noqa: E731
        restored = restorer.run(codec.as_clip(samples), callback=callback, first=start, **recipe.run)
        return ((codec.as_samples(restored) - samples) / gain).unflatten(1, (frames, -1)).movedim(0, 1).numpy()

    def whole(frames: "list[np.ndarray]") -> "Iterator[np.ndarray]":
        import numpy as np

        if frames:  # [F, channels, hop] → [F·hop, channels]
            yield np.stack(frames).transpose(0, 2, 1).reshape(-1, channels)

    return resampled(changed(), codec.rate, rate, channels)


def framed(blocks: "Iterable[np.ndarray]", hop: int, channels: int) -> Iterator[Piece]:
    """Blocks of samples [n, channels] as frames of `hop` samples; the last one is filled up with silence."""
    import numpy as np

    left = np.zeros((0, channels), np.float32)
    for block in blocks:
        left = np.concatenate((left, block))
        count = len(left) // hop
        yield from map(Piece, left[: count * hop].reshape(count, hop, channels).transpose(0, 2, 1))
        left = left[count * hop :]
    if len(left):
        yield Piece(np.concatenate((left, np.zeros((hop - len(left), channels), np.float32))).T)


def added(blocks: "Iterable[np.ndarray]", changes: "Iterable[np.ndarray]") -> "Iterator[np.ndarray]":
    """Samples [n, channels] with the changes of the same samples, which come in blocks of other lengths; none are zero."""
    import numpy as np

    waiting: deque[np.ndarray] = deque()
    changes, count = iter(changes), 0
    for block in blocks:
        while count < len(block) and (more := next(changes, None)) is not None:
            waiting.append(more)
            count += len(more)
        result, place = np.array(block), 0
        while place < len(block) and waiting:
            part = waiting.popleft()
            taken = part[: len(block) - place]
            result[place : place + len(taken)] += taken
            place += len(taken)
            count -= len(taken)
            if len(taken) < len(part):
                waiting.appendleft(part[len(taken) :])
        yield result
