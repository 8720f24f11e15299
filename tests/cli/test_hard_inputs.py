"""Bad and odd files: restored properly or refused in one clear line, quickly, in bounded memory, with nothing left behind."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tifffile")
if os.name == "nt":
    pytest.skip("needs FIFOs and links", allow_module_level=True)

from ebr_engine.media.images import read_image
from ebr_engine.media.video import open_video
from tests.cli.hard_inputs import CASES, RGB

SECONDS = 10
MEGABYTES = 400  # more than any of these may need, less than what they declare


@pytest.fixture(autouse=True)
def no_hang():
    def late(*_):
        raise TimeoutError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


@pytest.mark.parametrize("label", CASES)
def test_restored_or_refused_in_one_line(cli, engine, label):
    name, out, build, expected = CASES[label]
    if label == "without_permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    build(name)
    before = sorted(os.listdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, _, stderr = cli("restore", "-o", out, "--task", "haze", "--", name)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < MEGABYTES
    errors = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    if "refused" in expected or (expected.get("odd") and code):
        assert code in (1, 2)
        assert len(errors) == 1, stderr
        assert errors[0].startswith("error: ")
        for word in expected.get("refused", []):
            assert word in errors[0]
        assert sorted(os.listdir()) == before
        return
    assert (code, errors) == (0, [])
    assert sorted(os.listdir()) == sorted([*before, out.rstrip("/")])
    result = Path(out, name) if out.endswith("/") else Path(out)
    if "frames" in expected or expected.get("odd"):
        with open_video(result) as reader:
            assert sum(1 for _ in reader) == expected.get("frames", reader.info.frames or 0) or expected.get("odd")
        return
    picture = read_image(result)
    assert (picture.height, picture.width) == expected["shape"]
    assert picture.bits == expected.get("bits", 8)
    assert (picture.alpha is not None) == expected.get("alpha", False)
    if expected.get("exact"):
        assert np.abs(picture.pixels - (1 - RGB / 255)).max() < 0.6 / 255


def test_all_at_once_through_the_real_command(tmp_path):
    """The odd pictures of a folder with mini: those that can be are restored, each other one is told in the end."""
    chosen = [
        "zero bytes",
        "half a PNG",
        "animated PNG",
        "float TIFF",
        "one pixel",
        "palette with a transparent colour",
        "CMYK JPEG",
    ]
    (tmp_path / "in").mkdir()
    for label in chosen:
        name, _, build, _ = CASES[label]
        build(tmp_path / "in" / f"{label}{Path(name).suffix}")
    signal.alarm(120)  # it loads torch
    command = [sys.executable, "-c", "from ebr_engine.cli import main; main()", "restore", "in", "-o", "out"]
    command += ["--task", "haze", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "4 of 7 restored, 3 failed" in done.stdout
    assert len(done.stderr.splitlines()) == 3
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        ".ebr-journal.jsonl",
        "CMYK JPEG.jpg",
        "animated PNG.png",
        "one pixel.png",
        "palette with a transparent colour.png",
    ]
