"""`ebr-engine restore` on clips: every frame comes out, in its place, with the sound; what cannot be done is one line."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from ebr_engine.media.video import VideoInfo, open_video, write_video


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
    code, stdout, stderr = cli("restore", "in.mkv", "-o", "out.mkv", "--task", "lowlight", "--steps", "1", "--codec", "ffv1")
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
    from ebr_engine.media.images import Picture, write_image

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
