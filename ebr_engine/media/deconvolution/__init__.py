"""Blur taken out of a picture before it is restored: how it is blurred is found in the picture itself.

A kernel of many pixels reaches far beyond a transformer's token, but once it is known most of a uniform blur can be taken out. It
is one of the closed forms of `optics.py` where the power spectrum says so (`spectrum.py`), else a path of any form (`paths.py`).
A prompt learns from pictures that have been through this, and restores what it leaves: noise, ringing and lost detail.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.media.calm import kept_calm, luma_of
from ebr_engine.media.deconvolution.inverse import extended, wiener
from ebr_engine.media.deconvolution.optics import Optics
from ebr_engine.media.deconvolution.paths import kernel_of, transfer_of
from ebr_engine.media.deconvolution.spectrum import BLOCK, Fit, Spectrum
from ebr_engine.media.deconvolution.trusting import trust

LARGEST = 640  # pixels of the longer side in which a wide blur is looked for
SHARP = 0.8  # pixels of a point's image, up to which a picture is left as it is
NARROW = 2.0  # pixels of it in a reduced version, below which a larger one shows it better
GOOD = 0.2  # error of a fit up to which a sharp picture is believed to be sharp
SURE = 0.1  # error of a closed form's fit up to which no path is looked for
SIZES = (15, 27)  # pixels of the paths that are looked for
SEARCHED = 480  # pixels of the part that they are looked for in, either way
SPARSITY = 8.0  # how much the logarithm of a result's sparsity counts beside that of the fit's error
MARGIN = 0.5  # by which a path has to be better than a closed form
DOUBTS = (1e-3, 3e-3, 1e-2)  # of a lens, of a straight path, of any path
ALIKE = 0.5  # correlation of the paths of a picture's halves from which on they are one
KEPT = 0.03  # share of fine detail from which on a picture was not blurred by a wide path; a hundredth and less is usual
BELIEVED = 0.15  # error of a fit from which on there is more


@dataclass(frozen=True)
class Blur:
    """How a picture is blurred: by `optics`, or else by a kernel of any form."""

    optics: Optics | None
    kernel: Tensor | None  # [side, side] of sum 1
    fit: Fit  # of the picture's spectrum
    scale: float = 1.0  # by how much the picture is larger than the version in which optics or kernel were measured

    def transfer(self, height: int, width: int) -> Tensor:
        """The transfer function [height, width // 2 + 1] of `rfft2` in the picture's own pixels."""
        if self.optics is not None:
            return self.optics.scaled(self.scale).transfer(height, width)
        kernel = self.kernel
        if self.scale > 1:
            side = int(len(kernel) * self.scale) // 2 * 2 + 1
            kernel = F.interpolate(kernel[None, None], (side, side), mode="bilinear", align_corners=True)[0, 0]
            kernel = kernel / kernel.sum()
        return transfer_of(kernel, height, width)

    @property
    def doubt(self) -> float:
        """How far off the transfer function may be: its relative error, squared."""
        doubt = DOUBTS[2] if self.optics is None else DOUBTS[1] if self.optics.length else DOUBTS[0]
        return doubt * max(1.0, self.fit.error / BELIEVED)

    def removed(self, pictures: Tensor, doubt: float | None = None) -> Tensor:
        """Pictures or frames [F, C, H, W] without it, float32 in [0, 1]; `doubt` in place of its own."""
        transfer = self.transfer(*(extended(side) for side in pictures.shape[-2:]))
        return wiener(pictures, transfer, self.fit, self.doubt if doubt is None else doubt).clamp_(0, 1)

    def __str__(self) -> str:
        return "a path of its own" if self.optics is None else str(self.optics.scaled(self.scale))


def deconvolved(frames: Tensor) -> Tensor:
    """A picture or a scene's frames [F, 3, H, W] in [0, 1] without the blur that they show; as they are where they show none."""
    blur = blur_of(frames)
    if blur is None:
        return frames
    transfer = blur.transfer(*(extended(side) for side in frames.shape[-2:]))
    results = torch.empty(frames.shape)
    for frame, result in zip(frames.split(1), results.split(1)):  # one at a time: spectra are large
        share = trust(luma_of(frame)[0], transfer, blur.fit)
        result.copy_(kept_calm(frame, frame.lerp(blur.removed(frame), share)))
    return results


def blur_of(frames: Tensor) -> Blur | None:
    """The blur of a picture or of a scene's frames [F, 3, H, W] in [0, 1], which is one for all; None for sharp ones.

    Where it is not sharp at its own pixels, it is looked for in a small version first, where a wide blur is found, then in larger
    ones up to the picture itself.
    """
    luma = luma_of(frames)
    if min(luma.shape[-2:]) < BLOCK:
        return None
    own = Spectrum.of(luma)
    if not own.empty:
        optics, fit = own.explained()
        if optics.width < SHARP and fit.error < GOOD:
            return None
    for halved in range(max(0, math.ceil(math.log2(max(luma.shape[-2:]) / LARGEST))), -1, -1):
        small = luma
        if halved:
            shape = [round(side / 2**halved) for side in luma.shape[-2:]]
            small = F.interpolate(luma[:, None], shape, mode="bilinear", antialias=True)[:, 0]
        found = _seen(small, whole=not halved) if min(small.shape[-2:]) >= BLOCK else None
        if found is None:
            continue
        found = replace(found, fit=found.fit.scaled(2.0**halved), scale=2.0**halved)
        if not halved or found.optics is not None or own.kept(found.fit) < KEPT:  # else stripes of a texture
            return found
    return None


def _seen(lumas: Tensor, whole: bool) -> Blur | None:
    """The blur of lumas [F, H, W] in their own pixels; None where they are sharp. `whole`: they are no reduced version."""
    spectrum = Spectrum.of(lumas)
    if spectrum.empty:
        return None
    optics, fit = spectrum.explained()
    sharp = optics.width < (SHARP if whole else NARROW)
    lens = Blur(optics, None, fit)
    several = len(lumas) > 1  # a shaken camera moves otherwise in each frame
    blocks = whole and spectrum.stored  # whose borders are edges of JPEG's making
    if fit.error < (GOOD if sharp else SURE) or several or blocks:
        return None if sharp else lens
    part = _busiest(lumas[0])
    kernels = [kernel_of(part, size) for size in SIZES]
    paths = [Blur(None, kernel, spectrum.fit(transfer_of(kernel, BLOCK, BLOCK).abs().square())) for kernel in kernels]
    path = min(paths, key=lambda one: _badness(one, part))
    if _badness(path, part) < _badness(lens, part) - MARGIN and _halves_agree(lumas[0], len(path.kernel)):
        return path
    return None if sharp else lens


def _halves_agree(luma: Tensor, size: int) -> bool:
    """Whether a kernel of that size is about the same in both halves of [H, W]: a camera's path is one, a texture's is chance."""
    dim = 1 if luma.shape[1] > luma.shape[0] else 0
    half = luma.shape[dim] // 2
    halves = luma.narrow(dim, 0, half), luma.narrow(dim, luma.shape[dim] - half, half)
    one, other = (torch.fft.rfft2(kernel_of(_busiest(part), size), s=(2 * size, 2 * size)) for part in halves)
    both, alone = torch.fft.irfft2(one * other.conj()), [torch.fft.irfft2(kernel) for kernel in (one, other)]
    return float(both.max() / (alone[0].norm() * alone[1].norm())) > ALIKE


def _badness(blur: Blur, luma: Tensor) -> float:
    """How little a blur explains: by the spectrum, and by how many small gradients a luma [H, W] has without it.

    Sharp pictures have few large gradients and hardly any others (Krishnan, Tay and Fergus, "Blind Deconvolution Using a
    Normalized Sparsity Measure", 2011); a wrong kernel leaves rings.
    """
    edge = min(16, *(side // 4 for side in luma.shape))
    sharp = blur.removed(luma[None, None], max(DOUBTS))[0, 0, edge:-edge, edge:-edge]
    gradients = (sharp.diff(dim=dim).flatten() for dim in (0, 1))
    sparsity = sum(float(one.abs().mean() / one.square().mean().sqrt().clamp_min(1e-6)) for one in gradients) / 2
    return math.log(blur.fit.error) + SPARSITY * math.log(max(sparsity, 1e-6))


def _busiest(luma: Tensor) -> Tensor:
    """The part [h, w] of [H, W], SEARCHED pixels at most either way, with the most edges."""
    height, width = luma.shape
    window = [min(SEARCHED, side) for side in luma.shape]
    steps = [max(1, (side - part) // 4) for side, part in zip(luma.shape, window)]
    places = [
        (top, left) for top in range(0, height - window[0] + 1, steps[0]) for left in range(0, width - window[1] + 1, steps[1])
    ]
    parts = [luma[top : top + window[0], left : left + window[1]] for top, left in places]
    return max(parts, key=lambda part: float(part.diff(dim=0).abs().mean() + part.diff(dim=1).abs().mean()))
