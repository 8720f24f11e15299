"""The experiments' frame: the same cells for every arm, runs that are not made twice, intervals that hold what they should."""

import json
import xml.dom.minidom
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from benchmarks.claims import common, reporting
from benchmarks.claims.common import TINY, Learning, Store, Study, key_of, make_case, save_random, variants
from benchmarks.claims.reporting import Difference, difference, forest, table
from ebr_engine.evaluation import photos


@pytest.fixture
def study(tmp_path):
    model = save_random(tmp_path / "tiny.safetensors", TINY, gain=10)
    learning = Learning(iterations=2, batch=2, size=32, tokens=4, scenes=2)
    names = ("chelsea", "coffee")
    return Study("t", model, tmp_path / "out", tmp_path, ("haze",), names, (0, 1), 32, 2, learning, quick=True)


def rows_of(gap, photos=4, seeds=3, tasks=("haze", "rain"), spread=0.0):
    """Rows of two arms: the second is better by `gap` and by a number of the photo's and the seed's own."""
    random = np.random.default_rng(1)
    rows = []
    for task in tasks:
        for photo in range(photos):
            for seed in range(seeds):
                base, extra = 10 + 5 * random.random(), spread * random.standard_normal()
                cell = {"task": task, "photo": f"p{photo}", "seed": seed, "ssim": 0.5}
                rows += [cell | {"arm": "old", "psnr": base}, cell | {"arm": "new", "psnr": base + gap + extra}]
    return rows


def test_draw_zero_is_the_benchmarks_and_others_differ():
    first, second = (make_case("chelsea", "rain", 64, storm) for storm in (0, 1))
    assert torch.equal(first.degraded, photos.make_case("chelsea", "rain", 64).degraded)
    assert torch.equal(first.clean, second.clean)
    assert not torch.equal(first.degraded, second.degraded)


def test_a_paired_difference_does_not_care_for_what_cells_share():
    gap = difference(rows_of(0.5), "new", "old")
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))
    assert gap.sign == "better"
    assert difference(rows_of(0.5), "old", "new").sign == "worse"


def test_an_interval_widens_with_the_spread_and_tells_when_nothing_is_shown():
    narrow, wide = (difference(rows_of(0.1, spread=spread), "new", "old") for spread in (0.05, 3.0))
    assert narrow.low < narrow.mean < narrow.high
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)
    assert narrow.sign == "better"
    assert wide.sign == "no difference shown"


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(7)
    held = 0
    for _ in range(60):
        gaps = random.standard_normal((12, 5))
        rows = []
        for (photo, seed), gap in np.ndenumerate(gaps):
            cell = {"task": "t", "photo": photo, "seed": seed}
            rows += [cell | {"arm": "a", "psnr": gap}, cell | {"arm": "b", "psnr": 0.0}]
        found = difference(rows, "a", "b")
        held += found.low <= 0 <= found.high
    assert held >= 51  # 85 %: few photos make it somewhat too narrow, or too wide


def test_arms_of_different_cells_are_not_compared():
    rows = rows_of(0.5)
    with pytest.raises(ValueError, match="'new' and 'old'"):
        difference(rows[:-1], "new", "old")


def test_a_table_has_means_by_task_and_the_difference():
    rows = [
        {"arm": arm, "task": task, "photo": "p", "seed": 0, "psnr": psnr, "ssim": 0.5}
        for arm, psnrs in (("old", (10.0, 20.0)), ("new", (11.0, 22.0)))
        for task, psnr in zip(("haze", "rain"), psnrs)
    ]
    assert table(rows, "old").splitlines() == [
        "| arm | PSNR dB | against old | SSIM | haze | rain |",
        "|---|---|---|---|---|---|",
        "| old | 15.00 | reference | 0.500 | 10.00 | 20.00 |",
        "| new | 16.50 | +1.50 [+1.50, +1.50] | 0.500 | 11.00 | 22.00 |",
    ]


def test_a_plot_is_valid_and_shows_every_arm():
    gaps = {"a < b": Difference(0.5, 0.1, 0.9), "c": Difference(-1.0, -1.5, -0.2), "d": Difference(0.0, -0.1, 0.1)}
    text = forest(gaps, "PSNR & more")
    xml.dom.minidom.parseString(text)
    assert text.count("<circle") == 3
    for word in ("a &lt; b", "PSNR &amp; more", "-1.50", "+0.90"):
        assert word in text


def test_what_was_measured_is_not_measured_again(study):
    calls = []

    def arm(case, seed):
        calls.append((case.photo, seed))
        return case.degraded

    first = study.measure({"input": arm})
    assert calls == [(photo, seed) for seed in (0, 1) for photo in ("chelsea", "coffee")]
    again = replace(study).measure({"input": arm})
    assert (len(calls), again) == (4, first)
    replace(study, size=64).measure({"input": arm})
    assert len(calls) == 8


def test_a_run_that_stops_keeps_what_it_has(tmp_path):
    store = Store(tmp_path / "s.json")
    store.run({"arm": "a"}, lambda: [{"psnr": 1.0}])
    with pytest.raises(KeyboardInterrupt):
        store.run({"arm": "b"}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Store(tmp_path / "s.json")
    assert again.run({"arm": "a"}, lambda: pytest.fail("made again")) == [{"psnr": 1.0}]
    assert len(json.loads((tmp_path / "s.json").read_text())) == 1


def test_equal_settings_have_one_key_and_any_change_another():
    settings = {"a": 1, "photos": ("x", "y")}
    assert key_of(settings) == key_of({"photos": ["x", "y"], "a": 1})
    assert len({key_of(settings | {"a": value}) for value in (1, 2, 1.5, "1")}) == 4


def test_a_prompt_is_learned_once_and_again_for_other_settings(study, monkeypatch):
    learned = []
    real = common.learn_prompt
    monkeypatch.setattr(
        common, "learn_prompt", lambda study, settings, path: (learned.append(settings), real(study, settings, path))
    )
    first, again, other = study.prompt("haze", 0), study.prompt("haze", 0), study.prompt("haze", 0, tokens=2)
    assert torch.equal(first.residual, again.residual)
    assert [settings["tokens"] for settings in learned] == [4, 2]
    assert other.residual.shape[0] == 2
    assert first.t0 == study.learning.t0


def test_one_setting_changes_at_a_time():
    base = Learning()
    found = dict(variants(base, tokens=(1, 16), loss=("pixel", "x0")))
    assert found == {"tokens 1": {"tokens": 1}, "loss x0": {"loss": "x0"}}


def test_the_written_report_says_how_it_was_made(study):
    rows = study.measure({"input": lambda case, seed: case.degraded, "grey": lambda case, seed: case.degraded * 0 + 0.5})
    reporting.finish(study, "Q", rows, "input", "python -m benchmarks.claims.t --quick")
    text = (study.out / "t.md").read_text()
    for word in ("# Q", "QUICK FORM", "| grey |", "t.svg", "python -m benchmarks.claims.t --quick", "commit", version("torch")):
        assert word in text
