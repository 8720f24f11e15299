"""Synthesised sound: the material from which `mini-audio` is pre-trained; nobody was recorded for it.

Speech comes from espeak-ng's formant synthesis (a program that has to be installed): its languages and voices at any speed and
pitch, reading words that are put together at random. Music, tones and noises are made here.
"""

import math
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ebr_engine.backbones.mini_audio.codec import LEVEL, RATE
from ebr_engine.errors import EbrError

SPOKEN_RATE = 22050  # of espeak-ng's formant voices
LENGTH = 81920  # samples of a clip: about five seconds
KINDS = ("speech", "music", "tones", "effects")
KIND_ODDS = (0.72, 0.14, 0.06, 0.08)
PITCHES = ("low", "middle", "high")
CAPTION_WORDS: tuple[str, ...] = KINDS + PITCHES
PROGRAM = "espeak-ng"


def _words(text: str) -> list[str]:
    return text.split()


ONSETS = _words("b d f g h j k l m n p r s t v w z br dr fl gr kl kr pl pr sk sl sm sn sp st str tr ch sh th")
VOWELS = _words("a e i o u a e i o ai au ea ei ie oo ou")
CODAS = ["", "", "", *_words("l m n r s t k nd nt rk st x ng sh p")]
LATIN = _words(  # languages of espeak-ng that are written in Latin letters
    "af an ca cs cy da de en-gb en-gb-scotland en-gb-x-rp en-us en-us-nyc eo es es-419 et eu fi fr-be fr-fr ga hr ht hu ia id is "
    "it la lb lt lv ms mt nb nl pap pl pt pt-br ro sk sl sq sv sw tn tr uz"
)


@dataclass(frozen=True)
class Sound:
    """A clean clip [LENGTH] float32 at 16 kHz with its words: a kind and, of speech, a pitch."""

    samples: np.ndarray
    caption: tuple[str, ...]


def check_installed() -> None:
    """`EbrError` unless espeak-ng is there."""
    if shutil.which(PROGRAM) is None:
        raise EbrError(f"{PROGRAM} is not installed, which speaks what mini-audio learns from: apt install {PROGRAM}")


def render(seed: int) -> Sound:
    """The clip numbered `seed`; the same on every call with one version of espeak-ng (about 30 ms)."""
    rng = np.random.default_rng((seed, LENGTH))
    kind = str(rng.choice(KINDS, p=KIND_ODDS))
    words = (kind,)
    if kind == "speech":
        samples, pitch = _speech(rng)
        words += (pitch,)
    else:
        samples = {"music": _music, "tones": _tones, "effects": _effects}[kind](rng)
    samples = samples - samples.mean()
    level = math.sqrt(float(np.square(samples).mean()))
    return Sound((samples * (LEVEL / max(level, 1e-6))).astype(np.float32), words)


