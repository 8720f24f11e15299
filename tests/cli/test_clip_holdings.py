"""`ebr-engine restore` on clips that hold more than frames: it goes through chunks, and through a run that was stopped."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from ebr_engine.media.video import open_video, parts
from tests.media.clip_maker import CC, CLIPS, sei, write_clip

RUN = ["restore", "--task", "haze", "--chunk-frames", "6", "--chunk-overlap", "2"]


@pytest.fixture
def stopping(engine, monkeypatch):
    """The stand-in engine; Ctrl-C comes in the chunk `stop_at`."""
    engine.runs, engine.stop_at = 0, None

    def run(self, clip, *, plan, callback, **settings):
        engine.runs += 1
        if engine.runs == engine.stop_at:
            raise KeyboardInterrupt
        return (clip * (0.5 + clip[:, :, :1].mean())).clamp(0, 1)

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    return engine


def make(kind):
    """A clip of twenty frames with captions, or with alpha."""
    if kind == "captions":
        return write_clip("in.mp4", frames=20, inserted=sei(4, CC))
    return write_clip("in.webm", "libvpx-vp9", frames=20, pix_fmt="yuva420p", alpha=True)


@pytest.mark.parametrize("kind", ["captions", "alpha"])
def test_a_stopped_run_goes_on_with_all_that_its_frames_hold(cli, stopping, kind):
    clip = make(kind)
    assert cli(*RUN, clip, "-o", f"whole{Path(clip).suffix}")[0] == 0
    stopping.runs, stopping.stop_at = 0, 4
    assert cli(*RUN, clip, "-o", f"out{Path(clip).suffix}")[0] == 130
    assert list(Path().glob(".ebr-*.parts/tail-*"))
    stopping.stop_at = None
    code, stdout, stderr = cli(*RUN, clip, "-o", f"out{Path(clip).suffix}")
    assert (code, stderr) == (0, "")
    assert "goes on at frame" in stdout
    assert Path(f"out{Path(clip).suffix}").read_bytes() == Path(f"whole{Path(clip).suffix}").read_bytes()
    with open_video(f"out{Path(clip).suffix}") as reader, open_video(clip) as source:
        for after, before in zip(reader, source):
            assert after.messages.get("captions") == before.messages.get("captions")
            assert (after.alpha is None) == (kind == "captions")
            if kind == "alpha":
                assert np.abs(after.alpha - before.alpha).mean() < 0.02


def test_what_is_not_kept_is_one_warning_and_listed_for_programs(cli, engine):
    clip = CLIPS["captions"](Path())
    code, stdout, stderr = cli(*RUN, clip, "-o", "out.webm", "--json")
    assert code == 0
    assert stderr.count("warning") == 1
    assert "captions: vp9 has no place for it" in stderr
    told = next(each for line in stdout.splitlines() if "holdings" in (each := json.loads(line)))
    assert [(each["kind"], each["fate"]) for each in told["holdings"]] == [("captions", "not kept")]


def test_strict_fails_before_any_work(cli, engine):
    clip = CLIPS["attachment"](Path())
    code, _, stderr = cli(*RUN, clip, "-o", "out.mp4", "--strict")
    assert code == 1
    assert stderr.count("\n") == 1
    assert "attachment (font.ttf)" in stderr
    assert not engine.calls
    assert not Path("out.mp4").exists()


def test_inspect_lists_a_clip_and_what_another_container_would_lose(cli):
    clip = CLIPS["attachment"](Path())
    code, stdout, _ = cli("inspect", clip, "--to", "mp4", "--json")
    assert code == 0
    (held,) = json.loads(stdout)["holdings"]
    assert (held["kind"], held["detail"], held["fate"]) == ("attachment", "font.ttf", "not kept")
    assert cli("inspect", clip, "--to", "mp4", "--strict")[0] == 1
    assert cli("inspect", clip, "--strict")[0] == 0


def test_dolby_vision_5_is_refused_in_one_line_with_the_way(cli, engine):
    from tests.media.clip_maker import add_box, dolby_record

    add_box(write_clip("in.mp4", "libx265", pix_fmt="yuv420p10le"), "entry", dolby_record(5, 0))
    code, _, stderr = cli(*RUN, "in.mp4", "-o", "out.mp4")
    assert code == 1
    assert stderr.count("\n") == 1
    assert "Dolby Vision of profile 5" in stderr
    assert "ffmpeg" in stderr
    assert not Path("out.mp4").exists()


def test_a_comparison_is_not_held_to_what_the_clip_holds(cli, engine):
    clip = CLIPS["spherical"](Path())
    code, _, stderr = cli(*RUN, clip, "-o", "out.mp4", "--compare")
    assert (code, stderr) == (0, "")
    with open_video("out_compare.mp4") as reader:
        assert not reader.view
