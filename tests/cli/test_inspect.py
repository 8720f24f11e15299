"""What files hold is listed, told when it is lost, and refused to be lost when that is asked for."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ebr_engine.media.images import read_image
from tests.media.picture_maker import FILES, animation, encoded, smooth, two_pages, ultra_hdr


def test_inspect_lists_everything_with_its_fate(cli):
    Path("a.jpg").write_bytes(ultra_hdr())
    code, stdout, _ = cli("inspect", "a.jpg", "--to", "webp")
    assert code == 0
    for words in ("a.jpg: jpeg, to webp", "gain map", "not kept", "iptc", "converted: to XMP", "exif"):
        assert words in stdout
    code, stdout, _ = cli("inspect", "a.jpg", "--json")
    found = json.loads(stdout)
    assert (found["kind"], found["to"]) == ("jpeg", "jpeg")
    assert {each["fate"] for each in found["holdings"]} == {"kept"}
    assert next(each for each in found["holdings"] if each["kind"] == "iptc")["detail"] == "keywords, city"


def test_inspect_strict_is_an_exit_code(cli):
    Path("a.jpg").write_bytes(ultra_hdr())
    assert cli("inspect", "a.jpg", "--strict")[0] == 0
    assert cli("inspect", "a.jpg", "--to", ".png", "--strict")[0] == 1


@pytest.mark.parametrize(("arguments", "words"), [(["a.jpg", "--to", "doc"], "doc"), (["no.jpg"], "no.jpg"), (["."], "folder")])
def test_what_cannot_be_inspected_is_told_in_one_line(cli, arguments, words):
    Path("a.jpg").write_bytes(encoded("JPEG"))
    code, stdout, stderr = cli("inspect", *arguments)
    assert code in (1, 2)
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert words in stderr


def test_inspect_of_a_bare_file_says_so(cli):
    Path("a.png").write_bytes(encoded("PNG"))
    assert "nothing beside its pixels" in cli("inspect", "a.png")[1]


def test_restore_warns_once_of_all_that_is_lost(cli, engine):
    Path("a.png").write_bytes(FILES["text", "png"]())
    code, _, stderr = cli("restore", "a.png", "-o", "out.jpg", "--task", "haze")
    assert code == 0
    assert stderr.count("warning") == stderr.count("\n") == 1
    assert "a.png: not kept: text (workflow" in stderr
    code, stdout, stderr = cli("restore", "a.png", "-o", "same.png", "--task", "haze", "--json")
    assert stderr == ""
    told = json.loads(stdout.splitlines()[0])["holdings"]
    assert [each["fate"] for each in told] == ["kept", "kept"]


def test_strict_fails_the_file_and_writes_nothing(cli, engine):
    Path("a.png").write_bytes(FILES["text", "png"]())
    code, _, stderr = cli("restore", "a.png", "-o", "out.jpg", "--task", "haze", "--strict")
    assert code == 1
    assert "--strict" in stderr
    assert "text" in stderr
    assert not os.path.exists("out.jpg")
    assert cli("restore", "a.png", "-o", "out.png", "--task", "haze", "--strict")[0] == 0


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp")])
def test_an_animation_is_restored_to_its_own_kind(cli, engine, kind, suffix):
    os.mkdir("in")
    Path(f"in/a{suffix}").write_bytes(animation(kind))
    code, _, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert (code, stderr) == (0, "")
    with Image.open(f"in/a{suffix}") as before, Image.open(f"out/a{suffix}") as after:
        assert before.n_frames == after.n_frames == 3
        assert before.info.get("loop") == after.info.get("loop") == 2
        for one, other in zip(ImageSequence.Iterator(before), ImageSequence.Iterator(after)):
            assert one.info.get("duration") == other.info.get("duration")
            inverted = 255 - np.asarray(one.convert("RGB")).astype(int)
            assert np.abs(inverted - np.asarray(other.convert("RGB"))).mean() < 12  # a palette, or WebP's loss


def test_every_page_of_a_tiff_is_restored(cli, engine):
    Path("a.tif").write_bytes(two_pages())
    assert cli("restore", "a.tif", "-o", "out.tif", "--task", "haze")[0] == 0
    assert len(engine.calls) == 2
    with Image.open("out.tif") as image:
        np.testing.assert_array_equal(np.asarray(image), 255 - smooth())
        image.seek(1)
        np.testing.assert_array_equal(np.asarray(image), smooth(20, 30))
    code, _, stderr = cli("restore", "a.tif", "-o", "out.png", "--task", "haze")
    assert code == 0
    assert "2 pages" in stderr
    assert ".tif holds all" in stderr


def test_a_folder_says_what_it_left_out(cli, engine):
    os.mkdir("in")
    for name in ("a.jpg", "b.jfif", "e"):
        Path("in", name).write_bytes(encoded("JPEG"))
    Path("in/d.bmp").write_bytes(encoded("BMP"))
    for name in ("notes.txt", "more.txt", "x.doc"):
        Path("in", name).write_text("hello")
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert code == 0
    assert stderr == "note: 3 files of other kinds left out (txt 2, doc 1)\n"
    assert "4 of 4 restored" in stdout
    assert sorted(os.listdir("out")) == [".ebr-journal.jsonl", "a.jpg", "b.jfif", "d.bmp.png", "e.jpg"]
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert "4 finished before" in stdout


def test_the_quality_of_a_jpeg_is_its_own_unless_asked_for(cli, engine):
    Path("a.jpg").write_bytes(encoded("JPEG", quality=60))
    cli("restore", "a.jpg", "-o", "own.jpg", "--task", "haze")
    cli("restore", "a.jpg", "-o", "asked.jpg", "--task", "haze", "--quality", "95")
    assert read_image("own.jpg").coding.quality == 60
    assert read_image("asked.jpg").coding.quality == 95
