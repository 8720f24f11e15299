"""What auto sees and mends: the quick form runs, and its sums are those of its cases."""

import json

import pytest

from benchmarks import auto_task


@pytest.mark.slow
def test_the_quick_form_tells_of_both_parts(tmp_path, capsys):
    auto_task.main(["--quick", "--size", "64", "--json", str(tmp_path / "auto.json")])
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
