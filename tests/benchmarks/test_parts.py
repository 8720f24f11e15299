"""Where an evaluation's time goes is told by operation."""

import json

from benchmarks import parts


def test_an_evaluation_is_taken_apart(tmp_path, capsys):
    file = tmp_path / "parts.json"
    parts.main(["--quick", "--case", "mini-256", "--precision", "fp32", "--rounds", "1", "--json", str(file)])
    (part,) = json.loads(file.read_text())["parts"]
    named = sum(spent["median"] for spent in part["operations"].values())
    assert 0 < named <= part["seconds"]["median"]
    assert part["gflop"] > 0
    assert "mini-256, fp32" in capsys.readouterr().out
