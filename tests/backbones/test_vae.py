"""The real VAEs as codecs: equal to diffusers' own coding, in tiles, in chunks, in any clip's length of bounded memory."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ebr_engine.backbones.flux.codec import FluxCodec
from ebr_engine.backbones.flux.vae import FluxVae, FluxVaeConfig
from ebr_engine.backbones.vae import load_codec
from ebr_engine.errors import EbrError
from tests.backbones.conftest import FACTOR, SHIFT

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def wan(vae_folders):
    return load_codec("wan", vae_folders / "wan")


@pytest.fixture
def flux(vae_folders):
    return load_codec("flux", vae_folders / "flux")


@pytest.fixture(params=["wan", "flux"])
def codec(request):
    return request.getfixturevalue(request.param)


def smooth(*shape, cell=16):
    """A clip [B, 3, F, H, W] in [0, 1] without fine detail."""
    b, c, f, h, w = shape
    coarse = torch.rand(b, c, max(2, f // 2), max(2, h // cell), max(2, w // cell))
    return F.interpolate(coarse, (f, h, w), mode="trilinear")


def published_wan(vae_folders):
    """diffusers' model with Wan's normalisation, as its pipelines apply it."""
    vae = diffusers.AutoencoderKLWan.from_pretrained(vae_folders / "wan")
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return vae, mean, std


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("size", [(24, 40), (40, 16)])
@torch.no_grad()
def test_wan_is_coded_as_by_diffusers(vae_folders, wan, frames, size):
    vae, mean, std = published_wan(vae_folders)
    pixels = smooth(2, 3, frames, *size)
    latent = wan.encode(pixels)
    assert latent.shape == (2, 16, 1 + frames // 4, size[0] // 8, size[1] // 8)
    expected = (vae.encode(pixels * 2 - 1).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    latent = torch.randn_like(latent)
    decoded = wan.decode(latent)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded.clamp(0, 1), vae.decode(latent * std + mean).sample / 2 + 0.5, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_flux_codes_every_frame_alone_as_diffusers_does(vae_folders, flux, frames):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folders / "flux")
    pixels = smooth(2, 3, frames, 24, 40)
    latent = flux.encode(pixels)
    assert latent.shape == (2, 16, frames, 3, 5)
    decoded = flux.decode(latent)
    for i in range(frames):
        expected = (vae.encode(pixels[:, :, i] * 2 - 1).latent_dist.mode() - SHIFT) * FACTOR
        torch.testing.assert_close(latent[:, :, i], expected, rtol=1e-5, atol=1e-5)
        sample = vae.decode(expected / FACTOR + SHIFT).sample
        torch.testing.assert_close(decoded[:, :, i], sample / 2 + 0.5, rtol=0, atol=1e-4)


@torch.no_grad()
def test_flux_with_outer_convolutions_is_coded_as_by_diffusers():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=[4, 4], latent_channels=16, norm_num_groups=2)
    codec = FluxCodec(FluxVae(FluxVaeConfig(**blocks, block_out_channels=[4, 4], latent_channels=16, norm_num_groups=2)))
    codec.vae.load_state_dict(vae.state_dict())
    pixels = smooth(1, 3, 1, 10, 6)
    assert codec.spatial == 2
    expected = vae.encode(pixels[:, :, 0] * 2 - 1).latent_dist.mode() * 0.18215  # no shift in this configuration
    torch.testing.assert_close(codec.encode(pixels)[:, :, 0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        codec.decode(expected[:, :, None])[:, :, 0], vae.decode(expected / 0.18215).sample / 2 + 0.5, rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_sampled_latents_are_drawn_from_the_posterior_by_the_seed(vae_folders):
    vae, mean, std = published_wan(vae_folders)
    pixels = smooth(1, 3, 5, 16, 24)
    codec = load_codec("wan", vae_folders / "wan", sample_latents=True, seed=7)
    sample = vae.encode(pixels * 2 - 1).latent_dist.sample(generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(codec.encode(pixels), (sample - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(codec.encode(pixels), codec.encode(pixels))
    assert not torch.allclose(codec.encode(pixels), load_codec("wan", vae_folders / "wan").encode(pixels))


@torch.no_grad()
def test_bf16_is_as_near_to_float32_as_diffusers_is_in_bf16(vae_folders):
    vae, mean, std = published_wan(vae_folders)
    pixels = smooth(1, 3, 5, 24, 16)
    codec = load_codec("wan", vae_folders / "wan", dtype=torch.bfloat16)
    latent, exact = codec.encode(pixels), load_codec("wan", vae_folders / "wan").encode(pixels)
    assert latent.dtype == codec.decode(latent).dtype == torch.float32
    theirs = (vae.bfloat16().encode((pixels * 2 - 1).bfloat16()).latent_dist.mode().float() - mean) / std
    assert (latent - exact).norm() < 1.5 * (theirs - exact).norm()


def test_decoded_pixels_are_not_clamped(codec):
    with torch.no_grad():
        codec.vae.decoder.conv_out.bias.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    decoded = codec.decode(torch.randn(1, 16, 1, 2, 2))
    assert decoded[:, 0].max() < -1
    assert decoded[:, 2].min() > 2


@pytest.mark.parametrize("shape", [(5, 40, 200), (1, 136, 144)])
def test_tiles_of_wan_give_what_the_whole_picture_gives(vae_folders, wan, shape):
    tiled = load_codec("wan", vae_folders / "wan", tile=128, overlap=96)
    pixels = smooth(1, 3, *shape)
    latent = wan.encode(pixels)
    assert ((tiled.encode(pixels) - latent).abs() <= latent.std() / 255).float().mean() >= 0.999
    seen = []
    tiled.vae.decoder.conv_out.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2:]))
    for z in (latent, torch.randn_like(latent)):
        error = (tiled.decode(z) - wan.decode(z)).abs()
        assert (error <= 1 / 255).float().mean() >= 0.999
    assert len(seen) > 2 * 2 * latent.shape[2]
    assert max(max(sides) for sides in seen) <= 128


class Through(nn.Module):
    def forward(self, x, overwrite=False):
        return x


def test_tiles_of_flux_differ_by_their_statistics_alone(vae_folders):
    """GroupNorm sees a whole feature map; without it, tiles give what the whole picture gives: the attention is never cut."""
    whole, tiled = (load_codec("flux", vae_folders / "flux", tile=tile, overlap=96) for tile in (0, 128))
    for codec in (whole, tiled):
        for half in (codec.vae.encoder.down_blocks, codec.vae.decoder.up_blocks):
            for module in half.modules():
                for name, child in module.named_children():
                    if isinstance(child, nn.GroupNorm):
                        setattr(module, name, Through())
        codec.vae.decoder.conv_norm_out = Through()
        codec.margin = 3 / 8
    pixels = smooth(1, 3, 1, 136, 200)
    latent = whole.encode(pixels)
    torch.testing.assert_close(tiled.encode(pixels), latent, rtol=0, atol=1e-3 * latent.std())
    decoded = whole.decode(latent)
    torch.testing.assert_close(tiled.decode(latent), decoded, rtol=0, atol=decoded.std() / 255)


def test_tiles_of_flux_have_no_seams(vae_folders, flux):
    tiled = load_codec("flux", vae_folders / "flux", tile=64, overlap=32)
    latent = torch.randn(1, 16, 1, 1, 1).expand(1, 16, 1, 8, 16) + 0.01 * torch.randn(1, 16, 1, 8, 16)
    steps = [codec.decode(latent).diff(dim=-1).abs().amax() for codec in (flux, tiled)]
    assert steps[1] < 2 * steps[0]


def test_only_pictures_above_an_area_are_tiled_by_default(codec):
    assert len(codec._windows(60, 104, 1, 8)) == 1  # 480 × 832
    assert (len(codec._windows(128, 128, 1, 8)) == 1) == isinstance(codec, FluxCodec)  # 1024 × 1024 in float32
    assert len(codec._windows(270, 480, 1, 8)) > 1
    codec.asked_dtype = torch.bfloat16
    assert len(codec._windows(128, 128, 1, 8)) == 1
    codec.tile = 0
    assert len(codec._windows(270, 480, 1, 8)) == 1


@pytest.mark.parametrize("chunks", [(5, 4, 4), (1, 12), (9, 4), (13,)])
@pytest.mark.parametrize("tile", [None, 64])
def test_a_stream_of_chunks_gives_what_the_whole_clip_gives(vae_folders, chunks, tile):
    codec = load_codec("wan", vae_folders / "wan", tile=tile)
    pixels = smooth(1 if tile else 2, 3, sum(chunks), 16, 72)
    latents = list(codec.encode_stream(pixels.split(chunks, dim=2)))
    assert [latent.shape[2] for latent in latents] == [-(-count // 4) for count in chunks]
    latent = codec.encode(pixels)
    torch.testing.assert_close(torch.cat(latents, dim=2), latent, rtol=1e-5, atol=1e-5)
    decoded = list(codec.decode_stream(latents))
    assert tuple(part.shape[2] for part in decoded) == chunks
    torch.testing.assert_close(torch.cat(decoded, dim=2), codec.decode(latent), rtol=0, atol=1e-5)


def test_a_stream_is_lazy_and_streams_do_not_disturb_each_other(wan):
    first, second = smooth(2, 3, 9, 16, 16).split(1)
    streams = [wan.encode_stream(iter(clip.split([5, 4], dim=2))) for clip in (first, second)]
    mixed = [next(streams[i]) for i in (0, 1, 1, 0)]
    torch.testing.assert_close(torch.cat(mixed[::3], dim=2), wan.encode(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(mixed[1:3], dim=2), wan.encode(second), rtol=1e-5, atol=1e-5)


def peak_bytes(run):
    """The most bytes that `run` had allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_does_not_grow_with_the_clip_beyond_input_and_output(wan):
    short, long = (torch.randn(1, 16, frames, 4, 6) for frames in (3, 9))
    pixels = [wan.decode(latent) for latent in (short, long)]
    beyond = [peak_bytes(lambda z=z: wan.decode(z)) - out.nbytes for z, out in zip((short, long), pixels)]
    assert beyond[1] < 1.05 * beyond[0] + long.nbytes
    beyond = [peak_bytes(lambda x=x: wan.encode(x)) for x in pixels]
    assert beyond[1] < 1.05 * beyond[0] + 4 * long.nbytes  # moments as they come and put together


