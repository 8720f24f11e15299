"""Seeded, batched synthetic degradations of clean images: haze, rain, snow, blur and low light.

Every random number comes from the caller's CPU generator and only then moves to the images' device, so a seed means the
same degradation on every machine. Within a task the draws do not depend on the strength: one seed gives the same storm,
stronger or weaker. Lengths are in pixels and densities per pixel: a 64 px image looks like a crop of a 256 px one.

Point spread functions are written as their Fourier transforms (Gaussian, disc and line all have closed forms), so one
FFT serves a different kernel for every sample of the batch.
"""

import math

import torch
import torch.nn.functional as F

from ebr_engine.media.deconvolution.optics import APERTURE, disc, frequencies, gaussian, line

TASKS = ("haze", "rain", "snow", "blur", "lowlight")
STRENGTH_WORDS = ("light", "moderate", "heavy")
CAPTION_WORDS: tuple[str, ...] = TASKS + STRENGTH_WORDS

# Ranges far wider than any run needs, so that a step counter can index them without a check.
_SEEDS = {
    "train": range(0, 1_000_000_000),
    "validation": range(1_000_000_000, 1_001_000_000),
    "test": range(2_000_000_000, 2_001_000_000),
}

# One row a layer, from far and dense to near and sparse: length px, sigma across px, streaks per px, opacity.
RAIN_LAYERS = (
    (7.0, 0.50, 0.0080, 0.30),
    (13.0, 0.55, 0.0050, 0.45),
    (22.0, 0.65, 0.0022, 0.65),
    (32.0, 0.90, 0.0008, 0.75),
    (44.0, 1.50, 0.0002, 0.45),
)
# Radius px, flakes per px, opacity: the two largest are near the lens, out of focus and translucent.
_SNOW_LAYERS = (
    (0.7, 0.0130, 0.75),
    (1.1, 0.0065, 0.90),
    (1.7, 0.0026, 1.00),
    (2.8, 0.0007, 0.90),
    (5.0, 0.00016, 0.55),
)


def seeds(split: str) -> range:
    """Generator seeds of a split: "train" (1e9 of them, from 0), "validation" (1e6, from 1e9), "test" (1e6, from 2e9).

    The ranges are disjoint, so no storm seen in training is met again in an evaluation. ValueError for another name.
    """
    if split not in _SEEDS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(_SEEDS)}")
    return _SEEDS[split]


def strength_word(strength: float) -> str:
    """The caption's word for a strength in [0, 1]: "light" below 1/3, "moderate" below 2/3, else "heavy"."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    return STRENGTH_WORDS[min(int(strength * 3), 2)]


def degrade(
    clean: torch.Tensor,
    task: str,
    generator: torch.Generator,
    *,
    depth: torch.Tensor | None = None,
    strength: float | torch.Tensor | None = None,
    moment: int | None = None,
) -> torch.Tensor:
    """Degrades clean [B, 3, H, W] (float32 sRGB in [0, 1]) by one of TASKS; returns the same shape, dtype and range.

    generator: a CPU generator, the only source of randomness. depth: [B, 1, H, W] in [0, 1], 0 near and 1 far, read by
    haze alone; None makes a plausible one. strength: a float or [B] in [0, 1] (0 mild, 1 ruined); None draws one a
    sample, uniformly. moment: the number of a clip's frame, see `degrade_clip`. ValueError for anything else. Sources: the
    functions of the five tasks below.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of: {', '.join(TASKS)}")
    if clean.ndim != 4 or clean.shape[1] != 3 or 0 in clean.shape:
        raise ValueError(f"clean must be [B, 3, H, W], got {list(clean.shape)}")
    if clean.dtype != torch.float32:
        raise ValueError(f"clean must be float32, got {clean.dtype}")
    _check_unit_range("clean", clean)
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be a CPU generator, got one on {generator.device}")
    batch, _, height, width = clean.shape

    # Drawn even where it is given, so that the rest of the sample's draws stay the same.
    drawn = torch.rand(batch, generator=generator)
    strength = drawn if strength is None else torch.as_tensor(strength, dtype=torch.float32)
    if strength.shape not in ((), (batch,)):
        raise ValueError(f"strength must be a number or [{batch}], got {list(strength.shape)}")
    _check_unit_range("strength", strength)
    strength = strength.to(clean.device).expand(batch).reshape(batch, 1, 1, 1)

    if depth is not None:
        if depth.shape != (batch, 1, height, width):
            raise ValueError(f"depth must be {[batch, 1, height, width]}, got {list(depth.shape)}")
        _check_unit_range("depth", depth)
        depth = depth.to(clean)
    if task == "haze":
        return _haze(clean, strength, generator, depth).clamp_(0, 1)
    model = {"rain": _rain, "snow": _snow, "blur": _blur, "lowlight": _lowlight}[task]
    return model(clean, strength, generator, moment).clamp_(0, 1)


