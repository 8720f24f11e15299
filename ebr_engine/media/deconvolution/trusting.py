"""Where in a picture to believe a deconvolved version: not where the picture is flat, and not where it is sharp already."""

import torch
from torch import Tensor

from ebr_engine.media.deconvolution.inverse import extended, periodic
from ebr_engine.media.deconvolution.optics import frequencies
from ebr_engine.media.deconvolution.spectrum import BLOCK, LOWEST, Fit
from ebr_engine.media.detail import boxed

FLAT = 0.006  # standard deviation in a window about a pixel, at which a half of the change is left
NOISY = 5.0  # what the noise's variance counts beside the square of that
FLAT_REACH = 6  # pixels of that window about its middle
REACH = 24  # pixels of the windows in which sharp parts are looked for
CUT, KEPT = 0.05, 0.3  # power of a transfer function below which blur leaves next to nothing, and above which it leaves much
FEW = 0.02  # share of all frequencies below which there are too few that are cut
SHARP_FROM, SHARP_TO = 0.35, 0.65  # of the way from blurred to sharp (in logarithms) on which belief goes


def trust(luma: Tensor, transfer: Tensor, fit: Fit) -> Tensor:
    """How much of a change is taken, [H, W] from 0 to 1, of a luma [H, W] and a transfer function of its `extended` size.

    What is flat in a blurred picture is flat in the sharp one, and noise or rings beside edges are all that could come (Shan, Jia
    and Agarwala, "High-quality Motion Deblurring from a Single Image", 2008). What has more of the frequencies that blur takes
    away than the fit leaves there was not blurred so: another depth, a caption, what stood still.
    """
    here = luma[None, None]
    variance = boxed(here.square(), FLAT_REACH) - boxed(here, FLAT_REACH).square()
    share = variance.clamp_min(0) / (variance.clamp_min(0) + FLAT**2 + NOISY * fit.noise.variance)
    fy, fx = frequencies(*(extended(side) for side in luma.shape))
    squared = fy**2 + fx**2
    gain = transfer.abs().square()
    seen = (squared > (LOWEST / BLOCK) ** 2) & (squared < 0.25)
    cut, kept = seen & (gain < CUT), seen & (gain > KEPT)
    if cut.float().mean() < FEW or not kept.any():
        return share[0, 0]
    model = squared.clamp_min(1e-12) ** (-fit.slope / 2) * fit.amplitude
    noise = fit.noise.power(squared.clamp_min(1e-12))
    blurred = ((model * gain + 2 * noise) * cut).sum() / ((model * gain + noise) * kept).sum()
    sharp = (model * cut).sum() / (model * kept).sum()
    if sharp < 2 * blurred:  # noise hides what would tell
        return share[0, 0]
    spectrum = torch.fft.rfft2(periodic(luma))
    energies = [_energy(spectrum * band, luma.shape) for band in (cut, kept)]
    floor = float((noise * kept).sum() / squared.numel())
    found = energies[0] / (energies[1] + floor).clamp_min(1e-12)
    way = torch.log(found.clamp_min(1e-12) / blurred) / torch.log(sharp / blurred)
    believed = 1 - ((way - SHARP_FROM) / (SHARP_TO - SHARP_FROM)).clamp(0, 1)
    return (share * boxed(believed, FLAT_REACH))[0, 0]


def _energy(spectrum: Tensor, shape: torch.Size) -> Tensor:
    """The mean square about every pixel [1, 1, H, W] of a band."""
    sides = tuple(extended(side) for side in shape)
    band = torch.fft.irfft2(spectrum, s=sides)[: shape[0], : shape[1]]
    return boxed(band.square()[None, None], REACH)
