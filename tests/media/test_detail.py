"""Detail from the input: the map from a small picture to its restoration, and that map at full size."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ebr_engine.media.detail import affine_map, applied, boxed, detail_of_input, noise_of, steadied
from ebr_engine.media.sizes import resized


def picture(height, width, seed=0, channels=3):
    """Smooth [1, C, H, W] in [0, 1] with fine texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 6, generator=generator)
    fine = torch.rand(1, channels, height, width, generator=generator)
    return 0.2 + 0.4 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) + 0.2 * fine


def apply(pictures, maps, **how):
    result = torch.empty_like(pictures)
    applied(pictures, *maps, result, **how)
    return result


def test_an_affine_relation_is_found_and_applied():
    small = picture(48, 64)
    gain, shift = torch.tensor([1.5, 0.8, 1.1]).view(1, 3, 1, 1), torch.tensor([-0.2, 0.1, 0.0]).view(1, 3, 1, 1)
    slope, offset = affine_map(small, gain * small + shift)
    assert torch.allclose(slope, gain.expand_as(slope), rtol=0.02)
    assert torch.allclose(slope * small + offset, gain * small + shift, atol=2e-3)
    big = picture(193, 257, seed=1)  # other detail than the small version's: it is kept
    assert torch.allclose(
        apply(big, (gain.expand_as(slope), shift.expand_as(slope))), (gain * big + shift).clamp(0, 1), atol=1e-6
    )


def test_the_detail_of_the_result_is_the_inputs():
    clip = resized(picture(70, 100).unsqueeze(2), 200, 300)
    small = resized(clip, 64, 96)
    grid = torch.zeros_like(small)
    grid[..., ::8, :] = grid[..., ::8] = 0.05  # what a model that decides block by block leaves
    result = detail_of_input(clip, small, (0.5 * small + 0.3 + grid).clamp(0, 1))
    inside = (..., slice(20, -20), slice(20, -20))
    difference = (result - 0.5 * clip - 0.3)[inside]
    assert difference.std() < 0.012  # its mean is the grid's
    coarse = F.interpolate((small * 0.5 + 0.3 + grid).squeeze(2), (200, 300), mode="bilinear").unsqueeze(2)
    assert (coarse - 0.5 * clip - 0.3)[inside].std() > 2 * difference.std()


@pytest.mark.parametrize("size", [(5, 7), (1, 9), (9, 1), (1, 1), (40, 33)])
@pytest.mark.parametrize("radius", [1, 4])
def test_windows_reflect_at_the_borders(size, radius):
    x = picture(*size)
    padded = x.double().numpy()
    reach = [min(radius, side - 1) for side in size]
    padded = np.pad(padded, ((0, 0), (0, 0), *((by, by) for by in reach)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, [2 * by + 1 for by in reach], (2, 3))
    assert torch.allclose(boxed(x, radius).double(), torch.from_numpy(windows.mean((-2, -1))), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 1), (101, 67), (16, 24)])
@pytest.mark.parametrize("slab", [1, 150, 1 << 20])
def test_maps_are_enlarged_as_bilinear_whatever_the_slab(size, slab):
    small, big = picture(16, 24), picture(*size, seed=2)
    slope, offset = small + 0.7, small - 0.6
    wide = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (slope, offset)]
    assert torch.allclose(apply(big, (slope, offset), slab=slab), (wide[0] * big + wide[1]).clamp(0, 1), atol=2e-6)


def test_pixels_in_rows_of_colours_give_the_same():
    small, big = picture(16, 24), picture(61, 83)
    in_rows = big.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    maps = affine_map(small, small.sqrt())
    assert torch.equal(apply(in_rows, maps), apply(big, maps))


def test_deep_pixels_are_not_rounded_to_8_bit():
    ramp = (torch.arange(4096, dtype=torch.float32) / 65535 + 0.25).expand(1, 3, 8, 4096)
    small = resized(ramp.unsqueeze(2), 8, 512).squeeze(2)
    result = apply(ramp, affine_map(small, 0.9 * small + 0.05))
    assert len(result[0, 0, 4].unique()) > 4000


def test_brighter_stays_brighter():
    small = picture(32, 32)
    slope, _ = affine_map(small, 1 - small)  # an inverted picture: no tone curve
    assert slope.min() >= 0


def test_clipped_skies_stay_flat():
    small = picture(64, 64)
    small[..., :32, :] = 1
    slope, offset = affine_map(small, 0.8 * small)
    result = apply(torch.ones(1, 3, 256, 256), (slope, offset))
    assert (result[..., :40, :] - 0.8).abs().max() < 1e-3


@pytest.mark.parametrize("sigma", [0.01, 0.04])
def test_noise_is_measured(sigma):
    clean = resized(picture(6, 8).unsqueeze(2), 300, 400).squeeze(2)
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    assert noise_of(clean).max() < 0.1 * sigma
    assert torch.allclose(noise_of(noisy), torch.full((1, 3, 1, 1), sigma), rtol=0.2)


def test_clipped_places_show_no_noise_and_do_not_count():
    noisy = 0.5 + 0.02 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(4))
    noisy[..., :128] = 1
    assert torch.allclose(noise_of(noisy), torch.full((1, 3, 1, 1), 0.02), rtol=0.2)
    assert noise_of(torch.ones(1, 3, 64, 64)).max() == 0
    assert noise_of(torch.rand(1, 3, 1, 1)).max() == 0


def test_noise_in_flat_places_is_not_made_stronger():
    generator = torch.Generator().manual_seed(5)
    dark = 0.05 + 0.01 * torch.randn(1, 3, 128, 128, generator=generator)
    bright = 5 * dark  # a model that passes all noise on
    gain = [affine_map(dark, bright, noise)[0].mean() for noise in (None, noise_of(dark))]
    assert gain[0] > 4
    assert gain[1] < 0.8 * gain[0]


def test_a_still_clip_has_one_map():
    small = picture(24, 32).expand(6, -1, -1, -1)
    maps = torch.rand(1, 6, 24, 32).expand(6, -1, -1, -1)
    assert torch.allclose(steadied(maps, small), maps, atol=1e-6)


def test_maps_are_steadied_where_the_clip_is_still_and_only_there():
    generator = torch.Generator().manual_seed(6)
    small = picture(24, 32).repeat(9, 1, 1, 1)
    small[:, :, :, 16:] = torch.rand(9, 3, 24, 16, generator=generator)  # moves
    maps = torch.rand(9, 6, 1, 1, generator=generator).expand(-1, -1, 24, 32)
    steady = steadied(maps, small)
    assert steady[2:-2, :, :, :12].std(0).mean() < 0.6 * maps[2:-2].std(0).mean()
    assert torch.allclose(steady[..., 20:], maps[..., 20:], atol=0.02)
