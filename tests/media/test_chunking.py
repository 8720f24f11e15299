"""Chunks of source frames, cut at scenes and blended back: every frame once, in order, without a seam."""

import weakref
from fractions import Fraction

import numpy as np
import pytest

from ebr_engine.errors import EbrError
from ebr_engine.media.chunking import chunked, cross_fade, scenes
from ebr_engine.media.video import Frame


def next_4n1(count):
    return -(-(count - 1) // 4) * 4 + 1


def scene(seed, count, height=40, width=56, motion=1):
    """Frames of a smooth random pattern that moves."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((6, 40, 3), dtype=np.float32)
    wide = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)[:height]
    return [wide[:, motion * i : motion * i + width].copy() for i in range(count)]


def clip(*pictures):
    return [Frame(picture, index, Fraction(1, 25), 1) for index, picture in enumerate(pictures)]


def run(frames, length, overlap, model=lambda pixels: pixels, **settings):
    chunks = chunked(iter(frames), length, overlap, next_4n1, **settings)
    return list(cross_fade((chunk, model(chunk.pixels)) for chunk in chunks))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9, 10, 11, 13, 14, 31, 40])
@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (5, 0), (9, 3), (9, 8), (13, 1)])
def test_an_identity_model_gives_every_frame_back_once_and_in_order(count, length, overlap):
    frames = clip(*scene(1, count))
    out = run(frames, length, overlap)
    assert [frame.pts for frame in out] == list(range(count))
    for before, after in zip(frames, out):
        np.testing.assert_allclose(after.pixels, before.pixels, atol=1e-6)


def test_a_static_clip_is_returned_bit_for_bit():
    frames = clip(*[np.full((8, 8, 3), 0.3, np.float32)] * 21)
    for frame in run(frames, 9, 4):
        assert (frame.pixels == np.float32(0.3)).all()


def test_chunks_hold_only_lengths_that_the_model_takes_and_are_full_where_the_scene_is_long_enough():
    chunks = list(chunked(iter(clip(*scene(1, 21))), 9, 3, next_4n1))
    assert [(c.start, len(c.frames), c.skip, c.overlap, c.padded) for c in chunks] == [
        (0, 9, 0, 0, 0),
        (6, 9, 0, 3, 0),
        (12, 9, 0, 3, 0),
    ]
    last = list(chunked(iter(clip(*scene(1, 22))), 9, 3, next_4n1))[-1]
    assert (last.start, len(last), last.skip, last.overlap) == (13, 9, 5, 3)  # one new frame, and all the context there is


def test_a_scene_shorter_than_a_chunk_is_padded_back_and_forth():
    (chunk,) = chunked(iter(clip(*[np.full((8, 8, 3), 0.1 * i, np.float32) for i in range(3)])), 9, 2, next_4n1)
    assert (len(chunk.frames), chunk.padded) == (3, 2)
    np.testing.assert_allclose(chunk.pixels[:, 0, 0, 0], [0, 0.1, 0.2, 0.1, 0], atol=1e-6)
    (chunk,) = chunked(iter(clip(*scene(1, 1))), 9, 2, lambda count: 9)
    assert (chunk.pixels == chunk.pixels[0]).all()


def test_the_fade_is_a_raised_cosine_whose_weights_sum_to_one():
    """Noise that is independent between chunks has the variance w² + (1 - w)² where two are mixed by w."""
    rng = np.random.default_rng(0)
    flat = np.zeros((48, 48, 3), np.float32)
    out = run(clip(*[flat] * 13), 9, 5, lambda pixels: rng.standard_normal(pixels.shape).astype(np.float32), cuts=False)
    weight = 0.5 - 0.5 * np.cos(np.pi * (np.arange(5) + 0.5) / 5)
    expected = [*[1] * 4, *(weight**2 + (1 - weight) ** 2), *[1] * 4]
    np.testing.assert_allclose([frame.pixels.var() for frame in out], expected, rtol=0.1)  # of 6912 samples: 5 sigma
    ramp = run(clip(*[flat] * 13), 9, 5, lambda pixels, steps=iter((0.0, 1.0)): pixels + np.float32(next(steps)), cuts=False)
    np.testing.assert_allclose([frame.pixels[0, 0, 0] for frame in ramp], [*[0] * 4, *weight, *[1] * 4], atol=1e-6)


def test_chunks_do_not_cross_cuts():
    frames = clip(*scene(1, 14), *scene(2, 3), *scene(3, 11))
    chunks = list(chunked(iter(frames), 9, 3, next_4n1))
    spans = [(c.start, c.start + len(c.frames), c.overlap) for c in chunks]
    assert spans == [(0, 9, 0), (5, 14, 3), (14, 17, 0), (17, 26, 0), (19, 28, 3)]
    assert [frame.pts for frame in run(frames, 9, 3)] == list(range(28))


def test_cuts_are_found_in_the_dark_in_haze_and_in_noise():
    rng = np.random.default_rng(0)
    parts = [scene(seed, 6) for seed in (1, 2, 3)]
    for gain, lift, noise in ((1, 0, 0.05), (0.08, 0, 0.005), (0.2, 0.7, 0.01)):
        pictures = [
            (gain * p + lift + noise * rng.standard_normal(p.shape)).clip(0, 1).astype(np.float32) for s in parts for p in s
        ]
        assert [frame.pts for frame, cut in scenes(clip(*pictures)) if cut] == [6, 12]


def test_flashes_flicker_fades_noise_and_fast_motion_are_no_cuts():
    rng = np.random.default_rng(0)
    calm = scene(1, 16)
    flash = [*calm[:7], np.ones_like(calm[0]), *calm[8:]]
    flicker = [picture * (1 if i % 2 else 0.7) for i, picture in enumerate(calm)]
    dissolve = [(1 - t) * scene(1, 1)[0] + t * scene(2, 1)[0] for t in np.linspace(0, 1, 16, dtype=np.float32)]
    noise = list(rng.random((16, 40, 56, 3), dtype=np.float32))
    for pictures in (calm, flash, flicker, dissolve, noise, scene(1, 16, motion=6)):
        assert not [frame.pts for frame, cut in scenes(clip(*pictures)) if cut]


def test_memory_does_not_grow_with_the_clip():
    alive = weakref.WeakSet()
    most = {"read": 0}

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def source():
        for index, picture in enumerate(scene(1, 1) * 2000):
            counted = picture.copy().view(Counted)
            alive.add(counted)
            most["read"] = max(most["read"], len(alive))
            yield Frame(counted, index, Fraction(1, 25), 1)

    chunks = chunked(source(), 13, 4, next_4n1)
    count = sum(1 for _ in cross_fade((chunk, np.asarray(chunk.pixels)) for chunk in chunks))
    assert count == 2000
    assert most["read"] <= 2 * 13 + 2  # two chunks, and what looking for cuts reads ahead


@pytest.mark.parametrize(("length", "overlap"), [(8, 2), (0, 0), (9, 9), (9, -1)])
def test_impossible_lengths_are_refused(length, overlap):
    with pytest.raises(EbrError, match="chunk"):
        next(chunked(iter(clip(*scene(1, 3))), length, overlap, next_4n1))


def test_a_restoration_of_another_length_is_refused():
    with pytest.raises(ValueError, match="its restoration 8"):
        run(clip(*scene(1, 9)), 9, 0, lambda pixels: pixels[1:])