def test_frames_are_computed_one_by_one_on_a_cpu(vae_folders):
    codec = load_codec("wan", vae_folders / "wan", tile=64)
    most = {"encoder": 0, "decoder": 0}
    for half in most:
        network = getattr(codec.vae, half)
        for module in (network.conv_in, network.conv_out):

            def note(module, args, out, half=half):
                most[half] = max(most[half], len(args[0]), len(out))

            module.register_forward_hook(note)
    codec.decode(codec.encode(smooth(1, 3, 17, 72, 16)))
    assert most == {"encoder": 1, "decoder": 1}


def overflow(module, args, out):
    return out + float("inf") if out.dtype != torch.float32 else out


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_values_that_are_not_finite_are_made_again_in_float32(vae_folders, caplog, half):
    codec = load_codec("wan", vae_folders / "wan", dtype=torch.bfloat16)
    reference = load_codec("wan", vae_folders / "wan", dtype=torch.bfloat16)
    reference.asked_dtype = torch.float32
    reference.to("cpu")  # the weights are those that bf16 left
    getattr(codec.vae, half).conv_out.register_forward_hook(overflow)
    x = smooth(1, 3, 1, 8, 8) if half == "encoder" else torch.randn(1, 16, 1, 1, 1)
    run, expected = ((c.encode if half == "encoder" else c.decode)(x) for c in (codec, reference))
    torch.testing.assert_close(run, expected)
    assert [record.name for record in caplog.records if record.levelno == logging.WARNING] == ["ebr_engine"]
    assert codec.dtype == torch.float32
    codec.decode(torch.randn(1, 16, 1, 1, 1))
    assert len(caplog.records) == 1  # it stays in float32 and is told once
    assert codec.to("cpu").dtype == torch.float32