def degrade_clip(
    clean: torch.Tensor,
    task: str,
    generator: torch.Generator,
    *,
    depth: torch.Tensor | None = None,
    strength: float | None = None,
) -> torch.Tensor:
    """Degrades the frames [F, 3, H, W] of one clip by one of TASKS as one camera would see it; arguments as those of `degrade`.

    Wind, sizes, light and the lens are one for all frames. Rain's drops are others in each, as they fall past between two;
    flakes drift on; a sensor's noise is new; haze and darkness stand still. A clip of one frame is a picture.
    """
    if len(clean) == 1:
        return degrade(clean, task, generator, depth=depth, strength=strength)
    start = generator.get_state()
    frames = []
    for moment, frame in enumerate(clean.split(1)):
        generator.set_state(start)
        far = None if depth is None else depth[moment : moment + 1]
        frames.append(degrade(frame, task, generator, depth=far, strength=strength, moment=moment))
    return torch.cat(frames)


def depth_from_disparity(disparity) -> torch.Tensor:
    """Depth [1, 1, H, W] in [0, 1] (0 near, 1 far) from a stereo disparity map [H, W] (array or tensor, pixels).

    Unknown disparities (infinite, NaN or not positive) are mostly background that the nearer object hides from the
    other camera, so they take the farther of the nearest known pixels to the left and right (the usual fill of the
    Middlebury and KITTI stereo sets). ValueError if no pixel is known.
    """
    disparity = torch.as_tensor(disparity, dtype=torch.float32)
    if disparity.ndim != 2:
        raise ValueError(f"disparity must be [H, W], got {list(disparity.shape)}")
    known = torch.isfinite(disparity) & (disparity > 0)
    if not known.any():
        raise ValueError("disparity has no finite positive value")
    width = disparity.shape[1]
    column = torch.arange(width, device=disparity.device).expand_as(disparity)
    left = torch.where(known, column, -1).cummax(1).values
    right = torch.where(known, column, width).flip(1).cummin(1).values.flip(1)
    values = torch.where(known, disparity, math.inf)
    from_left = torch.where(left >= 0, values.gather(1, left.clamp_min(0)), math.inf)
    from_right = torch.where(right < width, values.gather(1, right.clamp_max(width - 1)), math.inf)
    filled = torch.minimum(from_left, from_right)
    filled = torch.where(torch.isfinite(filled), filled, disparity[known].min())  # rows without a known pixel

    distance = 1.0 / filled
    # Stray matches make a few absurd distances; percentiles keep them from squeezing the rest of the scene.
    order = distance.flatten().sort().values
    near, far = order[int(0.01 * (len(order) - 1))], order[int(0.99 * (len(order) - 1))]
    return ((distance - near) / (far - near).clamp_min(1e-8)).clamp(0, 1)[None, None]


