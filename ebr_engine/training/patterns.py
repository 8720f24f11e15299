"""What procedural scenes are painted with: random palettes, fields, textures and outlines, all drawn from a given generator."""

import numpy as np
from scipy import fft

HUES = {"warm": 0.65, "cool": 3.6, "green": 1.7}  # radians on the wheel red 0, green 2π/3, blue 4π/3
SATURATION = {"warm": 0.45, "cool": 0.4, "vivid": 0.75, "green": 0.45, "grey": 0.03}
ANGLES = 1024  # entries of a contour table: half a pixel of arc at a radius of 80 px
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709, linear light


def palette(rng: np.random.Generator, name: str) -> np.ndarray:
    """Five to eight linear RGB colours [K, 3]: luminance spread over decades, chroma small and around few hues."""
    count = int(rng.integers(5, 9))
    # Daylight scenes lie along orange to blue, with green beside it; purple is for the vivid ones.
    natural = rng.choice([0.55, 0.7, 1.2, 3.6])
    hue = HUES.get(name, rng.uniform(0, 2 * np.pi) if name == "vivid" else natural) + rng.normal(0, 0.15)
    spread = 1.5 if name == "vivid" else 0.2
    hues = hue + spread * rng.standard_normal(count) + np.pi * (rng.random(count) < 0.15)
    saturation = SATURATION.get(name, 0.22) * rng.uniform(0.3, 1.3, count)
    wheel = np.cos(hues[:, None] - np.array([0, 2 * np.pi / 3, 4 * np.pi / 3]))
    colours = np.clip(1 + saturation[:, None] * wheel, 0.03, None)
    luminance = 0.85 * np.exp(-rng.uniform(2, 4) * rng.permutation(np.linspace(0, 1, count)))
    return (colours / (colours @ LUMA)[:, None] * luminance[:, None]).astype(np.float32)


def field(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0, cut: float = 0.0) -> np.ndarray:
    """A periodic Gaussian field [S, S] of unit variance with power |f|^-slope; `stretch` > 1 draws it out along x."""
    fy, fx = fft.fftfreq(size)[:, None] / stretch, fft.rfftfreq(size)[None] * stretch
    power = fy * fy + fx * fx + cut * cut
    power[0, 0] = 1
    spectrum = rng.standard_normal((2, *power.shape), np.float32)
    gain = (power ** (-slope / 4)).astype(np.float32)
    gain[0, 0] = 0
    values = fft.irfft2((spectrum[0] + 1j * spectrum[1]) * gain, (size, size))
    return values / values.std()


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A field as a surface: 1/f^s with s in [0.5, 2.5], sometimes drawn out (grass, wood), folded (veins), patchy."""
    stretch = float(np.exp(rng.uniform(-1.4, 1.4))) if rng.random() < 0.35 else 1.0
    surface = field(rng, size, 2.5 - 2 * rng.random() ** 2, stretch, rng.choice([0, 0.02, 0.08]))
    style = rng.random()
    if style < 0.2:
        surface = 1.6 * (0.8 - np.abs(surface))
    elif style < 0.4:
        surface = np.tanh(2.5 * surface)
    return surface


def stripes(rng, distance, slope, pattern, extent: int) -> np.ndarray:
    """Stripes or checks in [-1, 1], along the leaf's own gradient, warped by `pattern`."""
    waves = extent / rng.uniform(4, 24)
    bands = np.sin(np.float32(3 * waves) * slope + np.float32(rng.uniform(0, 0.8)) * pattern)
    if rng.random() < 0.3:
        bands = bands * np.sin(distance * np.float32(6 * waves / extent))
    return np.tanh(np.float32(rng.uniform(0.5, 4)) * bands)


def profile(rng: np.random.Generator, size: int, slope: float) -> np.ndarray:
    """A fractal line [S] of unit variance, power |f|^-slope; cut from twice the length, so that its ends differ."""
    gain = np.arange(1, size + 1) ** (-slope / 2)
    spectrum = np.concatenate([[0], gain * (rng.standard_normal(size) + 1j * rng.standard_normal(size))])
    line = fft.irfft(spectrum, 2 * size)[:size]
    return ((line - line.mean()) / line.std()).astype(np.float32)


def contour(rng: np.random.Generator, shape: int) -> np.ndarray:
    """A star-shaped outline [2, ANGLES]: radius over angle (largest 1), and the cosine between normal and radius.

    shape 0: superellipse; 1: Fourier blob; 2: polygon, convex or not.
    """
    theta = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    if shape == 0:
        power = rng.choice([2.0, 2.0, rng.uniform(1.2, 5)])
        aspect = rng.uniform(0.3, 1)
        radius = (np.abs(np.cos(theta)) ** power + np.abs(np.sin(theta) / aspect) ** power) ** (-1 / power)
    elif shape == 1:
        order = np.arange(1, 25)[:, None]
        weights = rng.standard_normal((24, 1)) * order ** -rng.uniform(1.0, 2.0) * rng.uniform(0.15, 0.5)
        radius = np.exp((weights * np.cos(order * theta + rng.uniform(0, 6.3, (24, 1)))).sum(0))
    else:
        corners = int(rng.integers(3, 9))
        # Jittered, evenly spread corners: no side may span half a turn, where the polar form of a line breaks.
        angles = (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) * (2 * np.pi / corners)
        inverse = 1 / rng.choice([1.0, rng.uniform(0.4, 1)], corners)
        at = np.searchsorted(angles, theta, side="right") - 1
        start, stop = angles[at], angles[(at + 1) % corners]
        side = np.mod(stop - start, 2 * np.pi)
        past = np.mod(theta - start, 2 * np.pi)
        radius = np.sin(side) / (np.sin(side - past) * inverse[at] + np.sin(past) * inverse[(at + 1) % corners])
    steepness = (np.roll(radius, -1) - np.roll(radius, 1)) * (ANGLES / (4 * np.pi)) / radius
    return np.stack([radius / radius.max(), (1 + steepness**2) ** -0.5]).astype(np.float32)
