"""Comparisons, previews, colours and auto as `ebr-engine restore` does them, with a stand-in for the engine that inverts."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.engine.classify import Diagnosis
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import VideoInfo, open_video, write_video
from ebr_engine.prompts.catalogue import TASKS


def picture(path, value=0.25, size=(6, 10), **more):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(np.full((*size, 3), value, np.float32), **more))


def clip(path, frames=6, height=16, width=24):
    with write_video(path, VideoInfo(width, height, Fraction(10), Fraction(1, 10)), codec="ffv1") as writer:
        for index in range(frames):
            writer.write(np.full((height, width, 3), 0.05 * index, np.float32))


def frames(path):
    with open_video(path) as reader:
        return [frame.pixels for frame in reader]


def base(source, out="out.png", task="haze"):
    return ["restore", source, "-o", out, "--task", task]


def test_a_wipe_of_a_picture_is_half_input_half_output(cli, engine):
    picture("in.png", size=(8, 20), alpha=np.full((8, 20), 0.5, np.float32))
    assert cli(*base("in.png"), "--compare-as", "wipe")[0] == 0
    both = read_image("out_compare.png")
    assert both.pixels.shape == (8, 20, 3)
    np.testing.assert_allclose(both.pixels[:, :10], 0.25, atol=0.01)
    np.testing.assert_allclose(both.pixels[:, 10:], 0.75, atol=0.01)
    np.testing.assert_allclose(both.alpha, 0.5, atol=0.01)


def test_a_clip_is_compared_in_the_part_that_was_restored(cli, engine):
    clip("in.mkv")
    how = "--compare --start 0.2 --frames 3 --codec ffv1"
    code, _, stderr = cli(*base("in.mkv", "out.mkv"), *how.split())
    assert (code, stderr) == (0, "")
    both = frames("out_compare.mkv")
    assert [frame.shape for frame in both] == 3 * [(16, 48, 3)]
    for index, frame in enumerate(both):
        np.testing.assert_allclose(frame[:, 2:22], 0.05 * (index + 2), atol=0.03)
        np.testing.assert_allclose(frame[:, 26:46], 1 - 0.05 * (index + 2), atol=0.03)


def test_a_clip_at_another_size_is_compared_at_that_size(cli, engine, monkeypatch):
    def resized(self, clip, *, plan, callback, size, **settings):
        return 1 - clip[..., : size[0], : size[1]]

    clip("in.mkv")
    monkeypatch.setitem(engine.released, "mini", (8, 12))
    monkeypatch.setattr(engine, "run", resized)
    assert cli(*base("in.mkv", "out.mkv"), "--compare-as", "wipe", "--size", "released")[0] == 0
    assert frames("out_compare.mkv")[0].shape == (8, 12, 3)


def test_a_preview_without_a_terminal_is_all_that_is_done(cli, engine):
    picture("in/a.png")
    picture("in/b.png")
    code, stdout, stderr = cli(*base("in", "out"), "--preview")
    assert (code, stderr) == (0, "")
    assert "out/a_preview.png" in stdout
    assert "--yes" in stdout
    assert [name for name in os.listdir("out") if not name.startswith(".")] == ["a_preview.png"]
    both = read_image("out/a_preview.png").pixels
    np.testing.assert_allclose(both[:, :10], 0.25, atol=0.01)
    np.testing.assert_allclose(both[:, 10:], 0.75, atol=0.01)


def test_after_the_preview_yes_goes_on(cli, engine):
    picture("in/a.png")
    picture("in/b.png")
    for again in range(2):
        code, _, stderr = cli(*base("in", "out"), "--preview", "--yes", *(["--overwrite"] if again else []))
        assert (code, stderr) == (0, "")
    assert sorted(name for name in os.listdir("out") if not name.startswith(".")) == ["a.png", "a_preview.png", "b.png"]


@pytest.mark.parametrize("answer", [True, False])
def test_a_person_is_asked(cli, engine, monkeypatch, answer):
    asked = []
    monkeypatch.setattr("ebr_engine.cli.progress.on_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, **how: asked.append((text, how["default"])) or answer)
    picture("a.png")
    picture("b.png")
    assert cli("restore", "a.png", "b.png", "-o", "out", "--task", "haze", "--preview")[0] == 0
    assert asked == [("go on with 2 files?", True)]
    assert Path("out/b.png").exists() == answer


def test_a_preview_shows_the_centre_of_a_large_picture_only(cli, engine):
    picture("in.png", size=(900, 1300))
    assert cli(*base("in.png"), "--preview")[0] == 0
    assert [call["size"] for call in engine.calls] == [(512, 512)]
    assert read_image("out_preview.png").pixels.shape == (512, 1026, 3)


def test_a_preview_of_a_clip_is_its_first_frame(cli, engine):
    clip("in.mkv")
    assert cli(*base("in.mkv", "out.mkv"), "--preview", "--start", "0.4")[0] == 0
    np.testing.assert_allclose(read_image("out_preview.png").pixels[:, :24], 0.2, atol=0.02)
    assert sorted(os.listdir()) == ["in.mkv", "out_preview.png"]


def test_a_preview_never_replaces_an_input(cli, engine):
    picture("a.png")
    picture("a_preview.png", 0.5)
    code, _, stderr = cli("restore", "a.png", "a_preview.png", "-o", "./", "--task", "haze", "--preview")
    assert code == 2
    assert "is an input" in stderr
    np.testing.assert_allclose(read_image("a_preview.png").pixels, 0.5, atol=0.01)


def test_colours_are_fixed_where_that_is_asked_for(cli, engine):
    picture("in.png")
    clip("in.mkv")
    assert cli(*base("in.png"), "--color-fix", "wavelet")[0] == 0
    np.testing.assert_allclose(read_image("out.png").pixels, 0.25, atol=0.01)
    assert cli(*base("in.mkv", "out.mkv"), "--color-fix", "adain", "--codec", "ffv1")[0] == 0
    np.testing.assert_allclose(frames("out.mkv")[3], 0.15, atol=0.03)


def test_colours_are_fixed_by_task_by_default(cli, engine, monkeypatch):
    from ebr_engine.media import colour_fix

    picture("in.png")
    assert cli(*base("in.png"))[0] == 0
    np.testing.assert_allclose(read_image("out.png").pixels, 0.75, atol=0.01)
    monkeypatch.setitem(colour_fix.BY_TASK, "haze", "wavelet")
    assert cli(*base("in.png"), "--overwrite")[0] == 0
    np.testing.assert_allclose(read_image("out.png").pixels, 0.25, atol=0.01)
    assert cli(*base("in.png"), "--overwrite", "--color-fix", "none")[0] == 0
    np.testing.assert_allclose(read_image("out.png").pixels, 0.75, atol=0.01)


@pytest.fixture
def sees(monkeypatch):
    """What is diagnosed, by how bright the first picture is: bright ones are hazy; keeps how many pictures were shown."""
    shown = []

    def diagnose(pictures):
        shown.append(len(pictures))
        hazy = 0.9 if pictures[0].mean() > 0.2 else 0.2
        return Diagnosis(dict.fromkeys(TASKS, 0.1) | {"haze": hazy})

    monkeypatch.setattr("ebr_engine.engine.classify.diagnose", diagnose)
    return shown


def test_auto_chooses_for_every_file_and_says_so(cli, engine, sees):
    picture("in/a.png")
    picture("in/b.png", 0.05)
    clip("in/c.mkv")
    code, stdout, stderr = cli(*base("in", "out", "auto"))
    assert (code, stderr) == (0, "")
    assert "auto: haze 90%" in stdout
    assert "b.png skipped: auto sees nothing to repair (likeliest: haze 20%); name a task" in stdout
    assert "c.mkv skipped" in stdout  # its first frame is black
    assert "1 of 3 restored, 2 left out" in stdout
    assert Path("out/a.png").exists()
    assert not Path("out/b.png").exists()
    assert sorted(sees) == [1, 1, 3]
    assert [call["task"] for call in engine.calls] == ["haze"]


def test_auto_guesses_when_it_may(cli, engine, sees):
    picture("b.png", 0.05)
    code, stdout, stderr = cli(*base("b.png", task="auto"), "--guess")
    assert (code, stderr) == (0, "")
    assert "auto: a guess, haze 20%" in stdout


def test_a_manifest_may_leave_it_to_auto(cli, engine, sees):
    picture("a.png")
    Path("list.csv").write_text("input,output,task\na.png,out.png,auto\n")
    code, stdout, stderr = cli("restore", "--manifest", "list.csv", "--json")
    assert (code, stderr) == (0, "")
    assert '"note": "auto: haze 90%"' in stdout


def test_nothing_can_be_built_for_auto(cli, engine):
    for command in (["build", "-o", "a.ebr"], ["export", "-o", "a.onnx"]):
        code, _, stderr = cli(*command, "--task", "auto")
        assert code == 2
        assert "name a task" in stderr
    assert engine.made == []


def test_auto_is_told_where_prompts_are_when_a_backbone_has_none(cli, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    picture("a.png")
    code, _, stderr = cli(*base("a.png", task="auto"), "--backbone", "wan")
    assert code == 2
    assert "prompts add" in stderr
    assert engine.made == []