def _haze(clean, strength, generator, depth):
    """Atmospheric scattering, I = J·T + A·(1 − T) with T = exp(−β·d).

    Koschmieder's law in sRGB as the dehazing sets apply it: He et al., "Single Image Haze Removal Using Dark Channel
    Prior", 2009, eq. 1; Li et al., "Benchmarking Single-Image Dehazing and Beyond" (RESIDE), 2019, eq. 1-2.
    """
    batch, _, height, width = clean.shape
    beta = _lerp(0.6, 2.3, strength) * uniform((batch, 1, 1, 1), 0.93, 1.07, generator, clean)
    airlight = uniform((batch, 1, 1, 1), 0.78, 0.97, generator, clean)
    airlight = (airlight + uniform((batch, 3, 1, 1), -0.03, 0.03, generator, clean)).clamp(0.75, 1.0)
    if depth is None:
        # Far at the top, near at the bottom; the exponent moves the horizon, low frequencies stand for the objects.
        row = torch.linspace(1, 0, height, device=clean.device).reshape(1, 1, height, 1)
        ramp = row ** uniform((batch, 1, 1, 1), 0.6, 1.8, generator, clean)
        depth = (ramp + 0.3 * _smooth_noise(batch, height, width, generator, clean)).clamp(0, 1)
    # The nearest object already stands behind some air.
    transmission = torch.exp(-beta * (0.2 + 0.8 * depth))
    return airlight + (clean - airlight) * transmission


def _rain(clean, strength, generator, moment):
    """Streaks of several depths on a screen blend, I = 1 − (1 − J)(1 − S), under a slight veil.

    Sparse seeds convolved with oriented motion kernels, as the Rain100L/H sets are made: Yang et al., "Deep Joint Rain
    Detection and Removal from a Single Image", 2017; streak appearance: Garg and Nayar, "Vision and Rain", 2007.
    """
    batch, _, height, width = clean.shape
    layers = len(RAIN_LAYERS)
    length, sigma, density, opacity = (column.reshape(1, layers, 1, 1) for column in columns(RAIN_LAYERS, clean))
    size = uniform((batch, 1, 1, 1), 0.75, 1.3, generator, clean)  # the shutter's time: longer streaks, fewer of them
    wind = uniform((batch, 1, 1, 1), -21, 21, generator, clean)
    angle = torch.deg2rad(wind + uniform((batch, layers, 1, 1), -4, 4, generator, clean))
    gusts = 1 + 0.6 * _smooth_noise(batch, height, width, generator, clean)
    length = length * size * uniform((batch, layers, 1, 1), 0.8, 1.2, generator, clean)
    light = uniform((batch, 1, 1, 1), 0.85, 1.0, generator, clean)
    tint = 1 - uniform((batch, 3, 1, 1), 0.0, 0.05, generator, clean)

    drops = seed_field(density * gusts * _lerp(0.38, 1.45, strength) / size, _instant(generator, moment))
    streaks = 1 - torch.exp(-1.3 * streaks_of(drops, length, sigma, opacity, angle))
    streaks = streaks * _lerp(0.72, 1.0, strength) * light
    veil = _lerp(0.03, 0.15, strength)
    veiled = clean + (0.72 * light * tint - clean) * veil
    return 1 - (1 - veiled) * (1 - streaks * tint)


def streaks_of(drops, length, sigma, opacity, angle):
    """The sum over layers [B, 1, H, W] of drops [B, layers, H, W] drawn out along their fall.

    `length`, `sigma` in pixels, `opacity` of a lone streak and `angle` from the vertical, in radians: [1 or B, layers, 1, 1].
    """
    fy, fx = frequencies(*drops.shape[-2:], length.device)
    along, across = fx * angle.sin() + fy * angle.cos(), fx * angle.cos() - fy * angle.sin()
    transfer = torch.sinc(along * length) * torch.exp(-2 * (math.pi * sigma) ** 2 * (along**2 + across**2))
    transfer = transfer * (opacity * length * sigma * math.sqrt(2 * math.pi))  # a lone streak peaks at its opacity
    return _filter_and_sum(drops, transfer)


