"""`ebr-engine restore` on clips: every frame comes out, in its place, with the sound; what cannot be done is one line."""

import os
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from ebr_engine.errors import EbrError
from ebr_engine.media.video import VideoInfo, open_video, parts, write_video


def clip(path, frames=6, height=16, width=24):
    info = VideoInfo(width, height, Fraction(10), Fraction(1, 10))
    with write_video(path, info, codec="ffv1") as writer:
        for i in range(frames):
            writer.write(np.full((height, width, 3), 0.2 + 0.1 * i, np.float32))


def read(path):
    with open_video(path) as reader:
        return [(round(float(frame.time), 3), frame.pixels.mean()) for frame in reader]


def test_every_frame_keeps_its_place_and_time(cli):
    clip("in.mkv")
    code, stdout, stderr = cli("restore", "in.mkv", "-o", "out.mkv", "--task", "rain", "--steps", "1", "--codec", "ffv1")
    assert (code, stderr) == (0, "")
    assert "6 frames" in stdout
    before, after = read("in.mkv"), read("out.mkv")
    assert [time for time, _ in after] == [time for time, _ in before]
    means = [mean for _, mean in after]
    assert means == sorted(means)  # each a little brighter than the one before, as they came


def test_a_part_of_a_clip_can_be_restored(cli):
    clip("in.mkv")
    how = "--task haze --steps 1 --codec ffv1 --start 0.2 --frames 3"
    assert cli("restore", "in.mkv", "-o", "out.mkv", *how.split())[0] == 0
    assert [time for time, _ in read("out.mkv")] == [0, 0.1, 0.2]


