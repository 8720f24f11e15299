"""The measured cost of inventories is below its limits, and the benchmark tells it."""

import json

import pytest

from benchmarks import inventory
from benchmarks.report import RESULTS

pytest.importorskip("PIL")


def test_the_committed_measurement_is_below_its_limits():
    rows = json.loads((RESULTS / "inventory.json").read_text())["rows"]
    assert {row["file"] for row in rows} >= {"jpeg", "png", "webp", "tiff", "avif", "gif", "mp4", "mov", "mkv"}
    for row in rows:
        assert row["inventory_ms"]["median"] < row["limit_ms"], row["file"]
        assert row["inventory_ms"]["median"] < row["read_ms"]["median"], row["file"]


def test_every_file_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inventory, "HEIGHT", 64)
    monkeypatch.setattr(inventory, "WIDTH", 96)
    monkeypatch.setattr(inventory, "REPEATS", 2)
    monkeypatch.setattr(inventory, "clips", lambda folder: {})
    inventory.main(["--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 7
    told = capsys.readouterr().out
    assert all(row["file"] in told for row in rows)
