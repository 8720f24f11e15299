"""The engine and other runtimes evaluate the same transformer in turns, each in its own process."""

import json

import pytest

from benchmarks import peers, runtimes


@pytest.mark.slow
def test_runtimes_take_turns_on_one_case(tmp_path, capsys):
    file = tmp_path / "runtimes.json"
    rows = ["ours, plain torch", "ONNX Runtime"]
    peers.main(["--runtimes", "--quick", "--case", "mini-256", "--precision", "fp32", "--runtime", *rows, "--json", str(file)])
    result = json.loads(file.read_text())
    (case,) = result["runtimes"]
    assert [row["runtime"] for row in case["rows"]] == rows
    assert case["skipped"] == {}
    for row in case["rows"]:
        assert row["error"] < 1e-5
        assert row["cpu_seconds"]["median"] > 0
    assert result["versions"]["onnxruntime"]
    assert "mini-256" in capsys.readouterr().out


def test_a_table_says_how_much_faster_ours_is():
    def row(name, seconds):
        return {"runtime": name, "cpu_seconds": spread(seconds), "wall_seconds": spread(seconds), "error": 1e-7}

    def spread(seconds):
        return {"median": seconds, "quartiles": [seconds, seconds], "all": [seconds]}

    case = {"case": "mini-512", "precision": "bf16", "rows": [row("ours", 0.5), row("OpenVINO", 0.75)]}
    case["skipped"] = {"ONNX Runtime": "has no bf16 on a CPU"}
    text = runtimes.table({"runtimes": [case], "instructions": ["avx2"], "versions": {"openvino": "1"}})
    assert "x1.50" in text
    assert "skipped ONNX Runtime: has no bf16 on a CPU" in text
    assert "instructions: avx2" in text
