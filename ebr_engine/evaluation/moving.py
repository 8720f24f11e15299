"""Photos in motion: clips whose every clean frame, and whose motion, is known, degraded as one camera would see it.

A virtual camera pans, turns and zooms over a photo that no training has seen, with the tremble of a hand; in every second clip a
piece of another photo moves across on a path of its own.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.evaluation.photos import NAMES, STRENGTH, load_photo
from ebr_engine.media.degradations import degrade_clip, seeds

CLIPS = 10
ROOM = 1.5  # sides of the photo over those of a frame
STEADY = 0.05  # by which a pixel may differ from where it came from, to be one that was in sight


@dataclass(frozen=True)
class Clip:
    """A clean clip and its degraded form, [F, 3, H, W] float32 in [0, 1]."""

    name: str
    task: str
    clean: Tensor
    degraded: Tensor


def make_clip(number: int, task: str, size: int = 192, frames: int = 9, strength: float = STRENGTH) -> Clip:
    """The clip of a number from 0 on, the same on every call; frames are squares of `size` pixels, rounded to 8 bit."""
    rng = np.random.default_rng((number, seeds("test").start))
    name = NAMES[number % len(NAMES)]
    clean = filmed(scaled(name, size), camera(rng, frames), size)
    if number % 2:
        other = scaled(NAMES[(number + 1) % len(NAMES)], size)
        clean = passed_by(rng, clean, filmed(other, camera(rng, 1), size)[0])
    generator = torch.Generator().manual_seed(seeds("test").start + number)
    clean = (clean * 255).round() / 255
    degraded = degrade_clip(clean, task, generator, strength=strength)
    return Clip(f"{name} {number}", task, clean, (degraded * 255).round() / 255)


def scaled(name: str, size: int) -> Tensor:
    """A whole photo [1, 3, H, W] whose shorter side is 1.5 times a frame's."""
    photo, _ = load_photo(name, None)
    scale = ROOM * size / min(photo.shape[-2:])
    shape = [round(side * scale) for side in photo.shape[-2:]]
    return F.interpolate(photo, shape, mode="bicubic", antialias=True).clamp(0, 1)


def camera(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A path [F, 4]: x and y in pixels off the middle, angle in radians, zoom; half a pixel to three a frame, and a tremble."""
    moments = np.arange(frames) - (frames - 1) / 2
    direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 3.0)
    turning, zooming = rng.uniform(-0.004, 0.004), rng.uniform(-0.006, 0.006)
    phase = rng.uniform(0, 2 * np.pi, 2)
    x, y = (speed * moments * f(direction) + np.sin(0.8 * np.arange(frames) + p) for f, p in zip((np.cos, np.sin), phase))
    return np.stack((x, y, turning * moments, 1 + zooming * moments), 1)


def filmed(photo: Tensor, path: np.ndarray, size: int) -> Tensor:
    """What a camera on a path [F, 4] over a photo [1, 3, H, W] sees, [F, 3, size, size]."""
    height, width = photo.shape[-2:]
    y, x = torch.meshgrid(*2 * [torch.arange(size) - (size - 1) / 2], indexing="ij")
    frames = []
    for right, down, angle, zoom in path.tolist():
        u = width / 2 + right + zoom * (math.cos(angle) * x - math.sin(angle) * y)
        v = height / 2 + down + zoom * (math.sin(angle) * x + math.cos(angle) * y)
        grid = torch.stack((u / width * 2 - 1, v / height * 2 - 1), -1)[None].float()
        frames.append(F.grid_sample(photo, grid, "bicubic", padding_mode="reflection", align_corners=False))
    return torch.cat(frames).clamp(0, 1)


def passed_by(rng: np.random.Generator, scene: Tensor, other: Tensor) -> Tensor:
    """A scene [F, 3, S, S] that an oval piece of another picture [3, S, S] moves across, at two to five pixels a frame."""
    frames, size = len(scene), scene.shape[-1]
    y, x = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float32)], indexing="ij")
    direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(2, 5)
    radii = rng.uniform(0.14, 0.26, 2) * size
    result = []
    for frame, moment in zip(scene, np.arange(frames) - (frames - 1) / 2):
        right, down = (round(speed * moment * f(direction)) for f in (np.cos, np.sin))
        distance = torch.sqrt(((x - size / 2 - right) / radii[0]) ** 2 + ((y - size / 2 - down) / radii[1]) ** 2)
        cover = ((1 - distance) * float(radii.min()) + 0.5).clamp(0, 1)
        result.append(torch.lerp(frame, other.roll((down, right), (1, 2)), cover))
    return torch.stack(result)


def warping_error(frames: Tensor, clean: Tensor) -> float:
    """How much frames [F, 3, H, W] differ from the frame before along the motion of the clean clip, in 1/255; 0 is steady.

    The mean absolute difference over what the clean clip shows in both (Lai et al., "Learning Blind Video Temporal
    Consistency", ECCV 2018). The motion is that of OpenCV's optical flow between clean frames.
    """
    from ebr_engine.media.motion import Motion

    pictures, truth = (np.ascontiguousarray(x.movedim(1, -1).numpy()) for x in (frames, clean))
    motion, errors = Motion(truth), []
    for i in range(1, len(truth)):
        there = motion.places(i, i - 1)
        shown = motion.sure(i, i - 1) & (np.abs(motion.taken(truth[i - 1], there) - truth[i]).max(-1) < STEADY)
        errors.append(np.abs(motion.taken(pictures[i - 1], there) - pictures[i])[shown].mean())
        motion.forget(i - 1)
    return 255 * float(np.mean(errors))
