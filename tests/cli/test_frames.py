"""Folders of frames as clips: a folder to a video, a video to frames, frames to frames, and what stands in the way."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av")

from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import VideoInfo, open_video, write_video

HOW = ["--task", "haze", "--steps", "1"]


def frames(folder, count=5, bits=8):
    Path(folder).mkdir()
    for i in range(count):
        write_image(Path(folder, f"shot_{8 + i}.png"), Picture(np.full((16, 24, 3), 0.2 + 0.1 * i, np.float32), bits=bits))


def clip(path, count=3):
    info = VideoInfo(24, 16, Fraction(10), Fraction(1, 10))
    with write_video(path, info, codec="ffv1") as writer:
        for i in range(count):
            writer.write(np.full((16, 24, 3), 0.2 + 0.1 * i, np.float32))


def test_a_folder_of_frames_becomes_a_video_at_the_rate_that_is_asked_for(cli, engine):
    frames("in")
    code, _, stderr = cli("restore", "in", "-o", "out.mkv", *HOW, "--fps", "12.5", "--codec", "ffv1")
    assert (code, stderr) == (0, "")
    with open_video("out.mkv") as reader:
        found = list(reader)
    assert [frame.time for frame in found] == pytest.approx([i / 12.5 for i in range(5)], abs=1e-3)
    np.testing.assert_allclose([frame.pixels.mean() for frame in found], [0.8 - 0.1 * i for i in range(5)], atol=0.01)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_folder_of_frames_is_one_clip_when_told_so_and_keeps_names_and_depth(cli, engine, bits):
    frames("in", bits=bits)
    code, _, stderr = cli("restore", "in", "-o", "out", *HOW, "--as-clip")
    assert (code, stderr) == (0, "")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(path.name for path in Path("in").iterdir())
    assert engine.calls[0]["size"] == (1, 3, 2, 16, 24)  # chunks of frames, not pictures
    assert read_image("out/shot_8.png").bits == bits
    assert read_image("out/shot_12.png").pixels.mean() == pytest.approx(1 - 0.6, abs=0.005)


def test_a_video_becomes_numbered_frames(cli, engine):
    clip("in.mkv")
    code, _, stderr = cli("restore", "in.mkv", "-o", "frames/%04d.tif", *HOW)
    assert (code, stderr) == (0, "")
    assert sorted(path.name for path in Path("frames").iterdir()) == ["0001.tif", "0002.tif", "0003.tif"]
    assert read_image("frames/0003.tif").pixels.mean() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "-o", "in", "--as-clip"], "never overwritten"),
        (["in", "-o", "in/%03d.png"], "folder"),
        (["in", "-o", "full", "--as-clip"], "--overwrite"),
        (["in.mkv", "-o", "full/%d.png"], "--overwrite"),
        (["in.mkv", "-o", "out/%d.mkv"], ".png"),
        (["nowhere", "-o", "out", "--as-clip"], "no such"),
        (["in", "in.mkv", "-o", "out", "--as-clip"], "single folder"),
        (["in/shot_8.png", "-o", "out", "--as-clip"], "a clip is"),
    ],
)
def test_what_would_be_overwritten_or_is_no_clip_is_refused_in_one_line(cli, engine, arguments, words):
    frames("in", 2)
    clip("in.mkv")
    Path("full").mkdir()
    write_image("full/7.png", Picture(np.zeros((4, 4, 3), np.float32)))
    code, _, stderr = cli("restore", *arguments, *HOW)
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1
    assert words in stderr
    assert not engine.calls
    assert not Path("out").exists()


def animation(path):
    """Five frames, each brighter than the one before, shown for 100, 200, 100, 50 and 100 ms."""
    frames = [Image.fromarray(np.full((24, 32, 3), 40 * i + 30, np.uint8)) for i in range(5)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 200, 100, 50, 100])


@pytest.mark.parametrize("name", ["x.gif", "x.png"])
def test_an_animation_becomes_a_video_with_its_times(cli, engine, name):
    animation(name)
    code, _, stderr = cli("restore", name, "-o", "out.mkv", "--task", "haze", "--codec", "ffv1")
    assert code == 0, stderr
    with open_video("out.mkv") as reader:
        frames = [(round(float(frame.time), 3), round(float(frame.pixels.mean()) * 255)) for frame in reader]
    assert [time for time, _ in frames] == [0, 0.1, 0.3, 0.4, 0.45]
    assert [value for _, value in frames] == pytest.approx([255 - 40 * i - 30 for i in range(5)], abs=1)


def test_an_animation_becomes_frames(cli, engine):
    animation("x.gif")
    assert cli("restore", "x.gif", "-o", "frames/%02d.png", "--task", "haze")[0] == 0
    assert sorted(os.listdir("frames")) == [*(f"{i:02}.png" for i in range(1, 6)), "timestamps.txt"]
    lines = Path("frames/timestamps.txt").read_text().splitlines()
    assert [float(line) for line in lines[1:]] == [0, 100, 300, 400, 450, 550]


@pytest.mark.parametrize(("name", "out"), [("x.gif", "out.jpg"), ("x.png", "out.tif"), ("x.webp", "out.avif")])
def test_an_animation_that_is_to_be_a_picture_is_told_how(cli, engine, name, out):
    animation(name)
    code, _, stderr = cli("restore", name, "-o", out, "--task", "haze")
    assert code == 1
    assert stderr.count("\n") == 1
    assert "-o out.mp4" in stderr


@pytest.mark.parametrize("out", ["out.mp4", "%03d.png"])
def test_a_single_picture_is_no_clip(cli, engine, out):
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save("x.png")
    code, _, stderr = cli("restore", "x.png", "-o", out, "--task", "haze")
    if out.endswith(".mp4"):
        assert code == 2
        assert "cannot write .mp4" in stderr
    else:
        assert code == 0
        assert sorted(os.listdir()) == ["%03d.png", "x.png"]
