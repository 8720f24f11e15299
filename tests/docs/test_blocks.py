"""The blocks of the README and the guide run as they stand, in their order, in an empty folder with the bundled photos.

A block of a shell that needs more names it behind ```sh: `clip`, `pairs` and `sound` are made here, `slow` runs with the slow
tests, and `download` does not run. Commands run in this process; photos are small here, and learning is short.
"""

import re
import shlex
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from ebr_engine.cli import app
from ebr_engine.prompts import catalogue
from tests.media.clip_maker import write_clip

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+) ?(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OF_A_SHELL = ("make", "source")  # they set this environment up
# iterations of learning, minutes of pre-training
SHORT = {
    "--minutes 60": "--minutes 0.01 --no-compile --batch 4",
    "-n 500": "-n 1 --batch 2 --tokens 4",
    "-n 250": "-n 1 --batch 2 --tokens 4",
}
SIZE = (64, 48)


def blocks(page, *wanted):
    """(language, content) of a page's blocks in their order: those of Python, and those of a shell that need what is `wanted`."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(language, text) for language, needs, text in found if language == "python" or needs in wanted]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty; what the package brings is there, its photos small."""
    assets = tmp_path / "assets"
    (assets / "demo").mkdir(parents=True)
    for path in catalogue.ASSETS.iterdir():
        if path.name != "demo":
            (assets / path.name).symlink_to(path)
    for photo in (catalogue.ASSETS / "demo").glob("*.jpg"):
        Image.open(photo).resize(SIZE).save(assets / "demo" / photo.name, quality=95)
    monkeypatch.setattr(catalogue, "ASSETS", assets)
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@contextmanager
def told(line):
    """What goes wrong names the line that it happened at."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{line}\n{error}") from error


def run(language, text):
    """Run a block; what a command is told to write has to be there."""
    if language == "python":
        with told(text):
            exec(compile(text, "block", "exec"), {})
        return
    for line in text.splitlines():
        for long, short in SHORT.items():
            line = line.replace(long, short)
        words = shlex.split(line, comments=True)
        if not words or words[0] in OF_A_SHELL:
            continue
        if words[0] != "ebr-engine":
            subprocess.run(["sh", "-c", line], check=True)
            continue
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        written = words[words.index("-o") + 1] if "-o" in words else "."
        assert Path(written).parent.exists() if "%" in written else Path(written).exists(), line


def test_the_readme_runs(folder):
    found = blocks("README.md", "")
    assert len(found) == len(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) > 5
    for block in found:
        run(*block)
    assert {"clear.jpg", "sheet.png", "dry_compare.png", "rainless.jpg"} <= {path.name for path in folder.iterdir()}


def test_the_guide_runs(folder):
    write_clip(folder / "clip.mp4", frames=3)
    for name in ("input", "target"):
        (folder / "pairs" / name).mkdir(parents=True)
        for number, photo in enumerate(sorted((catalogue.ASSETS / "demo").glob("*.jpg"))[:2]):
            side = min(SIZE) // 16 * 16
            Image.open(photo).resize((side + 16, side + 16)).save(folder / "pairs" / name / f"{number}.png")
    (folder / "recordings").mkdir()
    for path in (folder / "noisy.wav", folder / "recordings" / "one.wav"):
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 3000), 16000)
    for block in blocks("docs/guide.md", "", "clip", "pairs", "sound"):
        run(*block)
    assert len(list((folder / "frames").glob("*.png"))) == 3
    assert (folder / "scores" / "summary.md").is_file()


@pytest.mark.slow
def test_what_takes_longer_runs(folder):
    run("sh", "ebr-engine demo --inputs photos/")
    for language, text in blocks("docs/guide.md", "slow"):
        if language == "sh":
            run(language, text)


def test_make_demo_installs_what_is_tested_and_restores_the_photos():
    planned = subprocess.run(["make", "-n", "-B", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m venv .venv" in planned
    assert re.search(r"pip install .*-c constraints.txt -e \.$", planned, re.MULTILINE)
    assert re.search(r"^\.venv/bin/ebr-engine demo", planned, re.MULTILINE)


def test_what_is_downloaded_is_all_that_is_left_out():
    needs = {need for page in ("README.md", "docs/guide.md") for _, need, _ in BLOCK.findall((ROOT / page).read_text("utf-8"))}
    assert needs == {"", "clip", "pairs", "sound", "slow", "download"}
