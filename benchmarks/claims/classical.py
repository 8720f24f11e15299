"""Restoration without learning, one method a degradation, with fixed parameters; pictures [1, 3, H, W] float32 in [0, 1].

Sources: dark channel prior, He, Sun, Tang, 2009 (transmission smoothed by the guided filter of the same authors, 2010); Wiener
deconvolution with a Gaussian of the middle strength; gamma that brings the median to a middle grey; medians for what is thin
and bright.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 15  # pixels of the dark channel
OMEGA = 0.95
LEAST_TRANSMISSION = 0.1
GUIDE = 20  # radius
MIDDLE = 0.45
WIENER_SIGMA = 2.0
WIENER_NOISE = 0.01
MEDIAN = 5


def dehaze(picture: Tensor) -> Tensor:
    """Dark channel prior."""
    dark = _minimum(picture.amin(1, keepdim=True), PATCH)
    count = max(1, dark.numel() // 1000)
    brightest = dark.flatten().topk(count).indices
    light = picture.flatten(2)[0, :, brightest].mean(1).clamp_min(0.1).view(1, 3, 1, 1)
    coarse = 1 - OMEGA * _minimum((picture / light).amin(1, keepdim=True), PATCH)
    transmission = _guided(picture.mean(1, keepdim=True), coarse, GUIDE).clamp(LEAST_TRANSMISSION, 1)
    return ((picture - light) / transmission + light).clamp(0, 1)


def brighten(picture: Tensor) -> Tensor:
    """The gamma that brings the median to `MIDDLE`, if it is darker."""
    median = float(picture.median().clamp(1e-3, MIDDLE))
    return picture.clamp(0, 1) ** (math.log(MIDDLE) / math.log(median))


def deblur(picture: Tensor) -> Tensor:
    """Wiener deconvolution, mirrored at the border."""
    height, width = picture.shape[-2:]
    pad = [min(16, side - 1) for side in (width, width, height, height)]
    padded = F.pad(picture.double(), pad, mode="reflect")
    fy, fx = (torch.fft.fftfreq(side, dtype=torch.float64) for side in padded.shape[-2:])
    transfer = torch.exp(-2 * (math.pi * WIENER_SIGMA) ** 2 * (fy[:, None] ** 2 + fx**2))
    sharp = torch.fft.ifft2(torch.fft.fft2(padded) * transfer / (transfer**2 + WIENER_NOISE)).real
    return sharp[..., pad[2] : pad[2] + height, pad[0] : pad[0] + width].float().clamp(0, 1)


def derain(picture: Tensor) -> Tensor:
    """A median along the rows: streaks are narrow and upright."""
    return _median(picture, (1, MEDIAN))


def desnow(picture: Tensor) -> Tensor:
    """A median over squares."""
    return _median(picture, (MEDIAN, MEDIAN))


METHODS = {"haze": dehaze, "rain": derain, "snow": desnow, "blur": deblur, "lowlight": brighten}


def _minimum(x: Tensor, side: int) -> Tensor:
    half = side // 2
    return -F.max_pool2d(F.pad(-x, [half] * 4, mode="replicate"), side, stride=1)


def _median(picture: Tensor, window: tuple[int, int]) -> Tensor:
    from scipy.ndimage import median_filter

    return torch.from_numpy(np.ascontiguousarray(median_filter(picture.numpy(), size=(1, 1, *window), mode="reflect")))


def _guided(guide: Tensor, x: Tensor, radius: int, smooth: float = 1e-3) -> Tensor:
    """The guided filter: locally linear in the guide."""
    side = 2 * radius + 1

    def mean(y: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(y, [radius] * 4, mode="replicate"), side, stride=1)

    mg, mx = mean(guide), mean(x)
    a = (mean(guide * x) - mg * mx) / (mean(guide * guide) - mg * mg + smooth)
    return mean(a) * guide + mean(mx - a * mg)
