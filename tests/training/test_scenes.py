"""The pool of scenes: what `render` makes, cut into crops, renewed in the background."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

from ebr_engine.media.degradations import seeds
from ebr_engine.training import scenes
from ebr_engine.training.procedural import KINDS, PALETTES, SCALES, render
from ebr_engine.training.scenes import ScenePool, still_pool

SIZE = 64


@pytest.fixture
def inline(monkeypatch):
    """Scenes are rendered in this process, in place of new ones that each have to import everything."""
    started = []

    def render_now(*arguments):
        started.append(arguments)
        scenes._render_into(*arguments)

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(scenes, "_start", render_now)
    monkeypatch.setattr(scenes, "_run", lambda processes: None)
    return started


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_holds(pool, slot, number):
    """The pool's slot is the scene of that number, bit for bit."""
    scene = render(number, pool.pixels.shape[-1])
    assert np.array_equal(pool.pixels[slot, :3].permute(1, 2, 0).numpy(), scene.image)
    assert np.array_equal(pool.pixels[slot, 3].numpy(), np.round(scene.depth * 255).astype(np.uint8))
    assert tuple(scenes.CAPTION_WORDS[word] for word in pool.words[slot]) == scene.caption


def test_processes_fill_the_pool_with_numbered_scenes():
    with ScenePool(3, SIZE, first=7, workers=2) as pool:
        for slot in range(3):
            assert_holds(pool, slot, 7 + slot)
    assert not multiprocessing.active_children()


def test_the_number_of_workers_does_not_matter(inline):
    one, three = ScenePool(4, SIZE, workers=1), ScenePool(4, SIZE, workers=3)
    assert torch.equal(one.pixels, three.pixels)
    assert torch.equal(one.words, three.words)
    assert len(inline) == 4


def test_a_process_renews_the_oldest_scenes_until_the_context_ends(inline, monkeypatch):
    render_now, process = scenes._start, []

    def start(*arguments):
        if arguments[-1] == 0:
            return render_now(*arguments)
        process.append(multiprocessing.get_context("spawn").Process(target=scenes._render_into, args=arguments, daemon=True))
        process[0].start()
        return process[0]

    monkeypatch.setattr(scenes, "_start", start)
    with ScenePool(2, SIZE, first=5, rate=0.01) as pool:  # the first one at once, the second after 100 s
        old = pool.pixels[0].clone()
        deadline = time.monotonic() + 120
        while torch.equal(pool.pixels[0], old) or pool.words[0].tolist() != words(7):
            assert time.monotonic() < deadline, "nothing was renewed"
            assert process[0].is_alive()
            time.sleep(0.05)
        assert_holds(pool, 0, 7)
        assert_holds(pool, 1, 6)
    assert not process[0].is_alive()
    assert not multiprocessing.active_children()


def words(number):
    return [scenes.CAPTION_WORDS.index(word) for word in render(number, SIZE).caption]


def test_the_renewer_gets_the_scenes_that_follow(inline, monkeypatch):
    started = []
    monkeypatch.setattr(scenes, "_start", lambda *arguments: started.append(arguments))
    ScenePool(4, SIZE, first=100, rate=2.5, workers=2)
    assert sorted([*started[0][3], *started[1][3]]) == [100, 101, 102, 103]
    assert started[2][3] == range(104, seeds("train").stop)
    assert started[2][4] == 2.5


def test_renewing_keeps_to_its_rate(inline, monkeypatch):
    waits = []
    monkeypatch.setattr(scenes, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=waits.append))
    pool = ScenePool(2, SIZE)
    scenes._render_into(pool.pixels, pool.words, 0, range(2, 5), 4.0)
    assert waits == [0.25] * 3
    for slot, number in ((0, 4), (1, 3)):
        assert_holds(pool, slot, number)


@pytest.mark.parametrize(("first", "capacity"), [(-1, 2), (seeds("train").stop - 1, 2), (seeds("test").start, 2)])
def test_scenes_outside_the_training_range_are_refused(inline, first, capacity):
    with pytest.raises(ValueError, match="training seeds"):
        ScenePool(capacity, SIZE, first=first)
    assert not inline


def test_a_failed_process_is_not_passed_over():
    def process(code):
        return SimpleNamespace(join=lambda: None, exitcode=code)

    scenes._run([process(0), process(0)])
    with pytest.raises(RuntimeError, match="renders scenes failed"):
        scenes._run([process(0), process(1)])


@pytest.mark.parametrize("size", [32, 40, 64])
def test_crops_have_shape_range_and_words(inline, size):
    pool = ScenePool(3, SIZE)
    clean, depth, captions = pool.crops(6, size, seeded())
    assert (clean.shape, depth.shape, len(captions)) == ((6, 3, size, size), (6, 1, size, size), 6)
    assert clean.dtype == depth.dtype == torch.float32
    for values in (clean, depth):
        assert 0 <= values.min() < values.max() <= 1
    for kind, palette, scale in captions:
        assert kind in KINDS
        assert palette in PALETTES
        assert scale in SCALES


def test_crops_depend_on_the_generator_only(inline):
    pool = ScenePool(3, SIZE)
    first, again, other = (pool.crops(5, 32, seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2]))
    assert first[2] == again[2]
    assert not torch.equal(first[0], other[0])


def test_a_whole_crop_is_the_scene_or_its_mirror_with_its_depth_and_words(inline):
    pool = ScenePool(2, SIZE)
    clean, depth, captions = pool.crops(16, SIZE, seeded())
    found = set()
    for crop, caption in zip(torch.cat((clean, depth), 1), captions):
        matches = [
            (slot, flip)
            for slot in range(2)
            for flip in (False, True)
            if torch.equal(crop, (pool.pixels[slot].flip(-1) if flip else pool.pixels[slot]).float() / 255)
        ]
        assert len(matches) == 1
        slot = matches[0][0]
        assert caption == tuple(scenes.CAPTION_WORDS[word] for word in pool.words[slot])
        found |= set(matches)
    assert len(found) == 4


def test_small_crops_come_at_both_scales(inline):
    pool = ScenePool(1, SIZE)
    scene = pool.pixels[0].float() / 255
    windows = scene.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # every 32 × 32 piece
    halved = F.avg_pool2d(scene, 2)
    kinds = []
    for crop in torch.cat(pool.crops(12, 32, seeded())[:2], 1):
        upright = (crop, crop.flip(-1))
        taken = any((windows - c).abs().amax((1, 2, 3)).min() < 1e-6 for c in upright)
        reduced = any((halved - c).abs().max() < 1e-6 for c in upright)
        assert taken != reduced
        kinds.append(reduced)
    assert 0 < sum(kinds) < 12


def test_a_still_pool_is_rendered_once(monkeypatch):
    made = []
    monkeypatch.setattr(scenes, "ScenePool", lambda capacity: made.append(capacity) or object())
    still_pool.cache_clear()
    first = still_pool(2)
    assert still_pool(2) is first
    assert made == [2]
    still_pool.cache_clear()
