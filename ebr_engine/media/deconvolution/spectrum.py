"""How a picture is blurred, by its power spectrum alone.

Sharp pictures have a spectrum that falls by about f^−2.2 (van der Schaaf and van Hateren, "Modelling the power spectra of
natural images", 1996); blur multiplies it by the square of its transfer function, and noise adds a floor. So
log S(f) = log(A·f^−α·|K(f)|² + n²), which is fitted by a robust distance. It sees no phases: where a path bends, see `paths.py`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ebr_engine.media.calm import LUMA
from ebr_engine.media.deconvolution.optics import APERTURE, Optics, frequencies, transfers

BLOCK = 64  # pixels of the windows whose spectra are averaged, either way
BLOCKS = 900  # of them at most
LOWEST = 3  # cycles a block below which a spectrum is the picture's own
SLOPES = (1.8, 2.0, 2.2, 2.4, 2.6, 2.8)  # α
USUAL, SPREAD, PRIOR = 2.2, 0.3, 0.005  # of α in sharp pictures, and how much that counts
LEVELS = (0.7, 1.0, 1.4)  # of A about its median
SEEN = 1e-3  # share of the strongest frequency's power above which a frequency tells A
GREY_NOISE = sum(weight**2 for weight in LUMA)  # variance of a luma's noise, where each colour's is 1
TILTS = (1.0, 2.0)  # of what JPEG leaves of noise
STORED = 0.0055  # standard deviation of a luma's noise at the highest frequencies below which it may be that
HIGHEST = 0.42  # cycles a pixel from which on that is measured
SHOWN = 10.0  # times the noise that the lowest frequencies have, where a picture shows anything
GRID = 1.1  # how much larger steps have to be on the borders of JPEG's blocks
STEP = 0.02  # largest step that counts, and a picture's edge is nothing more
FAINT = 0.0015  # standard deviation of noise in a luma below which none is believed: rounding to 8 bits makes as much
DETAIL = (0.15, 0.3)  # cycles a pixel of detail that a wide blur takes away
ROUNDS = 7  # of refining, with steps that halve


class Noise(NamedTuple):
    """Its power in a luma over frequencies: `floor`·(2f)^−tilt."""

    floor: float
    tilt: float

    def power(self, squared: Tensor) -> Tensor:
        """At squared frequencies, in (cycles a pixel)²."""
        return self.floor * (4 * squared) ** (-self.tilt / 2)

    @property
    def variance(self) -> float:
        """In a luma, of the frequencies that a spectrum is fitted at and above."""
        fy, fx = frequencies(BLOCK, BLOCK)
        squared = fy**2 + fx**2
        return float(self.power(squared.clamp_min(BLOCK**-2.0)).mul_(squared >= (LOWEST / BLOCK) ** 2).mean())


@dataclass(frozen=True)
class Fit:
    """A picture's spectrum before it was blurred, A·f^−α, the noise, and how far off that is from what is seen."""

    amplitude: float
    slope: float
    noise: Noise
    error: float

    def ratio(self, squared: Tensor) -> Tensor:
        """Noise over signal in a colour, at squared frequencies (cycles a pixel): what Wiener's filter asks for."""
        squared = squared.clamp_min(1e-12)
        return self.noise.power(squared) / GREY_NOISE / self.amplitude * squared ** (self.slope / 2)

    def scaled(self, factor: float) -> "Fit":
        """The same of a picture that is so many times larger than the version that was measured: its frequencies are lower."""
        noise = Noise(self.noise.floor * factor**-self.noise.tilt, self.noise.tilt)
        return Fit(self.amplitude * factor**-self.slope, self.slope, noise, self.error)


