"""The VAEs' networks against diffusers' modules: sizes of every kind, native code and none, frames one by one and at once."""

from dataclasses import fields

import pytest
import torch

from ebr_engine.backbones.flux.vae import FluxVae, FluxVaeConfig
from ebr_engine.backbones.vae_files import read_network
from ebr_engine.backbones.vae_layers import laid_out, put_back
from ebr_engine.backbones.wan.vae import WanVae, WanVaeConfig
from ebr_engine.errors import BackboneError
from ebr_engine.kernels import backend
from tests.real_layout import WAN22_VAE

diffusers = pytest.importorskip("diffusers")
PARITY = 1e-4
WAN = {
    "narrow": {"base_dim": 4, "num_res_blocks": 1},
    "wide enough for native code": {"base_dim": 32},
    "two sizes": {"base_dim": 8, "dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1},
    "time first": {"base_dim": 8, "temperal_downsample": [True, True, False], "num_res_blocks": 1, "dim_mult": [1, 1, 2, 2]},
    "2.2": WAN22_VAE,
    "2.2, wide": WAN22_VAE | {"base_dim": 16, "decoder_base_dim": 32, "num_res_blocks": 2},
}
FLUX = {
    "narrow": {"block_out_channels": (4, 4, 8), "norm_num_groups": 2},
    "wide": {"block_out_channels": (32, 64, 64), "norm_num_groups": 8, "layers_per_block": 2},
    "no attention": {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "mid_block_add_attention": False},
    "bare": {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "use_quant_conv": False, "use_post_quant_conv": False},
}


def of(config, theirs, network):
    """Our network of the same sizes and weights."""
    known = {field.name: theirs.config[field.name] for field in fields(config) if field.name in theirs.config}
    ours = network(config(**known)).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours


def wan_pair(name):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**WAN[name]).eval()
    for parameter in theirs.parameters():
        if parameter.dim() < 5:
            parameter.data += 0.1 * torch.randn_like(parameter)  # norms and biases that are no ones and zeros
    return theirs, of(WanVaeConfig, theirs, WanVae)


