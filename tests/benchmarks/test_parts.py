"""Where an evaluation's time goes is told by operation."""

import json
import time
from collections import defaultdict

import pytest

from benchmarks import parts


def test_an_evaluation_is_taken_apart(tmp_path, capsys):
    file = tmp_path / "parts.json"
    parts.main(["--quick", "--case", "mini-256", "--precision", "fp32", "--rounds", "1", "--json", str(file)])
    (part,) = json.loads(file.read_text())["parts"]
    named = sum(spent["median"] for spent in part["operations"].values())
    assert 0 < named <= part["seconds"]["median"]
    assert part["gflop"] > 0
    assert "mini-256, fp32" in capsys.readouterr().out


def test_what_a_clocked_function_calls_is_not_its_own_time():
    spent = defaultdict(float)
    inner = parts.clocked(lambda: time.sleep(0) or sum(range(200_000)), "inner", spent)
    parts.clocked(lambda: inner() and inner(), "outer", spent)()
    assert 0 <= spent["outer"] < spent["inner"]


@pytest.mark.slow
def test_a_step_of_learning_is_taken_apart(capsys):
    parts.main(["--quick", "--case", "learning", "--precision", "fp32", "--rounds", "1"])
    shown = capsys.readouterr().out
    assert "learning, fp32" in shown
    assert "attention_gradient" in shown