def test_a_stream_goes_on_in_float32_where_it_was(vae_folders):
    codec = load_codec("wan", vae_folders / "wan", dtype=torch.bfloat16)
    exact = load_codec("wan", vae_folders / "wan")
    latent = torch.randn(1, 16, 3, 1, 1)
    stream = codec.decode_stream(latent.split(1, dim=2))
    parts = [next(stream)]
    codec.vae.decoder.conv_out.register_forward_hook(overflow)
    parts += stream
    expected = exact.decode(latent)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=0.1 * expected.std())  # bf16's error
    assert codec.dtype == torch.float32


def test_what_is_not_finite_in_float32_is_an_error(codec):
    with pytest.raises(EbrError, match="not finite, in float32 too"):
        codec.decode(torch.full((1, 16, 1, 2, 2), float("nan")))


def test_frames_are_one_and_a_multiple_of_four_for_wan_and_any_for_flux(wan, flux):
    assert [wan.frames(count) for count in (1, 2, 4, 5, 6, 81, 82)] == [1, 5, 5, 5, 9, 81, 85]
    assert [flux.frames(count) for count in (1, 2, 7)] == [1, 2, 7]
    assert (wan.spatial, wan.temporal, wan.channels) == (8, 4, 16)
    assert (flux.spatial, flux.temporal, flux.channels) == (8, 1, 16)


