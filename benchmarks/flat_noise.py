"""`python -m benchmarks.quality flat INPUT RESULT [RESULT ...]`: noise of flat areas of a file, and of what was made of it.

Noise is the standard deviation of luma in 7 × 7 pixels. *flattest third* is its median in that third of the picture, of each file
by itself; *same places* is the median of the result where the input is flattest. Both are told as shares of the input's, which
restoring should hardly raise; of clips the median frame and the highest.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import columns
from ebr_engine.media.calm import deviation, luma_of
from ebr_engine.media.images import read_image
from ebr_engine.media.video import open_video, video_suffixes

SHARE = 3  # of the picture, that is flattest


def options(parser: ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a picture or a clip")
    parser.add_argument("results", type=Path, nargs="+", help="what was made of it, of the same size")


def measure(options: Namespace) -> dict[str, Any]:
    """Noise in flat areas of results as a share of their input's."""
    rows = []
    for result in options.results:
        try:
            pairs = [noises(*pair) for pair in zip(lumas(options.input), lumas(result), strict=True)]
        except ValueError as error:
            options.error(f"{options.input} and {result} differ in size or in frames ({error})")
        own, same = zip(*pairs)
        rows.append({"result": result.name, "frames": len(pairs)} | told("flattest third", own) | told("same places", same))
    return {"input": options.input.name, "rows": rows}


def noises(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Noise of a result's luma [H, W] as a share of its input's: each in its own flattest third, and in the input's."""
    if before.shape != after.shape:
        raise ValueError(f"{tuple(before.shape)}, {tuple(after.shape)}")
    here, there = deviation(before), deviation(after)
    own = (flattest(noise).median() for noise in (there, here))
    flat = here <= flattest(here).max()
    return float(next(own) / next(own)), float(there[flat].median() / here[flat].median())


def flattest(noise: Tensor) -> Tensor:
    """The lowest third of values."""
    return noise.flatten().sort().values[: max(1, noise.numel() // SHARE)]


def told(name: str, shares: tuple[float, ...]) -> dict[str, float]:
    return {name: median(shares), f"{name}, highest": max(shares)}


def lumas(path: Path) -> Iterator[Tensor]:
    """The luma [H, W] of every frame of a file."""
    clip = nullcontext([read_image(path)]) if path.suffix.lower() not in video_suffixes() else open_video(path)
    with clip as frames:
        for frame in frames:
            yield luma_of(torch.tensor(frame.pixels).movedim(-1, 0)[None])[0]


def table(found: dict[str, Any]) -> str:
    """What a person reads."""
    names = list(found["rows"][0])
    rows = [[value if isinstance(value, str) else format(value, ".3g") for value in row.values()] for row in found["rows"]]
    return "\n".join([f"noise of flat areas, as a share of that of {found['input']}", columns(names, rows)])
