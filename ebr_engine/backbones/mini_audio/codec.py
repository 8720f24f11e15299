"""`mini-audio`'s codec: the modified discrete cosine transform, of sound that lies in the places of a clip's pixels.

A frame of a clip is `HOP` samples: two rows of 128 numbers, in the places of a picture's three colours. So a clip
[B, 128, F, 2, 1] is F frames of sound, and an engine that knows of shapes only restores it like any other.
"""

import math

import torch
from torch import Tensor

from ebr_engine.backbones.base import check_latent
from ebr_engine.backbones.mini.codec import OrthonormalCodec
from ebr_engine.errors import EbrError

RATE = 16000  # samples a second
HOP = 256  # samples between frames; a basis function spans two hops
LEVEL = 0.1  # root mean square at which the model meets sound: so loud it is made before, and back after
BANDS = 2  # halves of the spectrum, a token each: the transformer's width has to hold a token's coefficients and more


class SoundCodec(OrthonormalCodec):
    """The MDCT with a sine window and normalised coefficients, exactly invertible, nothing learned.

    As a filter over each border between frames and the orthonormal DCT-IV of each frame (the outermost half frames are not
    filtered), so that F frames give F·256 coefficients. Coefficients are divided by `scale`, the square root of their
    standard deviation over speech-like sound (and normalised to unit variance overall), so that white noise in the latent
    hides faint frequencies first.

    Sources: Princen, Johnson and Bradley, "Subband/transform coding using filter bank designs based on time domain aliasing
    cancellation", 1987; as a filter before the DCT, as `mini`'s codec: Tran, Liang and Tu, 2003.
    """

    spatial = 1
    channels = HOP // BANDS
    rate, hop = RATE, HOP
    level = LEVEL
    noise = 0.2  # of the bridge's own that a run starts with

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None):
        super().__init__(torch.zeros(HOP) if mean is None else mean, torch.ones(HOP) if scale is None else scale)
        self.register_buffer("dct", dct4_basis(HOP))
        self.register_buffer("fold", border_filter(HOP))

    @property
    def tones(self) -> Tensor:
        """No coefficient is a mean."""
        return torch.zeros(HOP, dtype=torch.bool, device=self.mean.device)

    def spread(self, statistic: Tensor) -> Tensor:
        """A number a frequency [256] as a latent has them, [1, 128, 1, 2, 1]."""
        return statistic.view(1, BANDS, self.channels, 1, 1).movedim(1, 3)

    def encode(self, pixels: Tensor) -> Tensor:
        """Sound [B, 128, F, 2, 1] → [B, 128, F, 2, 1] float32: the lower half of the spectrum, then the upper."""
        return self.normalised(self.analyse(samples_of(checked(pixels))))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 128, F, 2, 1] → sound of the same shape, float32: the exact inverse of `encode`."""
        check_latent(latent, self)
        coefficients = latent.float() * self.spread(self.scale) + self.spread(self.mean)
        return frames_of(self.synthesise(coefficients.movedim(2, 1).movedim(3, 2).flatten(2)))

    def as_clip(self, samples: Tensor) -> Tensor:
        """See `frames_of`."""
        return frames_of(samples)

    def as_samples(self, clip: Tensor) -> Tensor:
        """See `samples_of`."""
        return samples_of(clip)

    def normalised(self, coefficients: Tensor) -> Tensor:
        """Coefficients [B, F, 256] as a latent."""
        latent = coefficients.unflatten(2, (BANDS, -1)).movedim(3, 1).unsqueeze(-1)
        return (latent - self.spread(self.mean)) / self.spread(self.scale)

    def analyse(self, samples: Tensor) -> Tensor:
        """The transform alone: [B, F·256] → [B, F, 256], orthonormal."""
        return _folded(samples.float(), self.fold).unflatten(-1, (-1, HOP)) @ self.dct

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """The inverse of `analyse`."""
        return _folded((coefficients @ self.dct).flatten(1), self.fold.T)


def frames_of(samples: Tensor) -> Tensor:
    """Samples [B, F·256] as a clip [B, 128, F, 2, 1]."""
    return samples.unflatten(1, (-1, BANDS, HOP // BANDS)).movedim(3, 1).unsqueeze(-1)


def samples_of(pixels: Tensor) -> Tensor:
    """The inverse of `frames_of`."""
    return pixels.squeeze(-1).movedim(1, 3).flatten(1)


def checked(pixels: Tensor) -> Tensor:
    """A clip of sound; `EbrError` for another shape."""
    if pixels.ndim != 5 or (pixels.shape[1], *pixels.shape[3:]) != (HOP // BANDS, BANDS, 1) or not pixels.numel():
        raise EbrError(f"expected sound [B, {HOP // BANDS}, F, {BANDS}, 1], got {tuple(pixels.shape)}")
    return pixels


def dct4_basis(size: int) -> Tensor:
    """The orthonormal DCT-IV matrix, which is symmetric and its own inverse, [size, size] float32."""
    k, n = torch.meshgrid(*2 * (torch.arange(size, dtype=torch.float64) + 0.5,), indexing="ij")
    return (torch.cos(math.pi / size * n * k) * math.sqrt(2 / size)).float()


def border_filter(size: int) -> Tensor:
    """The orthonormal filter over a border between frames, `size` samples with the border in their middle, [size, size] float32.

    It folds what a sine window of two frames sees of its neighbours: even at a frame's beginning, odd at its end.
    """
    half = size // 2
    angle = math.pi / (2 * size) * (half + torch.arange(half, dtype=torch.float64) + 0.5)
    rising, falling = angle.sin(), angle.cos()
    left, right = half - 1 - torch.arange(half), half + torch.arange(half)  # at one distance from the border
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[left, left], matrix[left, right] = rising, -falling
    matrix[right, right], matrix[right, left] = rising, falling
    return matrix.float()


def _folded(samples: Tensor, matrix: Tensor) -> Tensor:
    """`matrix` [256, 256] over every border between frames of samples [B, F·256]; the outermost 128 stay."""
    half = HOP // 2
    if samples.shape[-1] == HOP:
        return samples
    inner = samples[..., half:-half].unflatten(-1, (-1, HOP)) @ matrix.T
    return torch.cat((samples[..., :half], inner.flatten(-2), samples[..., -half:]), -1)
