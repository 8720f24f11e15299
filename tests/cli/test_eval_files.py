"""`ebr-engine eval` on a person's own files: one line a file, three files of results, errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.media.images import write_image


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
    assert {path.name for path in Path("out").iterdir()} == {"scores.csv", "summary.md", "summary.json", "rows.jsonl"}
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
