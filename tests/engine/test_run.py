"""Runs: a batch is its pictures one by one, tiles are near the whole, and the callback hears of every step."""

import pytest
import torch

from ebr_engine.bridge.sampler import draw_noise, make_table, sample
from ebr_engine.engine.layout import tiled
from ebr_engine.media.tiling import plan_tiles
from tests.tiny import make_prompt, picture

EPS = torch.finfo(torch.float32).eps


def test_a_batch_equals_one_by_one(restorer, prompt, relative_rms):
    images = picture(24, 40, batch=3)
    together = restorer.restore(images, prompt=prompt)
    alone = torch.cat([restorer.restore(image[None], prompt=prompt) for image in images])
    # Sums of at most 48 numbers in another order, in each of five steps through two blocks.
    assert relative_rms(together, alone) < 16 * EPS
    assert not torch.equal(together[0], together[1])


def test_a_batch_in_tiles_equals_one_by_one(restorer, prompt, relative_rms):
    images = picture(40, 56, batch=2)
    together = restorer.restore(images, prompt=prompt, tile=32, tile_overlap=8)
    alone = torch.cat([restorer.restore(image[None], prompt=prompt, tile=32, tile_overlap=8) for image in images])
    assert relative_rms(together, alone) < 16 * EPS


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, None), (32, 0), (64, 60)])
def test_tiles_keep_the_size_and_stay_near_one_piece(restorer, prompt, tile, overlap):
    image = picture(43, 101)
    whole = restorer.restore(image, prompt=prompt, tile=0)
    backbone = restorer.restore(image, prompt=prompt, tile=tile, tile_overlap=overlap)
    assert backbone.shape == image.shape
    assert backbone.isfinite().all()
    assert 0 <= backbone.min() <= backbone.max() <= 1
    assert not torch.equal(backbone, whole)
    assert (backbone - whole).square().mean() < 0.25 * (image - whole).square().mean()


def test_the_smallest_tiles_cover_any_size(restorer, prompt):
    image = picture(13, 50)
    result = restorer.restore(image, prompt=prompt, tile=8, tile_overlap=0)
    assert result.shape == image.shape
    assert 0 <= result.min() <= result.max() <= 1


def test_a_picture_no_larger_than_a_tile_is_one_piece(restorer, prompt):
    image = picture(37, 53)
    whole = restorer.restore(image, prompt=prompt, tile=0)
    assert torch.equal(restorer.restore(image, prompt=prompt, tile=64, tile_overlap=8), whole)
    assert torch.equal(restorer.restore(image, prompt=prompt), whole)


def test_tiling_changes_nothing_when_pixels_do_not_look_at_each_other(relative_rms):
    degraded = torch.randn(2, 48, 1, 10, 17)
    noise = draw_noise(degraded.shape, 42)
    table = make_table("fast", 0.3)

    def velocity(state, step):
        return torch.tanh(state) * step

    conditioning = [0.5] * len(table)
    whole = sample(velocity, conditioning, degraded, noise, table)
    backbone = sample(tiled(velocity, plan_tiles(10, 17, 4, 2), at_once=3), conditioning, degraded, noise, table)
    assert relative_rms(backbone, whole) < 5 * 4 * EPS  # four tiles summed in each of five steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 10),  # two prompts in turn
        ({"mix": "residual"}, 5),
        ({"mix": "residual", "steps": 3}, 3),
        ({"mix": "residual", "schedule": "released"}, 20),
        ({"mix": "residual", "schedule": "exact"}, 19),
        ({"schedule": "uniform", "steps": 2, "order": 1}, 4),
        ({"mix": "residual", "tile": 16, "tile_overlap": 8}, 5 * 7),  # six tiles and the small version
        ({"mix": "velocity"}, 5),
    ],
)
def test_the_callback_hears_of_every_step_once(restorer, prompt, settings, steps):
    heard = []
    prompts = [prompt, make_prompt(1)]
    restorer.restore(picture(24, 32), prompt=prompts, callback=lambda *step: heard.append(step), **settings)
    assert heard == [(i + 1, steps) for i in range(steps)]
