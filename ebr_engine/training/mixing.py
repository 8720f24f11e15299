"""What a prompt learns from beside procedural scenes and their degradations: photos, intact pictures, and stored ones."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import degrade
from ebr_engine.media.heavy import HEAVY
from ebr_engine.media.images import SUFFIXES, read_image
from ebr_engine.training.classifier import as_stored
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import seeded
from ebr_engine.training.scenes import ScenePool

NOISE = 0.012  # largest standard deviation of the noise in a stored picture


class MixedSamples:
    """Crops of procedural scenes, and of the photos in `config.photos`, degraded by the task.

    `config.intact`: the share that stays as it is, so that a prompt learns to leave alone what needs nothing;
    `config.heavy`: the share of the others that is damaged as heavy public sets of pairs are;
    `config.stored`: the share whose degraded form also has a camera's noise and the traces of JPEG.
    """

    def __init__(self, config: LearnConfig, pool: ScenePool):
        self.config, self.pool = config, pool
        self.photos = read_photos(Path(config.photos), max(config.crop)) if config.photos else []

    def pixels(self, number: int) -> tuple[Tensor, Tensor]:
        """See `Samples`."""
        config, generator = self.config, seeded(self.config.seed, "scene", number)
        photo, intact, stored, level = torch.rand(4, generator=generator).tolist()
        if self.photos and photo < config.photo_share:
            clean, depth = photo_crop(self.photos, config.crop, config.flip, generator), None
        else:
            clean, depth, _ = self.pool.crops(1, config.crop, generator)
        if intact < config.intact:
            degraded = clean
        elif config.heavy and float(torch.rand((), generator=generator)) < config.heavy:
            degraded = HEAVY[config.task](clean, generator)
        else:
            degraded = degrade(clean, config.task, generator, depth=depth)
        if stored < config.stored:
            noisy = degraded + torch.randn(degraded.shape, generator=generator) * NOISE * level
            degraded = as_stored(noisy.clamp(0, 1), 1.0, generator)
        return degraded.movedim(0, 1), clean.movedim(0, 1)


def read_photos(folder: Path, least: int) -> list[Tensor]:
    """The pictures of a folder, [3, H, W] uint8, in the order of their names; `EbrError` for none or one smaller than `least`."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise EbrError(f"photos: there is no picture in {folder}")
    photos = []
    for path in paths:
        pixels = torch.tensor(read_image(path).pixels)
        if min(pixels.shape[:2]) < least:
            raise EbrError(f"{path}: is smaller than the crops of {least} pixels")
        photos.append((pixels.permute(2, 0, 1) * 255).round().byte())
    return photos


def photo_crop(photos: list[Tensor], size: tuple[int, int], flip: bool, generator: torch.Generator) -> Tensor:
    """A random part of a random photo, reduced to `size` (height, width): [1, 3, h, w] float32 in [0, 1].

    Its scale is drawn evenly in octaves, from the photo's own pixels to as much of the photo as has that shape.
    """
    which, top, left, mirrored = torch.randint(0, 2**31, (4,), generator=generator).tolist()
    photo = photos[which % len(photos)]
    largest = min(photo.shape[-2] / size[0], photo.shape[-1] / size[1])
    factor = math.exp(math.log(largest) * float(torch.rand((), generator=generator)))
    height, width = (min(whole, round(side * factor)) for whole, side in zip(photo.shape[-2:], size))
    top, left = top % (photo.shape[-2] - height + 1), left % (photo.shape[-1] - width + 1)
    crop = photo[None, :, top : top + height, left : left + width].float() / 255
    crop = F.interpolate(crop, size, mode="bilinear", antialias=True).clamp(0, 1)
    return crop.flip(-1) if flip and mirrored % 2 else crop
