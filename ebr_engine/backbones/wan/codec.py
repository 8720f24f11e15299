"""Wan 2.1's causal 3-D VAE as the two halves that `backbones/vae.py` runs."""

from typing import Any

from torch import Tensor

from ebr_engine.backbones.vae import VaeCodec
from ebr_engine.backbones.vae_layers import Cache, laid_out, put_back
from ebr_engine.backbones.wan.vae import WanVae, WanVaeConfig
from ebr_engine.errors import BackboneError


class WanCodec(VaeCodec):
    """Wan 2.1's causal 3-D VAE: a latent cell spans 8 × 8 pixels and 4 frames, but 1 frame where the clip begins.

    The decoder's fine half sees up to 97 pixels far, though hardly beyond 50: so far what tiles share is thrown away, for a
    tile's border would show through a blend.
    """

    published, network, sizes = "AutoencoderKLWan", WanVae, WanVaeConfig
    version, residual = "2.1", False
    whole_area = 1024 * 1024  # decoding takes about 21 KB a pixel in float32
    default_tile, default_overlap, margin = 512, 128, 3 / 8

    def __init__(self, vae: WanVae, **options: Any):
        config = vae.config
        if config.attn_scales or {config.is_residual, config.patch_size is not None} != {self.residual}:
            raise BackboneError(f"this is the VAE of another Wan than {self.version}, which is not supported")
        self.spatial = (config.patch_size or 1) * 2 ** (len(config.dim_mult) - 1)
        self.temporal, self.channels = 2 ** sum(config.temperal_downsample), config.z_dim
        super().__init__(vae, config.latents_mean, config.latents_std, **options)

    @property
    def width(self) -> int:
        """See `VaeCodec`."""
        return self.vae.config.base_dim

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.encoder.fine(laid_out(x), cache))

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.quant_conv(self.vae.encoder.coarse(laid_out(x), cache)))

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.decoder.coarse(self.vae.post_quant_conv(laid_out(z)), cache))

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.decoder.fine(laid_out(x), cache))
