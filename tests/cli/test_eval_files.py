"""`ebr-engine eval` on a person's own files: one line a file, three files of results, errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.images import read_image, write_image


@pytest.fixture
def pairs(tmp_path):
    """Two rainy pictures of 24 × 32 pixels and their clean ones, as folders and as a list."""
    generator = np.random.default_rng(1)
    for name in ("a", "b"):
        clean = generator.random((24, 32, 3), np.float32)
        for role, pixels in (("gt", clean), ("in", np.clip(clean + 0.1, 0, 1))):
            (tmp_path / role).mkdir(exist_ok=True)
            write_image(tmp_path / role / f"{name}.png", pixels)
    records = [{"image_path": f"in/{name}.png", "target_path": f"{role}/{name}.png"} for name, role in (("a", "gt"), ("b", "in"))]
    (tmp_path / "list.json").write_text(json.dumps(records))
    return tmp_path


def test_given_results_are_measured(cli, pairs):
    code, stdout, stderr = cli("eval", "--restored", "in", "--target", "gt", "--protocol", "y-channel", "-o", "out")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[0].startswith("protocol y-channel: ")
    assert [line.split()[:2] for line in stdout.splitlines()[1:3]] == [["a", "psnr"], ["b", "psnr"]]
    assert "| PSNR in dB | higher |" in stdout
    assert {path.name for path in Path("out").iterdir()} == {"scores.csv", "summary.md", "summary.json", "rows.jsonl", "worst"}
    code, again, _ = cli("eval", "--restored", "in", "--target", "gt", "--protocol", "y-channel", "-o", "out")
    assert "2 of 2 file(s) were measured by an earlier run" in again
    assert again.splitlines()[-6:] == stdout.splitlines()[-6:]


def test_a_list_is_restored_and_measured_and_a_target_that_is_none_gets_no_score(cli, pairs):
    arguments = "--list list.json --task rain --steps 1 --device cpu --precision fp32 -o out"
    code, stdout, _ = cli("eval", *arguments.split())
    assert code == 0
    assert "b  no target" in stdout
    assert "1 of 2 file(s) have no target" in stdout
    assert "restored: now, mini, rain, schedule fast, seed 42" in Path("out/summary.md").read_text()
    rows = json.loads(Path("out/summary.json").read_text())["rows"]
    assert [set(row["scores"]) for row in rows] == [{"psnr", "ssim"}, set()]


def test_results_stand_beside_the_input_and_the_empty_prompt(cli, pairs):
    arguments = "-i in --target gt --task rain --steps 1 --device cpu --precision fp32 --seeds 1,2 --table latex -o out"
    code, stdout, stderr = cli("eval", *arguments.split())
    assert code == 0, stderr
    assert r"\toprule" in stdout
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary["ways"]) == ["input", "empty prompt", "restored"]
    assert [list(row["by_seed"]) for row in summary["rows"]] == [["1", "2"], ["1", "2"]]
    for row in summary["rows"]:
        assert row["scores"]["psnr"] == pytest.approx(sum(one["psnr"] for one in row["by_seed"].values()) / 2)
        source, target = (read_image(f"{role}/{row['name']}.png").pixels for role in ("in", "gt"))
        assert row["beside"]["input"]["psnr"] == pytest.approx(-10 * np.log10(np.mean((source - target) ** 2)), abs=1e-3)
    assert summary["restoration"]["seeds"] == [1, 2]
    assert summary["data"]["items"] == 2
    assert len(list(Path("out/worst").glob("*.png"))) == 2


def test_a_plot_that_is_not_drawn_is_told_in_one_line(cli, pairs, monkeypatch):
    from ebr_engine.evaluation import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, _, stderr = cli("eval", "--restored", "in", "-i", "in", "--target", "gt", "-o", "out")
    assert code == 0
    assert stderr == "warning: no plots are drawn: matplotlib is missing: pip install 'ebr-engine[curves]'\n"


def test_the_empty_prompt_is_strength_zero(cli, pairs):
    arguments = "-i in --target gt --task rain --steps 1 --device cpu --precision fp32"
    assert cli("eval", *arguments.split(), "-o", "one")[0] == 0
    assert cli("eval", *arguments.split(), "--strength", "0", "--no-empty", "-o", "two")[0] == 0
    one, two = (json.loads(Path(name, "summary.json").read_text()) for name in ("one", "two"))
    assert one["ways"]["empty prompt"] == two["ways"]["restored"]
    assert one["ways"]["restored"] != two["ways"]["restored"]
    assert "empty prompt" not in two["ways"]


def test_folders_of_results_are_collected_and_compared(cli, pairs):
    for name in ("one", "two"):
        assert cli("eval", "--restored", "in", "--target", "gt", "-o", name)[0] == 0
    code, stdout, _ = cli("eval", "--collect", "one", "two", "--table", "csv", "-o", "tables/all.csv")
    assert code == 0
    assert stdout == Path("tables/all.csv").read_text()
    assert [line.split(",")[:2] for line in stdout.splitlines()[1:]] == [
        [name, title] for name in ("one", "two") for title in ("PSNR in dB", "SSIM")
    ]
    code, stdout, _ = cli("eval", "--compare", "one", "two")
    assert code == 0
    assert "+0.00 [+0.00, +0.00]" in stdout


def test_sice_is_measured_as_released(cli, pairs):
    for role, names in (("in/SICE/1", "1245"), ("gt/SICE/1", "1245")):
        (pairs / role).mkdir(parents=True)
        for name in names:
            write_image(pairs / role / f"{name}.png", np.zeros((24, 32, 3), np.float32))
    for protocol, count in (("released", 2), ("native", 4)):
        how = ("--restored", "in/SICE", "--target", "gt/SICE", "--protocol", protocol, "--metrics", "psnr-y", "-o", protocol)
        code, stdout, stderr = cli("eval", *how)
        assert code == 0, stderr
        assert ("2 of 4 files count" in stdout) == (protocol == "released")
        assert json.loads(Path(protocol, "summary.json").read_text())["files"] == count


def test_an_engine_file_restores_what_is_measured(cli, pairs):
    assert cli("build", "--task", "rain", "--steps", "1", "--device", "cpu", "-o", "rain.ebr")[0] == 0
    code, stdout, stderr = cli("eval", "--engine", "rain.ebr", "-i", "in", "--target", "gt", "--device", "cpu", "-o", "out")
    assert code == 0, stderr
    first = json.loads(Path("out/rows.jsonl").read_text().splitlines()[0])
    assert first["settings"]["restoring"]["request"]["engine"] == "rain.ebr"
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary["ways"]) == ["input", "restored"]
    assert summary["restoration"]["engine"]["file"] == "rain.ebr"
    how = ("--engine", "rain.ebr", "-i", "in", "--target", "gt", "--device", "cpu", "-o", "other", "--strength", "0.5")
    code, _, stderr = cli("eval", *how)
    assert (code, "holds its own prompt and schedule" in stderr) == (2, True)
    code, stdout, _ = cli("eval", "--engine", "rain.ebr", "-i", "in", "--target", "gt", "--device", "cpu", "-o", "out")
    assert "2 of 2 file(s) were measured by an earlier run" in stdout


def test_a_file_that_fails_is_told_and_gives_exit_code_1(cli, pairs):
    write_image(pairs / "gt" / "a.png", np.zeros((24, 31, 3), np.float32))
    code, stdout, stderr = cli("eval", "--restored", "in", "--target", "gt", "-o", "out")
    assert code == 1
    assert stderr.startswith("error: ")
    assert "a.png" in stderr
    assert "1 of 2 file(s) could not be measured" in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--input in --target gt --task rain", ["--out"]),
        ("--input in --target gt -o out", ["--task", "--prompt"]),
        ("--input in --target gt --task fog -o out", ["fog", "rain"]),
        ("--input in --target gt --task rain --task haze -o out", ["one --task"]),
        ("--input in --target gt --restored in --task rain -o out", ["--restored", "leave --task"]),
        ("--input in --target gone --task rain -o out", ["gone", "no such"]),
        ("--target gt -o out", ["--target alone"]),
        ("--input in --task rain -o out", ["has a target", "--target", "musiq"]),
        ("--list list.json --input in --task rain -o out", ["--list", "--input"]),
        ("--restored in --target gt --metrics sharpness -o out", ["sharpness", "psnr"]),
        ("--restored in --target gt -o list.json", ["list.json", "folder"]),
        ("--restored in --target gt --prompts in -o out", ["--prompts", "--prompt"]),
        ("--prompt rain.safetensors", ["rain.safetensors", "no such prompt"]),
        ("--input in --target gt --task rain --seeds 1,x -o out", ["--seeds", "1,x"]),
        ("--input in --target gt --task rain --seeds 1,1 -o out", ["--seeds", "1,1"]),
        ("--restored in --target gt --metrics lpips --weights-dir in -o out", ["in", "alexnet-owt-7be5be79.pth"]),
        ("--restored in --target gt --seeds 1,2 -o out", ["--restored", "--seeds"]),
        ("in gt", ["in", "--collect", "--input"]),
        ("--compare in", ["--compare", "two folders"]),
        ("--compare in gt", ["in", "summary.json"]),
        ("--collect", ["--collect", "folders"]),
        ("--collect --compare in gt", ["--collect", "--compare"]),
        ("--collect in -o gt", ["gt", "folder"]),
    ],
)
def test_impossible_requests_are_refused_in_one_line(cli, pairs, arguments, words):
    code, stdout, stderr = cli("eval", *arguments.split())
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in stderr
    assert not Path("out/scores.csv").exists()
