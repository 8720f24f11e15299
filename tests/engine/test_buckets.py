"""A few sizes stand for any, at the stated cost; what is padded does not change what is seen."""

from itertools import product

import pytest
import torch

from ebr_engine.engine.layout import few_sizes, repeated, rounded, widened


def test_sizes_are_few_and_grow_by_less_than_a_quarter():
    sizes = {rounded(count) for count in range(1, 129)}
    assert sizes == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128}
    for count in range(1, 5000):
        assert count <= rounded(count) < 1.25 * count
        assert rounded(rounded(count)) == rounded(count)


@pytest.mark.parametrize(
    ("shape", "tile", "expected"),
    [
        ((1, 3, 1, 8, 8), 512, (1, 1, 8, 8)),
        ((1, 3, 1, 72, 136), 512, (1, 1, 80, 160)),
        ((3, 3, 1, 504, 512), 512, (4, 1, 512, 512)),
        ((5, 3, 1, 1000, 72), 512, (8, 1, 1000, 80)),  # a side that is cut into tiles stays
        ((1, 3, 1, 488, 8), 496, (1, 1, 496, 8)),  # not wider than a tile
        ((1, 3, 1, 1000, 1032), 0, (1, 1, 1024, 1280)),
    ],
)
def test_pixels_take_the_next_size(shape, tile, expected):
    assert few_sizes(shape, 8, 1, tile) == expected


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (5, 5), (33, 33), (37, 41), (65, 65), (69, 81)])
def test_clips_take_the_next_length_that_a_codec_of_four_frames_takes(frames, expected):
    assert few_sizes((1, 3, frames, 16, 16), 16, 4, 832)[1] == expected


def test_the_cost_is_what_the_documentation_says():
    shares = []
    for height, width in product(range(8, 513, 8), repeat=2):
        _, _, h, w = few_sizes((1, 3, 1, height, width), 8, 1, 512)
        shares.append(h * w / (height * width))
    assert max(shares) < (5 / 4) ** 2
    assert 1.12 < sum(shares) / len(shares) < 1.13


def test_what_was_there_stays_where_it_is():
    pixels, noise = torch.rand(2, 3, 3, 5, 7), torch.randn(2, 4, 3, 2, 3)
    wide = widened(pixels, 4, 5, 8, 10)
    assert wide.shape == (4, 3, 5, 8, 10)
    assert torch.equal(wide[:2, :, :3, :5, :7], pixels)
    assert torch.equal(wide[:2, :, :3, 5:, :7], pixels[:, :, :, [3, 2, 1]])
    assert torch.equal(wide[3], wide[1])
    assert torch.equal(wide[:, :, 4], wide[:, :, 2])
    more = repeated(noise, (4, 4, 5, 3, 5))
    assert torch.equal(more[:2, :, :3, :2, :3], noise)
    assert torch.equal(more[2:, :, 3:], more[:2, :, :2])
    assert repeated(noise, noise.shape) is noise
