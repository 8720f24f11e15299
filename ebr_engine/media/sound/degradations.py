"""Seeded synthetic degradations of clean sound: noise, clipping and reverberation.

Everything random comes from the caller's CPU generator, so that a seed means the same degradation everywhere. Sound is
[B, n] float32 at 16 kHz at any level: noise is measured against the sound's own, and so is what is cut off.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebr_engine.media.degradations import seeds, strength_word

__all__ = ["CAPTION_WORDS", "NOISES", "TASKS", "degrade", "mixed_at", "seeds", "strength_word"]

TASKS = ("noise", "clipping", "reverb")
NOISES = ("white", "coloured", "hum", "wind", "crackle", "machine", "babble")
CAPTION_WORDS = (*TASKS, *NOISES, "light", "moderate", "heavy")
RATE = 16000
SNR = (20.0, -2.0)  # dB, from the mildest to the strongest noise
KEPT = (0.6, 0.08)  # share of the peak at which sound is cut off
DECAY = (0.15, 0.9)  # seconds in which a room's sound falls by 60 dB
DIRECT = (8.0, -4.0)  # dB of the direct sound over the room's
FLOOR = 1e-4  # least level that counts as sound


def degrade(
    clean: Tensor,
    task: str,
    generator: torch.Generator,
    strength: Tensor | None = None,
    kinds: Sequence[str] | None = None,
) -> tuple[Tensor, list[str]]:
    """Degrade clean [B, n] by one of `TASKS`; the result, and for each a word more for its caption (a noise's kind, or "").

    `strength` [B] in [0, 1]: 0 mild, 1 ruined; None draws one a sample, uniformly. `kinds`: of each one's noise,
    of `NOISES`; drawn for None. ValueError for another task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of: {', '.join(TASKS)}")
    drawn = torch.rand(len(clean), generator=generator)
    strength = drawn if strength is None else strength
    results, words = [], []
    for i, (one, how) in enumerate(zip(clean, strength.tolist())):
        if task == "noise":
            drawn = int(torch.randint(len(NOISES), (1,), generator=generator))
            kind = kinds[i] if kinds else NOISES[drawn]
            noise = MAKERS[kind](one, generator)
            results.append(mixed_at(one, noise, _between(SNR, how)))
        else:
            kind = ""
            results.append((_clipped if task == "clipping" else _reverberated)(one, how, generator))
        words.append(kind)
    return torch.stack(results), words


def mixed_at(clean: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Sound [n] with noise [n] at a signal-to-noise ratio in dB, over all of both."""
    level = clean.square().mean().sqrt().clamp(min=FLOOR)
    return clean + noise * (level / noise.square().mean().sqrt().clamp(min=1e-9)) * 10 ** (-snr / 20)


def _between(span: tuple[float, float], strength: float) -> float:
    return span[0] + (span[1] - span[0]) * strength


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _shaped(length: int, gain: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """White noise [length] whose spectrum is multiplied by `gain` of the frequencies in Hz."""
    spectrum = torch.fft.rfft(torch.randn(length, generator=generator))
    return torch.fft.irfft(spectrum * gain(torch.fft.rfftfreq(length, 1 / RATE)), length)


def _smooth(length: int, knots: int, generator: torch.Generator) -> Tensor:
    """A random curve [length] in [0, 1] through so many knots."""
    values = torch.rand(1, 1, max(2, knots), generator=generator)
    return torch.nn.functional.interpolate(values, length, mode="linear", align_corners=True).flatten()


def _white(clean: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(len(clean), generator=generator)


def _coloured(clean: Tensor, generator: torch.Generator) -> Tensor:
    """A random tilt, from -9 to +3 dB an octave, with a random broad curve over it: fans, rooms, microphones, tape."""
    tilt, curve = _uniform(generator, -1.5, 0.5), 20 * (_smooth(512, 6, generator) - 0.5)

    def gain(frequency: Tensor) -> Tensor:
        place = (frequency / (RATE / 2) * 511).long().clamp(max=511)
        return (frequency.clamp(min=40) / 1000) ** tilt * 10 ** (curve[place] / 20)

    return _shaped(len(clean), gain, generator)


def _hum(clean: Tensor, generator: torch.Generator) -> Tensor:
    """The mains and its harmonics over a little hiss."""
    base = (50.0, 60.0)[int(torch.randint(2, (1,), generator=generator))] * _uniform(generator, 0.995, 1.005)
    time = torch.arange(len(clean)) / RATE
    fall = _uniform(generator, 0.5, 1.3)
    total = torch.zeros(len(clean))
    for k in range(1, 1 + int(_uniform(generator, 4, 25))):
        phase, level = _uniform(generator, 0, 2 * math.pi), _uniform(generator, 0.2, 1) * k**-fall
        total += level * torch.sin(2 * math.pi * base * k * time + phase)
    hiss = torch.randn(len(clean), generator=generator) * _uniform(generator, 0.01, 0.15)
    return total / total.square().mean().sqrt() + hiss


def _wind(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Low rumble that swells: wind in a microphone, passing cars."""
    corner, order = _uniform(generator, 80, 500), _uniform(generator, 1, 2.5)
    rumble = _shaped(len(clean), lambda f: (1 + (f / corner) ** 2) ** (-order / 2), generator)
    swell = _smooth(len(clean), 2 + int(_uniform(generator, 1, 6) * len(clean) / RATE), generator)
    return rumble / rumble.square().mean().sqrt() * (0.15 + swell**2)


def _crackle(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Clicks, each a short damped ring, over a little hiss: records, bad contacts, dishes."""
    length, rate = len(clean), 10 ** _uniform(generator, 0.5, 2.2)
    hits = (torch.rand(length, generator=generator) < rate / RATE).float() * torch.randn(length, generator=generator)
    time = torch.arange(1024) / RATE
    ring = torch.exp(-time / 10 ** _uniform(generator, -3.7, -2.2)) * torch.cos(
        2 * math.pi * _uniform(generator, 300, 6000) * time
    )
    clicks = _convolved(hits, ring)
    hiss = _shaped(length, lambda f: (f.clamp(min=40) / 1000) ** -0.3, generator)
    level = clicks.square().mean().sqrt().clamp(min=1e-3)
    return clicks + hiss * level * _uniform(generator, 0.02, 0.4)


def _machine(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that beats at a steady rate, with a few whining tones: engines, fans, drills."""
    length = len(clean)
    time = torch.arange(length) / RATE
    beat = 1 + _uniform(generator, 0.1, 0.9) * torch.sin(2 * math.pi * _uniform(generator, 2, 60) * time)
    total = _coloured(clean, generator)
    total = total / total.square().mean().sqrt() * beat
    drift = (_smooth(length, 4, generator) - 0.5) * _uniform(generator, 0, 0.06)
    for _ in range(int(_uniform(generator, 0, 5))):
        turns = torch.cumsum(_uniform(generator, 60, 4000) * (1 + drift), 0) / RATE
        total += _uniform(generator, 0.05, 0.7) * torch.sin(2 * math.pi * turns)
    return total


def _babble(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Many voices at once: the sound itself, backwards, from several beginnings and at several speeds."""
    total, backwards = torch.zeros(len(clean)), clean.flip(0)
    for _ in range(int(_uniform(generator, 4, 9))):
        speed = _uniform(generator, 0.8, 1.25)
        places = (torch.arange(len(clean)) * speed + _uniform(generator, 0, len(clean))).long() % len(clean)
        total += _uniform(generator, 0.4, 1) * backwards[places]
    return total + _coloured(clean, generator) * total.square().mean().sqrt().clamp(min=FLOOR) * 0.05


MAKERS = dict(zip(NOISES, (_white, _coloured, _hum, _wind, _crackle, _machine, _babble)))  # (clean, generator) → noise [n]


def _clipped(clean: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Cut off at a share of the peak, at one level or, half of the time, softly above it."""
    drawn = _uniform(generator, 0, 1)
    limit = clean.abs().max() * math.exp(_between(tuple(map(math.log, KEPT)), strength))
    limit = limit.clamp(min=1e-6)
    hard = clean.clamp(-limit, limit)
    if drawn < 0.6:
        return hard
    knee = 0.6 * limit
    over = (clean.abs() - knee).clamp(min=0)
    return clean.sign() * (clean.abs().minimum(knee) + (limit - knee) * torch.tanh(over / (limit - knee)))


def _reverberated(clean: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A room: the direct sound, a few early reflections, and noise that decays faster the higher it is (Polack's model)."""
    decay = _between(DECAY, strength) * _uniform(generator, 0.8, 1.2)
    length = min(len(clean), int(decay * RATE))
    time = torch.arange(length) / RATE
    low = torch.exp(-6.9 * time / decay) * torch.randn(length, generator=generator)
    high = torch.exp(-6.9 * time / (decay * _uniform(generator, 0.3, 0.7))) * torch.randn(length, generator=generator)
    smooth = torch.nn.functional.avg_pool1d(low[None, None], 5, 1, 2, count_include_pad=False).flatten()
    room = smooth * 2 + (high - torch.nn.functional.avg_pool1d(high[None, None], 5, 1, 2).flatten())
    start = int(_uniform(generator, 0.001, 0.012) * RATE)
    room = torch.cat((torch.zeros(start), room))[:length]
    for _ in range(int(_uniform(generator, 2, 7))):
        place = min(length - 1, int(_uniform(generator, 0.001, 0.03) * RATE))
        room[place] += _uniform(generator, -1, 1) * room.abs().max() * 2
    room = room / room.square().sum().sqrt().clamp(min=1e-9) * 10 ** (-_between(DIRECT, strength) / 20)
    return clean + _convolved(clean, room)


def _convolved(sound: Tensor, response: Tensor) -> Tensor:
    """The first n samples of sound [n] through a response."""
    size = len(sound) + len(response)
    return torch.fft.irfft(torch.fft.rfft(sound, size) * torch.fft.rfft(response, size), size)[: len(sound)]
