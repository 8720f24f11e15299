"""The lapped codec is an orthonormal transform whose functions overlap: exactly invertible, and without a grid of its own."""

import pytest
import torch

from ebr_engine.backbones.mini.codec import dct_basis
from ebr_engine.backbones.mini.lapped import LappedCodec, overlap_filter
from ebr_engine.errors import EbrError

SHAPES = [(1, 3, 1, 8, 8), (2, 3, 1, 24, 40), (1, 3, 3, 8, 72), (1, 3, 1, 56, 16)]


@pytest.fixture
def trained():
    """A codec with statistics, as the shipped one has."""
    return LappedCodec(torch.randn(LappedCodec.channels), torch.rand(LappedCodec.channels) + 0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_inverts_encode_with_and_without_statistics(shape, trained):
    pixels = torch.rand(shape)
    for codec in (LappedCodec(), trained):
        latent = codec.encode(pixels)
        assert latent.shape == (shape[0], 192, shape[2], shape[3] // 8, shape[4] // 8)
        assert latent.dtype == torch.float32
        torch.testing.assert_close(codec.decode(latent), pixels, atol=1e-5, rtol=0)


def test_encode_inverts_decode_so_no_latent_is_out_of_reach(trained):
    latent = torch.randn(2, 192, 1, 3, 5)
    torch.testing.assert_close(trained.encode(trained.decode(latent)), latent, atol=1e-4, rtol=0)  # 1 / scale is up to 20


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_of_a_picture_is_kept(shape):
    pixels = torch.rand(shape)
    torch.testing.assert_close(LappedCodec().encode(pixels).norm(), pixels.norm(), rtol=1e-6, atol=0)


def test_the_filter_is_orthonormal_and_leaves_what_is_symmetric():
    matrix = overlap_filter(8)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)
    half = torch.rand(4)
    symmetric = torch.cat((half, half.flip(0)))
    torch.testing.assert_close(matrix @ symmetric, symmetric)


def test_its_coding_gain_is_that_of_the_published_transform():
    """9.2 dB on a first-order process of correlation 0.95, where the DCT has 8.83 (Malvar and Staelin, 1989)."""
    blocks = 9
    place = torch.arange(8 * blocks, dtype=torch.float64)
    covariance = 0.95 ** (place[:, None] - place).abs()
    border = torch.eye(8 * blocks, dtype=torch.float64)
    for edge in range(8, 8 * blocks, 8):
        border[edge - 4 : edge + 4, edge - 4 : edge + 4] = overlap_filter(8).double()
    gains = []
    for before in (torch.eye(8 * blocks, dtype=torch.float64), border):
        transform = torch.block_diag(*[dct_basis(8).double()] * blocks) @ before
        middle = (transform @ covariance @ transform.T).diag()[8 * (blocks // 2) :][:8]
        gains.append(float(-10 * middle.log10().mean()))
    assert gains[0] == pytest.approx(8.83, abs=0.01)
    assert gains[1] == pytest.approx(9.22, abs=0.01)


def test_a_constant_picture_has_only_three_means_to_its_very_border():
    pixels = torch.tensor([0.9, 0.2, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 24, 32)
    latent = LappedCodec().encode(pixels)
    tones = LappedCodec().tones
    assert tones.nonzero().flatten().tolist() == [0, 64, 128]
    assert latent[:, ~tones].abs().max() < 5e-6
    torch.testing.assert_close(latent[:, 0], torch.full((1, 1, 3, 4), (0.9 + 0.2 + 0.5) / 3**0.5 * 8))


def test_one_cell_fades_into_its_neighbours():
    """What a single channel adds to the picture spans 16 pixels and is small at their ends: no step at the block's border."""
    latent = torch.zeros(1, 192, 1, 5, 5)
    latent[0, 0, 0, 2, 2] = 1
    row = LappedCodec().decode(latent)[0, 0, 0, 20].abs()  # through the cell's middle
    assert row.nonzero().flatten().tolist() == list(range(12, 28))
    assert row[16:24].min() > 2 * row[[12, 27]].max()
    assert row.diff().abs().max() < 0.5 * row.max()


def test_a_cell_is_read_from_its_own_and_the_neighbouring_half_blocks():
    pixels = torch.rand(1, 3, 2, 40, 40)
    other = pixels.clone()
    other[0, 1, 1, 17, 23] += 0.5
    changed = (LappedCodec().encode(other) - LappedCodec().encode(pixels)).abs().amax(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 1, 2], [1, 1, 3], [1, 2, 2], [1, 2, 3]]


def test_statistics_centre_and_scale_each_channel():
    mean, scale = torch.randn(192), torch.rand(192) + 0.5
    pixels = torch.rand(1, 3, 1, 16, 8)
    plain, normalised = LappedCodec().encode(pixels), LappedCodec(mean, scale).encode(pixels)
    torch.testing.assert_close(normalised, (plain - mean.view(1, 192, 1, 1, 1)) / scale.view(1, 192, 1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 3, 1, 12, 8), (1, 3, 1, 8, 9), (1, 4, 1, 8, 8), (1, 1, 1, 8, 8), (1, 3, 8, 8)])
def test_wrong_sizes_are_named(shape):
    with pytest.raises(EbrError, match=r"multiples of 8, got \(1, " + str(shape[1])):
        LappedCodec().encode(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 48, 1, 2, 2), (192, 1, 2, 2), (1, 192, 0, 2, 2)])
def test_latents_of_a_wrong_shape_are_named(shape):
    with pytest.raises(EbrError, match=r"expected a latent \[B, 192, f, h, w\], got \("):
        LappedCodec().decode(torch.rand(shape))
