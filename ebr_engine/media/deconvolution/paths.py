"""A point's image of any form, such as the path of a shaken camera, from a blurred picture's strongest edges.

A sharp picture with few edges and the kernel that blurs it are found in turns, from coarse to fine: the picture by an L0 prior on
its gradients, solved by half-quadratic splitting (Xu, Zheng and Jia, "Unnatural L0 Sparse Representation for Natural Image
Deblurring", 2013); the kernel by least squares on gradients (Cho and Lee, "Fast Motion Deblurring", 2009).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.media.deconvolution.inverse import periodic

SMALLEST = 5  # pixels of the coarsest kernel, either way
TURNS = 5  # at each scale
SPARSE, DECAY, LEAST = 4e-3, 1.1, 1e-4  # weight of the prior: at first, its decay a turn, and at last
STIFFEST, STIFFENING = 1e5, 3.0  # weight of the splitting at last, and its growth
RIDGE = 16.0  # weight of a kernel's energy, where grey values lie in [0, 1]
STRAY = 0.05  # share of a kernel's peak below which it is nothing


def kernel_of(luma: Tensor, size: int) -> Tensor:
    """The kernel [size, size] (odd) that blurs a luma [H, W] in [0, 1]; its sum is 1.

    Where a sharp picture lay cannot be told from a blurred one: the kernel's centre of mass is put in its middle, so that the
    picture stays where its light is.
    """
    levels = max(1, math.floor(math.log(SMALLEST / size) / math.log(math.sqrt(0.5))))
    kernel, sparse = None, SPARSE
    for level in range(levels, -1, -1):
        scale = math.sqrt(0.5) ** level
        side = max(3, int(size * scale) // 2 * 2 + 1)
        picture = luma
        if level:
            shape = [max(side, round(x * scale)) for x in luma.shape]
            picture = F.interpolate(luma[None, None], shape, mode="bicubic", antialias=True)[0, 0]
        if kernel is None:
            kernel = torch.zeros(side, side)
            kernel[side // 2, side // 2 - 1 : side // 2 + 1] = 0.5
        else:
            kernel = pruned(F.interpolate(kernel[None, None], (side, side), mode="bicubic", align_corners=True)[0, 0])
        kernel, sparse = _in_turns(picture, kernel, sparse)
        kernel = centred(kernel)
    return kernel


def _in_turns(picture: Tensor, kernel: Tensor, sparse: float) -> tuple[Tensor, float]:
    side = len(kernel)
    wide = periodic(picture, max(side, 16))
    spectrum, slopes = torch.fft.rfft2(wide), _gradient_transfers(wide.shape)
    blurred = [torch.fft.rfft2(gradient) for gradient in _gradients(wide)]
    for _ in range(TURNS):
        sharp = _few_edges(wide, spectrum, transfer_of(kernel, *wide.shape), slopes, sparse)
        edges = [torch.fft.rfft2(gradient) for gradient in _gradients(sharp)]
        above = sum(edge.conj() * gradient for edge, gradient in zip(edges, blurred))
        below = sum(edge.abs().square() for edge in edges) + RIDGE
        found = torch.fft.irfft2(above / below, s=wide.shape).roll((side // 2, side // 2), (0, 1))[:side, :side]
        kernel = pruned(found)
        sparse = max(sparse / DECAY, LEAST)
    return kernel, sparse


def _few_edges(wide: Tensor, spectrum: Tensor, transfer: Tensor, slopes: tuple[Tensor, Tensor], sparse: float) -> Tensor:
    """The picture S that has k * S near the blurred one and few gradients other than 0."""
    sharp, stiff = wide, 2 * sparse
    fixed, gain = transfer.conj() * spectrum, transfer.abs().square()
    curvature = sum(slope.abs().square() for slope in slopes)
    while stiff < STIFFEST:
        gradients = _gradients(sharp)
        flat = sum(gradient.square() for gradient in gradients) < sparse / stiff
        kept = sum(slope.conj() * torch.fft.rfft2(one.masked_fill(flat, 0)) for slope, one in zip(slopes, gradients))
        sharp = torch.fft.irfft2((fixed + stiff * kept) / (gain + stiff * curvature), s=wide.shape)
        stiff *= STIFFENING
    return sharp


def _gradients(picture: Tensor) -> list[Tensor]:
    return [picture.roll(-1, dim) - picture for dim in (1, 0)]


def _gradient_transfers(shape: torch.Size) -> tuple[Tensor, Tensor]:
    impulse = torch.zeros(shape)
    impulse[0, 0] = 1
    across, down = _gradients(impulse)
    return torch.fft.rfft2(across), torch.fft.rfft2(down)


def transfer_of(kernel: Tensor, height: int, width: int) -> Tensor:
    """The transfer function [height, width // 2 + 1] of a kernel about its middle."""
    side = len(kernel)
    plane = torch.zeros(max(height, side), max(width, side))
    plane[:side, :side] = kernel
    return torch.fft.rfft2(plane.roll((-(side // 2), -(side // 2)), (0, 1)), s=(height, width))


def pruned(kernel: Tensor) -> Tensor:
    """A kernel without what is negative or stray; of sum 1."""
    kernel = torch.where(kernel > STRAY * kernel.max(), kernel, 0.0)
    if not kernel.sum() > 0:
        kernel = torch.zeros_like(kernel)
        kernel[len(kernel) // 2, len(kernel) // 2] = 1
    return kernel / kernel.sum()


def centred(kernel: Tensor) -> Tensor:
    """A kernel [side, side] moved by whole pixels, so that its centre of mass lies in the middle; what leaves it is lost."""
    places = torch.arange(len(kernel)) - float(len(kernel) // 2)
    down, aside = (round(float(kernel.sum(dim) @ places)) for dim in (1, 0))
    reach = max(abs(down), abs(aside))
    wide = F.pad(kernel, [reach] * 4)
    return pruned(wide.roll((-down, -aside), (0, 1))[reach : reach + len(kernel), reach : reach + len(kernel)])
