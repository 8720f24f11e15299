"""Damage as heavy public sets of pairs have it: what a prompt may learn from beside `degradations.py`, and is not measured by."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.media.degradations import RAIN_LAYERS, columns, seed_field, streaks_of, uniform

REACH = 15  # pixels of a shaken camera's path either way from its middle
MOMENTS = 64  # of an exposure


def downpour(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Clean [B, 3, H, W] under dense, opaque streaks that are added to its light and clip to white, I = min(J + S, 1).

    As in Rain100H: Yang et al., "Deep Joint Rain Detection and Removal from a Single Image", 2017.
    """
    batch, _, height, width = clean.shape
    layers = len(RAIN_LAYERS)
    length, sigma, density, opacity = (column.reshape(1, layers, 1, 1) for column in columns(RAIN_LAYERS, clean))
    size = uniform((batch, 1, 1, 1), 0.7, 1.8, generator, clean)
    angle = uniform((batch, 1, 1, 1), -35, 35, generator, clean) + uniform((batch, layers, 1, 1), -6, 6, generator, clean)
    amount = uniform((batch, 1, 1, 1), 0.8, 3.0, generator, clean)
    light = uniform((batch, 1, 1, 1), 0.5, 1.0, generator, clean)
    drops = seed_field((density * amount / size).expand(batch, layers, height, width), generator)
    streaks = streaks_of(drops, length * size, sigma * size.sqrt(), opacity, torch.deg2rad(angle))
    return (clean + light * (1 - torch.exp(-1.5 * streaks))).clamp(0, 1)


def shake(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Clean [B, 3, H, W] as a camera in a trembling hand sees it, with faint noise.

    The path is a random walk with inertia, as in Boracchi and Foi, "Modeling the Performance of Image Restoration from Motion
    Blur", 2012; the public kernels of Levin et al. (2009) are such paths, measured.
    """
    kernels = torch.stack([_path(generator) for _ in clean]).to(clean)
    side = 2 * REACH + 1
    reach = [min(REACH, length - 1) for length in clean.shape[-2:]]
    padded = F.pad(clean, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    padded = F.pad(padded, [REACH - reach[1]] * 2 + [REACH - reach[0]] * 2, mode="replicate")
    weight = kernels.view(-1, 1, side, side).repeat_interleave(3, 0)
    blurred = F.conv2d(padded.flatten(0, 1)[None], weight, groups=len(weight)).view(clean.shape)
    noise = torch.randn(clean.shape, generator=generator).to(clean) * uniform(
        (len(clean), 1, 1, 1), 0.001, 0.008, generator, clean
    )
    return (blurred + noise).clamp(0, 1)


def _path(generator: torch.Generator) -> Tensor:
    """How long the camera is where: [31, 31], with the sum 1 and its middle of mass in the middle."""
    kicks = torch.randn(MOMENTS, 2, generator=generator)
    jerk = torch.rand(MOMENTS, 1, generator=generator) < 1.5 / MOMENTS
    speed, place, walked = torch.zeros(2), torch.zeros(2), []
    for kick, jerked in zip(kicks, jerk):
        speed = kick if jerked else 0.95 * speed + 0.3 * kick
        place = place + speed
        walked.append(place)
    path = torch.stack(walked)
    path = path - path.mean(0)
    extent = float(torch.rand((), generator=generator)) * (REACH - 4) + 3
    path = (path * extent / path.norm(dim=1).max()).clamp(1 - REACH, REACH - 1) + REACH
    low, part = path.floor().long(), path - path.floor()
    kernel = torch.zeros(2 * REACH + 1, 2 * REACH + 1)
    for dy in (0, 1):
        for dx in (0, 1):
            share = (part[:, 0] if dy else 1 - part[:, 0]) * (part[:, 1] if dx else 1 - part[:, 1])
            kernel.index_put_((low[:, 0] + dy, low[:, 1] + dx), share, accumulate=True)
    return kernel / kernel.sum()


HEAVY = {"rain": downpour, "blur": shake}
