"""The VAEs of Wan 2.1 and FLUX.1 as codecs: diffusers' modules, cut into the two halves that `vae_codec.py` runs.

Wan's tiles give what the whole picture gives. FLUX's normalise by statistics of a whole feature map, of which a tile knows
only its own: there tiles are an approximation, used for larger pictures only.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebr_engine.errors import BackboneError
from ebr_engine.vae_codec import Cache, VaeCodec


class WanCodec(VaeCodec):
    """Wan 2.1's causal 3-D VAE: a latent cell spans 8 × 8 pixels and 4 frames, but 1 frame where the clip begins.

    The decoder's fine half sees up to 97 pixels far, though hardly beyond 50: so far what tiles share is thrown away, for a
    tile's border would show through a blend.
    """

    published = "AutoencoderKLWan"
    whole_area = 1024 * 1024  # decoding takes about 21 KB a pixel in float32
    default_tile, default_overlap, margin = 512, 128, 3 / 8

    def __init__(self, vae: nn.Module, **options: Any):
        config = vae.config
        if config.is_residual or config.patch_size or config.attn_scales:
            raise BackboneError("this is the VAE of another Wan than 2.1, which is not supported")
        self.spatial, self.temporal = 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temperal_downsample)
        self.channels = config.z_dim
        super().__init__(vae, config.latents_mean, config.latents_std, **options)

    @property
    def width(self) -> int:
        """See `VaeCodec`."""
        return self.vae.config.base_dim

    def _encode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        encoder, layer = self.vae.encoder, [0]
        x = _causal(encoder.conv_in, x, cache, layer)
        for block in encoder.down_blocks:
            x = block(x, feat_cache=cache, feat_idx=layer)
        return x

    def _encode_coarse(self, x: Tensor, cache: Cache) -> Tensor:
        encoder, layer = self.vae.encoder, [0]
        x = encoder.mid_block(x, feat_cache=cache, feat_idx=layer)
        x = encoder.nonlinearity(encoder.norm_out(x))
        return self.vae.quant_conv(_causal(encoder.conv_out, x, cache, layer))

    def _decode_coarse(self, z: Tensor, cache: Cache) -> Tensor:
        decoder, layer = self.vae.decoder, [0]
        z = _causal(decoder.conv_in, self.vae.post_quant_conv(z), cache, layer)
        return decoder.mid_block(z, feat_cache=cache, feat_idx=layer)

    def _decode_fine(self, x: Tensor, cache: Cache) -> Tensor:
        decoder, layer = self.vae.decoder, [0]
        for block in decoder.up_blocks:
            x = block(x, feat_cache=cache, feat_idx=layer)
        x = decoder.nonlinearity(decoder.norm_out(x))
        return _causal(decoder.conv_out, x, cache, layer)


class FluxCodec(VaeCodec):
    """FLUX.1's VAE: a latent cell spans 8 × 8 pixels, and every frame is a picture of its own.

    Tiles are large, few and blended widely because they do not agree: each normalises by its own statistics.
    """

    published = "AutoencoderKL"
    temporal = 1
    whole_area = 2048 * 2048  # decoding takes about 4 KB a pixel in float32
    default_tile, default_overlap, margin = 1024, 256, 1 / 8

    def __init__(self, vae: nn.Module, **options: Any):
        config = vae.config
        self.spatial, self.channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        mean, std = config.shift_factor or 0.0, 1 / config.scaling_factor
        super().__init__(vae, [mean] * self.channels, [std] * self.channels, **options)

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


CODECS: dict[str, type[VaeCodec]] = {"wan": WanCodec, "flux": FluxCodec}


def load_codec(
    backbone: str,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    sample_latents: bool = False,
    seed: int = 42,
    tile: int | None = None,
    overlap: int | None = None,
) -> VaeCodec:
    """The codec of a backbone (`wan`, `flux`) from a folder in diffusers' layout (config.json and safetensors), on the CPU.

    Options as for `VaeCodec`. Raises `BackboneError` for a folder that is missing, incomplete, damaged or of another model.
    """
    folder, codec = Path(folder), CODECS[backbone]
    try:
        import diffusers
    except ImportError as error:
        raise BackboneError(f"the VAE of {backbone} needs diffusers: pip install 'ebr-engine[models]'") from error
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"{folder} is no VAE in diffusers' layout: config.json is missing or no JSON object") from error
    if found != codec.published:
        raise BackboneError(f"{folder} holds a model of class {found}, but {backbone} takes {codec.published}")
    try:
        vae, report = getattr(diffusers, codec.published).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(f"cannot load the VAE in {folder}: {' '.join(str(error).split())}") from error
    for kind in ("missing", "unexpected"):
        if names := sorted(report[f"{kind}_keys"]):
            raise BackboneError(f"the VAE in {folder} does not fit its config.json: {kind} tensors {', '.join(names[:3])} …")
    return codec(vae, dtype=dtype, sample_latents=sample_latents, seed=seed, tile=tile, overlap=overlap)


def _causal(conv: nn.Module, x: Tensor, cache: Cache, layer: list[int]) -> Tensor:
    """A causal convolution that sees the two frames before x [B, C, F, H, W], with diffusers' bookkeeping."""
    before = cache[layer[0]]
    last = x[:, :, -2:].clone()
    if last.shape[2] < 2 and before is not None:
        last = torch.cat([before[:, :, -1:], last], dim=2)
    cache[layer[0]] = last
    layer[0] += 1
    return conv(x, before)
