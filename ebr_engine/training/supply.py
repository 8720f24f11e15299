"""Crops of scenes with their captions, clean and degraded: made when asked for, or ahead by processes and kept on a device."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

import torch
from torch import Tensor, multiprocessing

from ebr_engine.media import degradations
from ebr_engine.training.scenes import ScenePool, start_process

CLEAN_WORD = "clean"
KEPT = 2**29  # bytes of crops of one size that are kept on a device
AHEAD = 3  # batches that a process makes before it waits
PATIENCE = 120.0  # seconds after which processes that gave nothing are given up


@dataclass(frozen=True)
class Recipe:
    """What crops are made: their sides, how many of each a batch has and how often; shares degraded and without caption."""

    sizes: Sequence[int]
    counts: Mapping[int, int]
    odds: Sequence[float]
    degraded: float
    caption_dropout: float

    def size(self, generator: torch.Generator) -> int:
        """A side, drawn by the odds."""
        return self.sizes[int(torch.multinomial(torch.tensor(self.odds), 1, generator=generator))]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crops_of(pool: ScenePool, recipe: Recipe, size: int, generator: torch.Generator) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Crops [B, 3, size, size] float32 in [0, 1], clean and degraded, shuffled by construction, and their captions."""
    count = recipe.counts[size]
    clean, depth, captions = pool.crops(count, size, generator)
    tasks = torch.randint(len(degradations.TASKS), (count,), generator=generator)
    tasks[torch.rand(count, generator=generator) >= recipe.degraded] = -1
    strength = torch.rand(count, generator=generator)
    dropped = torch.rand(count, generator=generator) < recipe.caption_dropout
    images = clean.clone()
    for number, task in enumerate(degradations.TASKS):
        chosen = (tasks == number).nonzero().flatten()
        if len(chosen):
            far = depth[chosen] if pool.has_depth else None
            images[chosen] = degradations.degrade(clean[chosen], task, generator, depth=far, strength=strength[chosen])
    words = []
    for i, caption in enumerate(captions):
        damage = (CLEAN_WORD,)
        if tasks[i] >= 0:
            damage = (degradations.strength_word(float(strength[i])), degradations.TASKS[tasks[i]])
        words.append(() if dropped[i] else (*damage, *caption))
    return images, words


@dataclass
class Supply:
    """Crops made ahead by `workers` processes and kept on `device`, from where a step draws them at random.

    A device that is faster than the processes meets crops again, with other noise; the oldest make room for new ones. Use it
    as a context manager, so that the processes end. `tokens` (from words to ids [16]) is a dict of places.
    """

    pool: ScenePool
    recipe: Recipe
    places: Mapping[str, int]
    rows: int  # of a caption's ids
    workers: int
    device: torch.device
    seed: int
    made: int = 0  # crops that came
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> "Supply":
        context = multiprocessing.get_context("spawn")
        self.queue = context.Queue(AHEAD * self.workers)
        about = self.pool, self.recipe, self.places, self.rows, self.queue
        self.processes = [start_process(make, *about, self.seed + i) for i in range(self.workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of crops [B, 3, size, size] float32 and captions' ids [B, rows], on the device."""
        self.take(wait=False)
        while not self.filled.get(size):
            self.take(wait=True)
        return self.draw_kept(size, generator)

    def draw_kept(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same of what is there."""
        images, ids = self.kept[size]
        there = min(self.filled[size], len(images))
        chosen = torch.randint(there, (self.recipe.counts[size],), generator=generator).to(self.device)
        return images[chosen].float() / 255, ids[chosen]

    def take(self, wait: bool) -> None:
        """Take in the batches that are there; `wait` for one."""
        for _ in range(AHEAD * self.workers):
            try:
                size, images, ids = self.queue.get(timeout=PATIENCE) if wait else self.queue.get_nowait()
            except Empty:
                if wait:
                    raise RuntimeError("the processes that make crops give none; their errors stand above") from None
                return
            wait = False
            self.keep(size, images, ids)

    def keep(self, size: int, images: Tensor, ids: Tensor) -> None:
        """Put a batch in place of the oldest crops."""
        if size not in self.kept:
            room = max(KEPT // images[0].numel(), len(images))
            self.kept[size] = (
                torch.empty(room, *images.shape[1:], dtype=torch.uint8, device=self.device),
                torch.empty(room, *ids.shape[1:], dtype=torch.int64, device=self.device),
            )
        room = len(self.kept[size][0])
        slots = (self.filled.get(size, 0) + torch.arange(len(images))) % room
        for store, new in zip(self.kept[size], (images, ids)):
            store[slots.to(self.device)] = new.to(self.device)
        self.filled[size] = self.filled.get(size, 0) + len(images)
        self.made += len(images)


def make(pool: ScenePool, recipe: Recipe, places: Mapping[str, int], rows: int, queue: Any, seed: int) -> None:
    """Make batches for ever, in a process of its own; crops are rounded to 8 bits, as pictures are."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        size = recipe.size(generator)
        images, words = crops_of(pool, recipe, size, generator)
        ids = torch.zeros(len(words), rows, dtype=torch.int64)
        for row, caption in zip(ids, words):
            numbers = [places[word] for word in caption] + [1]
            row[: len(numbers)] = torch.tensor(numbers)
        queue.put((size, (images * 255).round_().to(torch.uint8), ids))
