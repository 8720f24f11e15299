"""Two degradations that neither the engine's generator nor any prompt knows: an old film's scratches and dirt, and moiré.

As those of `media/degradations.py`: clean [B, 3, H, W] in [0, 1], every random number from the caller's generator, lengths in
pixels.
"""

import math

import torch
from torch import Tensor

FLAWS = 5  # of each kind on 128 × 128 pixels, on average


def film(clean: Tensor, generator: torch.Generator, depth: Tensor | None = None) -> Tensor:
    """Vertical scratches that wander and break off, and specks of dirt: I = J·(1 − m) + c·m, each flaw white or black.

    A scratch runs along the film, so it is nearly vertical and long; dirt is a blob or a short hair. Source: Kokaram, "On missing
    data treatment for degraded video and film archives", 2004, sections 1 and 2. `depth` is not read.
    """
    batch, _, height, width = clean.shape
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    result = clean.clone()
    for i in range(batch):
        number = _uniform(generator, 0.5, 1.5) * FLAWS
        scratches, specks = max(1, round(number * width / 128)), max(1, round(4 * number * height * width / 128**2))
        for _ in range(scratches):
            wander = _uniform(generator, 0, 3) * torch.sin(2 * math.pi * (y / _uniform(generator, 80, 300) + _uniform(generator)))
            centre = _uniform(generator, 0, width) + _uniform(generator, -0.03, 0.03) * y + wander
            there = ((y / _uniform(generator, 40, 200) + _uniform(generator)) % 1 < _uniform(generator, 0.5, 1)).float()
            cover = torch.exp(-((x - centre) ** 2) / (2 * _uniform(generator, 0.4, 1.0) ** 2)) * there
            result[i] = _over(result[i], cover * _uniform(generator, 0.5, 0.95), generator)
        for _ in range(specks):
            angle, long, wide = (_uniform(generator, *limits) for limits in ((0, math.pi), (0.8, 4.0), (0.6, 1.6)))
            dx, dy = x - _uniform(generator, 0, width), y - _uniform(generator, 0, height)
            along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            cover = torch.exp(-((along / long) ** 4) - (across / wide) ** 4)
            result[i] = _over(result[i], cover * _uniform(generator, 0.6, 1.0), generator)
    return result.clamp(0, 1)


def moire(clean: Tensor, generator: torch.Generator, depth: Tensor | None = None) -> Tensor:
    """A screen photographed: I_c = J_c·(1 + Σ a·cos(2π·f·(x + bend) + φ + shift_c)), three beats of 5 to 40 pixels.

    The camera's grid and the screen's beat against each other; red, green and blue stripes lie a third of a screen's pixel apart,
    so the beats are coloured, and the lens bends them. Source: Sun, Yu, Wang, "Moiré Photo Restoration Using Multiresolution
    Convolutional Neural Networks", 2018, section III. `depth` is not read.
    """
    batch, _, height, width = clean.shape
    y, x = torch.arange(height).view(1, -1, 1) - height / 2, torch.arange(width).view(1, 1, -1) - width / 2
    third = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1) * 2 * math.pi / 3
    result = torch.empty_like(clean)
    for i in range(batch):
        pattern = torch.zeros(3, height, width)
        for amplitude in (0.22, 0.14, 0.08):
            angle, period = _uniform(generator, 0, math.pi), 40 ** _uniform(generator, 0.44, 1)
            along = x * math.cos(angle) + y * math.sin(angle)
            across = y * math.cos(angle) - x * math.sin(angle)
            bend = _uniform(generator, -1, 1) * 2e-3 * across**2 + _uniform(generator, 0, 4) * torch.sin(across / 25)
            colour = third * _uniform(generator, 0.2, 1.0)
            phase = 2 * math.pi * ((along + bend) / period + _uniform(generator))
            pattern += amplitude * _uniform(generator, 0.7, 1.3) * torch.cos(phase + colour)
        result[i] = clean[i] * (1 + pattern)
    return result.clamp(0, 1)


def _over(picture: Tensor, cover: Tensor, generator: torch.Generator) -> Tensor:
    """A flaw over a picture [3, H, W]: white, or black."""
    light = _uniform(generator) < 0.6
    tone = _uniform(generator, 0.85, 1.0) if light else _uniform(generator, 0.0, 0.15)
    return picture * (1 - cover) + tone * cover


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


SIMULATORS = {"film": film, "moire": moire}