SHAPES = [(3, 1, 16, 16), (1, 3, 16, 16), (1, 4, 1, 16, 16), (1, 3, 1, 16, 20), (1, 3, 1, 12, 16), (1, 3, 0, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_of_a_wrong_shape_are_named(codec, shape):
    with pytest.raises(EbrError, match=rf"multiples of 8, got \({shape[0]}, {shape[1]}"):
        codec.encode(torch.rand(shape))


def test_a_number_of_frames_that_cannot_be_encoded_is_named(wan):
    with pytest.raises(EbrError, match=r"F one and a multiple of 4, got \(1, 3, 4"):
        wan.encode(torch.rand(1, 3, 4, 16, 16))
    stream = wan.encode_stream([torch.rand(1, 3, 1, 16, 16), torch.rand(1, 3, 5, 16, 16)])
    next(stream)
    with pytest.raises(EbrError, match=r"F a multiple of 4, got \(1, 3, 5"):
        next(stream)


@pytest.mark.parametrize("shape", [(1, 8, 1, 2, 2), (16, 1, 2, 2), (1, 16, 0, 2, 2)])
def test_a_latent_of_a_wrong_shape_is_named(codec, shape):
    with pytest.raises(EbrError, match=r"expected a latent \[B, 16, f, h, w\], got \("):
        codec.decode(torch.rand(shape))


@pytest.mark.parametrize(("tile", "overlap"), [(100, None), (128, 128), (128, 20), (-64, 8), (None, 2048), (64, -8)])
def test_tiles_that_cannot_be_are_named(vae_folders, tile, overlap):
    with pytest.raises(EbrError, match="multiples of 8 pixels"):
        load_codec("wan", vae_folders / "wan", tile=tile, overlap=overlap)


def test_a_codec_moves_and_tells_its_bytes(vae_folders):
    codec = load_codec("flux", vae_folders / "flux")
    weights = sum(weight.numel() for weight in codec.vae.parameters())
    assert codec.to("cpu") is codec
    assert (codec.dtype, codec.parameters_bytes) == (torch.float32, 4 * weights)
    assert load_codec("flux", vae_folders / "flux", dtype=torch.bfloat16).parameters_bytes == 2 * weights
    codec.device = torch.device("cuda")
    assert codec.dtype == torch.bfloat16  # what an automatic dtype is there
    assert codec.to("meta").device.type == "meta"
    assert all(weight.is_meta for weight in codec.vae.parameters())


def test_coding_keeps_no_gradients(codec):
    latent = codec.encode(smooth(1, 3, 1, 8, 8).requires_grad_())
    assert not latent.requires_grad
    assert not codec.decode(latent.requires_grad_()).requires_grad
