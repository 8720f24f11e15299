"""FLUX.2's VAE as the two halves that `backbones/vae.py` runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebr_engine.backbones.flux.codec import PictureCodec
from ebr_engine.backbones.flux.vae import FluxVae, FluxVaeConfig
from ebr_engine.backbones.vae_layers import Cache
from ebr_engine.errors import BackboneError


@dataclass(frozen=True)
class Flux2VaeConfig(FluxVaeConfig):
    """Sizes as config.json has them; the defaults are diffusers'."""

    down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 4
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    batch_norm_eps: float = 1e-4
    patch_size: Sequence[int] = (2, 2)


class Flux2Vae(FluxVae):
    """FLUX.1's network, and the statistics of its latents."""

    def __init__(self, config: Flux2VaeConfig):
        super().__init__(config)
        self.bn = nn.BatchNorm2d(config.latent_channels * math.prod(config.patch_size), affine=False)


class Flux2Codec(PictureCodec):
    """FLUX.2's VAE: a latent cell spans 16 × 16 pixels, being 2 × 2 cells of the network, and every frame is a picture.

    Cells are normalised by the running mean and variance of the batch norm that they were trained with, which knows the four
    places in a cell apart. Between the halves features are folded alike, so that tiles lie on cells.
    """

    published, network, sizes = "AutoencoderKLFlux2", Flux2Vae, Flux2VaeConfig

    def __init__(self, vae: Flux2Vae, **options: Any):
        config, norm = vae.config, vae.bn
        if tuple(config.patch_size) != (2, 2):
            raise BackboneError(f"the VAE's config.json has patch_size={config.patch_size}; only cells of 2×2 are supported")
        self.fold = config.patch_size[0]
        self.spatial, self.channels = self.fold * 2 ** (len(config.block_out_channels) - 1), norm.num_features
        mean, std = norm.running_mean, torch.sqrt(norm.running_var + config.batch_norm_eps)
        vae.bn = nn.Identity()  # read once; buffers would be moved, and read back, with the weights
        super().__init__(vae, mean.tolist(), std.tolist(), **options)

    @property
    def width(self) -> int:
        """See `VaeCodec`."""
        config = self.vae.config
        return max(config.block_out_channels[0], (config.decoder_block_out_channels or config.block_out_channels)[0])

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return self._folded(super()._encode_fine(x, cache))

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        moments = super()._encode_coarse(self._unfolded(x), cache)
        return torch.cat([self._folded(part) for part in moments.chunk(2, dim=1)], dim=1)

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        return self._folded(super()._decode_coarse(self._unfolded(z), cache))

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return super()._decode_fine(self._unfolded(x), cache)

    def _folded(self, x: Tensor) -> Tensor:
        """[B, C, 1, 2h, 2w] → [B, 4C, 1, h, w], a channel's four places side by side."""
        return F.pixel_unshuffle(x.squeeze(2), self.fold).unsqueeze(2)

    def _unfolded(self, x: Tensor) -> Tensor:
        """The inverse of `_folded`."""
        return F.pixel_shuffle(x.squeeze(2), self.fold).unsqueeze(2)
