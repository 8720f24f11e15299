"""What fp8, colours and `--task auto` cost or gain: the quick forms run, and their sums are those of their cases."""

import json
import shutil

import pytest
import torch

from benchmarks import auto_task, quality, report
from ebr_engine.kernels.int8_linear import can_int8


@pytest.mark.slow
def test_auto_task_tells_of_both_parts(tmp_path, capsys):
    quality.main(["auto-task", "--quick", "--size", "64", "--json", str(tmp_path / "auto.json")])
    result = json.loads((tmp_path / "auto.json").read_text())
    assert len(result["seeing"]["cases"]) == 3 * 16
    single, pair = result["mending"]
    assert "oracle, halves" in pair
    assert "oracle, halves" not in single
    shown = capsys.readouterr().out
    assert "precision" in shown
    assert "two tasks" in shown


def test_precision_recall_and_shares_are_counted():
    cases = [
        {"tasks": [], "found": []},
        {"tasks": [], "found": ["rain"]},
        {"tasks": ["haze"], "found": ["haze"]},
        {"tasks": ["haze"], "found": []},
        {"tasks": ["rain"], "found": ["rain"]},
        {"tasks": ["haze", "rain"], "found": ["rain"]},
    ]
    result = auto_task.summed(cases)
    assert result["labels"]["rain"] == {"precision": 2 / 3, "recall": 1.0}
    assert result["labels"]["haze"] == {"precision": 1.0, "recall": 1 / 3}
    assert result["right"]["clean"]["all right"] == 0.5
    assert result["right"]["one task"] == {"cases": 3, "all right": 2 / 3, "one of them right": 2 / 3}
    assert result["right"]["two tasks"] == {"cases": 1, "all right": 0.0, "one of them right": 1.0}


def test_the_table_of_the_second_part_groups_by_number_of_tasks():
    records = [
        {"photo": "a", "tasks": ["haze"], "found": [], "input": 10.0, "auto": 10.0, "oracle": 12.0},
        {"photo": "b", "tasks": ["haze"], "found": [], "input": 12.0, "auto": 12.0, "oracle": 16.0},
        {"photo": "a", "tasks": ["haze", "rain"], "found": [], "input": 9.0, "auto": 9.0, "oracle": 9.5, "oracle, halves": 9.7},
    ]
    lines = auto_task.mending_table(records, 128).splitlines()
    (one,) = [line.split() for line in lines if line.startswith("one task")]
    (two,) = [line.split() for line in lines if line.startswith("two tasks")]
    assert one[2:] == ["11.00", "11.00", "14.00"]
    assert two[2:] == ["9.00", "9.00", "9.50", "9.70"]


def test_attention_in_eight_bits_costs_what_the_pages_say():
    result = json.loads((report.ROOT / "benchmarks" / "results" / "fp8_quality.json").read_text())
    assert all(abs(row["fp8 attention"] - row["fp32"]) < 0.05 for row in result["psnr"].values())  # dB
    pictures = [row["fp8"] for row in result["attention"] if row["noise"] is not None]
    assert max(pictures) < 2e-2


def test_fp8_tells_of_quality_and_layers(tmp_path, capsys):
    quality.main(["fp8", "--quick", "--size", "64", "--json", str(tmp_path / "fp8.json")])
    result = json.loads((tmp_path / "fp8.json").read_text())
    (row,) = result["psnr"].values()
    assert row["fp8"] != row["fp32"]
    assert abs(row["fp8"] - row["fp32"]) < 0.5
    assert 0 < abs(row["fp8 attention"] - row["fp32"]) < 0.5
    assert all(row["bf16"] < row["fp8"] < 2e-2 for row in result["attention"])
    for layer in result["layers"]:
        assert 2**-7 < layer["fp8"] < 2**-4 * (4 / 3) ** 0.5  # independent roundings of at most 2^-4 each
        assert layer.get("bf16", 0) < 2**-7
    shown = capsys.readouterr().out
    assert "mean" in shown
    assert "up, GELU, down" in shown


def test_colour_fix_tells_of_every_way(tmp_path, capsys):
    quality.main(["colour-fix", "--quick", "--size", "64", "--json", str(tmp_path / "fix.json")])
    result = json.loads((tmp_path / "fix.json").read_text())
    assert [score["task"] for score in result["scores"]] == ["haze", "rain"]
    for score in result["scores"]:
        assert len({score[way] for way in ("none", "wavelet", "adain")}) == 3
    haze = result["scores"][0]
    assert abs(haze["wavelet"] - haze["input"]) < abs(haze["none"] - haze["input"])  # the haze is back
    assert "BY_TASK" in capsys.readouterr().out


