"""What every backbone has: the interface of its codec."""

from typing import Protocol

import torch
from torch import Tensor

from ebr_engine.errors import EbrError


class Codec(Protocol):
    """What turns a clip into the latent that a transformer takes, and back. A picture is a clip of one frame."""

    spatial: int  # pixels a latent cell spans, either way
    temporal: int  # frames a latent frame spans, but for a clip's first, which spans one
    channels: int  # of a latent

    @property
    def parameters_bytes(self) -> int:
        """Bytes that the weights take."""

    def frames(self, count: int) -> int:
        """The least number of frames, `count` or more, that can be encoded."""

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] → [B, channels, f, h, w] float32, normalised as the transformer takes it."""

    def decode(self, latent: Tensor) -> Tensor:
        """[B, channels, f, h, w] → pixels [B, 3, F, H, W] float32, not clamped."""

    def to(self, device: torch.device | str) -> "Codec":
        """Move the weights; returns the same object."""


def check_pixels(pixels: Tensor, codec: Codec) -> None:
    """`EbrError` unless pixels are [B, 3, F, H, W], not empty, with H and W that the codec divides (F is not checked)."""
    multiple = codec.spatial
    if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.numel() or any(side % multiple for side in pixels.shape[-2:]):
        shape = tuple(pixels.shape)
        raise EbrError(f"expected pixels [B, 3, F, H, W] with H and W multiples of {multiple}, got {shape}")


def check_latent(latent: Tensor, codec: Codec) -> None:
    """`EbrError` unless a latent is [B, channels, f, h, w] and not empty."""
    if latent.ndim != 5 or latent.shape[1] != codec.channels or not latent.numel():
        raise EbrError(f"expected a latent [B, {codec.channels}, f, h, w], got {tuple(latent.shape)}")
