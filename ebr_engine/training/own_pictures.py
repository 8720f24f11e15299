"""Windows of your own pictures, and of frames of your own clips, in place of procedural scenes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ebr_engine.errors import EbrError

SECONDS = 10.0  # of a clip, from which a frame is taken


def sources(folder: Path) -> list[Path]:
    """The pictures and clips of a folder and those below it; `EbrError` where there are none."""
    from ebr_engine.media.kinds import is_clip, picture_kind

    if not folder.is_dir():
        raise EbrError(f"{folder} is no folder of pictures")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and (picture_kind(path) or is_clip(path)))
    if not files:
        raise EbrError(f"{folder} holds no picture and no clip")
    return files


def window(files: Sequence[Path], seed: int, size: int) -> np.ndarray:
    """The window numbered `seed`: [size, size, 3] uint8 of a random picture, at a random scale, half of the time its mirror.

    A picture whose shorter side is under `size` is enlarged. `EbrError` for a file that cannot be read.
    """
    rng = np.random.default_rng((seed, size))
    pixels = read(files[int(rng.integers(len(files)))], rng.uniform(0, SECONDS))
    height, width = pixels.shape[:2]
    largest = min(height, width)
    side = round(float(np.exp(rng.uniform(np.log(min(size, largest)), np.log(largest)))))
    top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
    part = np.ascontiguousarray(pixels[top : top + side, left : left + side].transpose(2, 0, 1))
    cut = torch.from_numpy(part)[None]
    cut = cut if side == size else F.interpolate(cut, (size, size), mode="bilinear", antialias=side > size)
    cut = cut.flip(-1) if rng.random() < 0.5 else cut
    return (cut[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def read(path: Path, second: float) -> np.ndarray:
    """A picture's pixels [H, W, 3] float32 in [0, 1], or those of a clip's frame at that second or the last one before."""
    from ebr_engine.media.images import read_image
    from ebr_engine.media.kinds import is_clip
    from ebr_engine.media.video import open_video

    if not is_clip(path):
        return read_image(path).pixels
    with open_video(path) as video:
        last = None
        for frame in video:
            last = frame.pixels
            if frame.time >= second:
                break
    if last is None:
        raise EbrError(f"{path} holds no frame")
    return last