def test_folders_of_pictures_and_clips_are_mirrored(cli, engine):
    from ebr_engine.media.images import write_image
    from ebr_engine.media.picture import Picture

    Path("in/deep").mkdir(parents=True)
    clip("in/deep/a.mkv", 2)
    write_image("in/b.png", Picture(np.zeros((8, 8, 3), np.float32)))
    code, _, stderr = cli("restore", "in", "-o", "out", "--task", "haze", "--compare")
    assert (code, stderr) == (0, "")
    found = sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("[!.]*") if path.is_file())
    assert found == ["b.png", "b_compare.png", "deep/a.mkv", "deep/a_compare.mkv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "out.mkv", "-e", "preset"], ["preset", "KEY=VALUE"]),
        (["-o", "out.png"], ["out.png", ".mp4"]),
        (["-o", "out.mkv", "--codec", "nosuch"], ["nosuch"]),
        (["-o", "out.mkv", "--chunk-frames", "2", "--chunk-overlap", "2"], ["overlap"]),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(cli, arguments, words):
    clip("in.mkv")
    code, _, stderr = cli("restore", "in.mkv", "--task", "haze", "--steps", "1", *arguments)
    assert code in (1, 2)
    assert len(stderr.strip().splitlines()) == 1
    for word in words:
        assert word in stderr
    assert os.listdir() == ["in.mkv"]


SCRIPT = """
import sys, types
sys.path.insert(0, {folder!r})
import conftest
from ebr_engine.media.video import parts
parts.SECONDS = 0.0
class Uneven(conftest.FakeRestorer):
    def run(self, clip, *, plan, callback, **settings):
        callback(1, 1)
        restored = (clip * (0.5 + clip[:, :, :1].mean() + clip[:, :, -1:].std() / 4)).clamp(0, 1)
        return restored.contiguous()  # channel by channel, as an engine's is
if {fake}:
    fake = types.ModuleType("ebr_engine.engine.restorer")
    fake.Restorer = Uneven
    sys.modules["ebr_engine.engine.restorer"] = fake
from ebr_engine.cli import main
main()
"""


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("clip.mkv", True),
        pytest.param("clip.mkv", False, marks=pytest.mark.slow),  # with mini
    ],
)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, name, fake):
    monkeypatch.chdir(tmp_path)
    moving_clip(name, frames=60, height=48, width=64)
    command = [sys.executable, "-c", SCRIPT.format(folder=str(Path(__file__).parent), fake=fake), "restore", name]
    command += [
        "--task",
        "haze",
        "--steps",
        "2",
        "--chunk-frames",
        "6",
        "--chunk-overlap",
        "2",
        "--device",
        "cpu",
        "-o",
    ]
    assert subprocess.run([*command, "whole" + name], capture_output=True, timeout=200).returncode == 0
    process = subprocess.Popen([*command, "out/" + name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path().glob("out/.ebr-*.parts/part-000002")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not Path("out", name).exists()
    again = subprocess.run([*command, "out/" + name], capture_output=True, text=True, timeout=200)
    assert (again.returncode, again.stderr) == (0, "")
    assert "goes on at frame" in again.stdout
    assert Path("out", name).read_bytes() == Path("whole" + name).read_bytes()
    assert not list(Path("out").glob("*.parts"))


@pytest.fixture
def uneven(engine, monkeypatch):
    """The stand-in engine with a result that depends on the chunk; `stop_at` is the chunk that Ctrl-C comes in."""
    engine.stop_at = None
    engine.runs = 0

    def run(self, clip, *, plan, callback, **settings):
        engine.runs += 1
        if engine.runs == engine.stop_at:
            raise KeyboardInterrupt
        restored = (clip * (0.5 + clip[:, :, :1].mean() + clip[:, :, -1:].std() / 4)).clamp(0, 1)
        return restored.contiguous()  # channel by channel, as an engine's is

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    return engine


RUN = ["restore", "in.mp4", "--task", "haze", "--chunk-frames", "6", "--chunk-overlap", "2", "-o"]


@pytest.mark.parametrize("damage", ["nothing", "part", "tail", "input", "settings", "only the last tail is there"])
def test_parts_are_used_only_when_they_are_whole_and_of_the_same_run(cli, uneven, damage):
    moving_clip("in.mp4", frames=30, height=16, width=32)
    assert cli(*RUN, "whole.mkv")[0] == 0
    total, uneven.runs, uneven.stop_at = uneven.runs, 0, 5
    code, _, stderr = cli(*RUN, "out.mkv")
    assert (code, stderr.count("error: ")) == (130, 1)
    (folder,) = Path().glob(".ebr-*.parts")
    assert sorted(os.listdir(folder)) == ["part-000000", "part-000001", "part-000002", "part-000003", "tail-000003"]
    left, more = 4 if damage == "nothing" else 0, []  # of a damaged part, the tail before is gone
    if damage in ("part", "tail"):
        file = folder / {"part": "part-000001", "tail": "tail-000003"}[damage]
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    elif damage == "input":
        os.utime("in.mp4", (1, 1))
    elif damage == "settings":
        more = ["--seed", "7"]
    elif damage != "nothing":
        os.unlink(folder / "part-000003")
    uneven.runs, uneven.stop_at = 0, None
    assert cli(*RUN, "out.mkv", *more)[0] == 0
    assert uneven.runs == total - left
    assert Path("out.mkv").read_bytes() == Path("whole.mkv").read_bytes()
    assert sorted(os.listdir()) == ["in.mp4", "out.mkv", "whole.mkv"]


@pytest.mark.parametrize("out", ["out.mkv", "out/"])
def test_a_run_killed_when_all_was_done_leaves_its_parts_to_the_next_one(cli, uneven, monkeypatch, out):
    moving_clip("in.mp4", frames=20, height=16, width=32)
    with monkeypatch.context() as killed:
        killed.setattr(parts.Parts, "remove", lambda self: None)
        assert cli(*RUN, out)[0] == 0
    assert len(list(Path().rglob(".ebr-*.parts"))) == 1
    code, _, stderr = cli(*RUN, out)
    assert (code, "--overwrite" in stderr) == ((2, True) if out == "out.mkv" else (0, False))
    assert not list(Path().rglob(".ebr-*.parts"))


def test_parts_that_are_newer_than_an_old_output_stay(cli, uneven):
    moving_clip("in.mp4", frames=20, height=16, width=32)
    Path("out.mkv").write_bytes(b"old")
    os.utime("out.mkv", (1, 1))
    uneven.stop_at = 3
    assert cli(*RUN, "out.mkv", "--overwrite")[0] == 130
    total, uneven.runs, uneven.stop_at = uneven.runs, 0, None
    assert cli(*RUN, "out.mkv")[0] == 2
    code, stdout, _ = cli(*RUN, "out.mkv", "--overwrite")
    assert (code, total) == (0, 3)
    assert "goes on at frame" in stdout


def test_a_run_killed_before_its_comparison_makes_that_only(cli, uneven):
    moving_clip("in.mp4", frames=20, height=16, width=32)
    assert cli(*RUN, "out/", "--compare")[0] == 0
    made, compared = Path("out/in.mp4").read_bytes(), pictures("out/in_compare.mp4")
    os.unlink("out/in_compare.mp4")
    uneven.runs = 0
    code, stdout, stderr = cli(*RUN, "out/", "--compare")
    assert (code, stderr, uneven.runs) == (0, "", 0)
    assert "20 frames" in stdout
    assert Path("out/in.mp4").read_bytes() == made
    again = pictures("out/in_compare.mp4")  # by x264, whose bytes are not always the same
    assert again.shape == compared.shape
    assert np.abs(again - compared).mean() < 0.005


def test_a_disk_without_room_for_parts_costs_the_parts_only(cli, uneven, monkeypatch):
    moving_clip("in.mp4", frames=20, height=16, width=32)
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    code, _, stderr = cli(*RUN, "out.mkv")
    assert code == 0
    assert "warning: out.mkv: its parts are not kept" in stderr
    assert names() == ["in.mp4", "out.mkv"]


def test_without_resume_nothing_is_kept(cli, uneven):
    moving_clip("in.mp4", frames=20, height=16, width=32)
    uneven.stop_at = 3
    assert cli(*RUN, "out.mkv", "--no-resume")[0] == 130
    assert names() == ["in.mp4"]


def test_a_clip_that_cannot_be_finished_leaves_no_parts(cli, uneven, monkeypatch):
    moving_clip("in.mp4", frames=20, height=16, width=32)

    def wrong(self, clip, **settings):
        uneven.runs += 1
        if uneven.runs == 3:
            raise EbrError("no")
        return clip

    monkeypatch.setattr(uneven, "run", wrong)
    assert cli(*RUN, "out.mkv")[0] == 1
    assert names() == ["in.mp4"]


def names():
    return sorted(os.listdir())


def pictures(path):
    with open_video(path) as reader:
        return np.stack([frame.pixels for frame in reader])


def moving_clip(path, frames, height, width):
    info = VideoInfo(width, height, Fraction(10), Fraction(1, 10))
    noise = np.random.default_rng(0).random((height, width + frames, 3), np.float32)
    with write_video(path, info, crf=5) as writer:
        for i in range(frames):
            writer.write(noise[:, i : i + width] * 0.5 + 0.2)
