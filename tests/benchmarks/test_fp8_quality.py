"""What fp8 costs: the quick form runs, and its numbers are those of fp8."""

import json

from benchmarks import fp8_quality


def test_the_quick_form_tells_of_quality_and_layers(tmp_path, capsys):
    fp8_quality.main(["--quick", "--size", "64", "--json", str(tmp_path / "fp8.json")])
    result = json.loads((tmp_path / "fp8.json").read_text())
    (row,) = result["psnr"].values()
    assert row["fp8"] != row["fp32"]
    assert abs(row["fp8"] - row["fp32"]) < 0.5
    for layer in result["layers"]:
        assert 2**-7 < layer["fp8"] < 2**-4 * (4 / 3) ** 0.5  # independent roundings of at most 2^-4 each
        assert layer.get("bf16", 0) < 2**-7
    shown = capsys.readouterr().out
    assert "mean" in shown
    assert "up, GELU, down" in shown
