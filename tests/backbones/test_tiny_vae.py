"""Tiny autoencoders: the layouts that are published, with random weights, against their architecture written down anew."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ebr_engine.backbones.tiny_vae import is_tiny, load_tiny
from ebr_engine.errors import BackboneError

WIDTHS = (256, 128, 64, 64)


def convolution(name, channels, outputs, bias=True, size=3):
    bound = (channels * size**2) ** -0.5
    made = {f"{name}.weight": torch.empty(outputs, channels, size, size).uniform_(-2 * bound, 2 * bound)}
    return made | ({f"{name}.bias": 0.1 * torch.randn(outputs)} if bias else {})


def block(name, width, remembers):
    made = convolution(f"{name}.conv.0", width * (2 if remembers else 1), width)
    return made | convolution(f"{name}.conv.2", width, width) | convolution(f"{name}.conv.4", width, width)


def taehv():
    """Tensors of taew2_1, by its places."""
    made = convolution("encoder.0", 3, 64)
    for place, stride in ((2, 2), (7, 2), (12, 1)):
        made |= convolution(f"encoder.{place}.conv", 64 * stride, 64, False, 1)
        made |= convolution(f"encoder.{place + 1}", 64, 64, False)
        for i in range(3):
            made |= block(f"encoder.{place + 2 + i}", 64, True)
    made |= convolution("encoder.17", 64, 16) | convolution("decoder.1", 16, 256)
    for stage, stride in enumerate((1, 2, 2)):
        place, width = 3 + 6 * stage, WIDTHS[stage]
        for i in range(3):
            made |= block(f"decoder.{place + i}", width, True)
        made |= convolution(f"decoder.{place + 4}.conv", width, width * stride, False, 1)
        made |= convolution(f"decoder.{place + 5}", width, WIDTHS[stage + 1], False)
    return made | convolution("decoder.22", 64, 3)


def three(tensors, name, x):
    for i in (0, 2):
        x = F.relu(F.conv2d(x, tensors[f"{name}.conv.{i}.weight"], tensors[f"{name}.conv.{i}.bias"], padding=1))
    return F.conv2d(x, tensors[f"{name}.conv.4.weight"], tensors[f"{name}.conv.4.bias"], padding=1)


def remembering(tensors, name, x):
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    return F.relu(three(tensors, name, torch.cat((x, before), 1)) + x)


def plain(tensors, name, x, **how):
    return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding=1, **how)


def taehv_encoded(tensors, x):
    """All frames [T, 3, H, W] in [0, 1] together; T a multiple of 4."""
    x = F.relu(plain(tensors, "encoder.0", x))
    for place in (2, 7, 12):
        weight = tensors[f"encoder.{place}.conv.weight"]
        x = F.conv2d(x.reshape(-1, weight.shape[1], *x.shape[2:]), weight)
        x = plain(tensors, f"encoder.{place + 1}", x, stride=2)
        for i in range(3):
            x = remembering(tensors, f"encoder.{place + 2 + i}", x)
    return plain(tensors, "encoder.17", x)


def taehv_decoded(tensors, z):
    x = F.relu(plain(tensors, "decoder.1", torch.tanh(z / 3) * 3))
    for place in (3, 9, 15):
        for i in range(3):
            x = remembering(tensors, f"decoder.{place + i}", x)
        x = F.conv2d(F.interpolate(x, scale_factor=2), tensors[f"decoder.{place + 4}.conv.weight"])
        x = plain(tensors, f"decoder.{place + 5}", x.reshape(-1, WIDTHS[place // 6], *x.shape[2:]))
    return plain(tensors, "decoder.22", F.relu(x))[3:]


@pytest.fixture
def wan(tmp_path):
    torch.manual_seed(0)
    tensors = taehv()
    save_file(tensors, file := tmp_path / "taew2_1.safetensors")
    return file, tensors


@torch.no_grad()
def test_clips_are_decoded_as_by_taehv_and_streamed(wan):
    file, tensors = wan
    codec, z = load_tiny("wan", file), torch.randn(1, 16, 3, 5, 6)
    assert (codec.spatial, codec.temporal, codec.channels) == (8, 4, 16)
    expected = taehv_decoded(tensors, z[0].transpose(0, 1)).transpose(0, 1)[None]
    decoded = codec.decode(z)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    parts = torch.cat(list(codec.decode_stream(z.split([1, 2], dim=2))), dim=2)
    torch.testing.assert_close(parts, decoded)


@torch.no_grad()
def test_frames_are_encoded_as_by_taehv_the_first_one_as_four(wan):
    file, tensors = wan
    codec, pixels = load_tiny("wan", file), torch.rand(1, 3, 9, 40, 48)
    frames = pixels[0].transpose(0, 1)
    expected = taehv_encoded(tensors, torch.cat((frames[:1].expand(3, -1, -1, -1), frames)))
    latent = codec.encode(pixels)
    torch.testing.assert_close(latent[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    torch.testing.assert_close(torch.cat(list(codec.encode_stream(pixels.split([5, 4], dim=2))), dim=2), latent)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@torch.no_grad()
def test_pictures_are_coded_as_by_taef1(tmp_path, layout):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(latent_channels=16, scaling_factor=1.0).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if layout == "original":
        moved = {}
        for name, tensor in theirs.state_dict().items():
            half, _, place, rest = name.split(".", 3)
            moved[f"{half}.{int(place) + (half == 'decoder')}.{rest}"] = tensor.contiguous()
        save_file(moved, path := tmp_path / "taef1.safetensors")
    assert is_tiny(path)
    codec, pixels = load_tiny("flux", path), torch.rand(1, 3, 1, 40, 56)
    latent = codec.encode(pixels)
    expected = theirs.encode(pixels[:, :, 0] * 2 - 1).latents
    torch.testing.assert_close(latent[:, :, 0], expected, rtol=1e-4, atol=1e-4)
    z = torch.randn(1, 16, 1, 5, 7)
    decoded = theirs.decode(z[:, :, 0]).sample / 2 + 0.5
    torch.testing.assert_close(codec.decode(z)[:, :, 0], decoded, rtol=1e-4, atol=1e-4)


def test_what_is_no_tiny_autoencoder_is_told(tmp_path, wan):
    file, tensors = wan
    with pytest.raises(BackboneError, match="of another model: 8 pixels and 4 frames a cell; flux has 8 and 1"):
        load_tiny("flux", file)
    (pickled := tmp_path / "taef1_decoder.pth").write_bytes(b"\x80")
    with pytest.raises(BackboneError, match="never read"):
        load_tiny("flux", pickled)
    save_file({name: t for name, t in tensors.items() if name.startswith("decoder")}, half := tmp_path / "half.safetensors")
    with pytest.raises(BackboneError, match="holds no tiny autoencoder"):
        load_tiny("wan", half)
    save_file({"a.weight": nn.Linear(2, 2).weight.detach()}, other := tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="holds no tiny autoencoder"):
        load_tiny("wan", other)
