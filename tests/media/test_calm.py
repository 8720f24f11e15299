"""Where a picture is calm, what is made of it is calm too."""

import torch

from ebr_engine.media.calm import REACH, kept_calm


def spread(frames):
    """The standard deviation in 7×7 pixels, [F, h, w]."""
    side = 2 * REACH + 1
    return frames.mean(1).unfold(1, side, 1).unfold(2, side, 1).flatten(-2).std(-1)


def half_calm(noise=0.002):
    frames = 0.5 + noise * torch.randn(2, 3, 64, 96)
    frames[..., 48:] = torch.rand(2, 3, 64, 48)
    return frames


def test_noise_in_calm_places_stays_what_it_was_and_tones_change():
    before = half_calm()
    after = 0.8 * before + 0.05 + 0.01 * torch.randn(before.shape)
    kept = kept_calm(before, after)
    calm = (..., slice(6, -6), slice(6, 34))
    assert spread(after)[calm].median() > 3 * spread(before)[calm].median()
    assert spread(kept)[calm].median() < 1.2 * spread(before)[calm].median()
    assert torch.allclose(kept[calm].mean(), torch.tensor(0.45), atol=1e-3)


def test_storing_in_eight_bits_adds_no_noise_either():
    before = (half_calm(0.003) * 219).round() / 219
    after = 0.8 * before + 0.05 + 0.004 * torch.randn(before.shape)
    stored = (kept_calm(before, after) * 219).round() / 219
    calm = (..., slice(6, -6), slice(6, 34))
    assert spread(stored)[calm].median() < 1.05 * spread(before)[calm].median()


def test_lively_places_are_not_touched():
    before = half_calm()
    after = (before + 0.1 * torch.randn(before.shape)).clamp(0, 1)
    lively = (..., slice(None), slice(60, None))
    assert torch.allclose(kept_calm(before, after)[lively], after[lively], atol=1e-6)


def test_what_gets_calmer_stays_so():
    before = half_calm(0.004)
    after = before.clone()
    after[..., :40] = 0.5
    assert torch.allclose(kept_calm(before, after), after, atol=1e-5)


def test_frames_of_any_size():
    for shape in ((1, 3, 1, 1), (3, 3, 2, 9), (1, 3, 8, 8)):
        frames = torch.rand(shape)
        assert torch.allclose(kept_calm(frames, frames), frames, atol=1e-5)
