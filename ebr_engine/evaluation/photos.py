"""Real photos that no training has seen, degraded with test seeds: the quality benchmark's inputs.

Photos: astronaut, chelsea, coffee and motorcycle of scikit-image (`skimage.data`; the first three CC0, the last from the
Middlebury stereo data). Haze on the motorcycle follows its real depth. Ten are what all packages of the extras have: `MORE` are
five others of scikit-image's wheel, four of them grey, and the portrait among matplotlib's sample data.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import degrade, depth_from_disparity, seeds

NAMES = ("astronaut", "chelsea", "coffee", "motorcycle")
PORTRAIT = "grace_hopper"
MORE = ("rocket", PORTRAIT, "camera", "coins", "brick", "grass")
TEN = (*NAMES, *MORE)
STRENGTH = 0.75  # of 0 (mild) to 1 (ruined): what a photographer would call bad


@dataclass(frozen=True)
class Case:
    """A photo and its degraded form, both [1, 3, H, W] float32 in [0, 1]."""

    photo: str
    task: str
    clean: Tensor
    degraded: Tensor


def load_photo(name: str, size: int | None) -> tuple[Tensor, Tensor | None]:
    """A photo [1, 3, H, W] and its depth [1, 1, H, W] where it is known.

    `size`: the shorter side is reduced to it and the centre square taken; None keeps the whole photo. A grey photo has three
    equal channels.
    """
    depth = None
    if name == PORTRAIT:
        image = _portrait()
    else:
        try:
            from skimage import data
        except ImportError as error:
            raise EbrError("the test photos come with scikit-image: pip install 'ebr-engine[train]'") from error
        if name == "motorcycle":
            image, _, disparity = data.stereo_motorcycle()
            depth = depth_from_disparity(torch.from_numpy(np.array(disparity)))
        else:
            image = getattr(data, name)()
    pixels = torch.from_numpy(np.array(image)).float() / 255
    pixels = pixels.expand(1, 3, -1, -1).contiguous() if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
    return square(pixels, size), None if depth is None else square(depth, size).clamp(0, 1)


def _portrait() -> np.ndarray:
    from ebr_engine.media.images import opaque_pixels

    try:
        import matplotlib
    except ImportError as error:
        raise EbrError("this test photo comes with matplotlib: pip install 'ebr-engine[curves]'") from error
    pixels = opaque_pixels(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    return (pixels * 255).round().astype(np.uint8)


def square(x: Tensor, size: int | None) -> Tensor:
    """The picture [1, C, H, W] with its shorter side reduced to `size`, and of that the centre; as it is for None."""
    if size is None:
        return x
    height, width = x.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return x[..., top : top + size, left : left + size]


def make_case(photo: str, task: str, size: int | None, strength: float = STRENGTH) -> Case:
    """One photo degraded for one task, the same on every call; quantised to 8 bit as a file would be."""
    clean, depth = load_photo(photo, size)
    seed = seeds("test").start + TEN.index(photo)
    degraded = degrade(clean, task, torch.Generator().manual_seed(seed), depth=depth, strength=strength)
    return Case(photo, task, clean, (degraded * 255).round() / 255)
