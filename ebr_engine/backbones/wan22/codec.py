"""The VAE of Wan 2.2 TI2V-5B as the two halves that `backbones/vae.py` runs."""

from torch import Tensor

from ebr_engine.backbones.vae_layers import Cache
from ebr_engine.backbones.wan.codec import WanCodec


class Wan22Codec(WanCodec):
    """Wan 2.1's VAE with shortcuts around its blocks, over patches of 2 × 2 pixels: a cell spans 16 × 16 pixels and 4 frames.

    The fine halves see twice as far as Wan 2.1's, so tiles share twice as much.
    """

    version, residual = "2.2 TI2V-5B", True
    whole_area = 1024 * 1024  # decoding takes about 24 KB a pixel in float32
    default_tile, default_overlap, margin = 1024, 256, 3 / 8

    @property
    def width(self) -> int:
        """Channels where the decoder, which is the wider half, ends: at a quarter of the pixels."""
        return self.vae.config.decoder_base_dim or self.vae.config.base_dim

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return super()._encode_fine(patchify(x, self.vae.config.patch_size), cache)

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        return unpatchify(super()._decode_fine(x, cache), self.vae.config.patch_size)


def patchify(x: Tensor, side: int) -> Tensor:
    """[B, C, F, H, W] → [B, C·side², F, H/side, W/side]; of a channel's patch columns come first, as diffusers has them."""
    x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # [B, C, F, h, rows, w, columns]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, side: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, side, side))  # [B, C, columns, rows, F, h, w]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
