"""Tiles cover the grid with one shape, fade into each other, and blend back to what was split."""

import itertools

import pytest
import torch

from ebr_engine.errors import EbrError
from ebr_engine.media.tiling import crop, match_tones, pad_to_multiple, plan_tiles

CASES = [  # height, width, tile, overlap, multiple
    (64, 64, 64, 16, 8),
    (65, 127, 32, 8, 8),
    (33, 200, 32, 31, 1),
    (40, 300, 48, 0, 8),
    (7, 1000, 64, 16, 1),
    (97, 101, 24, 13, 2),
    (1, 1, 8, 2, 1),
]


def blend(parts, tiles):
    """What the tiles' results [h, w] add up to."""
    total = torch.zeros(*parts[0].shape[:-2], tiles.height, tiles.width)
    for index, part in enumerate(parts):
        tiles.add(part, index, total)
    return total


@pytest.mark.parametrize("case", CASES)
def test_tiles_lie_inside_and_cover_every_cell(case):
    height, width, tile, _, multiple = case
    tiles = plan_tiles(*case)
    covered = torch.zeros(height, width)
    for top, left in tiles.boxes:
        assert 0 <= top <= height - tiles.tile_height
        assert 0 <= left <= width - tiles.tile_width
        covered[top : top + tiles.tile_height, left : left + tiles.tile_width] += 1
    assert covered.min() >= 1
    assert len(set(tiles.boxes)) == len(tiles)
    assert tiles.tile_height == min(tile, height)
    assert tiles.tile_width == min(tile, width)
    assert tiles.tile_height % multiple == tiles.tile_width % multiple == 0


@pytest.mark.parametrize("case", CASES)
def test_overlaps_are_at_least_what_was_asked_and_nearly_equal(case):
    tiles = plan_tiles(*case)
    for starts, size in ((tiles.tops, tiles.tile_height), (tiles.lefts, tiles.tile_width)):
        shared = [a + size - b for a, b in itertools.pairwise(starts)]
        assert all(s >= case[3] for s in shared)
        assert not shared or max(shared) - min(shared) <= 1


@pytest.mark.parametrize("case", CASES)
def test_weights_sum_to_one_in_every_cell(case):
    tiles = plan_tiles(*case)
    total = torch.zeros(case[0], case[1], dtype=torch.float64)
    for index, (top, left) in enumerate(tiles.boxes):
        weight = tiles.weight(index)
        assert weight.min() >= 0
        total[top : top + tiles.tile_height, left : left + tiles.tile_width] += weight.double()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_scaled_tiles_lie_over_the_same_picture_and_blend_smoothly():
    tiles = plan_tiles(20, 33, 12, 4)
    scaled = tiles.scaled(8)
    assert (scaled.height, scaled.width, scaled.tile_height, scaled.tile_width) == (160, 264, 96, 96)
    assert scaled.boxes == [(8 * top, 8 * left) for top, left in tiles.boxes]
    total = sum(scaled.weight(i).sum() for i in range(len(scaled)))
    torch.testing.assert_close(total, torch.tensor(160.0 * 264))
    assert scaled.weight(0).diff(dim=0).abs().max() < 0.06  # a step of the cells' own ramp is five times that


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", [(2, 3), (1, 4, 2)])
def test_blending_the_untouched_tiles_returns_the_picture(case, lead):
    x = torch.rand(*lead, case[0], case[1], generator=torch.Generator().manual_seed(1))
    tiles = plan_tiles(*case)
    parts = [tiles.cut(x, index) for index in range(len(tiles))]
    assert {part.shape for part in parts} == {(*lead, tiles.tile_height, tiles.tile_width)}
    torch.testing.assert_close(blend(parts, tiles), x, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_a_seam_between_different_tiles_is_a_smooth_ramp():
    tiles = plan_tiles(16, 48, 32, 16)
    assert tiles.boxes == [(0, 0), (0, 16)]
    row = blend([torch.zeros(16, 32), torch.ones(16, 32)], tiles)[0]
    assert (row[:16] == 0).all()
    assert (row[32:] == 1).all()
    ramp = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(16) + 0.5) / 16)
    torch.testing.assert_close(row[16:32], ramp, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_tiles_reach_full_weight_at_the_border_of_the_grid():
    tiles = plan_tiles(40, 40, 24, 8)
    assert tiles.weight(0)[0, 0] == 1
    assert tiles.weight(len(tiles) - 1)[-1, -1] == 1


def test_low_precision_tiles_are_summed_in_float32():
    x = torch.full((1, 1, 33, 33), 1000.0, dtype=torch.bfloat16)
    tiles = plan_tiles(33, 33, 8, 7)
    result = blend([tiles.cut(x, index) for index in range(len(tiles))], tiles)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x.float(), rtol=0, atol=1000 * 8 * torch.finfo(torch.float32).eps)


