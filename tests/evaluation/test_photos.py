"""The benchmark's photos: the same on every call, and never met in training."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.evaluation import photos
from ebr_engine.evaluation.photos import TEN, load_photo, make_case
from ebr_engine.media.degradations import seeds
from ebr_engine.prompts.catalogue import TASKS

SIZE = 64


@pytest.fixture(autouse=True)
def one_load_each(monkeypatch):
    """Decode every photo once; a case is made from copies."""
    monkeypatch.setattr(photos, "load_photo", cache(load_photo))


@pytest.mark.parametrize("name", TEN)
def test_photos_are_squares_of_the_size_asked_for(name):
    clean, depth = load_photo(name, SIZE)
    assert clean.shape == (1, 3, SIZE, SIZE)
    assert clean.dtype == torch.float32
    assert 0 <= clean.min() < 0.35 < 0.65 < clean.max() <= 1
    assert 0.1 < clean.mean() < 0.7
    assert (depth is not None) == (name == "motorcycle")
    if depth is not None:
        assert depth.shape == (1, 1, SIZE, SIZE)
        assert 0 <= depth.min() < 0.2 < 0.8 < depth.max() <= 1


def test_the_whole_photo_is_every_pixel_of_it():
    from skimage import data

    clean, _ = load_photo("chelsea", None)
    assert clean.shape == (1, 3, 300, 451)
    assert torch.equal((clean[0].permute(1, 2, 0) * 255).round().byte(), torch.from_numpy(data.chelsea()))


def test_the_square_is_the_centre_and_nothing_is_squashed():
    clean, _ = load_photo("chelsea", None)
    square, _ = load_photo("chelsea", 300)  # its height: nothing to reduce, 451 − 300 columns to leave out
    torch.testing.assert_close(square, clean[..., 75:375])
    # Reduced first or last, it is the same picture but for the filter.
    reduced = F.avg_pool2d(load_photo("chelsea", 150)[0], 2)
    assert (reduced - F.avg_pool2d(square, 4)).square().mean().sqrt() < 0.01


def test_the_motorcycles_depth_lies_on_its_picture():
    clean, depth = load_photo("motorcycle", 128)
    assert depth.shape[-2:] == clean.shape[-2:]
    # The machine stands in the middle, before a wall: nearer than the upper corners.
    assert depth[..., 50:80, 40:90].mean() < depth[..., :20, :20].mean() - 0.2


@pytest.mark.parametrize("task", TASKS)
def test_a_case_is_the_same_on_every_call(task):
    for name in ("chelsea", "motorcycle"):
        first, again = (make_case(name, task, SIZE) for _ in range(2))
        assert (first.photo, first.task) == (name, task)
        assert torch.equal(first.clean, again.clean)
        assert torch.equal(first.degraded, again.degraded)
        assert first.degraded.shape == first.clean.shape
        assert not torch.equal(first.degraded, first.clean)
        eighths = first.degraded * 255
        torch.testing.assert_close(eighths, eighths.round(), rtol=0, atol=1e-4)


def test_stronger_cases_are_worse():
    for task in TASKS:
        mild, strong = (make_case("chelsea", task, SIZE, strength) for strength in (0.1, 0.9))
        assert (strong.degraded - strong.clean).square().mean() > (mild.degraded - mild.clean).square().mean()


def test_haze_follows_the_real_depth_where_it_is_known(monkeypatch):
    depths = {}

    def degrade(clean, task, generator, *, depth, strength):
        depths[len(depths)] = depth
        return clean

    monkeypatch.setattr(photos, "degrade", degrade)
    make_case("motorcycle", "haze", SIZE)
    make_case("chelsea", "haze", SIZE)
    assert torch.equal(depths[0], load_photo("motorcycle", SIZE)[1])
    assert depths[1] is None


def test_every_photo_has_a_test_seed_of_its_own(monkeypatch):
    used = []

    def degrade(clean, task, generator, **settings):
        used.append(generator.initial_seed())
        return clean

    monkeypatch.setattr(photos, "degrade", degrade)
    for name in TEN:
        for task in TASKS:
            make_case(name, task, SIZE)
    assert len(used) == len(TEN) * len(TASKS)
    assert len(set(used)) == len(TEN)
    assert all(seed in seeds("test") for seed in used)
    assert not any(seed in seeds(split) for seed in used for split in ("train", "validation"))
