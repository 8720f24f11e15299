"""Differences are paired by file, their intervals cover, and what got worst is found."""

import math

import numpy as np
import pytest
from scipy import stats

from ebr_engine.evaluation.statistics import difference, differences, gains, interval, scores_of, ways_of, worst


def row(name, restored, given=None, empty=None, metric="psnr"):
    beside = {way: {metric: value} for way, value in (("input", given), ("empty prompt", empty)) if value is not None}
    return {"name": name, "scores": {metric: restored}, "beside": beside}


ROWS = [row("a", 30.0, 20.0, 21.0), row("b", 18.0, 20.0, 18.5), row("c", 25.0), row("d", 26.0, 20.0, 20.0)]


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(5).normal(0.5, 1, 40)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(9))
    ours = interval(values)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)
    assert ours == interval(list(values))
    assert ours[0] < values.mean() < ours[1]


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    drawn = np.random.default_rng(1)
    held = [low < 0.3 < high for low, high in (interval(drawn.normal(0.3, 1, 30), resamples=400) for _ in range(300))]
    assert 0.9 < np.mean(held) < 0.98


def test_many_files_are_resampled_in_parts(monkeypatch):
    from ebr_engine.evaluation import statistics

    values = np.random.default_rng(2).normal(size=50)
    whole = interval(values, resamples=1000)
    monkeypatch.setattr(statistics, "AT_ONCE", 700)
    assert interval(values, resamples=1000) == pytest.approx(whole, abs=0.05)


def test_differences_are_paired_and_leave_out_what_has_no_partner():
    found = differences(ROWS, "psnr")
    assert found["input"].mean == pytest.approx((10 - 2 + 6) / 3)
    assert (found["input"].files, found["input"].better) == (3, 2)
    assert found["empty prompt"].mean == pytest.approx((9 - 0.5 + 6) / 3)
    assert found["input"].text(2).startswith("+4.67 [-2.00, +10.00]")
    assert gains(ROWS, "psnr", "input") == {"a": 10.0, "b": -2.0, "d": 6.0}
    assert ways_of(ROWS) == ["input", "empty prompt", "restored"]
    assert scores_of(ROWS[2], "input") == {}


def test_one_file_has_no_interval_and_infinite_ones_are_left_out():
    only = difference([(3.0, 1.0)], "psnr")
    assert (only.low, only.text(1)) == (None, "+2.0")
    assert difference([(math.inf, math.inf), (math.inf, 1.0), (2.0, 1.0)], "psnr").files == 1
    assert difference([(math.inf, math.inf)], "psnr") is None


def test_less_is_better_for_a_distance():
    rows = [row("a", 0.1, 0.3, metric="lpips"), row("b", 0.4, 0.2, metric="lpips")]
    assert differences(rows, "lpips")["input"].better == 1
    assert worst(rows, "lpips") == ["b", "a"]


def test_the_worst_gained_least_or_scored_least():
    assert worst(ROWS, "psnr", 2) == ["b", "d"]
    assert worst([row("a", 3.0), row("b", 1.0), {"name": "c", "error": "gone"}], "psnr") == ["b", "a"]
