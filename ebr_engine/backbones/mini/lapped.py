"""`mini`'s codec: a lapped orthonormal transform, whose basis functions fade into the neighbouring blocks and show no grid."""

import math

import torch
from torch import Tensor

from ebr_engine.backbones.base import check_latent, check_pixels
from ebr_engine.backbones.mini.codec import OrthonormalCodec, dct_basis, opponent_basis

HOP = 8  # pixels between blocks; a basis function spans two hops


class LappedCodec(OrthonormalCodec):
    """Malvar's lapped orthogonal transform with normalised channels, exactly invertible, nothing learned.

    Pixels go through an orthonormal opponent-colour transform; then, along rows and along columns, an orthonormal filter over
    each border between blocks of 8 pixels, and the orthonormal DCT-II of each block: 3·64 channels a cell. A block transform
    cuts the picture into tiles whose edges show wherever neighbours are changed differently; these functions overlap and fade
    out. The outermost 4 pixels of a picture are not filtered, which is what a picture reflected at its border would give.
    Channels are centred and divided by `scale`, the square root of their standard deviation over natural-like images (and
    normalised to unit variance overall), so that white noise in the latent hides fine detail first.

    Sources: Malvar and Staelin, "The LOT: transform coding without blocking effects", 1989; as a filter before the DCT, Tran,
    Liang and Tu, "Lapped transform via time-domain pre- and post-filtering", 2003.
    """

    spatial = block = HOP
    channels = 3 * HOP * HOP
    span = HOP  # pixels of a token, either way
    offsets = ((4, 4), (0, 0), (4, 0), (0, 4), (2, 6))  # of the grid of tokens in a run's steps, the last step first
    noise = 0.2  # of the bridge's own that a run starts with: less of it is left in flat areas, and no score misses it
    levels = True  # whether the mean of a picture's detail is kept, see `backbones/views.py`

    def __init__(self, mean: Tensor | None = None, scale: Tensor | None = None):
        super().__init__(mean, scale)
        self.register_buffer("colour", opponent_basis())
        self.register_buffer("dct", dct_basis(HOP))
        self.register_buffer("overlap", overlap_filter(HOP))

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] → [B, 192, F, H/8, W/8] float32; H and W must be multiples of 8."""
        check_pixels(pixels, self)
        return (self.analyse(pixels) - self.spread(self.mean)) / self.spread(self.scale)

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 192, F, h, w] → pixels [B, 3, F, 8h, 8w] float32, not clamped: the exact inverse of `encode`."""
        check_latent(latent, self)
        return self.synthesise(latent.float() * self.spread(self.scale) + self.spread(self.mean))

    def analyse(self, pixels: Tensor) -> Tensor:
        """The transform alone: [B, 3, F, H, W] → [B, 192, F, H/8, W/8], orthonormal."""
        b, _, f, h, w = pixels.shape
        x = torch.einsum("kc,bcfhw->bkfhw", self.colour, pixels.float())
        x = _filtered_down(_filtered(x, self.overlap), self.overlap)
        x = (x.unflatten(-1, (-1, HOP)) @ self.dct.T).flatten(-2)
        x = self.dct @ x.unflatten(-2, (-1, HOP))  # [B, 3, F, H/8, vertical, W/8 · horizontal]
        x = x.unflatten(-1, (-1, HOP)).permute(0, 1, 4, 6, 2, 3, 5)
        return x.reshape(b, self.channels, f, h // HOP, w // HOP)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """The inverse of `analyse`."""
        b, _, f, h, w = coefficients.shape
        x = coefficients.view(b, 3, HOP, HOP, f, h, w).permute(0, 1, 4, 5, 2, 6, 3)
        x = self.dct.T @ x.reshape(b, 3, f, h, HOP, w * HOP)
        x = (x.reshape(b, 3, f, h * HOP, w, HOP) @ self.dct).flatten(-2)
        x = _filtered(_filtered_down(x, self.overlap.T), self.overlap.T)
        return torch.einsum("kc,bkfhw->bcfhw", self.colour, x)


def overlap_filter(size: int) -> Tensor:
    """The orthonormal filter over a border between blocks, `size` pixels with the border in their middle, [size, size] float32.

    It leaves what is symmetric about the border as it is, and turns what is antisymmetric by J·DCT-IIᵀ·DCT-IV·J.
    """
    half = size // 2
    k, n = torch.meshgrid(torch.arange(half, dtype=torch.float64), torch.arange(half, dtype=torch.float64), indexing="ij")
    dct4 = torch.cos(math.pi * (n + 0.5) * (k + 0.5) / half) * math.sqrt(2 / half)
    dct2 = torch.cos(math.pi * (n + 0.5) * k / half) * math.sqrt(2 / half)
    dct2[0] /= math.sqrt(2)
    one, flip = torch.eye(half, dtype=torch.float64), torch.eye(half, dtype=torch.float64).flip(0)
    butterfly = torch.cat((torch.cat((one, flip), 1), torch.cat((flip, -one), 1))) / math.sqrt(2)
    turn = torch.block_diag(one, flip @ dct2.T @ dct4 @ flip)
    return (butterfly @ turn @ butterfly).float()


def _filtered(x: Tensor, matrix: Tensor) -> Tensor:
    """`matrix` [8, 8] over every border between blocks along the last axis [..., W]; the outermost 4 pixels stay."""
    half = HOP // 2
    if x.shape[-1] == HOP:
        return x
    inner = x[..., half:-half].unflatten(-1, (-1, HOP)) @ matrix.T
    return torch.cat((x[..., :half], inner.flatten(-2), x[..., -half:]), -1)


def _filtered_down(x: Tensor, matrix: Tensor) -> Tensor:
    """The same along the axis before the last, [..., H, W], row by row as they lie."""
    half = HOP // 2
    if x.shape[-2] == HOP:
        return x
    inner = matrix @ x[..., half:-half, :].unflatten(-2, (-1, HOP))
    return torch.cat((x[..., :half, :], inner.flatten(-3, -2), x[..., -half:, :]), -2)
