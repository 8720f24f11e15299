"""Corrections of colour: the input's low frequencies or statistics, the result's detail, and nothing where none is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.colour_fix import BY_TASK, FIXES, fix_colours, fix_for, low_frequencies
from ebr_engine.prompts.catalogue import TASKS


def picture(shape=(48, 70, 3), seed=0):
    return np.random.default_rng(seed).uniform(0.3, 0.7, shape).astype(np.float32)


@pytest.mark.parametrize("fix", FIXES)
@pytest.mark.parametrize("shape", [(48, 70, 3), (1, 1, 3), (5, 200, 3), (2, 33, 17, 3)])
def test_a_result_that_equals_its_source_stays(fix, shape):
    pixels = picture(shape)
    np.testing.assert_allclose(fix_colours(pixels, pixels, fix), pixels, atol=1e-6)


def test_a_shift_of_colour_is_undone_and_detail_stays():
    source = picture((20, 160, 3))
    detail = 0.02 * (-1.0) ** np.arange(160, dtype=np.float32)[None, :, None]  # the finest there is
    shifted = source + detail + np.array([0.1, -0.05, 0.02], np.float32)
    inner = slice(40, -40)  # beyond the reach of the borders, whose rows repeat
    np.testing.assert_allclose(fix_colours(shifted, source, "wavelet")[:, inner], (source + detail)[:, inner], atol=1e-5)


def test_the_wavelets_low_frequencies_are_linear_and_keep_what_is_flat():
    a, b = picture(seed=1), picture(seed=2)
    np.testing.assert_allclose(low_frequencies(a - b), low_frequencies(a) - low_frequencies(b), atol=1e-6)
    flat = np.full((9, 130, 3), 0.4, np.float32)
    np.testing.assert_allclose(low_frequencies(flat), flat, atol=1e-6)
    assert low_frequencies(a).std() < 0.1 * a.std()


def test_one_level_is_the_binomial_filter():
    pixels = np.zeros((5, 5, 3), np.float32)
    pixels[2, 2] = 1
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    np.testing.assert_allclose(low_frequencies(pixels, 1)[1:4, 1:4, 0], kernel, atol=1e-7)


def test_adain_takes_over_mean_and_spread_of_each_channel():
    source = picture(seed=3)
    restored = 0.5 + 0.4 * (picture(seed=4) - 0.5) * np.array([1.0, 0.5, 0.7], np.float32) + 0.05
    fixed = fix_colours(restored, source, "adain")
    np.testing.assert_allclose(fixed.mean((0, 1)), source.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(fixed.std((0, 1)), source.std((0, 1)), atol=1e-5)


def test_frames_of_a_clip_are_corrected_one_by_one():
    source, restored = picture((3, 20, 24, 3)), picture((3, 20, 24, 3), seed=1)
    for fix in ("wavelet", "adain"):
        clip = fix_colours(restored, source, fix)
        for frame, one, other in zip(clip, restored, source):
            np.testing.assert_allclose(frame, fix_colours(one, other, fix), atol=1e-6)


def test_a_flat_result_and_values_beyond_white_make_no_nonsense():
    source = picture()
    assert np.isfinite(fix_colours(np.full_like(source, 0.5), source, "adain")).all()
    fixed = fix_colours(np.ones_like(source), np.zeros_like(source) + 0.99 * (picture(seed=5) > 0.5), "wavelet")
    assert fixed.min() >= 0
    assert fixed.max() <= 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="sepia"):
        fix_colours(picture(), picture(), "sepia")
    with pytest.raises(ValueError, match="shape"):
        fix_colours(picture(), picture((48, 71, 3)), "wavelet")


def test_the_defaults_are_what_was_measured():
    measured = Path(__file__).parents[2] / "benchmarks" / "results" / "colour_fix.json"
    assert json.loads(measured.read_text())["best"] == BY_TASK


def test_where_the_low_frequencies_are_the_damage_nothing_is_corrected_by_default(monkeypatch):
    assert set(BY_TASK) == set(TASKS)
    assert all(BY_TASK[task] == "none" for task in ("haze", "lowlight"))
    assert fix_for(["haze"]) == fix_for(["lowlight"]) == fix_for(["my-own-task"]) == fix_for([]) == "none"
    monkeypatch.setitem(BY_TASK, "rain", "wavelet")
    monkeypatch.setitem(BY_TASK, "snow", "wavelet")
    assert fix_for(["rain"]) == fix_for(["rain", "snow"]) == "wavelet"
    assert fix_for(["rain", "haze"]) == "none"
