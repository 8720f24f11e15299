"""`ebr-engine sheet`: every task of a backbone on one sheet, auto's choice marked, with a stand-in for the engine."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.engine.classify import Diagnosis
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.sheet import MARK
from ebr_engine.media.video import VideoInfo, write_video
from ebr_engine.prompts.catalogue import TASKS


@pytest.fixture
def sheets(engine, monkeypatch):
    """Every sheet's tiles; the stand-in knows all tasks, and haze and rain are seen."""
    from ebr_engine.media import sheet

    made = []
    monkeypatch.setattr(engine, "plan", lambda self, task, **settings: {"task": task, **settings})
    monkeypatch.setattr(engine, "restore", lambda self, image, *, plan, seed, callback: image * 0 + len(plan["task"]) / 20)
    monkeypatch.setattr("ebr_engine.engine.classify.diagnose", lambda pictures: Diagnosis(seen))
    original = sheet.contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet", lambda tiles: made.append(tiles) or original(tiles))
    seen = dict.fromkeys(TASKS, 0.1) | {"haze": 0.8, "rain": 0.9}
    made.append(seen)
    return made


def photo(path="in.png", size=(60, 90)):
    write_image(path, Picture(np.full((*size, 3), 0.3, np.float32)))


def test_every_task_is_shown_and_autos_choice_marked(cli, sheets):
    photo()
    code, stdout, stderr = cli("sheet", "in.png", "-o", "new/sheet.png")
    assert (code, stderr) == (0, "")
    assert "auto: rain 90% + haze 80%" in stdout
    tiles = sheets[1]
    assert [tile.label.split()[0] for tile in tiles] == ["input", *TASKS, "rain+haze"]
    assert [tile.label for tile in tiles if tile.marked] == ["rain+haze · auto"]
    assert tiles[1].label == "haze 80%"
    assert np.isclose(read_image("new/sheet.png").pixels, MARK, atol=0.02).all(-1).sum() > 200


def test_one_sure_task_is_marked_itself_and_none_marks_the_input(cli, sheets):
    photo()
    sheets[0]["haze"] = 0.2
    assert cli("sheet", "in.png", "-o", "a.png")[0] == 0
    assert [tile.label for tile in sheets[1] if tile.marked] == ["rain 90% · auto"]
    sheets[0]["rain"] = 0.2
    assert cli("sheet", "in.png", "-o", "b.png")[0] == 0
    assert [tile.label.split()[0] for tile in sheets[2] if tile.marked] == ["input"]


def test_a_large_picture_is_reduced_and_a_small_one_is_not(cli, sheets):
    photo(size=(300, 1200))
    assert cli("sheet", "in.png", "-o", "a.png", "--side", "400")[0] == 0
    assert sheets[1][0].pixels.shape == (100, 400, 3)
    photo("small.png", (5, 7))
    assert cli("sheet", "small.png", "-o", "b.png")[0] == 0
    assert sheets[2][0].pixels.shape == (5, 7, 3)


def test_tasks_may_be_named_and_mixed(cli, sheets):
    photo()
    assert cli("sheet", "in.png", "-o", "a.png", "-t", "haze", "-t", "rain:0.5+snow")[0] == 0
    assert [tile.label.split()[0] for tile in sheets[1]] == ["input", "haze", "rain:0.5+snow"]


def test_a_clip_shows_one_of_its_frames(cli, sheets):
    with write_video("in.mkv", VideoInfo(24, 16, Fraction(10), Fraction(1, 10)), codec="ffv1") as writer:
        for index in range(6):
            writer.write(np.full((16, 24, 3), 0.1 * index, np.float32))
    assert cli("sheet", "in.mkv", "-o", "a.png", "--start", "0.4")[0] == 0
    np.testing.assert_allclose(sheets[1][0].pixels, 0.4, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in.png", "-o", "out.mp4"], "a sheet is a picture"),
        (["in.png", "-o", "old.png"], "--overwrite"),
        (["in.png", "-o", "in.png", "--overwrite"], "is the input"),
        (["nothing.png", "-o", "out.png"], "no such file"),
        (["in.png", "-o", "out.png", "-t", "fog"], "unknown task 'fog'"),
        (["in.png", "-o", "out.png", "-b", "wan"], "prompts add"),
        (["in.png", "-o", "out.png", "-b", "moon"], "unknown backbone"),
        (["bad.png", "-o", "out.png"], "bad.png"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(cli, sheets, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    photo()
    photo("old.png")
    Path("bad.png").write_bytes(b"bad")
    code, _, stderr = cli("sheet", *arguments)
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1
    assert words in stderr
    assert sorted(os.listdir()) == ["bad.png", "in.png", "old.png"]
    assert sys.modules["ebr_engine.engine.restorer"].Restorer.made == []
