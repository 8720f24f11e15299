"""The report of a measurement holds every way, what was gained and how sure that is, the worst files, and can be read back."""

import csv
import json

import pytest

from ebr_engine.errors import EbrError, EngineWarning
from ebr_engine.evaluation import plots
from ebr_engine.evaluation.collecting import collected, compared
from ebr_engine.evaluation.statistics import differences
from ebr_engine.evaluation.summary import score_table, seed_table, write_summary

METRICS = ("psnr", "ssim")


def rows_of(shift=0.0, count=7):
    rows = []
    for i in range(count):
        seeds = {str(seed): {"psnr": 20 + i + shift + seed / 10, "ssim": 0.5 + i / 20} for seed in (1, 2)}
        mean = {"psnr": 20 + i + shift + 0.15, "ssim": 0.5 + i / 20}
        beside = {"input": {"psnr": 19 + i / 2, "ssim": 0.45}, "empty prompt": {"psnr": 18 + i / 2, "ssim": 0.4}}
        size = {"frames": 1, "height": 4, "width": 6}
        rows.append({"name": f"f{i}", **size, "scores": mean, "by_seed": seeds, "beside": beside})
    return rows


def test_the_table_has_every_way_and_what_is_gained_over_it():
    lines = score_table(rows_of(), METRICS).markdown().splitlines()
    assert lines[0] == (
        "| metric | better | input | empty prompt | restored | restored − input | restored − empty prompt | files |"
    )
    gained = differences(rows_of(), "psnr")
    assert lines[2] == (
        f"| PSNR in dB | higher | 20.50 | 19.50 | 23.15 | {gained['input'].text(2)} | {gained['empty prompt'].text(2)} | 7 |"
    )


def test_seeds_are_told_with_their_spread():
    assert seed_table(rows_of(), METRICS).rows == (
        ("1", "23.10", "0.6500"),
        ("2", "23.20", "0.6500"),
        ("standard deviation", "0.071", "0.00000"),
    )


def test_the_report_is_whole(tmp_path):
    rows = rows_of()
    write_summary(tmp_path, rows, METRICS, {"protocol": "native"}, {"provenance": {"device": "cpu"}}, {"f0": "f0-1.png"})
    text = (tmp_path / "summary.md").read_text()
    for words in ("## Scores", "95 % intervals", "## Seeds", "![Histogram](gain.png)", "![f0](worst/f0-1.png)", "## Files", "█"):
        assert words in text
    assert [name for name in ("f0", "f1", "f2", "f3", "f4", "f5") if f"* {name}: input" in text] == ["f0", "f1", "f2", "f3", "f4"]
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "gain.svg").read_text()
    (first, *_) = csv.DictReader((tmp_path / "scores.csv").open())
    assert (first["psnr"], first["psnr input"], first["psnr gain over input"]) == ("20.1500", "19.0000", "+1.1500")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["provenance"] == {"device": "cpu"}
    assert summary["ways"]["empty prompt"]["psnr"] == pytest.approx(19.5)
    assert summary["differences"]["psnr"]["input"] == differences(rows, "psnr")["input"].data()
    assert summary["worst"] == ["f0", "f1", "f2", "f3", "f4"]


def test_without_matplotlib_the_report_says_so_and_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.warns(EngineWarning, match=r"matplotlib is missing: pip install 'ebr-engine\[curves\]'"):
        write_summary(tmp_path, rows_of(), METRICS, {"protocol": "native"})
    text = (tmp_path / "summary.md").read_text()
    assert "gain.png" not in text
    assert "█" in text
    assert not list(tmp_path.glob("gain.*"))


@pytest.fixture
def folders(tmp_path):
    for name, rows in (("one", rows_of()), ("two", rows_of(0.5, 12))):
        (tmp_path / name).mkdir()
        facts = {"restoration": {"schedule": {"name": "fast" if name == "one" else "released"}, "seeds": [1, 2]}}
        write_summary(tmp_path / name, rows, METRICS, {"protocol": "native"}, facts)
    return tmp_path


def test_several_runs_make_one_table(folders):
    found = collected([folders / "one", folders / "two"])
    assert found.header == (
        "run", "metric", "input", "empty prompt", "restored", "restored − input", "restored − empty prompt", "files"
    )  # fmt: skip
    assert [line[:2] for line in found.rows] == [
        ("one", "PSNR in dB"), ("one", "SSIM"), ("two", "PSNR in dB"), ("two", "SSIM")
    ]  # fmt: skip
    assert found.rows[0][2:6] == ("20.50", "19.50", "23.15", differences(rows_of(), "psnr")["input"].text(2))


def test_two_runs_are_compared_by_file(folders):
    means, by_file, notes = compared(folders / "one", folders / "two")
    assert means.rows[0] == ("PSNR in dB", "23.15", "23.65", "+0.50 [+0.50, +0.50]", "7 of 7")
    assert by_file.header == ("file", "one", "two", "difference")
    assert by_file.rows[0][3] == "+0.50"
    assert notes == ["5 file(s) are in two only", "restoration.schedule.name: fast in one, released in two"]


@pytest.mark.parametrize(("content", "words"), [(None, "no summary.json"), ("{", "damaged"), ("[]", "not the summary")])
def test_a_folder_without_results_is_told(tmp_path, content, words):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(EbrError, match=words):
        collected([tmp_path])


def test_runs_without_a_common_file_cannot_be_compared(folders):
    summary = json.loads((folders / "two" / "summary.json").read_text())
    summary["rows"] = [{**row, "name": f"x{row['name']}"} for row in summary["rows"]]
    (folders / "two" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(EbrError, match="no file with a score in common"):
        compared(folders / "one", folders / "two")
