"""The quality benchmark: its measures are the usual ones, and the bundled prompts hold what was measured of them."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from skimage import metrics

from ebr_engine.bridge.sampler import flow_table
from ebr_engine.bridge.schedules import power_times
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import PromptError
from ebr_engine.evaluation import photos, quality
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.photos import make_case
from ebr_engine.evaluation.quality import ROWS, markdown, means, measure
from ebr_engine.prompts.catalogue import ASSETS, TASKS
from ebr_engine.prompts.prompt import load_prompt

BOUNDS = ASSETS / "mini" / "quality.json"  # written by `ebr-engine eval --out`
MARGIN = 0.3  # dB: other kernels, other roundings
PHOTOS = ("chelsea", "motorcycle")


@pytest.fixture(scope="module", autouse=True)
def one_load_each():
    """Decode every photo once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "load_photo", cache(photos.load_photo))
        yield


@pytest.fixture(scope="module")
def restorer():
    return Restorer(device="cpu", precision="fp32")


def pair(size=24):
    target = torch.rand(1, 3, size, size)
    return (target + 0.1 * torch.randn(target.shape)).clamp(0, 1), target


def test_psnr_by_hand():
    target = torch.full((1, 3, 4, 4), 0.5)
    assert psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)  # −10 log10 0.01
    half = target.clone()
    half[..., :2] += 0.2  # half of the pixels off by 0.2: mean square 0.02
    assert psnr(half, target) == pytest.approx(-10 * math.log10(0.02), abs=1e-4)
    assert psnr(target, target) == math.inf


def test_gains_are_paired_by_photo_and_have_an_interval():
    values = {"input": (10, 12), "empty prompt": (9, 12), "naive prompt": (10, 10), "EBR prompt": (13, 16)}
    scores = [
        {"task": "haze", "photo": photo, "row": row, "psnr": numbers[i]}
        for i, photo in enumerate(("a", "b"))
        for row, numbers in values.items()
    ]
    found = quality.gain_table(scores)
    assert found.header == ("task", "EBR prompt − input", "EBR prompt − empty prompt", "EBR prompt − naive prompt")
    assert found.rows == (("haze", "+3.50 [+3.00, +4.00]", "+4.00 [+4.00, +4.00]", "+4.50 [+3.00, +6.00]"),)


def test_psnr_is_scikit_images():
    for _ in range(3):
        result, target = pair()
        expected = metrics.peak_signal_noise_ratio(target.numpy(), result.numpy(), data_range=1.0)
        assert psnr(result, target) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_scikit_images():
    result, target = pair()
    arrays = (x[0].permute(1, 2, 0).numpy().astype(np.float64) for x in (target, result))
    expected = metrics.structural_similarity(*arrays, channel_axis=2, data_range=1.0)
    assert ssim(result, target) == pytest.approx(expected, abs=1e-5)
    assert ssim(target, target) == pytest.approx(1)
    assert ssim(result, target) < 0.99


def scores(**values):
    """Scores of two photos a task: PSNRs by row, in the order of `rows`."""
    rows = ("input", "EBR prompt")
    return [
        {"task": task, "photo": photo, "row": row, "psnr": pairs[i][j], "ssim": pairs[i][j] / 100}
        for task, pairs in values.items()
        for i, photo in enumerate(("a", "b"))
        for j, row in enumerate(rows)
    ]


def test_means_are_over_photos():
    table = means(scores(haze=[(10, 15), (20, 30)], rain=[(1, 2), (3, 4)]))
    assert table == {"haze": {"input": 15, "EBR prompt": 22.5}, "rain": {"input": 2, "EBR prompt": 3}}
    assert means(scores(haze=[(10, 15), (20, 30)]), "ssim")["haze"]["input"] == pytest.approx(0.15)


def test_the_table_tells_means_and_the_gain_also_where_it_is_a_loss():
    text = markdown(scores(haze=[(10, 15), (20, 30)], blur=[(26, 25.5), (26, 25.25)]))
    assert text.splitlines() == [
        "| task | input | EBR prompt | gain |",
        "|---|---|---|---|",
        "| haze | 15.00 | 22.50 | +7.50 |",
        "| blur | 26.00 | 25.38 | -0.62 |",
    ]
    assert "| haze | 0.150 | 0.225 | +0.075 |" in markdown(scores(haze=[(10, 15), (20, 30)]), "ssim", 3)


def test_every_row_of_every_case_is_measured(restorer):
    heard = []
    found = measure(restorer, ("haze",), ("chelsea",), size=64, callback=heard.append)
    assert found == heard
    assert [(s["task"], s["photo"], s["row"]) for s in found] == [("haze", "chelsea", row) for row in ROWS]
    case = make_case("chelsea", "haze", 64)
    assert found[0]["psnr"] == psnr(case.degraded, case.clean)
    assert found[0]["ssim"] == ssim(case.degraded, case.clean)
    assert len({s["psnr"] for s in found}) == len(ROWS)
    assert all(math.isfinite(s[value]) for s in found for value in ("psnr", "ssim"))


def test_rows_are_restored_as_they_are_named(restorer):
    folder = ASSETS / "mini" / "prompts"
    degraded = make_case("chelsea", "rain", 64).degraded
    prompt, naive = load_prompt(folder / "rain.safetensors"), load_prompt(folder / "naive" / "rain.safetensors")
    table = flow_table(power_times(5, naive.t0), naive.t0)
    expected = {
        "input": degraded,
        "empty prompt": restorer.restore(degraded, t0=prompt.t0, steps=prompt.steps),
        "naive prompt": restorer.run(degraded, restorer.bake([(naive, 1.0)], table)),
        "EBR prompt": restorer.restore(degraded, task="rain"),
    }
    assert set(expected) == set(ROWS)
    for row, result in expected.items():
        assert torch.equal(quality.restore_row(restorer, row, "rain", degraded, folder), result)


def test_results_are_measured_as_a_file_would_hold_them(restorer, monkeypatch):
    case = make_case("chelsea", "haze", 64)
    monkeypatch.setattr(quality, "restore_row", lambda *_: case.degraded + 0.4 / 255)  # less than half a step: gone
    (score,) = measure(restorer, ("haze",), ("chelsea",), size=64, rows=("EBR prompt",))
    assert score["psnr"] == pytest.approx(psnr(case.degraded, case.clean), abs=1e-4)


def test_a_folder_without_the_prompt_is_told(restorer, tmp_path):
    with pytest.raises(PromptError, match=r"EBR prompt.*haze\.safetensors"):
        measure(restorer, ("haze",), ("chelsea",), size=64, prompts=tmp_path, rows=("EBR prompt",))


def recorded(record, task, photo, row):
    (score,) = (s["psnr"] for s in record["scores"] if (s["task"], s["photo"], s["row"]) == (task, photo, row))
    return score


@pytest.mark.skipif(not BOUNDS.exists(), reason=f"{BOUNDS.name} is not there: ebr-engine eval --out {BOUNDS}")
@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_prompts_restore_as_well_as_was_measured(restorer, task):
    record = json.loads(BOUNDS.read_text())
    assert (int(record["size"]), record["strength"]) == (256, photos.STRENGTH)
    found = {"scores": measure(restorer, (task,), PHOTOS, size=256, rows=("input", "EBR prompt"))}
    for photo in PHOTOS:
        now, then = ({row: recorded(source, task, photo, row) for row in ("input", "EBR prompt")} for source in (found, record))
        assert now["EBR prompt"] >= then["EBR prompt"] - MARGIN
        assert now["EBR prompt"] - now["input"] >= then["EBR prompt"] - then["input"] - MARGIN
