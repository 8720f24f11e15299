"""Giving a restored picture the colours of its input, where a model may have shifted them.

Two corrections as StableSR applies them to its results (Wang et al., "Exploiting Diffusion Prior for Real-World Image
Super-Resolution", arXiv 2305.07015): by wavelets, which keeps the result's detail over the input's low frequencies, and by
adaptive instance normalisation (Huang and Belongie, arXiv 1703.06868), which takes over each channel's mean and spread.
Neither is for haze or low light, where the input's low frequencies and statistics are the damage.
"""

from collections.abc import Iterable

import numpy as np

NONE, WAVELET, ADAIN = FIXES = ("none", "wavelet", "adain")
# By task; what helps `mini`, measured by `python -m benchmarks.quality colour-fix`.
BY_TASK = {"haze": NONE, "rain": NONE, "snow": NONE, "blur": NONE, "lowlight": NONE}
LEVELS = 5  # of the wavelet: what is wider than about 2⁵ pixels counts as colour


def fix_for(tasks: Iterable[str]) -> str:
    """The correction for pictures that are repaired by these tasks: the one that all of them agree on, else none."""
    wanted = {BY_TASK.get(task, NONE) for task in tasks}
    return wanted.pop() if len(wanted) == 1 else NONE


def fix_colours(restored: np.ndarray, source: np.ndarray, fix: str) -> np.ndarray:
    """The restored pixels [..., H, W, 3] in [0, 1] with the colours of `source`, of the same shape.

    `fix`: none, wavelet or adain. ValueError for another one, and for unequal shapes.
    """
    if fix not in FIXES:
        raise ValueError(f"unknown colour fix {fix!r}; choose one of {', '.join(FIXES)}")
    if restored.shape != source.shape:
        raise ValueError(f"restored and source pixels differ in shape: {restored.shape} and {source.shape}")
    if fix == NONE:
        return restored
    fixed = restored + low_frequencies(source - restored) if fix == WAVELET else _adain(restored, source)
    return fixed.clip(0, 1)


def low_frequencies(pixels: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """What an à-trous wavelet of so many levels leaves of pixels [..., H, W, 3]: binomial filters (1, 2, 1)/4 of spacing 2ⁱ.

    The wavelet correction, detail of the result plus low frequencies of the source, is linear: it is the result plus the
    low frequencies of their difference, one filter in place of two.
    """
    for level in range(levels):
        for axis in (-3, -2):
            pixels = _binomial(pixels, 2**level, axis)
    return pixels


def _binomial(x: np.ndarray, spacing: int, axis: int) -> np.ndarray:
    """(x[i − s] + 2·x[i] + x[i + s])/4 along an axis whose ends repeat."""
    x = np.moveaxis(x, axis, 0)
    padded = np.pad(x, ((spacing, spacing), *((0, 0),) * (x.ndim - 1)), mode="edge")
    filtered = 0.5 * x
    filtered += 0.25 * padded[: len(x)]
    filtered += 0.25 * padded[2 * spacing :]
    return np.moveaxis(filtered, 0, axis)


def _adain(restored: np.ndarray, source: np.ndarray) -> np.ndarray:
    places = (-3, -2)
    spread = restored.std(places, keepdims=True)
    scale = source.std(places, keepdims=True) / np.maximum(spread, 1e-5)
    return (restored - restored.mean(places, keepdims=True)) * scale + source.mean(places, keepdims=True)