def test_one_tile_is_the_picture_itself():
    tiles = plan_tiles(20, 12, 64, 16)
    x = torch.rand(1, 3, 20, 12)
    assert tiles.boxes == [(0, 0)]
    torch.testing.assert_close(blend([tiles.cut(x, 0)], tiles), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 8, 8, 0, 1), "0 x 8"),
        ((8, 8, 10, 0, 8), "multiple of 8, not 10"),
        ((8, 8, 0, 0, 8), "multiple of 8, not 0"),
        ((8, 8, 8, 8, 8), "less than the tile size 8, not 8"),
        ((8, 8, 8, -1, 8), "at least 0"),
        ((7, 64, 32, 8, 8), "pad it first"),
    ],
)
def test_impossible_plans_say_why(arguments, words):
    with pytest.raises(EbrError, match=words):
        plan_tiles(*arguments)


def test_shapes_that_do_not_fit_the_plan_are_refused():
    tiles = plan_tiles(16, 16, 8, 2)
    with pytest.raises(ValueError, match="16 x 16"):
        tiles.cut(torch.zeros(1, 1, 16, 17), 0)


@pytest.mark.parametrize("shape", [(3, 13, 21), (1, 3, 16, 24), (2, 4, 2, 9, 31)])
def test_padding_reflects_and_crop_undoes_it(shape):
    x = torch.rand(shape)
    padded = pad_to_multiple(x, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert padded.shape[-2] - shape[-2] < 8
    torch.testing.assert_close(crop(padded, shape[-2], shape[-1]), x, rtol=0, atol=0)
    if shape[-2:] == (13, 21):
        expected = torch.nn.functional.pad(x, (0, 3, 0, 3), mode="reflect")
        torch.testing.assert_close(padded, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_pictures_smaller_than_their_padding_repeat_the_edge(size):
    x = torch.arange(float(size)).reshape(1, 1, 1, size)
    padded = pad_to_multiple(x, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert (padded[0, 0, 0, size:] == size - 1).all()
    assert (padded == padded[:, :, :1]).all()


def test_tones_come_from_the_guide_and_detail_from_the_picture():
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.5
    guide = torch.nn.functional.avg_pool2d(picture, 2) + 0.25
    matched = match_tones(picture, guide, scale=16)
    torch.testing.assert_close(matched, picture + 0.25, atol=1e-6, rtol=0)
    stepped = picture.clone()
    stepped[..., 48:] += 0.2  # one half brighter, as a tile that misjudged the light would be
    matched = match_tones(stepped, guide - 0.25, scale=16)
    error = (matched - picture).mean((0, 1, 2))  # by column
    assert error[:24].abs().max() < 0.02
    assert error[-24:].abs().max() < 0.02


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "multiple"), [(600, 512, 64, 8), (75, 64, 8, 1), (129, 64, 0, 2), (1000, 64, 63, 1)]
)
def test_even_tiles_are_as_many_and_no_longer_than_they_have_to_be(size, tile, overlap, multiple):
    size = -(-size // multiple) * multiple
    plain, even = (plan_tiles(size, multiple, tile, overlap if tile > overlap else 0, multiple, way) for way in (False, True))
    assert len(even) == len(plain) > 1
    length, shared = even.tile_height, [before + even.tile_height - after for before, after in zip(even.tops, even.tops[1:])]
    assert length <= tile
    assert length % multiple == 0
    assert min(shared) >= overlap
    assert max(shared) < overlap + 2 * multiple * len(even)
    assert even.tops[-1] + length == size
    total = torch.zeros(size, multiple)
    for i in range(len(even)):
        even.add(torch.ones(length, multiple), i, total)
    torch.testing.assert_close(total, torch.ones(size, multiple))
