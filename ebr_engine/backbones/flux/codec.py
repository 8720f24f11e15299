"""FLUX.1's VAE as the two halves that `backbones/vae.py` runs."""

from typing import Any

from torch import Tensor

from ebr_engine.backbones.flux.vae import FluxVae, FluxVaeConfig
from ebr_engine.backbones.vae import VaeCodec
from ebr_engine.backbones.vae_layers import Cache, laid_out, put_back
from ebr_engine.errors import BackboneError

BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}


class PictureCodec(VaeCodec):
    """The network of FLUX.1's VAE and of FLUX.2's, for which every frame is a picture of its own.

    Tiles are large, few and blended widely because they do not agree: each normalises by its own statistics.
    """

    network, sizes = FluxVae, FluxVaeConfig
    temporal = 1
    whole_area = 2048 * 2048  # decoding takes about 4 KB a pixel in float32
    default_tile, default_overlap, margin = 1024, 256, 1 / 8

    def __init__(self, vae: FluxVae, *options: Any, **named: Any):
        config = vae.config
        if {*config.down_block_types, *config.up_block_types} - BLOCKS or config.act_fn != "silu":
            raise BackboneError("the VAE's config.json has blocks of another network than FLUX's, which are not supported")
        super().__init__(vae, *options, **named)

    @property
    def width(self) -> int:
        """See `VaeCodec`."""
        return self.vae.config.block_out_channels[0]

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.encoder.fine(laid_out(x)))

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.quant_conv(self.vae.encoder.coarse(laid_out(x))))

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.decoder.coarse(self.vae.post_quant_conv(laid_out(z))))

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return put_back(self.vae.decoder.fine(laid_out(x)))


class FluxCodec(PictureCodec):
    """FLUX.1's VAE: a latent cell spans 8 × 8 pixels."""

    published = "AutoencoderKL"

    def __init__(self, vae: FluxVae, **options: Any):
        config = vae.config
        self.spatial, self.channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        mean, std = config.shift_factor or 0.0, 1 / config.scaling_factor
        super().__init__(vae, [mean] * self.channels, [std] * self.channels, **options)