def _snow(clean, strength, generator, moment):
    """Near-white flakes of several sizes, alpha-composited over a light veil: I = J·(1 − α) + c·α.

    Sizes, opacities and motion vary as in Snow100K: Liu et al., "DesnowNet: Context-Aware Deep Network for Snow
    Removal", 2018, eq. 1.
    """
    batch, _, height, width = clean.shape
    layers = len(_SNOW_LAYERS)
    radius, density, opacity = (column.reshape(1, layers, 1, 1) for column in columns(_SNOW_LAYERS, clean))
    size = uniform((batch, 1, 1, 1), 0.8, 1.25, generator, clean)
    radius = radius * size
    wind = uniform((batch, 1, 1, 1), -50, 50, generator, clean)
    angle = torch.deg2rad(wind + uniform((batch, layers, 1, 1), -15, 15, generator, clean))
    motion = radius * uniform((batch, layers, 1, 1), 0.5, 2.5, generator, clean)  # px travelled: near flakes more
    gusts = 1 + 0.5 * _smooth_noise(batch, height, width, generator, clean)
    white = 1 - uniform((batch, 3, 1, 1), 0.0, 0.05, generator, clean)

    flakes = seed_field(density * gusts * _lerp(0.38, 1.5, strength) / size**2, generator)
    if moment:  # the shutter is open for half the time between two frames
        flakes = _drifted(flakes, 2 * motion * moment, angle)
    fy, fx = frequencies(height, width, clean.device)
    sigma = 0.62 * radius
    along = fx * angle.sin() + fy * angle.cos()
    transfer = torch.sinc(along * motion) * torch.exp(-2 * (math.pi * sigma) ** 2 * (fx**2 + fy**2))
    spread = torch.sqrt(1 + motion**2 / (12 * sigma**2))
    cover = _filter_and_sum(flakes, transfer * (2 * math.pi * sigma**2 * spread * opacity))
    # Fine noise breaks the round outlines; the saturating curve then turns Gaussians into discs with soft edges.
    cover = cover * uniform((batch, 1, height, width), 0.7, 1.3, _instant(generator, moment), clean)
    alpha = 0.97 * (1 - torch.exp(-2.2 * cover.clamp_min(0) ** 1.3))
    veiled = clean + (0.85 * white - clean) * _lerp(0.03, 0.16, strength)
    return veiled + (white - veiled) * alpha


