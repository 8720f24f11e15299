"""Calm places of a picture keep calm: where next to nothing is to be seen, a restoration may not add noise or texture."""

import torch
from torch import Tensor

from ebr_engine.media.detail import boxed

LUMA = (0.299, 0.587, 0.114)
CALM, CALMEST = 0.005, 1 / 3  # standard deviation up to which, and share of a picture in which, detail must not grow
REACH = 3  # pixels about a pixel in which that is seen
GROWTH = 0.05  # by which it may grow elsewhere, times the cube of how much livelier a place is there
STORED = 2.2e-6  # variance that storing as 8-bit video adds to a luma, and adds again to a result; rounding is 1 / 12 / 219²
MOST = 2**20  # pixels that the share is measured on


def kept_calm(before: Tensor, after: Tensor) -> Tensor:
    """Frames [F, 3, H, W] in [0, 1] whose detail hardly grows where those they were made of are calm; their tones stay.

    Damage such as drops and flakes is lively, so that what is calm before has none.
    """
    results = torch.empty(after.shape)
    for one, other, result in zip(before.split(1), after.split(1), results.split(1)):
        torch.lerp(boxed(other, REACH), other, _share(luma_of(one)[0], luma_of(other)[0]), out=result)
    return results


def luma_of(frames: Tensor) -> Tensor:
    """The lumas [F, H, W] of frames [F, 3, H, W]."""
    return sum(weight * colour for weight, colour in zip(LUMA, frames.float().unbind(1)))


def _share(before: Tensor, after: Tensor) -> Tensor:
    """How much of a luma's detail is kept, [H, W] from 0 to 1."""
    here, there = (deviation(luma) for luma in (before, after))
    level = min(CALM, float(here.flatten()[:: max(1, here.numel() // MOST)].quantile(CALMEST)))
    livelier = (here / max(level, 1e-6)).clamp_min(1)
    room = (there.square() - here.square()).clamp(0, STORED)
    allowed = (here.square() - room).clamp_min(0).sqrt() * (1 + GROWTH * (livelier**3 - 1))
    return boxed((allowed / there.clamp_min(1e-6)).clamp(0, 1)[None, None], REACH - 1)[0, 0]


def deviation(luma: Tensor) -> Tensor:
    """The standard deviation about every pixel, [H, W]."""
    here = luma[None, None]
    return (boxed(here.square(), REACH) - boxed(here, REACH).square()).clamp_min(0).sqrt()[0, 0]
