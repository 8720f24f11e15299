"""The VAE of Wan 2.2 TI2V-5B as a codec: equal to diffusers' own coding, in chunks and in tiles."""

import weakref

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as published
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.vae import load_codec
from ebr_engine.backbones.wan22.codec import patchify, unpatchify
from ebr_engine.errors import BackboneError, EbrError
from tests.real_layout import WAN22_VAE

REAL = {"base_dim": 160, "decoder_base_dim": 256, "num_res_blocks": 2}  # the published widths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random VAE in the real layout, whose pixels have a natural spread, so that 1/255 means what it means."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**WAN22_VAE | {"dim_mult": [1, 1, 1, 1]})
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(torch.randn(1, 48, 2, 4, 4)).sample.std())
    folder = tmp_path_factory.mktemp("models") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def codec(folder):
    return load_codec("wan22-5b", folder)


def smooth(*shape):
    """A clip [B, 3, F, H, W] in [0, 1] without fine detail."""
    b, c, f, h, w = shape
    return F.interpolate(torch.rand(b, c, max(2, f // 2), max(2, h // 16), max(2, w // 16)), (f, h, w), mode="trilinear")


def diffusers_own(folder):
    """diffusers' model, with the mean and the standard deviation of its latents."""
    vae = AutoencoderKLWan.from_pretrained(folder)
    return vae, *(torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))


@pytest.mark.parametrize(("frames", "size"), [(1, (48, 80)), (9, (16, 48))])
@torch.no_grad()
def test_clips_are_coded_as_by_diffusers(folder, codec, frames, size):
    vae, mean, std = diffusers_own(folder)
    pixels = smooth(2, 3, frames, *size)
    latent = codec.encode(pixels)
    assert latent.shape == (2, 48, 1 + frames // 4, size[0] // 16, size[1] // 16)
    expected = (vae.encode(pixels * 2 - 1).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    latent = torch.randn_like(latent)
    decoded = codec.decode(latent)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded.clamp(0, 1), vae.decode(latent * std + mean).sample / 2 + 0.5, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bf16_is_as_near_to_float32_as_diffusers_is_in_bf16(folder, codec):
    vae, mean, std = diffusers_own(folder)
    pixels = smooth(1, 3, 5, 32, 32)
    latent = load_codec("wan22-5b", folder, dtype=torch.bfloat16).encode(pixels)
    theirs = (vae.bfloat16().encode((pixels * 2 - 1).bfloat16()).latent_dist.mode().float() - mean) / std
    exact = codec.encode(pixels)
    assert (latent - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("chunks", [(5, 4), (1, 8)])
def test_a_stream_of_chunks_gives_what_the_whole_clip_gives(codec, chunks):
    pixels = smooth(1, 3, sum(chunks), 16, 32)
    latents = list(codec.encode_stream(pixels.split(chunks, dim=2)))
    latent = codec.encode(pixels)
    torch.testing.assert_close(torch.cat(latents, dim=2), latent, rtol=1e-5, atol=1e-5)
    decoded = list(codec.decode_stream(latents))
    assert tuple(part.shape[2] for part in decoded) == chunks
    torch.testing.assert_close(torch.cat(decoded, dim=2), codec.decode(latent), rtol=0, atol=1e-5)


def test_tiles_give_what_the_whole_picture_gives(folder, codec):
    tile = 384
    tiled = load_codec("wan22-5b", folder, tile=tile)
    pixels = smooth(1, 3, 1, 32, 576)
    latent = codec.encode(pixels)
    assert ((tiled.encode(pixels) - latent).abs() <= latent.std() / 255).float().mean() >= 0.999
    seen = []
    tiled.vae.decoder.conv_out.register_forward_hook(lambda module, args, out: seen.append(2 * out.shape[-1]))
    latent = torch.randn_like(latent)
    assert ((tiled.decode(latent) - codec.decode(latent)).abs() <= 1 / 255).float().mean() >= 0.999
    assert len(seen) > 1
    assert max(seen) <= tile


def test_patches_are_those_of_diffusers_and_go_back():
    pixels = torch.randn(2, 3, 5, 8, 12)
    patches = patchify(pixels, 2)
    assert torch.equal(patches, published.patchify(pixels, 2))
    assert torch.equal(unpatchify(patches, 2), pixels)


def test_its_facts_are_those_of_the_published_sizes(codec):
    assert (codec.spatial, codec.temporal, codec.channels, codec.width) == (16, 4, 48, 8)
    assert [codec.frames(count) for count in (1, 2, 5, 6)] == [1, 5, 5, 9]
    with pytest.raises(EbrError, match="multiples of 16"):
        codec.encode(torch.rand(1, 3, 1, 24, 32))


def of_network(sizes):
    """Without those that no network is made of."""
    return {name: size for name, size in sizes.items() if not name.startswith("scale_factor")}


class Living(TorchDispatchMode):
    """Counts the bytes that live at once of tensors that are made while it is on."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, torch.Tensor) and (key := (storage := out.untyped_storage())._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key)
            self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("name", "tiny", "real"), [("wan", {"base_dim": 4}, {}), ("wan22-5b", WAN22_VAE, WAN22_VAE | REAL)], ids=["wan", "wan22-5b"]
)
def test_memory_of_the_published_sizes_is_what_the_spec_says(name, tiny, real):
    costs, kind = spec(name).codec_costs, spec(name).codec
    codec = kind(kind.network(kind.sizes(**of_network(tiny))))
    with torch.device("meta"):
        codec.vae = vae = kind.network(kind.sizes(**of_network(real)))
    assert sum(weight.numel() for weight in vae.parameters()) == costs.parameters
    assert (codec.width, codec.spatial, codec.temporal) == (costs.width, costs.spatial, costs.temporal)
    height, width = spec(name).native_size
    cells = height // codec.spatial, width // codec.spatial
    for cost, fine, coarse, shapes in (
        (costs.encode, codec._encode_fine, codec._encode_coarse, [(3, frames, height, width) for frames in (1, 4, 4)]),
        (costs.decode, codec._decode_coarse, codec._decode_fine, 3 * [(codec.channels, 1, *cells)]),
    ):
        caches = {}, {}
        with torch.no_grad(), Living() as living:
            for shape in shapes:
                coarse(fine(torch.empty(1, *shape, device="meta"), caches[0]), caches[1])
        counted = living.most / (height * width * costs.width * 4)
        assert 0.7 * cost < counted < cost


def test_the_vae_of_another_wan_is_refused(folder, tmp_path):
    with pytest.raises(BackboneError, match=r"the VAE of another Wan than 2\.1"):
        load_codec("wan", folder)
    AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"the VAE of another Wan than 2\.2 TI2V-5B"):
        load_codec("wan22-5b", tmp_path)
