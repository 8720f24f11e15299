"""`mini`'s codec is an orthonormal transform: exactly invertible, and it keeps the size of a difference."""

import pytest
import torch

from ebr_engine.backbones.mini.codec import PixelCodec, dct_basis, opponent_basis
from ebr_engine.errors import EbrError

SHAPES = [(1, 3, 1, 8, 8), (2, 3, 1, 12, 20), (1, 3, 3, 4, 16)]


@pytest.fixture
def trained():
    """A codec with statistics, as the shipped one has."""
    return PixelCodec(torch.randn(PixelCodec.channels), torch.rand(PixelCodec.channels) + 0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_inverts_encode_with_and_without_statistics(shape, trained):
    pixels = torch.rand(shape)
    for codec in (PixelCodec(), trained):
        latent = codec.encode(pixels)
        assert latent.shape == (shape[0], 48, shape[2], shape[3] // 4, shape[4] // 4)
        assert latent.dtype == torch.float32
        torch.testing.assert_close(codec.decode(latent), pixels, atol=1e-5, rtol=0)


def test_encode_inverts_decode_so_no_latent_is_out_of_reach(trained):
    latent = torch.randn(2, 48, 1, 3, 5)
    torch.testing.assert_close(trained.encode(trained.decode(latent)), latent, atol=1e-4, rtol=0)  # 1 / scale is up to 20


def test_bases_are_orthonormal():
    for basis in (dct_basis(4), dct_basis(7), opponent_basis(), PixelCodec().basis):
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-6, rtol=0)


def test_the_norm_of_a_picture_is_kept():
    pixels = torch.rand(2, 3, 2, 12, 8)
    torch.testing.assert_close(PixelCodec().encode(pixels).norm(), pixels.norm(), rtol=1e-6, atol=0)


def test_a_grey_picture_has_only_the_mean_of_luminance():
    latent = PixelCodec().encode(torch.full((1, 3, 1, 8, 8), 0.3))
    torch.testing.assert_close(latent[:, 0], torch.full((1, 1, 2, 2), 0.3 * 48**0.5))  # 48 equal values, one unit vector
    assert latent[:, 1:].abs().max() < 1e-6


def test_a_coloured_constant_picture_has_only_three_means():
    pixels = torch.tensor([0.9, 0.2, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 8, 8)
    amount = PixelCodec().encode(pixels)[0, :, 0, 0, 0].abs()
    assert set(torch.nonzero(amount > 1e-6).flatten().tolist()) == {0, 16, 32}


def test_a_cell_depends_on_its_own_pixels_alone():
    pixels = torch.rand(1, 3, 2, 8, 12)
    other = pixels.clone()
    other[0, 1, 1, 5, 10] += 0.5
    changed = (PixelCodec().encode(other) != PixelCodec().encode(pixels)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[1, 1, 2]]


def test_statistics_centre_and_scale_each_channel():
    mean, scale = torch.randn(48), torch.rand(48) + 0.5
    pixels = torch.rand(1, 3, 1, 8, 8)
    plain, normalised = PixelCodec().encode(pixels), PixelCodec(mean, scale).encode(pixels)
    expected = (plain - mean.view(1, 48, 1, 1, 1)) / scale.view(1, 48, 1, 1, 1)
    torch.testing.assert_close(normalised, expected)


@pytest.mark.parametrize("shape", [(1, 3, 1, 6, 8), (1, 3, 1, 8, 9), (1, 4, 1, 8, 8), (1, 1, 1, 8, 8), (1, 3, 8, 8)])
def test_wrong_sizes_are_named(shape):
    with pytest.raises(EbrError, match=r"multiples of 4, got \(1, " + str(shape[1])):
        PixelCodec().encode(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (48, 1, 2, 2), (1, 48, 0, 2, 2)])
def test_latents_of_a_wrong_shape_are_named(shape):
    with pytest.raises(EbrError, match=r"expected a latent \[B, 48, f, h, w\], got \("):
        PixelCodec().decode(torch.rand(shape))


def test_a_picture_codec_takes_any_number_of_frames(trained):
    assert [trained.frames(count) for count in (1, 2, 9)] == [1, 2, 9]
    assert trained.parameters_bytes == 4 * (48 * 48 + 48 + 48)
    assert trained.to("cpu") is trained


def test_low_precision_pixels_are_transformed_in_float32():
    pixels = torch.rand(1, 3, 1, 8, 8).bfloat16()
    assert torch.equal(PixelCodec().encode(pixels), PixelCodec().encode(pixels.float()))
