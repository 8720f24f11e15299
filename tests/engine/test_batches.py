"""Several pictures in one run are what each is alone, whatever their sizes and kinds; one request always gives the same bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ebr_engine import Restorer
from ebr_engine.engine.batches import groups
from ebr_engine.engine.execute import Graphs, Runner
from ebr_engine.engine.run import TILES_AT_ONCE
from ebr_engine.errors import EbrError
from tests.engine.test_graphs import CallAgain
from tests.tiny import make_prompt

ROUNDING = 1e-5  # sums of at most 48 numbers in another order, through two blocks and five steps, of values below 1


def picture(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.3


@pytest.fixture
def plan(restorer):
    return restorer.plan(prompt=make_prompt())


def test_pictures_of_any_sizes_are_what_they_are_alone(restorer, plan):
    sizes = [(24, 40), (21, 38), (8, 8), (40, 24), (24, 33), (1, 1), (24, 40)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    together = restorer.restore_batch(images, plan=plan)
    for image, result in zip(images, together):
        torch.testing.assert_close(result, restorer.restore(image, plan=plan), atol=ROUNDING, rtol=0)
    assert not torch.equal(together[0], together[-1])


def test_every_kind_comes_back_as_itself_in_its_place(restorer, plan):
    rgb = (picture(16, 24).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    clip = torch.stack([picture(16, 24, seed) for seed in range(4)], dim=1)  # [3, F, H, W]
    frames = (clip.permute(1, 2, 3, 0).numpy() * 65535).astype(np.uint16)
    images = [Image.fromarray(rgb), rgb, clip, frames, picture(16, 24)]
    results = restorer.restore_batch(images, plan=plan)
    assert [type(result) for result in results] == [type(image) for image in images]
    assert np.array_equal(np.asarray(results[0]), results[1])
    assert results[2].shape == clip.shape
    assert (results[3].dtype, results[3].shape) == (np.uint16, frames.shape)
    for i in range(4):
        torch.testing.assert_close(results[2][:, i], restorer.restore(clip[:, i], plan=plan), atol=ROUNDING, rtol=0)
        alone = restorer.restore(frames[i], plan=plan)
        assert np.abs(results[3][i].astype(int) - alone).max() <= 1


def test_what_needs_tiles_is_in_the_batch_too(restorer, plan):
    images = [picture(40, 56, 1), picture(16, 16, 2), picture(40, 56, 3)]
    how = {"plan": plan, "tile": 32, "tile_overlap": 8}
    for image, result in zip(images, restorer.restore_batch(images, **how)):
        torch.testing.assert_close(result, restorer.restore(image, **how), atol=ROUNDING, rtol=0)


def test_groups_are_bounded_and_complete():
    shapes = [(8, 8)] * 5 + [(8, 16), (8, 8)]
    found = list(groups(shapes, [False] * 7, at_once=4))
    assert sorted(i for group in found for i in group) == list(range(7))
    assert sorted(map(len, found)) == [1, 2, 4]
    assert [len(group) for group in groups(shapes, [True] * 7)] == [1] * 7


def test_the_callback_counts_images_and_a_bad_one_is_told_before_any_work(restorer, plan):
    heard = []
    restorer.restore_batch([picture(8, 8), picture(16, 8)], plan=plan, callback=lambda *of: heard.append(of))
    assert heard == [(1, 2), (2, 2)]
    with pytest.raises(EbrError, match=r"photo\.jpg"):
        restorer.restore_batch([picture(8, 8), "photo.jpg"], plan=plan, callback=lambda *of: heard.append(of))
    assert len(heard) == 2
    assert restorer.restore_batch([], plan=plan) == []


@pytest.mark.parametrize("tile", [0, 32])
def test_the_same_request_gives_the_same_bytes(weights, tile):
    results = []
    for _ in range(2):
        one = Restorer(model=weights, device="cpu", precision="fp32", compile="off")
        how = {"tile": tile} | ({"tile_overlap": 8} if tile else {})
        results += [one.restore(picture(40, 56), prompt=make_prompt(), **how) for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.slow
def test_compiled_the_same_request_gives_the_same_bytes(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    results = []
    for _ in range(2):
        one = Restorer(model=weights, device="cpu", precision="fp32", compile="on")
        results += [one.restore(picture(40, 56), prompt=make_prompt()) for _ in range(2)]
        assert one.runner.compiled
        torch.compiler.reset()
    assert all(torch.equal(result, results[0]) for result in results)
    plain = Restorer(model=weights, device="cpu", precision="fp32", compile="off")
    torch.testing.assert_close(results[0], plain.restore(picture(40, 56), prompt=make_prompt()), atol=1e-4, rtol=0)


def test_how_many_tiles_run_at_once_changes_nothing_but_rounding(restorer, plan, monkeypatch):
    results = []
    for at_once in (1, 4):
        monkeypatch.setitem(TILES_AT_ONCE, "cpu", at_once)
        results.append(restorer.restore(picture(40, 72), plan=plan, tile=32, tile_overlap=8))
    torch.testing.assert_close(*results, atol=ROUNDING, rtol=0)


@pytest.fixture
def captured(weights):
    """An engine whose runs are recorded, with the recorder that counts."""
    one, recorder = Restorer(model=weights, device="cpu", precision="fp32"), CallAgain()
    one.engine.runner = Runner(one.backbone, "auto", graphs=Graphs(recorder))
    return one, recorder


def test_a_folder_of_odd_sizes_needs_few_graphs(captured, restorer, plan):
    one, recorder = captured
    heights, widths = (121, 123, 128, 118, 125, 114, 127, 99, 116, 124), (181, 179, 170, 192, 188, 161, 183, 190, 171, 186)
    sizes = list(zip(heights, widths))
    assert len({(-(-height // 8), -(-width // 8)) for height, width in sizes}) == 7  # that a plain run has
    for seed, size in enumerate(sizes):
        image = picture(*size, seed)
        result, exact = one.restore(image, plan=plan), restorer.restore(image, plan=plan)
        assert result.shape == image.shape
        # Attention sees the reflected margin too, so the result is near the exact one, not equal to it.
        assert (result - exact).square().mean() < 0.02 * (exact - image).square().mean()
    assert recorder.recorded == 2


def test_a_size_that_needs_no_margin_is_exact(captured, restorer, plan):
    image = picture(32, 40)
    assert torch.equal(captured[0].restore(image, plan=plan), restorer.restore(image, plan=plan))
