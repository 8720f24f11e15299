"""FLUX.2's VAE as a codec: cells of 2 × 2 normalised as diffusers' pipelines do it, whole and in tiles."""

import json

import pytest
import torch
from torch import nn

from ebr_engine.backbones.vae import load_codec
from ebr_engine.errors import BackboneError, EbrError

diffusers = pytest.importorskip("diffusers")
SIZES = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 6,
    "norm_num_groups": 2,
}


def write(folder, **changes):
    """A tiny random VAE in the real layout, its normalisation far from none; the folder."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(**SIZES | changes)
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.2, 3)
        vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(torch.randn(1, 6, 16, 16)).sample.std())
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("flux2") / "vae")


def published(folder):
    """Diffusers' model, and the functions with which its pipeline makes a latent of an encoded picture and back."""
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folder)
    pipeline = diffusers.Flux2KleinPipeline(vae=vae, **dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "transformer")))
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)

    def encode(pixels):
        return pipeline._encode_vae_image(pixels * 2 - 1, None)

    def decode(latent):
        return vae.decode(pipeline._unpatchify_latents(latent * std + mean)).sample / 2 + 0.5

    return encode, decode


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@torch.no_grad()
def test_every_frame_is_coded_alone_as_diffusers_pipeline_does(tmp_path, frames, changes):
    folder = write(tmp_path / "vae", **changes)
    codec, (encode, decode) = load_codec("flux2", folder), published(folder)
    pixels = torch.rand(2, 3, frames, 32, 48)
    latent = codec.encode(pixels)
    assert latent.shape == (2, 24, frames, 2, 3)
    decoded = codec.decode(latent)
    assert decoded.shape == pixels.shape
    for i in range(frames):
        expected = encode(pixels[:, :, i])
        torch.testing.assert_close(latent[:, :, i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded[:, :, i], decode(expected), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_decoder_of_other_widths_is_run_and_told(tmp_path):
    folder = write(tmp_path / "vae", decoder_block_out_channels=(6, 6, 8, 8))
    codec, (_, decode) = load_codec("flux2", folder), published(folder)
    latent = torch.randn(1, 24, 1, 2, 2)
    torch.testing.assert_close(codec.decode(latent)[:, :, 0], decode(latent[:, :, 0]), rtol=0, atol=1e-4)
    assert codec.width == 6


@torch.no_grad()
def test_sampled_latents_are_drawn_from_the_posterior_by_the_seed(folder):
    codec, mode = load_codec("flux2", folder, sample_latents=True, seed=7), load_codec("flux2", folder)
    pixels = torch.rand(1, 3, 1, 32, 16)
    drawn = codec.encode(pixels)
    assert torch.equal(codec.encode(pixels), drawn)
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folder)
    deviation = vae.encode(pixels[:, :, 0] * 2 - 1).latent_dist.std  # [1, 6, 4, 2]
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(7))
    places = nn.functional.pixel_unshuffle(deviation, 2).unsqueeze(2)
    expected = mode.encode(pixels) + places * noise / mode.std
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)


class Through(nn.Module):
    def forward(self, x, overwrite=False):
        return x


def test_tiles_differ_by_their_statistics_alone(folder):
    """GroupNorm sees a whole feature map; without it, tiles give what the whole picture gives: the attention is never cut."""
    whole, tiled = (load_codec("flux2", folder, tile=tile, overlap=96) for tile in (0, 128))
    for codec in (whole, tiled):
        for half in (codec.vae.encoder.down_blocks, codec.vae.decoder.up_blocks):
            for module in half.modules():
                for name, child in module.named_children():
                    if isinstance(child, nn.GroupNorm):
                        setattr(module, name, Through())
        codec.vae.decoder.conv_norm_out = Through()
        codec.margin = 3 / 8
    pixels = nn.functional.interpolate(torch.rand(1, 3, 9, 13), (144, 208), mode="bicubic").unsqueeze(2)
    latent = whole.encode(pixels)
    torch.testing.assert_close(tiled.encode(pixels), latent, rtol=0, atol=1e-3 * latent.std().item())
    decoded = whole.decode(latent)
    torch.testing.assert_close(tiled.decode(latent), decoded, rtol=0, atol=decoded.std().item() / 255)


def test_what_it_takes_and_tells(folder):
    codec = load_codec("flux2", folder)
    assert (codec.spatial, codec.temporal, codec.channels, codec.width) == (16, 1, 24, 4)
    assert [codec.frames(count) for count in (1, 2, 7)] == [1, 2, 7]
    assert len(codec._windows(64, 64, 1, 16)) == 1  # 1024 × 1024
    assert len(codec._windows(135, 240, 1, 16)) > 1
    with pytest.raises(EbrError, match=r"multiples of 16, got \(1, 3, 1, 24, 32\)"):
        codec.encode(torch.rand(1, 3, 1, 24, 32))
    with pytest.raises(EbrError, match=r"expected a latent \[B, 24, f, h, w\]"):
        codec.decode(torch.rand(1, 6, 1, 4, 4))


def test_half_precision_gives_the_statistics_unrounded(folder):
    codec, exact = load_codec("flux2", folder, dtype=torch.bfloat16), load_codec("flux2", folder)
    assert torch.equal(codec.mean, exact.mean)
    assert torch.equal(codec.std, exact.std)
    pixels = torch.rand(1, 3, 1, 32, 32)
    torch.testing.assert_close(codec.encode(pixels), exact.encode(pixels), rtol=0, atol=0.1)


def test_the_vae_of_another_model_is_told(folder, tmp_path):
    with pytest.raises(BackboneError, match="class AutoencoderKLFlux2, but flux takes AutoencoderKL"):
        load_codec("flux", folder)
    config = json.loads((folder / "config.json").read_text())
    other = write(tmp_path / "vae")
    (other / "config.json").write_text(json.dumps(config | {"patch_size": [4, 1]}))
    with pytest.raises(BackboneError, match=r"patch_size=\[4, 1\]"):
        load_codec("flux2", other)
