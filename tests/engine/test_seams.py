"""Nobody sees where a large picture was cut: tiles and chunks leave no step that the picture itself does not have."""

import pytest
import torch
from torch.nn import functional as F

from ebr_engine import Restorer

HEIGHT, WIDTH, TILE, CELL = 256, 320, 160, 8
MOST = 1.03  # times the step that an uncut picture has there
HOW = {"task": "haze", "detail": "model", "supersample": 1}


@pytest.fixture(scope="module")
def restorer():
    return Restorer("mini", precision="fp32")


def scene(kind):
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    smooth = torch.stack([0.3 + 0.3 * x, 0.4 + 0.2 * y, 0.5 - 0.2 * x * y])
    if kind == "smooth":
        return smooth
    grain = torch.randn(1, 3, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(1))
    return (smooth + 0.08 * F.interpolate(grain, (HEIGHT, WIDTH), mode="bicubic")[0]).clamp(0, 1)


def seam(restored, tiles):
    """Mean gradient across the tiles' borders over that across other borders of the codec's blocks, the worse axis."""
    ratios = []
    for axis, starts, length in ((1, tiles.tops, tiles.tile_height), (2, tiles.lefts, tiles.tile_width)):
        gradient = restored.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        blocks = torch.arange(CELL - 1, len(gradient), CELL)
        ends = [*(start - 1 for start in starts), *(start + length - 1 for start in starts)]
        at_tiles = torch.isin(blocks, torch.tensor(ends))
        assert at_tiles.any()
        ratios.append(float(gradient[blocks[at_tiles]].mean() / gradient[blocks[~at_tiles]].mean()))
    return max(ratios)


@pytest.mark.parametrize("blend", ["latent", "pixel"])
@pytest.mark.parametrize("kind", ["smooth", "textured"])
def test_tiles_leave_no_seam(restorer, kind, blend):
    restored = restorer.restore(scene(kind), **HOW, tile=TILE, tile_overlap=64, tile_blend=blend)
    whole = restorer.restore(scene(kind), **HOW, tile=0)  # on its own grid of patches
    tiles = restorer.engine.geometry.tiles(HEIGHT, WIDTH, TILE, 64, even=True).scaled(CELL)
    assert seam(restored, tiles) < MOST * max(1.0, seam(whole, tiles))  # 1: as any other border of the codec's blocks


@pytest.mark.parametrize("kind", ["smooth", "textured"])
def test_a_tile_a_twentieth_brighter_would_be_seen(restorer, kind):
    whole = restorer.restore(scene(kind), **HOW, tile=0)
    tiles = restorer.engine.geometry.tiles(HEIGHT, WIDTH, TILE, 64, even=True).scaled(CELL)
    restored = whole.clone()
    restored[:, :, tiles.lefts[1] :] += 0.05
    assert seam(restored, tiles) > MOST * max(1.0, seam(whole, tiles))


def test_both_ways_to_blend_agree(restorer):
    ways = [restorer.restore(scene("textured"), **HOW, tile=TILE, tile_blend=way) for way in ("latent", "pixel")]
    assert (ways[0] - ways[1]).abs().mean() < 2e-3  # a tile keeps the means of its own blocks
