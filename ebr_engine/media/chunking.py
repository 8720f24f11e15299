"""Clips of any length through a model that takes a bounded number of frames: overlapping chunks, blended back.

Chunks always hold source frames. They share `overlap` frames, over which one restoration fades into the next by a raised
cosine (a Hann window's flank), and never reach over a scene cut. The last chunk of a scene begins as early as it takes to
be of full length; only a scene shorter than a chunk is padded, back and forth, up to a length that the model takes.
Everything streams: not more than two chunks are held at any time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.media.video.info import Frame

_CELLS = (18, 32)  # a picture is compared by its luma in so many cells: motion and noise within one do not count
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # Rec. 709
_LEAST = 0.25  # unlikeness of the frames at a cut
_FACTOR = 3.0  # and how many times the scene's usual one
_VISIBLE = 0.004  # mean difference of luma: below, unlikeness is that of noise
_MEMORY = 12  # frames that tell what is usual


@dataclass(frozen=True, eq=False)
class Chunk:
    """Successive source frames of one scene, for one run of a model."""

    frames: tuple[Frame, ...]
    start: int  # the first frame's number in the clip
    skip: int  # leading frames that are context only: the chunk before has finished them
    overlap: int  # frames after those that fade over from the chunk before; 0 at the start of a scene
    hold: int  # frames at the end that the chunk after may fade out
    padded: int  # repetitions at the end, to a length that the model takes

    def __len__(self) -> int:
        """The frames that the model sees."""
        return len(self.frames) + self.padded

    @property
    def pixels(self) -> np.ndarray:
        """[F, H, W, 3] float32 RGB in [0, 1], padding included: a new array at every call."""
        return np.stack([self.frames[_bounce(i, len(self.frames))].pixels for i in range(len(self))])


def chunked(frames: Iterable[Frame], length: int, overlap: int, rule: Callable[[int], int], cuts: bool = True) -> Iterator[Chunk]:
    """Cut a stream of frames into chunks of `length`, of which neighbours share at least `overlap` frames.

    `rule(n)` is the least number of frames not below n that the model takes, such as the next 4k + 1; it has to take
    `length`. `cuts` looks for scene cuts (`scenes`), which no chunk crosses. Raises EbrError on impossible lengths.
    """
    if length < 1 or rule(length) != length:
        raise EbrError(f"the model takes no chunks of {length} frames; the next length that it takes is {rule(max(1, length))}")
    if not 0 <= overlap < length:
        raise EbrError(f"the chunk overlap must be at least 0 and less than the {length} frames of a chunk, not {overlap}")
    held: deque[Frame] = deque()  # the last `length` frames of the scene
    count = fresh = 0  # frames read; of the held ones, those that no chunk has had yet
    first_in_scene = True
    step = length - overlap

    def chunk() -> Chunk:
        shared = len(held) - fresh
        fade = 0 if first_in_scene else overlap
        return Chunk(tuple(held), count - len(held), shared - fade, fade, overlap, rule(len(held)) - len(held))

    for frame, cut in scenes(frames) if cuts else ((frame, False) for frame in frames):
        if cut:
            if fresh:
                yield chunk()
            held.clear()
            fresh, first_in_scene = 0, True
        if len(held) == length:
            held.popleft()
        held.append(frame)
        count, fresh = count + 1, fresh + 1
        if fresh == (length if first_in_scene else step):
            yield chunk()
            fresh, first_in_scene = 0, False
    if fresh:
        yield chunk()


def cross_fade(restored: Iterable[tuple[Chunk, np.ndarray]]) -> Iterator[Frame]:
    """Blend chunks, each with its restoration [F, H, W, 3] (F counts the padding), into the frames of the clip, in order."""
    tail: list[Frame] = []
    for chunk, pixels in restored:
        finished, tail = blend(chunk, pixels, tail)
        del chunk, pixels  # before the next ones are made
        while finished:
            yield finished.popleft()
    yield from tail


def blend(chunk: Chunk, pixels: np.ndarray, tail: Sequence[Frame]) -> tuple[deque[Frame], list[Frame]]:
    """Fade the frames that the chunk before held back, `tail`, into a chunk's restoration [F, H, W, 3].

    Gives the frames that are final now, and those that this chunk holds back for the next one, or for the end.
    The weights of the two sides sum to one; where both agree, the result is exactly what they agree on.
    """
    if len(pixels) != len(chunk):
        raise ValueError(f"the chunk has {len(chunk)} frames, its restoration {len(pixels)}")
    finished = deque([] if chunk.overlap else tail)
    held = []
    last = len(chunk.frames) - chunk.hold
    for index in range(chunk.skip, len(chunk.frames)):
        picture, position = pixels[index], index - chunk.skip
        if position < chunk.overlap:
            weight = np.float32(0.5 - 0.5 * np.cos(np.pi * (position + 0.5) / chunk.overlap))
            before = tail[position].pixels
            picture = before + weight * (picture - before)
        frame = replace(chunk.frames[index], pixels=picture)
        if index < last:
            finished.append(frame)
        else:
            held.append(replace(frame, pixels=np.array(picture)))  # a view would keep the whole chunk
    return finished, held


def scenes(frames: Iterable[Frame]) -> Iterator[tuple[Frame, bool]]:
    """Pair every frame with whether a new scene begins with it.

    The unlikeness of two frames is the energy of their difference over that of both, of luma in coarse cells without its
    mean; it lies near 1 for unrelated pictures, and flicker, haze and noise leave it low. A cut is an unlikeness of at
    least a quarter and of three times what is usual around it (its median), both of the next frame and of the one after:
    a flash of one frame is none. Reads one frame ahead.
    """
    usual: deque[float] = deque(maxlen=_MEMORY)
    before = None  # cells of the last frame that was no flash
    now = None  # the frame to decide on, its cells
    for following in chain(((frame, _cells(frame.pixels)) for frame in frames), [None]):
        if now is not None:
            frame, cells = now
            cut = flash = False
            if before is not None:
                change = _unlikeness(before, cells)
                ahead = [_unlikeness(cells, following[1])] if following else []
                least = max(_LEAST, _FACTOR * float(np.median([*usual, *ahead] or [0])))
                if change > least:
                    flash = following is not None and _unlikeness(before, following[1]) <= least
                    cut = not flash
                else:
                    usual.append(change)
            if cut:
                usual.clear()
            if not flash:
                before = cells
            yield frame, cut
        now = following


def _cells(pixels: np.ndarray) -> np.ndarray:
    """Mean luma in a coarse grid, of cells of at least 8 × 8 pixels where the picture allows."""
    luma = pixels @ _LUMA
    for axis, most in enumerate(_CELLS):
        size = luma.shape[axis]
        starts = np.linspace(0, size, min(most, max(1, size // 8)), endpoint=False).astype(int)
        counts = np.diff(np.append(starts, size))
        luma = np.add.reduceat(luma, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return luma


def _unlikeness(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b|² / (|a|² + |b|²) of two grids without their means: 0 for the same, about 1 for unrelated ones."""
    if np.abs(a - b).mean() < _VISIBLE:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.square(a - b).sum() / max(np.square(a).sum() + np.square(b).sum(), 1e-12))


def _bounce(index: int, count: int) -> int:
    """Walk back and forth over `count` frames: 0, 1, 2, 1, 0, 1 ... for three."""
    if count == 1:
        return 0
    index %= 2 * (count - 1)
    return min(index, 2 * (count - 1) - index)
