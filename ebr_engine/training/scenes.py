"""A pool of procedural scenes, or of windows of your own pictures, that processes keep renewing, and crops drawn from it."""

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, multiprocessing
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import seeds
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training import own_pictures
from ebr_engine.training.procedural import CAPTION_WORDS, render


class ScenePool:
    """`capacity` scenes in shared memory: pixels, depth and captions.

    Filled with the scenes numbered from `first` by `workers` processes; with `rate` > 0 other processes (`renewers`) go on
    replacing the oldest ones at about that many scenes a second. Use it as a context manager, so that they end. `data`: windows
    of the pictures and clips of that folder in place of scenes; they have no depth and no words. `keep`: a file that the first
    scenes are read from if it is there, and written to if not: rendered once, for all runs. `EbrError` where it holds others.
    """

    def __init__(
        self,
        capacity: int,
        size: int = 256,
        first: int = 0,
        rate: float = 0.0,
        workers: int = 2,
        renewers: int = 1,
        data: Path | None = None,
        keep: Path | None = None,
    ):
        if not (first in seeds("train") and first + capacity <= seeds("train").stop):
            raise ValueError(f"scenes {first} to {first + capacity} leave the range of training seeds")
        self.pixels = torch.empty(capacity, 4, size, size, dtype=torch.uint8).share_memory_()  # RGB and depth
        self.words = torch.zeros(capacity, 3, dtype=torch.int64).share_memory_()  # places in CAPTION_WORDS
        self.has_depth = data is None
        settings = {} if data is None else {"files": own_pictures.sources(data)}
        about = {"first": first, "size": size, "data": str(data.resolve()) if data else "scenes"}
        last = first + capacity
        if keep is None or not self._read(keep, about):
            _run(
                [_start(self.pixels, self.words, first, range(first + i, last, workers), 0.0, **settings) for i in range(workers)]
            )
            if keep is not None:
                write_tensors(keep, {"pixels": self.pixels, "words": self.words}, {"scenes": json.dumps(about)})
        stop, rate = seeds("train").stop, rate / renewers
        new = [range(last + i, stop, renewers) for i in range(renewers)] if rate > 0 else []
        self._renewers = [_start(self.pixels, self.words, first, numbers, rate, **settings) for numbers in new]

    def _read(self, path: Path, about: dict[str, object]) -> bool:
        """Take the first scenes from a file; False where there is none."""
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                found, tensors = (
                    json.loads((file.metadata() or {})["scenes"]),
                    {name: file.get_tensor(name) for name in ("pixels", "words")},
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise EbrError(f"{path} is no file of scenes: {' '.join(str(error).split())}") from error
        if found != about or tensors["pixels"].shape != self.pixels.shape:
            raise EbrError(f"{path} holds other scenes ({found}, {len(tensors['pixels'])} of them); name another file")
        self.pixels.copy_(tensors["pixels"])
        self.words.copy_(tensors["words"])
        return True

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
            captions.append(tuple(CAPTION_WORDS[word] for word in self.words[slot].tolist()) if self.has_depth else ())
        batch /= 255
        return batch[:, :3], batch[:, 3:], captions

    def __getstate__(self) -> dict[str, object]:
        """What another process needs of it: the shared scenes, not the processes that renew them."""
        return self.__dict__ | {"_renewers": []}

    def __enter__(self) -> "ScenePool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._renewers:
            process.terminate()
            process.join()


@functools.lru_cache(maxsize=1)
def still_pool(capacity: int) -> ScenePool:
    """A pool that nothing renews, kept for the next run of this process: its scenes are always the same."""
    return ScenePool(capacity)


def _start(*arguments: object, **settings: object) -> multiprocessing.Process:
    return start_process(_render_into, *arguments, **settings)


def start_process(function: Callable[..., None], *arguments: object, **settings: object) -> multiprocessing.Process:
    """A process that calls a function, begun; it ends with this one, even where this one is killed."""
    # Not forked: a forked child of a process whose thread pool runs can wait for ever.
    given = (function, *arguments)
    process = multiprocessing.get_context("spawn").Process(target=_accompanied, args=given, kwargs=settings, daemon=True)
    process.start()
    return process


def _accompanied(function: Callable[..., None], *arguments: object, **settings: object) -> None:
    """Call a function in a process that ends as soon as its parent has: a killed parent cannot end its children."""

    def watch() -> None:
        wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    function(*arguments, **settings)


def _run(processes: list[multiprocessing.Process]) -> None:
    wait_for(processes)


def wait_for(processes: list[multiprocessing.Process]) -> None:
    """Until all have ended; RuntimeError where one failed."""
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process that renders scenes failed; its error stands above")


def _render_into(pixels: Tensor, words: Tensor, first: int, numbers: range, rate: float, files: Sequence[Path] = ()) -> None:
    """Render scenes, or windows of files, into their slots, at most `rate` a second (0: as fast as it goes)."""
    torch.set_num_threads(1)
    for number in numbers:
        started = time.monotonic()
        slot = (number - first) % len(pixels)
        if files:
            pixels[slot, :3] = torch.from_numpy(own_pictures.window(files, number, pixels.shape[-1])).permute(2, 0, 1)
        else:
            scene = render(number, pixels.shape[-1])
            depth = np.round(scene.depth * 255).astype(np.uint8)
            pixels[slot] = torch.from_numpy(np.concatenate((scene.image.transpose(2, 0, 1), depth[None])))
            words[slot] = torch.tensor([CAPTION_WORDS.index(word) for word in scene.caption])
        if rate > 0:
            time.sleep(max(0.0, 1 / rate - (time.monotonic() - started)))
