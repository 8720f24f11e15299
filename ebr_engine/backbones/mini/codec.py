"""Pixels ↔ latents: the interface every backbone's codec has, and `mini`'s codec."""

import math

import torch
from torch import Tensor, nn

from ebr_engine.backbones.base import check_latent, check_pixels

BLOCK = 4


class OrthonormalCodec(nn.Module):
    """What `mini`'s codecs share: any number of frames, and channels centred by `mean` and divided by `scale`, [channels]."""

    temporal = 1
    channels: int
    block: int  # pixels of a transform's side; the first of its block² channels of each colour is the block's mean

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.channels) if mean is None else mean)
        self.register_buffer("scale", torch.ones(self.channels) if scale is None else scale)

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the statistics and the bases."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def to_tensors(self) -> dict[str, Tensor]:
        """What the codec is made of again, by the names of its arguments: an engine file holds it."""
        return {"mean": self.mean, "scale": self.scale}

    def spread(self, statistic: Tensor) -> Tensor:
        """A number a channel [channels] as a latent has them, [1, channels, 1, 1, 1]."""
        return statistic.view(1, -1, 1, 1, 1)

    @property
    def tones(self) -> Tensor:
        """Which channels hold a block's mean, the rest being its detail, [channels] bool."""
        return torch.arange(self.channels, device=self.mean.device) % self.block**2 == 0

    def frames(self, count: int) -> int:
        """Any number of frames can be encoded."""
        return count


class PixelCodec(OrthonormalCodec):
    """`mini`'s codec: an orthonormal block transform with normalised channels, exactly invertible, nothing learned.

    Each 4×4 block of pixels becomes 3·16 channels: an orthonormal opponent-colour transform, then the orthonormal
    two-dimensional DCT-II. Channels are centred and divided by `scale`, the square root of their standard deviation over
    natural-like images (and normalised to unit variance overall). White noise in this latent lies between white noise in
    pixels, which buries fine detail first, and noise that takes an equal share of every frequency, which buries the
    picture's tones.
    """

    spatial = block = BLOCK
    channels = 3 * BLOCK * BLOCK
    span = 2 * BLOCK  # pixels of a token, either way
    offsets = ((0, 0), (4, 0), (0, 4), (4, 4))  # of the grid of tokens in a run's steps, the last step first
    noise = 1.0  # of the bridge's own that a run starts with
    levels = False  # whether the mean of a picture's detail is kept, see `backbones/views.py`

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None):
        super().__init__(mean, scale)
        self.register_buffer("basis", torch.kron(opponent_basis(), torch.kron(dct_basis(BLOCK), dct_basis(BLOCK))))

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] → [B, 48, F, H/4, W/4] float32; H and W must be multiples of 4."""
        check_pixels(pixels, self)
        b, c, f, h, w = pixels.shape
        x = pixels.float().reshape(b, c, f, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4) @ self.basis.T  # [B, F, h, w, 48]
        return ((x - self.mean) / self.scale).permute(0, 4, 1, 2, 3)

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 48, F, h, w] → pixels [B, 3, F, 4h, 4w] float32, not clamped: the exact inverse of `encode`."""
        check_latent(latent, self)
        b, _, f, h, w = latent.shape
        x = (latent.float().permute(0, 2, 3, 4, 1) * self.scale + self.mean) @ self.basis
        x = x.view(b, f, h, w, 3, BLOCK, BLOCK).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(b, 3, f, h * BLOCK, w * BLOCK)


def dct_basis(size: int) -> Tensor:
    """The orthonormal DCT-II matrix, rows from low to high frequency, [size, size] float32."""
    k, n = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    basis = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def opponent_basis() -> Tensor:
    """Orthonormal rows: luminance, red–blue, green–magenta, [3, 3] float32."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    return rows / rows.norm(dim=1, keepdim=True)
