"""Pre-training of `mini-audio`: the course on synthesised sound, about half of it degraded, whose caption says so."""

import torch
from torch import Tensor

from ebr_engine.backbones.mini.model import MiniTextEncoder
from ebr_engine.backbones.mini_audio.codec import HOP, SoundCodec, frames_of
from ebr_engine.backbones.mini_audio.model import MINI_AUDIO, load_mini_audio, save_mini_audio
from ebr_engine.media.sound import degradations
from ebr_engine.training import synthesis
from ebr_engine.training.pretrain import Course, PretrainConfig
from ebr_engine.training.sounds import LEAD, SoundPool, levelled
from ebr_engine.training.supply import CLEAN_WORD

VOCABULARY = [*synthesis.CAPTION_WORDS, *degradations.CAPTION_WORDS, CLEAN_WORD]
MEASURED = 256  # crops that the codec's statistics are taken over


def batch(
    pool: SoundPool, codec: SoundCodec, text: MiniTextEncoder, config: PretrainConfig, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents [B, 128, F, 2, 1] of clean and degraded crops of `size` frames, and their captions' ids [B, 16]."""
    count = max(1, round(config.batch * config.sizes[0] / size))
    clean, captions = pool.crops(count, (LEAD + size) * HOP, generator)
    tasks = torch.randint(len(degradations.TASKS), (count,), generator=generator)
    tasks[torch.rand(count, generator=generator) >= config.degraded] = -1
    strength = torch.rand(count, generator=generator)
    dropped = torch.rand(count, generator=generator) < config.caption_dropout
    sounds, damages = clean.clone(), [(CLEAN_WORD,)] * count
    for number, task in enumerate(degradations.TASKS):
        chosen = (tasks == number).nonzero().flatten().tolist()
        if chosen:
            sounds[chosen], kinds = degradations.degrade(clean[chosen], task, generator, strength[chosen])
            for i, kind in zip(chosen, kinds):
                damages[i] = (degradations.strength_word(float(strength[i])), task, *filter(None, (kind,)))
    sounds = levelled(*2 * (sounds[:, LEAD * HOP :],), generator)[0]
    words = [() if gone else (*damage, *caption) for gone, damage, caption in zip(dropped, damages, captions)]
    return codec.encode(frames_of(sounds)), text.tokenize(words)


def measured(kind: type[SoundCodec], pool: SoundPool, generator: torch.Generator) -> SoundCodec:
    """A codec with its coefficients' statistics over clean crops; faint frequencies are kept above a fiftieth of the mean."""
    sounds = pool.crops(MEASURED, 64 * HOP, generator)[0]
    std = kind().analyse(levelled(sounds, sounds, generator)[0]).flatten(0, 1).std(0)
    std = std.clamp(min=0.02 * std.mean().item())
    return kind(scale=(std * std.mean()).sqrt())


COURSE = Course(
    model=MINI_AUDIO,
    vocabulary=VOCABULARY,
    codec=lambda sizes: SoundCodec,
    pool=lambda config, run: SoundPool(config.pool // 2, run * 10_000_000, config.scenes_per_second / 5),  # four times an image's
    measured=measured,
    batch=batch,
    save=save_mini_audio,
    begin=load_mini_audio,
)