def _speech(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A voice that reads made-up sentences, its colour changed as rooms and microphones do; with the pitch's word."""
    languages, variants = voices()
    voice = str(rng.choice(languages)) if rng.random() < 0.6 else str(rng.choice(("en-us", "en-gb", "de", "fr-fr", "es")))
    if rng.random() < 0.85:
        voice += f"+{rng.choice(variants)}"
    pitch = int(rng.integers(5, 95))
    samples = speak(sentences(rng), voice, int(rng.integers(105, 240)), pitch)
    if len(samples) < LENGTH // 8:  # a voice without a word of Latin letters
        samples = speak(sentences(rng), "en-us", 160, pitch)
    gap = int(rng.integers(0, RATE // 2))
    samples = np.concatenate((np.zeros(gap, np.float32), samples))
    samples = np.resize(samples, LENGTH) if len(samples) < LENGTH else samples[:LENGTH]
    return _coloured(samples, rng), PITCHES[min(2, pitch * 3 // 100)]


def speak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Speech [n] float32 at 16 kHz by a voice of espeak-ng (`de+f3`), in words a minute, at a pitch from 0 to 99."""
    import soxr

    command = [PROGRAM, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode or done.stdout[:4] != b"RIFF":
        raise EbrError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip()}")
    data = done.stdout[44:]  # its header cannot tell the length
    spoken = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
    return soxr.resample(spoken, SPOKEN_RATE, RATE)


@lru_cache(maxsize=1)
def voices() -> tuple[list[str], list[str]]:
    """espeak-ng's languages that read Latin letters, and its variants of a voice (but for those with effects)."""

    def column(argument: str, place: int) -> list[str]:
        listed = subprocess.run([PROGRAM, argument], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        return [line.split()[place] for line in listed]

    left_out = ("whisper", "croak", "robo", "UniRobot", "announcer", "Demonic")
    variants = sorted({one.removeprefix("!v/") for one in column("--voices=variant", 4) if one.startswith("!v/")})
    known = set(column("--voices", 1))
    return [one for one in LATIN if one in known], [one for one in variants if not one.startswith(left_out)]


def sentences(rng: np.random.Generator) -> str:
    """Words of one to four syllables, with numbers and pauses between them: about six seconds of speech."""
    words = []
    for _ in range(int(rng.integers(10, 18))):
        if rng.random() < 0.05:
            words.append(str(int(rng.integers(0, 3000))))
            continue
        count = int(rng.choice((1, 2, 3, 4), p=(0.3, 0.4, 0.22, 0.08)))
        words.append("".join(f"{rng.choice(ONSETS)}{rng.choice(VOWELS)}{rng.choice(CODAS)}" for _ in range(count)))
        words[-1] += str(rng.choice(("", ",", ".", "?"), p=(0.8, 0.1, 0.07, 0.03)))
    return " ".join(words)


def _coloured(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A gentle random curve over the spectrum, within 6 dB either way, and a random end at the top."""
    spectrum = np.fft.rfft(samples)
    frequency = np.linspace(0, RATE / 2, len(spectrum))
    knots = np.linspace(0, 1, 7) ** 2 * RATE / 2
    gain = np.interp(frequency, knots, rng.uniform(-6, 6, 7))
    if rng.random() < 0.25:
        gain -= np.maximum(0, frequency - rng.uniform(3000, 7500)) / 1000 * 12
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(samples)).astype(np.float32)


def _music(rng: np.random.Generator) -> np.ndarray:
    """Notes of a scale in steady time: plucked, blown and struck, alone and in chords, maybe over drums."""
    total = np.zeros(LENGTH)
    beat = int(RATE * rng.uniform(0.12, 0.5))
    scale = np.cumsum(rng.choice((1, 2, 2, 3), 7))
    root = rng.uniform(80, 330)
    makers = [_plucked, _blown, _struck]
    maker, fall = makers[int(rng.integers(3))], rng.uniform(0.6, 1.6)
    for start in range(0, LENGTH, beat):
        if rng.random() < 0.2:
            continue
        for _ in range(1 + int(rng.random() < 0.35) + int(rng.random() < 0.2)):
            frequency = root * 2 ** ((rng.choice(scale) + 12 * rng.integers(-1, 2)) / 12)
            note = maker(frequency, int(beat * rng.uniform(0.8, 4)), fall, rng)[: LENGTH - start]
            total[start : start + len(note)] += note * rng.uniform(0.3, 1)
    if rng.random() < 0.4:
        for start in range(0, LENGTH, beat * int(rng.integers(1, 4))):
            hit = rng.standard_normal(beat) * np.exp(-np.arange(beat) / (RATE * rng.uniform(0.01, 0.08)))
            total[start : start + beat] += hit[: LENGTH - start] * rng.uniform(0.1, 0.5)
    return total


def _plucked(frequency: float, length: int, fall: float, rng: np.random.Generator) -> np.ndarray:
    """A string: harmonics that die the faster the higher they are."""
    time = np.arange(length) / RATE
    count = max(1, min(30, int(0.48 * RATE / frequency)))
    decay = rng.uniform(0.15, 1.2)
    return _harmonics(
        time, frequency, [k**-fall for k in range(1, count + 1)], [decay / k**0.7 for k in range(1, count + 1)], rng
    )


def _struck(frequency: float, length: int, fall: float, rng: np.random.Generator) -> np.ndarray:
    """A bell or a bar: partials that are no harmonics."""
    time = np.arange(length) / RATE
    ratios = np.cumprod(np.concatenate(([1.0], rng.uniform(1.4, 2.8, 5))))
    total = np.zeros(length)
    for i, ratio in enumerate(ratios[ratios * frequency < 0.48 * RATE]):
        total += (
            np.sin(2 * np.pi * (frequency * ratio * time + rng.random())) * np.exp(-time * (2 + i) * rng.uniform(1, 5)) / (1 + i)
        )
    return total


def _blown(frequency: float, length: int, fall: float, rng: np.random.Generator) -> np.ndarray:
    """A pipe or a bowed string: steady harmonics with vibrato and a soft attack."""
    time = np.arange(length) / RATE
    turns = time + rng.uniform(0, 0.006) * np.sin(2 * np.pi * rng.uniform(4, 7) * time) / (2 * np.pi * 5)
    count = max(1, min(20, int(0.45 * RATE / frequency)))
    total = _harmonics(turns, frequency, [rng.uniform(0.2, 1) * k**-fall for k in range(1, count + 1)], None, rng)
    return total * np.minimum(1, time / rng.uniform(0.01, 0.1)) * np.minimum(1, (time[-1] - time) / 0.05 + 1e-3)


def _harmonics(
    time: np.ndarray, frequency: float, levels: list[float], decays: list[float] | None, rng: np.random.Generator
) -> np.ndarray:
    total = np.zeros(len(time))
    for k, level in enumerate(levels, 1):
        wave = level * np.sin(2 * np.pi * (frequency * k * time + rng.random()))
        total += wave * np.exp(-time / decays[k - 1]) if decays else wave
    return total


def _tones(rng: np.random.Generator) -> np.ndarray:
    """Sweeps and steady tones that come and go."""
    total = np.zeros(LENGTH)
    for _ in range(int(rng.integers(1, 6))):
        ends = np.exp(rng.uniform(math.log(60), math.log(6000), 3))
        frequency = np.interp(np.arange(LENGTH), np.linspace(0, LENGTH, 3), ends if rng.random() < 0.5 else ends[[0, 0, 0]])
        level = np.interp(np.arange(LENGTH), np.linspace(0, LENGTH, 8), np.maximum(0, rng.uniform(-0.5, 1, 8)))
        total += level * np.sin(2 * np.pi * (np.cumsum(frequency) / RATE + rng.random()))
    return total + 1e-4 * rng.standard_normal(LENGTH)


def _effects(rng: np.random.Generator) -> np.ndarray:
    """Short bursts of filtered noise and thuds, as of steps, doors and things that fall."""
    total = np.zeros(LENGTH)
    for _ in range(int(rng.integers(3, 14))):
        start, length = int(rng.integers(0, LENGTH - 2000)), int(rng.uniform(0.02, 0.7) * RATE)
        spectrum = np.fft.rfft(rng.standard_normal(length))
        frequency = np.linspace(0, RATE / 2, len(spectrum))
        centre, width = math.exp(rng.uniform(math.log(80), math.log(6000))), rng.uniform(0.3, 2)
        spectrum *= np.exp(-np.square(np.log((frequency + 20) / centre) / width))
        burst = np.fft.irfft(spectrum, length) * np.exp(-np.arange(length) / (length * rng.uniform(0.05, 0.5)))
        burst *= rng.uniform(0.2, 1) / max(1e-9, np.abs(burst).max())
        total[start : start + length] += burst[: LENGTH - start]
    return total