def encoded(vae, x, frames):
    """Moments of patches [1, C, F, H, W], group by group as a codec does it."""
    fine, coarse, groups = {}, {}, [1] + [frames] * ((x.shape[2] - 1) // frames)
    features = [vae.encoder.fine(laid_out(part), fine) for part in x.split(groups, dim=2)]
    return torch.cat([put_back(vae.quant_conv(vae.encoder.coarse(one, coarse))) for one in features], dim=2)


def decoded(vae, z):
    fine, coarse = {}, {}
    features = [vae.decoder.coarse(vae.post_quant_conv(laid_out(one)), coarse) for one in z.split(1, dim=2)]
    return torch.cat([put_back(vae.decoder.fine(one, fine)) for one in features], dim=2)


@pytest.mark.parametrize("name", WAN)
@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_wan_is_diffusers_network(name, native, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto" if native else "torch")
    theirs, ours = wan_pair(name)
    time = 2 ** sum(theirs.config.temperal_downsample)
    side = 2 ** (len(theirs.config.dim_mult) - 1)
    x = torch.randn(1, theirs.config.in_channels, 1 + 2 * time, 5 * side, 7 * side)
    moments = encoded(ours, x, time)
    if time == 4:  # diffusers takes groups of four whatever the sizes say
        patches = x if theirs.config.patch_size is None else diffusers.models.autoencoders.autoencoder_kl_wan.unpatchify(x, 2)
        torch.testing.assert_close(moments, theirs.encode(patches).latent_dist.parameters, rtol=PARITY, atol=PARITY)
    z = torch.randn(1, theirs.config.z_dim, 3, 5, 7)
    expected = theirs.decode(z).sample
    found = decoded(ours, z)
    found = found if theirs.config.patch_size is None else diffusers.models.autoencoders.autoencoder_kl_wan.unpatchify(found, 2)
    torch.testing.assert_close(found.clamp(-1, 1), expected, rtol=0, atol=PARITY)


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_flux_is_diffusers_network(name, native, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "auto" if native else "torch")
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    theirs = diffusers.AutoencoderKL(**kinds, latent_channels=6, **FLUX[name]).eval()
    ours = of(FluxVaeConfig, theirs, FluxVae)
    x, z = torch.randn(1, 3, 52, 76), torch.randn(1, 6, 13, 19)
    moments = ours.quant_conv(ours.encoder.coarse(ours.encoder.fine(x.contiguous(memory_format=torch.channels_last))))
    torch.testing.assert_close(moments, theirs.encode(x).latent_dist.parameters, rtol=PARITY, atol=PARITY)
    pixels = ours.decoder.fine(ours.decoder.coarse(ours.post_quant_conv(z.contiguous(memory_format=torch.channels_last))))
    torch.testing.assert_close(pixels, theirs.decode(z).sample, rtol=PARITY, atol=PARITY)


@pytest.mark.parametrize("name", ["narrow", "2.2"])
@torch.no_grad()
def test_what_is_remembered_is_never_written_into(name):
    _, ours = wan_pair(name)
    cache = {}
    features = torch.randn(3, ours.decoder.conv_in.bias.numel(), 5, 6).contiguous(memory_format=torch.channels_last)
    first = ours.decoder.fine(features[:1], cache)
    kept = {number: [frame.clone() for frame in frames] for number, frames in cache.items()}
    before = cache.copy()
    again = [ours.decoder.fine(features[1:2], before.copy()) for _ in range(2)]
    assert torch.equal(*again)
    assert all(torch.equal(a, b) for number in kept for a, b in zip(kept[number], before[number]))
    assert len(first) == 1
    assert len(again[0]) == 4


class AllAtOnce(torch.Tensor):
    """A tensor that does not say that it lies on a CPU: frames then go as they do on a GPU."""

    is_cpu = False


@pytest.mark.parametrize("name", ["narrow", "2.2"])
@torch.no_grad()
def test_frames_all_at_once_give_what_they_give_one_by_one(name, monkeypatch):
    monkeypatch.setattr(backend, "ASKED", "torch")
    _, ours = wan_pair(name)
    x, z = torch.randn(1, ours.config.in_channels, 9, 16, 24), torch.randn(1, ours.config.z_dim, 3, 2, 3)
    expected = encoded(ours, x, 4), decoded(ours, z)
    together = encoded(ours, x.as_subclass(AllAtOnce), 4), decoded(ours, z.as_subclass(AllAtOnce))
    for one, other in zip(expected, together):
        torch.testing.assert_close(other.as_subclass(torch.Tensor), one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_first_frame_and_all_others_are_two_graphs():
    _, ours = wan_pair("narrow")
    graphs = []

    def backend_of(graph, inputs):
        graphs.append(graph)
        return graph

    def step(x, cache):
        cache = dict(cache)
        return ours.decoder.fine(x, cache), cache

    compiled = torch.compile(step, backend=backend_of, fullgraph=True, dynamic=False)
    width = ours.decoder.conv_in.bias.numel()
    features = torch.randn(4, width, 4, 6).contiguous(memory_format=torch.channels_last).split(1)
    plain, cache, expected = {}, {}, []
    for one in features:
        y, plain = step(one, plain)
        expected.append(y)
        y, cache = compiled(one, cache)
        torch.testing.assert_close(y, expected[-1], rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 4  # the first frame, the second and third, which see less before them, and every other


def test_former_names_of_attention_are_read(tmp_path):
    kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    theirs = diffusers.AutoencoderKL(**kinds, block_out_channels=(8,), norm_num_groups=2)
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(file := tmp_path / "diffusion_pytorch_model.safetensors")
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    save_file({renamed(name): weight for name, weight in weights.items()}, file)
    vae = read_network(tmp_path, "flux", "AutoencoderKL", FluxVae, FluxVaeConfig)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in vae.state_dict().items())
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": "8"}')
    with pytest.raises(BackboneError, match="cannot load the VAE"):
        read_network(tmp_path, "flux", "AutoencoderKL", FluxVae, FluxVaeConfig)