def test_a_default_needs_a_gain_and_colours_that_are_no_damage():
    def score(task, none, wavelet, adain):
        return {"task": task, "photo": "x", "input": 0.0, "none": none, "wavelet": wavelet, "adain": adain}

    scores = [score("haze", 10, 20, 10), score("rain", 20, 20.01, 19), score("snow", 20, 20.5, 21), score("blur", 20, 19, 18)]
    assert quality.best(scores) == {"haze": "none", "rain": "none", "snow": "adain", "blur": "none"}


def test_prompts_stand_beside_one_another_in_few_evaluations(tmp_path, capsys):
    own = quality.evaluations.ASSETS / "mini" / "prompts"
    (tmp_path / "same").mkdir()
    shutil.copy(own / "blur.safetensors", tmp_path / "same")
    prompts = [word for label in (f"bundled={own}", f"same={tmp_path / 'same'}") for word in ("--prompts", label)]
    how = ("--quick", "--tasks", "blur", "--counts", "1", "2", "--size", "64", "--json", str(tmp_path / "few.json"))
    quality.main(["evaluations", *how, *prompts])
    found = json.loads((tmp_path / "few.json").read_text())
    rows = found["rows"]
    assert found["prompts"]["same"] == found["prompts"]["bundled"]
    assert list(found["prompts"]["same"]) == ["blur"]
    assert [(row["prompt"], row["evaluations"]) for row in rows[1:]] == [("bundled", 1), ("bundled", 2), ("same", 1), ("same", 2)]
    assert rows[1]["psnr"] == rows[3]["psnr"] != rows[2]["psnr"]
    assert "evaluations" in capsys.readouterr().out


def test_what_deconvolution_and_the_prompt_do_is_told_apart(tmp_path, capsys):
    how = ("--photos", "astronaut", "--damages", "heavy, JPEG", "--size", "96", "--json", str(tmp_path / "blur.json"))
    quality.main(["blur", *how])
    rows = {row["way"]: row for row in json.loads((tmp_path / "blur.json").read_text())["rows"]}
    assert list(rows) == ["input", "prompt alone", "deconvolution alone", "both"]
    assert rows["both"]["psnr"] > rows["input"]["psnr"] + 0.5
    assert "deconvolution alone" in capsys.readouterr().out


def test_a_moved_picture_is_aligned_and_a_shaken_one_is_damaged():
    clean, shaken = quality.deblurring.damaged("coffee", "shaken", 96)
    assert quality.deblurring.aligned(clean.roll((3, -2), (2, 3)), clean) == float("inf")
    assert 10 < quality.deblurring.aligned(shaken, clean) < 35
    clean, stored = quality.deblurring.damaged("coffee", "heavy, JPEG", 96)
    assert not torch.equal(stored, quality.deblurring.damaged("coffee", "heavy", 96)[1])
    assert torch.equal(clean, quality.deblurring.damaged("coffee", "clean", 96)[0])


def test_a_grid_is_seen_where_there_is_one():
    smooth = torch.linspace(0.2, 0.6, 64).expand(1, 3, 64, 64)
    blocks = smooth + (torch.arange(64) // 8 % 2) * 0.04
    assert abs(quality.evaluations.grid(smooth)) < 0.01
    assert quality.evaluations.grid(blocks) == pytest.approx(0.04 * 255 / 2, rel=0.2)  # along one axis of two


@pytest.mark.skipif(not can_int8(), reason="this CPU has no int8 products")
def test_int8_pictures_are_near_float32s(tmp_path, capsys):
    quality.main(["int8", "--quick", "--size", "32", "--rounds", "1", "--json", str(tmp_path / "x")])
    result = json.loads((tmp_path / "x").read_text())
    assert {row["form"] for row in result["pictures"]} <= {"int8", "int8, 7-bit activations"}
    assert all(50 < row["from_float32"] < 100 for row in result["pictures"])
    assert all(abs(row["from_truth"] - row["float32_from_truth"]) < 0.1 for row in result["pictures"])  # of 32 pixels
    assert list(result["seconds"]) == ["wan-width"]
    assert "in int8" in capsys.readouterr().out