def _blur(clean, strength, generator, moment):
    """Gaussian, defocus-disc or linear-motion blur (one kind a sample) of equal variance, plus faint sensor noise.

    I = k * J + n. Transfer functions: see `deconvolution/optics.py`; blur families as in Zhang et al., "Designing a Practical
    Degradation Model" (BSRGAN), 2021.
    """
    batch, _, height, width = clean.shape
    sigma = _lerp(0.9, 3.1, strength) * uniform((batch, 1, 1, 1), 0.93, 1.07, generator, clean)
    kind = torch.randint(3, (batch, 1, 1, 1), generator=generator).to(clean.device)
    angle = uniform((batch, 1, 1, 1), 0, math.pi, generator, clean)
    noise_level = uniform((batch, 1, 1, 1), 0.001, 0.006, generator, clean)
    noise = torch.randn(clean.shape, generator=_instant(generator, moment)).to(clean.device)

    pad_y, pad_x = min(10, height - 1), min(10, width - 1)
    padded = F.pad(clean, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    fy, fx = frequencies(height + 2 * pad_y, width + 2 * pad_x, clean.device)
    # The disc and the line keep a narrow Gaussian, the pixel's own aperture, or their cut spectrum would ring.
    transfer = gaussian(torch.where(kind == 0, sigma, APERTURE), fx**2 + fy**2)
    blurred_by_disc = disc(2 * sigma, torch.sqrt(fx**2 + fy**2))  # a disc's variance is radius² / 4
    blurred_by_line = line(math.sqrt(24) * sigma, fx * angle.cos() + fy * angle.sin())  # length² / 12, all along one axis
    transfer = transfer * torch.where(kind == 1, blurred_by_disc, 1.0)
    transfer = transfer * torch.where(kind == 2, blurred_by_line, 1.0)
    blurred = torch.fft.irfft2(torch.fft.rfft2(padded) * transfer, s=padded.shape[-2:])
    return blurred[..., pad_y : pad_y + height, pad_x : pad_x + width] + noise_level * noise


def _lowlight(clean, strength, generator, moment):
    """Under-exposure: gain and colour cast in linear light, shot and read noise, sRGB and gamma, 8-bit quantisation.

    Paired low light as in Wei et al., "Deep Retinex Decomposition for Low-Light Enhancement" (LOL), 2018; synthesis by
    gain, gamma and Poisson-Gaussian noise as in Lv et al., "Attention Guided Low-light Image Enhancement", 2021.
    """
    batch = clean.shape[0]
    gain = torch.exp(_lerp(math.log(0.30), math.log(0.055), strength))
    gain = gain * uniform((batch, 1, 1, 1), 0.88, 1.14, generator, clean)
    cast = uniform((batch, 3, 1, 1), 0.9, 1.1, generator, clean)
    gamma = uniform((batch, 1, 1, 1), 1.0, 1.12, generator, clean)
    shot = _lerp(1e-4, 5e-4, strength) * uniform((batch, 1, 1, 1), 0.5, 1.5, generator, clean)
    read = _lerp(5e-4, 2e-3, strength) * uniform((batch, 1, 1, 1), 0.5, 1.5, generator, clean)
    noise = torch.randn(clean.shape, generator=_instant(generator, moment)).to(clean.device)

    linear = torch.where(clean <= 0.04045, clean / 12.92, ((clean + 0.055) / 1.055) ** 2.4)
    exposed = linear * (gain * cast)
    noisy = (exposed + noise * torch.sqrt(shot * exposed + read**2)).clamp_(0, 1)
    encoded = torch.where(noisy <= 0.0031308, 12.92 * noisy, 1.055 * noisy ** (1 / 2.4) - 0.055)
    return torch.round(encoded**gamma * 255) / 255


def _check_unit_range(name, values):
    low, high = (float(v) for v in values.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}")


def _lerp(mild, strong, strength):
    return mild + (strong - mild) * strength


def uniform(shape, low, high, generator, like):
    """Numbers between two, of that shape, where the tensor `like` is; drawn on the CPU."""
    return torch.rand(shape, generator=generator).mul_(high - low).add_(low).to(like.device)


def columns(table, like):
    """The columns of a table of layers, [columns, layers], where the tensor `like` is."""
    return torch.tensor(table, device=like.device).T


def _smooth_noise(batch, height, width, generator, like):
    """Low-frequency noise [B, 1, H, W], mostly within [-1, 1]."""
    coarse = uniform((batch, 1, 4, 4), -1, 1, generator, like)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)


def seed_field(density, generator):
    """Sparse seeds of weight 0.4 to 1, at density [B, L, H, W] a pixel (the sum over L at most 1)."""
    batch, _, height, width = density.shape
    # One uniform number a pixel serves every layer: the interval it falls in places a seed, how far into it weighs it.
    u = torch.rand((batch, 1, height, width), generator=generator).to(density.device)
    position = (density.cumsum(1) - u) / density
    return torch.where((position > 0) & (position <= 1), 0.4 + 0.6 * position, 0.0)


def _instant(generator, moment):
    """What the numbers that differ from frame to frame come from: for a picture, the generator itself."""
    if moment is None:
        return generator
    clip = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(clip + moment)


def _drifted(fields, distance, angle):
    """Seed fields [B, L, H, W] moved on by distances [B, L, 1, 1] in pixels, downwards and aside by their angles; they wrap."""
    result = torch.empty_like(fields)
    down, aside = (x.round().long().flatten(1).tolist() for x in (distance * angle.cos(), distance * angle.sin()))
    for i, layers in enumerate(fields):
        for j, field in enumerate(layers):
            result[i, j] = field.roll((down[i][j], aside[i][j]), (0, 1))
    return result


def _filter_and_sum(fields, transfer):
    """Filters each layer of fields [B, L, H, W] by its transfer function and sums them: [B, 1, H, W].

    The FFT wraps around, which for random seeds is what is wanted: streaks cross the borders as they do in a crop.
    """
    spectrum = (torch.fft.rfft2(fields) * transfer).sum(1, keepdim=True)
    return torch.fft.irfft2(spectrum, s=fields.shape[-2:]).clamp_min(0)
