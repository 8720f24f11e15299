"""Wan 2.1's causal 3-D VAE: diffusers' module, cut into the two halves that `backbones/vae.py` runs."""

from typing import Any

import torch
from torch import Tensor, nn

from ebr_engine.backbones.vae import Cache, VaeCodec
from ebr_engine.errors import BackboneError


class WanCodec(VaeCodec):
    """Wan 2.1's causal 3-D VAE: a latent cell spans 8 × 8 pixels and 4 frames, but 1 frame where the clip begins.

    The decoder's fine half sees up to 97 pixels far, though hardly beyond 50: so far what tiles share is thrown away, for a
    tile's border would show through a blend.
    """

    published = "AutoencoderKLWan"
    version, residual = "2.1", False
    whole_area = 1024 * 1024  # decoding takes about 21 KB a pixel in float32
    default_tile, default_overlap, margin = 512, 128, 3 / 8

    def __init__(self, vae: nn.Module, **options: Any):
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
        encoder, layer = self.vae.encoder, [0]
        x = causal(encoder.conv_in, x, cache, layer)
        for block in encoder.down_blocks:
            x = block(x, feat_cache=cache, feat_idx=layer)
        return x

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        encoder, layer = self.vae.encoder, [0]
        x = encoder.mid_block(x, feat_cache=cache, feat_idx=layer)
        x = encoder.nonlinearity(encoder.norm_out(x))
        return self.vae.quant_conv(causal(encoder.conv_out, x, cache, layer))

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        decoder, layer = self.vae.decoder, [0]
        z = causal(decoder.conv_in, self.vae.post_quant_conv(z), cache, layer)
        return decoder.mid_block(z, feat_cache=cache, feat_idx=layer)

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        decoder, layer = self.vae.decoder, [0]
        for block in decoder.up_blocks:
            x = block(x, feat_cache=cache, feat_idx=layer)
        x = decoder.nonlinearity(decoder.norm_out(x))
        return causal(decoder.conv_out, x, cache, layer)


def causal(conv: nn.Module, x: Tensor, cache: Cache, layer: list[int]) -> Tensor:
    """A causal convolution that sees the two frames before x [B, C, F, H, W], with diffusers' bookkeeping."""
    before = cache[layer[0]]
    last = x[:, :, -2:].clone()
    if last.shape[2] < 2 and before is not None:
        last = torch.cat([before[:, :, -1:], last], dim=2)
    cache[layer[0]] = last
    layer[0] += 1
    return conv(x, before)