@dataclass(frozen=True)
class Spectrum:
    """The mean power of a picture's windows [BLOCK, BLOCK // 2 + 1], as white noise of variance s² has it: s² everywhere.

    `stored`: whether the pictures show the blocks of JPEG.
    """

    power: Tensor
    stored: bool = False

    @classmethod
    def of(cls, lumas: Tensor) -> "Spectrum":
        """Of pictures or frames [F, H, W], taken together: Welch's method, with Hann windows that overlap by three quarters."""
        height, width = lumas.shape[-2:]
        step = max(BLOCK // 4, math.ceil(math.sqrt(len(lumas) * height * width / BLOCKS)))
        blocks = lumas.unfold(1, BLOCK, step).unfold(2, BLOCK, step).reshape(-1, BLOCK, BLOCK)
        window = torch.hann_window(BLOCK).outer(torch.hann_window(BLOCK))
        window = window / window.square().sum().sqrt()
        mean = (blocks * window).sum((1, 2), keepdim=True) / window.sum()
        power = torch.fft.rfft2((blocks - mean) * window).abs().square_().mean(0)
        return cls(power, max(grid_of(lumas, dim) for dim in (1, 2)) > GRID)

    @cached_property
    def _fitted(self) -> tuple[Tensor, Tensor]:
        """The frequencies that are fitted: a mask, and their sizes."""
        fy, fx = frequencies(BLOCK, BLOCK)
        size = (fy**2 + fx**2).sqrt()
        fitted = (size >= LOWEST / BLOCK) & (size <= 0.5)
        return fitted, size[fitted]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to see but noise."""
        fitted, size = self._fitted
        lowest = self.power[fitted][size < 2 * LOWEST / BLOCK].median()
        return float(lowest) < SHOWN * self.noises[0].floor

    def kept(self, fit: Fit) -> float:
        """The share of a picture's detail of a few pixels that is there, where `fit` tells the picture before it was blurred."""
        fitted, size = self._fitted
        band = (size > DETAIL[0]) & (size < DETAIL[1])
        beyond = (self.power[fitted][band] - self.noises[0].floor).clamp_min(0)
        return float((beyond / (fit.amplitude * size[band] ** -fit.slope)).median())

    @cached_property
    def noises(self) -> list[Noise]:
        """What the noise may be: white, or that of JPEG, which rounds high frequencies away."""
        fitted, size = self._fitted
        power = self.power[fitted]
        white = Noise(max(float(power[size > 0.4].quantile(0.05)), FAINT**2), 0.0)
        last = max(float(power[size > HIGHEST].median()), FAINT**2)
        return [white, *(Noise(last, tilt) for tilt in TILTS if self.stored and last < STORED**2)]

    def errors(self, gains: Tensor, thorough: bool = True) -> tuple[Tensor, Tensor]:
        """How badly powers |K|² [N, BLOCK, BLOCK // 2 + 1] explain it [N]; and of the best setting its number and A [2, N].

        Settings are noises, slopes and levels, the last changing fastest.
        """
        fitted, size = self._fitted
        gains, found = gains[:, fitted], []
        for noise in self.noises:
            floor = noise.power(size**2)
            power = self.power[fitted].maximum(floor).log()  # JPEG leaves less than any noise
            for slope in SLOPES if thorough else SLOPES[1::2]:
                base = gains * size**-slope
                seen = base > SEEN * base.amax(1, keepdim=True)
                level = (power - base.clamp_min(1e-12).log()).masked_fill(~seen, math.nan).nanmedian(1).values
                for factor in LEVELS if thorough else LEVELS[1:2]:
                    off = (power - torch.log((level.exp() * factor)[:, None] * base + floor)).abs()
                    error = torch.where(off < 1, off.square(), 2 * off - 1).mean(1)
                    unusual = PRIOR * ((slope - USUAL) / SPREAD) ** 2
                    found.append((error + unusual, level.exp() * factor))
        errors, amplitudes = (torch.stack(part) for part in zip(*found))
        best = errors.argmin(0)
        return errors.amin(0), torch.stack((best, amplitudes.gather(0, best[None])[0]))

    def fit(self, gain: Tensor) -> Fit:
        """The fit of one power |K|² [BLOCK, BLOCK // 2 + 1]."""
        error, (which, amplitude) = self.errors(gain[None])
        noise, slope = divmod(int(which) // len(LEVELS), len(SLOPES))
        return Fit(float(amplitude), SLOPES[slope], self.noises[noise], float(error))

    def explained(self) -> tuple[Optics, Fit]:
        """The closed form that explains it best: the best of each kind is refined, and the best of those taken."""
        found = [self._refined(*family) for family in families()]
        optics = min(found, key=lambda pair: pair[1])[0]
        return optics, self.fit(optics.transfer(BLOCK, BLOCK).square())

    def _refined(self, rows: Tensor, step: Tensor) -> tuple[Optics, float]:
        """The best of `rows` [N, 4], and what is better beside it: steps [4], which halve in each round."""
        best = rows[self.errors(_gains(rows), thorough=False)[0].argmin()]
        for _ in range(ROUNDS):
            around = [best] + [best + sign * step * unit for unit in torch.eye(4) if (step * unit).any() for sign in (-1, 1)]
            rows = torch.stack(around)
            rows[:, :3].clamp_(min=0)
            errors = self.errors(_gains(rows))[0]
            moved = int(errors.argmin())
            best = rows[moved]
            step = step if moved else step / 2
        return Optics(*best.tolist()), float(errors[moved])


def grid_of(lumas: Tensor, dim: int) -> float:
    """By how much steps between pixels of [F, H, W] along a dimension stand out, where they stand out most of eight places."""
    steps = lumas.diff(dim=dim)
    beside = [steps.narrow(dim, first, steps.shape[dim] - 2) for first in range(3)]
    strange = (beside[1] - (beside[0] + beside[2]) / 2).abs().clamp_(max=STEP)
    means = strange.mean([other for other in range(3) if other != dim])
    places = means[: len(means) // 8 * 8].view(-1, 8).mean(0)
    return float(places.max() / places.median().clamp_min(1e-9))


def families() -> list[tuple[Tensor, Tensor]]:
    """Gaussians, discs and straight paths: rows [N, 4] of `Optics`, each a tenth wider than the last, and first steps [4]."""
    widths = 1.1 ** torch.arange(28)
    gaussians = [Optics(float(0.4 * width)) for width in widths]
    discs = [Optics(APERTURE, float(0.9 * width)) for width in widths]
    lines = []
    for width in widths[:26]:
        length = float(2.5 * width)
        count = math.ceil(1.2 * length)  # a path's end moves by about a pixel from one angle to the next
        lines += [Optics(APERTURE, 0, length, math.pi * i / count) for i in range(count)]
    steps = ([0.1, 0, 0, 0], [0.1, 0.2, 0, 0], [0.1, 0, 0.4, 0.06])
    return [(torch.tensor(rows), torch.tensor(step)) for rows, step in zip((gaussians, discs, lines), steps)]


def _gains(rows: Tensor) -> Tensor:
    return transfers(rows, *frequencies(BLOCK, BLOCK)).square()
