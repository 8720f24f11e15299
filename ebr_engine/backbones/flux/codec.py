"""FLUX.1's VAE: diffusers' module, cut into the two halves that `backbones/vae.py` runs."""

from typing import Any

from torch import Tensor, nn

from ebr_engine.backbones.vae import Cache, VaeCodec


class PictureCodec(VaeCodec):
    """The network of FLUX.1's VAE and of FLUX.2's, for which every frame is a picture of its own.

    Tiles are large, few and blended widely because they do not agree: each normalises by its own statistics.
    """

    temporal = 1
    whole_area = 2048 * 2048  # decoding takes about 4 KB a pixel in float32
    default_tile, default_overlap, margin = 1024, 256, 1 / 8

    @property
    def width(self) -> int:
        """See `VaeCodec`."""
        return self.vae.config.block_out_channels[0]

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        encoder = self.vae.encoder
        x = encoder.conv_in(x.squeeze(2))
        for block in encoder.down_blocks:
            x = block(x)
        return x.unsqueeze(2)

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        encoder, last = self.vae.encoder, self.vae.quant_conv or nn.Identity()
        x = encoder.conv_norm_out(encoder.mid_block(x.squeeze(2)))
        return last(encoder.conv_out(encoder.conv_act(x))).unsqueeze(2)

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        decoder, first = self.vae.decoder, self.vae.post_quant_conv or nn.Identity()
        return decoder.mid_block(decoder.conv_in(first(z.squeeze(2)))).unsqueeze(2)

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        decoder = self.vae.decoder
        x = x.squeeze(2)
        for block in decoder.up_blocks:
            x = block(x)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x))).unsqueeze(2)


class FluxCodec(PictureCodec):
    """FLUX.1's VAE: a latent cell spans 8 × 8 pixels."""

    published = "AutoencoderKL"

    def __init__(self, vae: nn.Module, **options: Any):
        config = vae.config
        self.spatial, self.channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        mean, std = config.shift_factor or 0.0, 1 / config.scaling_factor
        super().__init__(vae, [mean] * self.channels, [std] * self.channels, **options)
