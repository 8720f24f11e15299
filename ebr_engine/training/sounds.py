"""A pool of synthesised sounds that a background process keeps renewing, and samples of it to learn from."""

import functools
import time

import torch
from torch import Tensor

from ebr_engine.backbones.mini_audio.codec import HOP, LEVEL, frames_of
from ebr_engine.media.sound.degradations import degrade, seeds
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import seeded
from ebr_engine.training.scenes import start_process, wait_for
from ebr_engine.training.synthesis import CAPTION_WORDS, LENGTH, check_installed, render

LEAD = 24  # frames before a crop that are degraded too, so that a room's sound is there at its beginning
LEAST = 0.1 * LEVEL  # level up to which a quiet crop is raised as any other
SPREAD = 4.0  # dB, standard deviation of a crop's level about its file's
FULL = 16384  # of the pool's 16 bit: a clip's 1.0


class SoundPool:
    """`capacity` clips in shared memory with their captions; renewed as a `ScenePool` is. Raises `EbrError` without espeak-ng."""

    def __init__(self, capacity: int, first: int = 0, rate: float = 0.0, workers: int = 2):
        check_installed()
        if not (first in seeds("train") and first + capacity <= seeds("train").stop):
            raise ValueError(f"sounds {first} to {first + capacity} leave the range of training seeds")
        self.samples = torch.empty(capacity, LENGTH, dtype=torch.int16).share_memory_()
        self.words = torch.full((capacity, 2), -1, dtype=torch.int64).share_memory_()  # places in CAPTION_WORDS, or none
        last, shared = first + capacity, (self.samples, self.words, first)
        wait_for([start_process(_render_into, *shared, range(first + i, last, workers), 0.0) for i in range(workers)])
        renewed = range(last, seeds("train").stop)
        self._renewer = start_process(_render_into, *shared, renewed, rate) if rate > 0 else None

    def crops(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, list[tuple[str, ...]]]:
        """Random crops [count, length] float32, some of them upside down, and their captions."""
        batch, captions = torch.empty(count, length), []
        for i in range(count):
            slot, start, flip = torch.randint(0, 2**31, (3,), generator=generator).tolist()
            slot %= len(self.samples)
            start %= LENGTH - length + 1
            batch[i] = self.samples[slot, start : start + length].float() * ((1 - flip % 2 * 2) / FULL)
            captions.append(tuple(CAPTION_WORDS[word] for word in self.words[slot].tolist() if word >= 0))
        return batch, captions

    def __enter__(self) -> "SoundPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._renewer is not None:
            self._renewer.terminate()
            self._renewer.join()


@functools.lru_cache(maxsize=1)
def still_sounds(capacity: int) -> SoundPool:
    """A pool that nothing renews, kept for the next run of this process: its sounds are always the same."""
    return SoundPool(capacity)


class SoundSamples:
    """Crops of synthesised sounds, degraded by the task; a share of `config.intact` is not."""

    def __init__(self, config: LearnConfig, pool: SoundPool):
        self.config, self.pool = config, pool

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded and clean [128, F, 2, 1] of sample `number`, as `data.Samples` has them."""
        generator = seeded(self.config.seed, "sound", number)
        clean, _ = self.pool.crops(1, (LEAD + self.config.frames) * HOP, generator)
        degraded, _ = degrade(clean, self.config.task, generator)
        if float(torch.rand((), generator=generator)) < self.config.intact:
            degraded = clean
        pair = levelled(degraded[:, LEAD * HOP :], clean[:, LEAD * HOP :], generator)
        return tuple(frames_of(sound)[0] for sound in pair)


def levelled(degraded: Tensor, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Degraded and clean [B, n], both by the gain that brings the degraded one to about the level that restoring does."""
    level = degraded.square().mean(1, keepdim=True).sqrt().clamp(min=LEAST)
    gain = LEVEL / level * 10 ** (SPREAD / 20 * torch.randn(len(clean), 1, generator=generator))
    return degraded * gain, clean * gain


def _render_into(samples: Tensor, words: Tensor, first: int, numbers: range, rate: float) -> None:
    """Synthesise clips into their slots, at most `rate` a second (0: as fast as it goes)."""
    torch.set_num_threads(1)
    for number in numbers:
        started = time.monotonic()
        sound = render(number)
        slot = (number - first) % len(samples)
        samples[slot] = (torch.from_numpy(sound.samples) * FULL).round().clamp(-32768, 32767).to(torch.int16)
        places = [CAPTION_WORDS.index(word) for word in sound.caption]
        words[slot] = torch.tensor([*places, -1][:2])
        if rate > 0:
            time.sleep(max(0.0, 1 / rate - (time.monotonic() - started)))
