"""A pool of procedural scenes that a background process keeps renewing, and batches of crops drawn from it."""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from ebr_engine.media.degradations import seeds
from ebr_engine.training.procedural import CAPTION_WORDS, render


class ScenePool:
    """`capacity` scenes in shared memory: pixels, depth and captions.

    Filled with the scenes numbered from `first`; with `rate` > 0 a background process goes on replacing the oldest ones at
    about that many scenes a second. Use it as a context manager, so that the process ends.
    """

    def __init__(self, capacity: int, size: int = 256, first: int = 0, rate: float = 0.0, workers: int = 2):
        if not (first in seeds("train") and first + capacity <= seeds("train").stop):
            raise ValueError(f"scenes {first} to {first + capacity} leave the range of training seeds")
        self.pixels = torch.empty(capacity, 4, size, size, dtype=torch.uint8).share_memory_()  # RGB and depth
        self.words = torch.zeros(capacity, 3, dtype=torch.int64).share_memory_()  # places in CAPTION_WORDS
        last = first + capacity
        run_processes([_start(self.pixels, self.words, first, range(first + i, last, workers), 0.0) for i in range(workers)])
        self._renewer = _start(self.pixels, self.words, first, range(last, seeds("train").stop), rate) if rate > 0 else None

    def crops(
        self, count: int, size: int | tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
        """Random crops of a size (h, w) or side: clean [count, 3, h, w] float32 in [0, 1], depth [count, 1, h, w], captions.

        Flipped at random; half of them taken at twice the size and halved, where the scenes are large enough.
        """
        side = self.pixels.shape[-1]
        size = (size, size) if isinstance(size, int) else size
        batch = torch.empty(count, 4, *size)
        captions = []
        for i in range(count):
            slot, top, left, flip, halve = torch.randint(0, 2**31, (5,), generator=generator).tolist()
            slot %= len(self.pixels)
            scale = 2 if halve % 2 and max(size) * 2 <= side else 1
            height, width = size[0] * scale, size[1] * scale
            top, left = top % (side - height + 1), left % (side - width + 1)
            crop = self.pixels[slot, :, top : top + height, left : left + width].float()
            if scale == 2:
                crop = F.avg_pool2d(crop, 2)
            batch[i] = crop.flip(-1) if flip % 2 else crop
            captions.append(tuple(CAPTION_WORDS[word] for word in self.words[slot].tolist()))
        batch /= 255
        return batch[:, :3], batch[:, 3:], captions

    def __enter__(self) -> "ScenePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._renewer is not None:
            self._renewer.terminate()
            self._renewer.join()


@functools.lru_cache(maxsize=1)
def still_pool(capacity: int) -> ScenePool:
    """A pool that nothing renews, kept for the next run of this process: its scenes are always the same."""
    return ScenePool(capacity)


def _start(*arguments: object) -> multiprocessing.Process:
    return start_process(_render_into, *arguments)


def start_process(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    """A process that calls a function, begun; it ends with this one."""
    # Not forked: a forked child of a process whose thread pool runs can wait for ever.
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def run_processes(processes: list[multiprocessing.Process]) -> None:
    """Until all have ended; RuntimeError where one failed."""
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process that renders scenes failed; its error stands above")


def _render_into(pixels: Tensor, words: Tensor, first: int, numbers: range, rate: float) -> None:
    """Render scenes into their slots, at most `rate` a second (0: as fast as it goes)."""
    torch.set_num_threads(1)
    for number in numbers:
        started = time.monotonic()
        scene = render(number, pixels.shape[-1])
        slot = (number - first) % len(pixels)
        depth = np.round(scene.depth * 255).astype(np.uint8)
        pixels[slot] = torch.from_numpy(np.concatenate((scene.image.transpose(2, 0, 1), depth[None])))
        words[slot] = torch.tensor([CAPTION_WORDS.index(word) for word in scene.caption])
        if rate > 0:
            time.sleep(max(0.0, 1 / rate - (time.monotonic() - started)))
