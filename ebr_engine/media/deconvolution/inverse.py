"""Taking a known blur out of a picture: Wiener's filter, by the spectrum and the noise of the picture itself."""

import torch
from torch import Tensor

from ebr_engine.media.deconvolution.optics import frequencies
from ebr_engine.media.deconvolution.spectrum import Fit

CAUTION = 2.0  # by how much more noise is feared than is seen
COARSE = 0.03  # cycles a pixel below which every kernel is known well
MARGIN = 48  # pixels at least over which a picture's opposite borders fade into each other


def wiener(pictures: Tensor, transfer: Tensor, fit: Fit, doubt: float) -> Tensor:
    """Pictures or frames [F, C, H, W] without the blur of a transfer function of their `extended` size.

    X = K*·Y / (|K|² + CAUTION·n²/S + doubt): what the noise hides is not made stronger, nor what hangs on how exactly K is known.
    """
    height, width = pictures.shape[-2:]
    shape = extended(height), extended(width)
    fy, fx = frequencies(*shape)
    squared = fy**2 + fx**2
    limit = CAUTION * fit.ratio(squared) + doubt * (1 - torch.exp(-squared / COARSE**2))
    filter = transfer.conj() / (transfer.abs().square() + limit)
    result = torch.empty_like(pictures, memory_format=torch.contiguous_format)  # so that its planes are views
    for picture, out in zip(pictures.flatten(0, 1), result.flatten(0, 1)):  # one at a time: spectra are large
        out.copy_(torch.fft.irfft2(torch.fft.rfft2(periodic(picture)).mul_(filter), s=shape)[:height, :width])
    return result


def extended(side: int, margin: int = MARGIN) -> int:
    """The length of a side with its margin: one whose factors are 2, 3 and 5."""
    length = side + min(margin, side - 1)
    while length < 2 * side - 1 and not _smooth(length):
        length += 1
    return length


def _smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


def periodic(picture: Tensor, margin: int = MARGIN) -> Tensor:
    """A picture [H, W] with a margin below and to the right, in which its reflections fade from one border to the other's."""
    for dim in (0, 1):
        side = picture.shape[dim]
        extra = extended(side, margin) - side
        if not extra:
            continue
        after = picture.narrow(dim, side - 1 - extra, extra).flip(dim)
        before = picture.narrow(dim, 1, extra).flip(dim)
        part = (torch.arange(extra) + 0.5) / extra
        part = (part * part * (3 - 2 * part)).view(-1, *[1] * (1 - dim))
        picture = torch.cat((picture, after.lerp(before, part)), dim)
    return picture
