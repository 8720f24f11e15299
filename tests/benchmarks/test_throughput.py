"""The throughput benchmark runs every form, counts what it measures, and says from how many pictures on compiling pays."""

import json

import pytest

from benchmarks import throughput


def test_every_form_is_measured_in_rounds(tmp_path, capsys):
    file = tmp_path / "x.json"
    arguments = "--size 32 --batch 1 2 --precision fp32 bf16 --steps 2 --rounds 3 --device cpu --json"
    throughput.main([*arguments.split(), str(file)])
    result, text = json.loads(file.read_text()), capsys.readouterr().out
    forms = [(row["precision"], row["compile"], row["batch"]) for row in result["rows"]]
    assert forms == [("fp32", "off", 1), ("fp32", "off", 2), ("bf16", "off", 1), ("bf16", "off", 2)]
    for row in result["rows"]:
        assert len(row["seconds"]["all"]) == 3
        assert row["rate"] == pytest.approx(row["batch"] / row["seconds"]["median"])
        assert row["first"] > 0
        assert row["break_even"] is None
        assert row["still"]
    one, two = (row["tflops"] * row["seconds"]["median"] for row in result["rows"][:2])
    assert two == pytest.approx(2 * one)
    for word in ("fp32, compile off", "pictures/s", "TFLOP/s", result["commit"]):
        assert word in text


def test_frames_are_counted_as_frames(capsys):
    throughput.main(["--size", "16", "--frames", "2", "--batch", "1", "--steps", "1", "--rounds", "1", "--device", "cpu"])
    assert "frames/s" in capsys.readouterr().out


def test_compiling_pays_when_what_it_took_is_saved():
    plain = {"compile": "off", "batch": 2, "asked": "auto", "first": 2.0, "seconds": {"median": 2.0}}
    fast = {"compile": "on", "batch": 2, "asked": "auto", "first": 21.0, "seconds": {"median": 1.0}}
    assert throughput.break_even(fast, [plain, fast]) == pytest.approx(40)  # 20 s, at half a second a picture
    assert throughput.break_even(plain, [plain, fast]) is None
    assert throughput.break_even(fast | {"seconds": {"median": 3.0}}, [plain, fast]) is None


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plots" / "x.png"
    throughput.main(
        [*["--size", "16", "--batch", "1", "2", "--steps", "1", "--rounds", "1", "--device", "cpu", "--plot"], str(file)]
    )
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--size", "8"], ["--batch", "0"], ["--precision", "int4"]])
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        throughput.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
