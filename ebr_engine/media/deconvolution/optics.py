"""What a lens or a moving camera does to a point of light: transfer functions in closed form, over frequencies in cycles a pixel.

Goodman, "Introduction to Fourier Optics", ch. 6: a Gaussian, a defocused disc (2·J1(x)/x) and a straight path (sinc).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

APERTURE = 0.45  # pixels: the Gaussian that a pixel itself is, beside a disc or a path


class Optics(NamedTuple):
    """A point's image: a Gaussian, a disc and a straight path, convolved; where a number is 0, that part is not there."""

    sigma: float = 0.0  # of the Gaussian, pixels
    radius: float = 0.0  # of the disc, pixels
    length: float = 0.0  # of the path, pixels
    angle: float = 0.0  # radians from the vertical

    @property
    def width(self) -> float:
        """Standard deviation of a point's image where it is widest, in pixels."""
        return math.sqrt(self.sigma**2 + self.radius**2 / 4 + self.length**2 / 12)

    def scaled(self, factor: float) -> "Optics":
        """The same in a picture that is `factor` times as large."""
        return Optics(self.sigma * factor, self.radius * factor, self.length * factor, self.angle)

    def transfer(self, height: int, width: int) -> Tensor:
        """The transfer function [height, width // 2 + 1] of `rfft2`."""
        return transfers(torch.tensor([self]), *frequencies(height, width))[0]

    def __str__(self) -> str:
        if self.length:
            return f"a path of {self.length:.1f} pixels at {math.degrees(self.angle) % 180:.0f}°"
        return f"a disc of radius {self.radius:.1f}" if self.radius else f"a Gaussian of {self.sigma:.1f} pixels"


def frequencies(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cycles per pixel of rfft2's bins: [H, 1] and [1, W // 2 + 1]."""
    return (
        torch.fft.fftfreq(height, device=device)[:, None],
        torch.fft.rfftfreq(width, device=device)[None, :],
    )


def gaussian(sigma: float | Tensor, squared: Tensor) -> Tensor:
    """Of standard deviation `sigma`, over squared frequencies."""
    return torch.exp(-2 * (math.pi * sigma) ** 2 * squared)


def disc(radius: float | Tensor, frequency: Tensor) -> Tensor:
    """Of that radius, over frequencies' sizes."""
    phase = (2 * math.pi * radius * frequency).clamp_min(1e-3)
    return 2 * torch.special.bessel_j1(phase) / phase


def line(length: float | Tensor, along: Tensor) -> Tensor:
    """Of that length, over the frequencies along it."""
    return torch.sinc(length * along)


def transfers(rows: Tensor, fy: Tensor, fx: Tensor) -> Tensor:
    """Transfer functions [N, ...] of rows [N, 4] of `Optics`, over frequencies of shapes that broadcast to [...]."""
    squared = fy**2 + fx**2
    sigma, radius, length, angle = rows.to(squared).view(len(rows), 4, *[1] * squared.ndim).unbind(1)
    along = fy * angle.cos() + fx * angle.sin()
    return gaussian(sigma, squared) * disc(radius, squared.sqrt()) * line(length, along)
