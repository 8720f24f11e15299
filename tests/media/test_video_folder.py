"""Folders of frames stand for videos in both directions."""

import os
from fractions import Fraction

import numpy as np
import pytest

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import VideoInfo, open_video, write_video


@pytest.fixture
def frames(tmp_path):
    """A folder of five 16-bit frames, shot.8.png to shot.12.png."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(8, 13):
        pixels = np.full((20, 30, 3), number / 16, np.float32)
        write_image(folder / f"shot.{number}.png", Picture(pixels, bits=16))
    (folder / "notes.txt").write_text("x")
    return folder


def test_frames_are_read_in_the_order_of_their_numbers(frames):
    with open_video(frames, fps=25) as reader:
        assert (reader.info.frames, reader.info.fps, reader.info.bits, reader.info.height) == (5, 25, 16, 20)
        read = list(reader)
    assert [frame.name for frame in read] == [f"shot.{n}" for n in range(8, 13)]
    assert [frame.time for frame in read] == [Fraction(i, 25) for i in range(5)]
    np.testing.assert_allclose([frame.pixels[0, 0, 0] for frame in read], np.arange(8, 13) / 16, atol=1e-5)


def test_start_and_frames_apply(frames):
    with open_video(frames, fps=10, start=0.15, frames=2) as reader:
        assert [frame.name for frame in reader] == ["shot.10", "shot.11"]
    with pytest.raises(MediaError, match="outside"):
        open_video(frames, fps=10, start=0.5)


def test_a_folder_comes_out_with_the_same_names_and_depth(frames, tmp_path):
    with open_video(frames) as reader, write_video(f"{tmp_path}/out/", reader) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
        assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path / "out")) == [f"shot.{n}.png" for n in (10, 11, 12, 8, 9)]
    before, after = (read_image(folder / "shot.11.png") for folder in (frames, tmp_path / "out"))
    assert after.bits == 16
    np.testing.assert_array_equal(before.pixels, after.pixels)


@pytest.mark.parametrize(("pattern", "second"), [("f_%03d.tif", "f_002.tif"), ("%d.png", "2.png")])
def test_a_pattern_names_the_frames(tmp_path, pattern, second):
    info = VideoInfo(30, 20, Fraction(24), Fraction(1, 24))
    with write_video(tmp_path / pattern, info) as writer:
        for _ in range(3):
            writer.write(np.full((20, 30, 3), 0.25, np.float32))
    assert len(os.listdir(tmp_path)) == 3
    assert read_image(tmp_path / second).bits == 8


def test_frames_become_a_video_and_back(frames, tmp_path):
    pytest.importorskip("av")
    with open_video(frames, fps=12) as reader, write_video(tmp_path / "out.mkv", reader, crf=0) as writer:
        for frame in reader:
            writer.write(frame.pixels, frame)
    with open_video(tmp_path / "out.mkv") as reader, write_video(f"{tmp_path}/back/", reader) as writer:
        assert (reader.info.fps, reader.info.bits) == (12, 10)
        for frame in reader:
            writer.write(frame.pixels, frame)
    pixels = read_image(tmp_path / "back" / "000003.png").pixels
    np.testing.assert_allclose(pixels, 10 / 16, atol=0.51 / 876 + 1e-5)  # 876 steps from black to white at 10 bit


def test_a_failure_leaves_nothing(tmp_path):
    writer = write_video(f"{tmp_path}/out/", VideoInfo(30, 20, Fraction(24), Fraction(1, 24)))
    with pytest.raises(KeyboardInterrupt):
        interrupted(writer)
    assert not os.listdir(tmp_path)


def interrupted(writer):
    with writer:
        writer.write(np.zeros((20, 30, 3), np.float32))
        raise KeyboardInterrupt


def test_unequal_and_missing_frames_are_refused(frames, tmp_path):
    write_image(frames / "shot.10.png", np.zeros((20, 31, 3), np.float32))
    with open_video(frames) as reader, pytest.raises(MediaError, match=r"shot\.10\.png: has 31 x 20 pixels, not 30 x 20"):
        list(reader)
    (tmp_path / "none").mkdir()
    with pytest.raises(MediaError, match="no frames in this folder"):
        open_video(tmp_path / "none")
