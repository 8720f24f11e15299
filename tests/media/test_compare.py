"""Comparisons: where input and output are, how the line moves, and that a clip keeps its sound and times."""

import weakref

import numpy as np
import pytest

from ebr_engine.media.compare import compare_clips, compared, compared_size, side_by_side, wiped
from ebr_engine.media.decoding import MediaError
from ebr_engine.media.video import open_video

BEFORE, AFTER = (np.full((400, 600, 3), value, np.float32) for value in (0.2, 0.7))


def test_side_by_side_has_both_whole_and_a_thin_line():
    both = side_by_side(BEFORE, AFTER)
    assert both.shape == (400, 1202, 3)
    assert (both[:, :600] == 0.2).all()
    assert (both[:, 602:] == 0.7).all()
    assert (both[:, 600:602] == 1).all()


def test_tiny_pictures_have_no_line():
    assert (side_by_side(BEFORE[:5, :7], AFTER[:5, :7])[:, 7:] == np.float32(0.7)).all()
    assert wiped(BEFORE[:5, :7], AFTER[:5, :7]).max() == np.float32(0.7)
    assert wiped(BEFORE[:1, :1], AFTER[:1, :1]).shape == (1, 1, 3)


def test_a_wipe_shows_the_input_left_of_its_line():
    joined = wiped(BEFORE, AFTER, 0.25)
    assert joined.shape == BEFORE.shape
    assert (joined[:, :149] == np.float32(0.2)).all()
    assert (joined[:, 149:151] == 1).all()
    assert (joined[:, 151:] == np.float32(0.7)).all()


def test_the_line_swings_through_the_middle_and_stays_inside():
    shares = [(compared(BEFORE, AFTER, "wipe", time)[0, :, 0] == np.float32(0.2)).mean() for time in np.arange(0, 8, 0.25)]
    assert shares[0] == pytest.approx(0.5, abs=0.01)
    assert min(shares) < 0.1 < 0.9 < max(shares)
    assert shares[: len(shares) // 2] == pytest.approx(shares[len(shares) // 2 :])  # over and over


@pytest.mark.parametrize("way", ["side", "wipe"])
@pytest.mark.parametrize("size", [(400, 600), (5, 7), (1081, 1921)])
def test_the_size_is_told_beforehand(way, size):
    before = np.zeros((*size, 3), np.float32)
    assert compared(before, before, way).shape[:2] == compared_size(*size, way)


@pytest.mark.parametrize("way", ["side", "wipe"])
def test_a_clips_comparison_keeps_frames_times_and_sound(make_clip, tmp_path, way):
    before = make_clip("before.mp4", 9, audio="aac")
    after = make_clip("after.mp4", 9)
    out = tmp_path / "both.mp4"
    assert compare_clips(before, after, out, way) == []
    with open_video(before) as source, open_video(out) as both:
        assert both.info.has_audio
        assert (both.info.height, both.info.width) == compared_size(48, 64, way)
        frames, made = list(source), list(both)
    assert [frame.time for frame in made] == [frame.time for frame in frames]
    left = slice(0, 20)
    assert abs(made[4].pixels[:, left] - frames[4].pixels[:, left]).mean() < 0.02


def test_a_part_of_a_clip_and_another_size_fit(make_clip, tmp_path):
    before, after = make_clip("before.mp4", 12), make_clip("after.mp4", 3, size=(32, 40))
    compare_clips(before, after, tmp_path / "both.mkv", "side", {"start": 0.5, "frames": 3})
    with open_video(tmp_path / "both.mkv") as both:
        assert both.info.width == 80
        assert len(list(both)) == 3


def test_clips_of_unequal_length_are_refused_and_nothing_is_left(make_clip, tmp_path):
    before, after = make_clip("before.mp4", 9), make_clip("after.mp4", 8)
    with pytest.raises(MediaError, match="as many frames"):
        compare_clips(before, after, tmp_path / "both.mp4", "side")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.mp4", "before.mp4"]


def test_few_frames_are_held_however_long_the_clip_is(make_clip, tmp_path, monkeypatch):
    from ebr_engine.media import compare

    alive, most = weakref.WeakSet(), 0

    def watched(*readers):
        nonlocal most
        for pair in zip(*readers):
            alive.update(pair)
            most = max(most, len(alive))
            yield pair
            del pair

    monkeypatch.setattr(compare, "zip_longest", watched)
    compare_clips(make_clip("a.mp4", 40), make_clip("b.mp4", 40), tmp_path / "both.mp4", "wipe")
    assert 2 <= most <= 4
