"""`python -m benchmarks.sound`: SI-SDR of sound that `mini-audio` restores, beside the input, a Wiener filter and noisereduce.

Items: speech, music and effects of held-out seeds (`training/synthesis.py`; needs espeak-ng), and recordings from folders, WAV
and FLAC, their first seconds as mono at 16 kHz. Degradations have test seeds: noise of every kind in turn at three
signal-to-noise ratios, clipping and rooms at a middling strength. Each item goes through `restore_file`, as a user's would.
`clean` is what is left of an item that needs nothing.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.report import Benchmark, columns
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.provenance import file_hash
from ebr_engine.evaluation.sound import si_sdr, wiener
from ebr_engine.media.sound import SUFFIXES
from ebr_engine.media.sound.degradations import NOISES, RATE, SNR, degrade, seeds
from ebr_engine.media.sound.files import needed
from ebr_engine.prompts.catalogue import find_prompt

BACKBONE = "mini-audio"
RATIOS = (0.0, 5.0, 10.0)  # dB
STRENGTHS = (0.5,)  # of clipping and reverberation
CLEAN = "clean"
WAYS = ("input", "wiener", "noisereduce", "noisereduce stationary", BACKBONE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    report.main("sound", __doc__, BENCHMARK, arguments)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--recordings", type=Path, nargs="*", default=[], metavar="FOLDER", help="real recordings, WAV and FLAC")
    parser.add_argument("--synthetic", type=int, default=7, help="items of held-out seeds")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each item, from its beginning")
    parser.add_argument("--tasks", nargs="+", default=["noise", "clipping", "reverb"], help="prompts to measure")
    parser.add_argument("--model", type=Path, help="other weights of the backbone")


def measure(options: Namespace) -> dict[str, Any]:
    """Every item, damage and way."""
    restorer = Restorer(BACKBONE, model=options.model)
    items = {"synthetic": list(synthetic(options.synthetic, options.seconds))}
    items["recordings"] = [each for folder in options.recordings for each in recordings(folder, options.seconds)]
    rows = []
    for task in options.tasks:
        for kind, found in items.items():
            for number, (name, clean) in enumerate(found):
                for level, damaged in damages(task, clean, number):
                    scores = dict(scored(restorer, task, damaged, clean))
                    rows.append({"task": task, "items": kind, "item": name, "level": level, "si_sdr": scores})
    prompts = {task: file_hash(find_prompt(BACKBONE, task)) for task in options.tasks}
    files = {path.name: file_hash(path) for folder in options.recordings for path in found_in(folder)}
    return {"seconds": options.seconds, "rows": rows, "prompts": prompts, "recordings": files}


def synthetic(count: int, seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Clips of test seeds, at any kind of sound."""
    from ebr_engine.training.synthesis import render

    first = seeds("test").start
    for number in range(count):
        sound = render(first + number)
        yield f"{number} {' '.join(sound.caption)}", sound.samples[: int(seconds * RATE)].astype(np.float64)


def found_in(folder: Path) -> list[Path]:
    """The recordings of a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def recordings(folder: Path, seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Recordings as mono at 16 kHz."""
    soundfile, soxr = needed("soundfile"), needed("soxr")
    for path in found_in(folder):
        samples, rate = soundfile.read(path, always_2d=True)
        yield path.name, soxr.resample(samples.mean(1), rate, RATE)[: int(seconds * RATE)]


def damages(task: str, clean: np.ndarray, number: int) -> Iterator[tuple[str, np.ndarray]]:
    """A clean item, and its degraded forms by what they are called."""
    sound = torch.from_numpy(clean).float()[None]
    for level in RATIOS if task == "noise" else STRENGTHS:
        generator = torch.Generator().manual_seed(seeds("test").start + number)
        if task == "noise":
            strength = torch.tensor([(level - SNR[0]) / (SNR[1] - SNR[0])])
            kinds = [NOISES[number % len(NOISES)]]
            yield f"{level:g} dB", degrade(sound, task, generator, strength, kinds)[0][0].double().numpy()
        else:
            yield f"strength {level:g}", degrade(sound, task, generator, torch.tensor([level]))[0][0].double().numpy()
    yield CLEAN, clean


def scored(restorer: Restorer, task: str, damaged: np.ndarray, clean: np.ndarray) -> Iterator[tuple[str, float]]:
    """SI-SDR in dB of every way; filters against noise are measured on noise and on clean sound only."""
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"input": lambda sound: sound}
    if task == "noise":
        ways |= {"wiener": lambda sound: wiener(sound, RATE)}
        ways |= {"noisereduce": lambda sound: reduced(sound, False), "noisereduce stationary": lambda sound: reduced(sound, True)}
    ways[BACKBONE] = lambda sound: restored(restorer, task, sound)
    yield from ((name, si_sdr(way(damaged), clean)) for name, way in ways.items() if name != "input" or damaged is not clean)


def reduced(sound: np.ndarray, stationary: bool) -> np.ndarray:
    """noisereduce with its defaults."""
    from noisereduce import reduce_noise

    return reduce_noise(y=sound, sr=RATE, stationary=stationary)


def restored(restorer: Restorer, task: str, sound: np.ndarray) -> np.ndarray:
    """What the engine makes of a file with this sound."""
    soundfile = needed("soundfile")
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.wav", Path(folder) / "out.wav"
        soundfile.write(source, sound, RATE, subtype="FLOAT")
        restorer.restore_file(source, target, task=task)
        return soundfile.read(target)[0]


def table(result: dict[str, Any]) -> str:
    """Means over items: a row a task, kind of items and level."""
    rows = []
    for task, items, level in dict.fromkeys((row["task"], row["items"], row["level"]) for row in result["rows"]):
        found = [row["si_sdr"] for row in result["rows"] if (row["task"], row["items"], row["level"]) == (task, items, level)]
        cells = [f"{mean(one[way] for one in found):.2f}" if way in found[0] else "" for way in WAYS]
        gains = [one[BACKBONE] - one["input"] for one in found if "input" in one]
        better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}, {median(gains):+.2f}" if gains else ""
        rows.append([task, items, level, str(len(found)), *cells, better])
    return columns(["task", "items", "level", "n", *WAYS, "better than the input, median gain"], rows)


BENCHMARK = Benchmark(options, measure, table)

if __name__ == "__main__":
    main()
