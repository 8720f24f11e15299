"""A filter for VapourSynth: `restore(clip, task="haze")` is a clip like any other.

Frames are asked for once, in order, as the engine needs them for its chunks; each result is kept until its time has come.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from ebr_engine.errors import EbrError
from ebr_engine.integrations.frames import recipe_for, request_of, restored, split_load
from ebr_engine.media.video.info import Frame

LOOKS = 3  # frames that task auto looks at
_TOP = {"RGB24": 255, "RGB48": 65535, "RGBS": 1.0}
_RESIZE = 'core.resize.Bicubic(clip, format=vs.RGBS, matrix_in_s="709")'


def restore(clip: Any, task: str | None = None, *, prompt: Any = None, restorer: Any = None, **options: Any) -> Any:
    """The clip, restored: of the same format, size and length, each frame with the properties of its source.

    `clip`: RGB24, RGB48 or RGBS of one size. `task` (`auto` looks at three frames now) or `prompt`, and `options`: as
    `Restorer.restore` takes them, with `chunk_frames`, `chunk_overlap`, `per_frame`, `color_fix` and `guess`, and, unless a
    loaded `restorer` is given, those of `Restorer`. Rendered from its first frame on, the result is that of
    `ebr-engine restore`; a jump begins a new chunk near the frame asked for. Raises `EbrError` for anything that cannot be met.
    """
    import vapoursynth as vs

    _check(clip, vs)
    load, asked = split_load(options)
    if restorer is not None and load:
        raise EbrError(f"a loaded restorer has its {', '.join(load)} already; give a restorer, or these")
    request = request_of(task, prompt, asked)
    if restorer is None:
        from ebr_engine.engine.restorer import Restorer

        restorer = Restorer(**load)

    def look() -> list[np.ndarray]:
        numbers = sorted({clip.num_frames * i // LOOKS for i in range(LOOKS)})
        return [pixels_of(clip.get_frame(number), clip.format.name) for number in numbers]

    recipe = recipe_for(restorer, request, look)
    results = _Results(clip, vs.core.num_threads, lambda frames: restored(restorer, frames, recipe, (clip.height, clip.width)))
    # The frame that the core asks for is an empty one: the sources are asked for by `_Results`, once.
    empty = clip.std.BlankClip(keep=True)
    return empty.std.ModifyFrame(empty, lambda n, f: results.at(n))


def _check(clip: Any, vs: Any) -> None:
    if not isinstance(clip, vs.VideoNode):
        raise EbrError(f"expected a clip, got a {type(clip).__name__}")
    if clip.format is None or not clip.width or not clip.height:
        raise EbrError("the clip changes its format or its size on the way; resize it to one first")
    if clip.format.name not in _TOP:
        raise EbrError(f"the clip is {clip.format.name}, not RGB24, RGB48 or RGBS; convert it first: {_RESIZE}")


def pixels_of(frame: Any, format: str) -> np.ndarray:
    """The pixels [H, W, 3] float32 in [0, 1] of a frame of this format."""
    planes = np.stack([np.asarray(frame[plane]) for plane in range(3)], axis=-1)
    return np.clip(planes.astype(np.float32) / np.float32(_TOP[format]), 0, 1)


def with_pixels(frame: Any, pixels: np.ndarray, format: str) -> Any:
    """A frame with these pixels [H, W, 3] in [0, 1], and with the properties of `frame`."""
    made = frame.copy()
    for plane in range(3):
        target = np.asarray(made[plane])
        values = pixels[..., plane] * np.float32(_TOP[format])
        target[...] = values if format == "RGBS" else np.rint(values).astype(target.dtype)
    return made


class _Results:
    """Restored frames by number, made in order from where they are first asked for, and kept while others may still come late."""

    def __init__(self, clip: Any, threads: int, restored: Any) -> None:
        self._clip, self._threads, self._restored = clip, threads, restored
        self._lock = threading.Lock()
        self._ready: OrderedDict[int, Any] = OrderedDict()
        self._sources: dict[int, Any] = {}  # frames that the engine has taken and not given back
        self._stream: Iterator[Frame] = iter(())
        self._next = clip.num_frames  # the number that the stream gives next; its end: there is no stream

    def at(self, number: int) -> Any:
        """The restored frame of this number."""
        with self._lock:  # the core asks from several threads
            if number not in self._ready:
                if not self._next <= number <= self._next + self._reach:
                    self._begin(max(0, number - self._threads))  # requests of several threads come in no order
                while self._next <= number:
                    self._advance()
            frame = self._ready[number]
            while len(self._ready) > self._reach:
                self._ready.popitem(last=False)
            return frame

    @property
    def _reach(self) -> int:
        """How far requests may lie apart and still belong to one rendering in order."""
        return self._threads + 8

    def _begin(self, number: int) -> None:
        self._ready.clear()
        self._sources.clear()
        self._stream, self._next = iter(self._restored(self._frames(number))), number

    def _frames(self, number: int) -> Iterator[Frame]:
        for n in range(number, self._clip.num_frames):
            self._sources[n] = self._clip.get_frame(n)
            yield Frame(pixels_of(self._sources[n], self._clip.format.name), n, Fraction(1))

    def _advance(self) -> None:
        try:
            frame = next(self._stream)
        except BaseException:
            self._next, self._stream = self._clip.num_frames, iter(())  # the next request begins anew
            raise
        source = self._sources.pop(frame.pts)
        self._ready[frame.pts] = with_pixels(source, frame.pixels, self._clip.format.name)
        self._next = frame.pts + 1
