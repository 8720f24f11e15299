"""The way of a newcomer: homes, suggestions, clean pictures, two runs at once, what killed runs leave, help that is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.engine.classify import Diagnosis
from ebr_engine.jobs.journal import LOCK, Journal
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.prompts.catalogue import TASKS


def picture(path, value=0.25, size=(6, 10)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(np.full((*size, 3), value, np.float32)))


@pytest.fixture
def clean(monkeypatch):
    """Auto sees nothing to repair."""
    nothing = Diagnosis(dict.fromkeys(TASKS, 0.1))
    monkeypatch.setattr("ebr_engine.engine.classify.diagnose", lambda pictures: nothing)


def test_a_clean_picture_is_left_out_not_failed(cli, engine, clean):
    picture("in.png")
    code, stdout, stderr = cli("restore", "in.png", "-o", "out.png", "--task", "auto", "--json")
    assert (code, stderr) == (0, "")
    (one, *_) = map(json.loads, stdout.splitlines())
    assert one["status"] == "skipped"
    assert "nothing to repair" in one["note"]
    assert "output" not in one
    assert not Path("out.png").exists()


def test_a_clean_picture_is_copied_where_that_is_asked_for(cli, engine, clean):
    picture("in/a.png")
    picture("in/b.png", 0.5)
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "auto", "--copy-clean")
    assert (code, stderr) == (0, "")
    assert "copied" in stdout
    for name in ("a.png", "b.png"):
        assert Path("out", name).read_bytes() == Path("in", name).read_bytes()
    assert engine.calls == []
    code, stdout, _ = cli("restore", "in", "-o", "out", "--task", "auto", "--copy-clean")
    assert "2 finished before" in stdout


def test_the_users_folder_is_found_everywhere(cli, engine, monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    picture(home / "in.png")
    Path(home / "p.safetensors").write_bytes(b"x")
    assert cli("restore", "~/in.png", "-o", "~/out.png", "--prompt", "~/p.safetensors")[0] == 0
    assert (home / "out.png").exists()
    (home / "list.csv").write_text("input,output,task\n~/in.png,listed.png,haze\n")
    assert cli("restore", "--manifest", "~/list.csv", "-o", "~/more")[0] == 0
    assert (home / "more" / "listed.png").exists()
    assert not Path("~").exists()


def test_standard_output_is_no_place_for_pictures(cli, engine):
    picture("in.png")
    code, _, stderr = cli("restore", "in.png", "-o", "-", "--task", "haze")
    assert code == 2
    assert "standard output" in stderr
    assert not Path("-").exists()


@pytest.mark.parametrize(("wrong", "meant"), [("Haze", "haze"), ("rian", "rain"), ("low-light", "lowlight")])
def test_a_task_that_is_misspelt_gets_a_suggestion(cli, engine, wrong, meant):
    picture("in.png")
    code, _, stderr = cli("restore", "in.png", "-o", "out.png", "--task", wrong)
    assert code == 2
    assert f"did you mean {meant}?" in stderr


def test_two_runs_do_not_write_into_one_folder(cli, engine):
    picture("in/a.png")
    with Journal(Path("out")).locked():
        code, _, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
        assert (code, engine.calls) == (2, [])
        assert "another run is writing into this folder" in stderr
    assert cli("restore", "in", "-o", "out", "--task", "haze")[0] == 0
    assert not Path("out", LOCK).exists()


def test_what_a_killed_run_left_half_written_goes_with_the_next(cli, engine):
    picture("in/a.png")
    Path("out/deep").mkdir(parents=True)
    for part in ("out/.ebr-0123.part", "out/deep/.ebr-4567.part"):
        Path(part).write_bytes(b"half")
    assert cli("restore", "in", "-o", "out", "--task", "haze")[0] == 0
    assert not list(Path("out").rglob("*.part"))


def test_a_manifest_may_ask_for_each_file(cli, engine):
    picture("a.png")
    Path("list.csv").write_text("input,output,strength,seed,steps\na.png,x.png,0.5,7,3\na.png,y.png,,,\n")
    assert cli("restore", "--manifest", "list.csv", "--task", "haze")[0] == 0
    first, second = engine.calls
    assert (first["strength"], first["seed"], first["steps"]) == (0.5, 7, 3)
    assert (second["strength"], second["seed"], second["steps"]) == (1.0, 42, None)


@pytest.mark.parametrize("more", [["--preview", "--yes"], []])
def test_a_rate_of_frames_holds_for_the_preview_and_for_auto(cli, engine, monkeypatch, more):
    monkeypatch.setattr(
        "ebr_engine.engine.classify.diagnose", lambda pictures: Diagnosis(dict.fromkeys(TASKS, 0.0) | {"haze": 1.0})
    )
    for index in range(8):
        picture(f"frames/{index:03}.png", 0.1 * index, size=(16, 16))
    asked = ["restore", "frames", "-o", "clip.mkv", "--fps", "1", "--start", "4", "--task", "auto", *more]
    assert cli(*asked)[0] == 0
    from ebr_engine.media.video import open_video

    with open_video("clip.mkv") as reader:
        assert len(list(reader)) == 4


def test_half_precision_can_be_asked_for(cli, engine):
    picture("in.png")
    assert cli("restore", "in.png", "-o", "out.png", "--task", "haze", "--precision", "fp16")[0] == 0
    assert engine.made[0]["precision"] == "fp16"


def test_help_tells_what_is_so(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    build = cli("build", "--help")[1]
    assert "auto looks at each" not in build
    assert "[default: residual]" in build
    for command in ("cache-text", "train"):
        assert re.search(r"--model +-m ", cli(command, "--help")[1])
    bench = cli("bench", "--help")[1]
    assert all(option in bench for option in ("--revision", "--context", "--vae"))
    for command in ((), ("build",), ("restore",), ("prompts",), ("prompts", "list")):
        assert "<bool>" not in cli(*command, "--help")[1]


def test_paths_are_not_cut_for_a_program(cli):
    rows = cli("prompts", "list")[1].splitlines()
    assert all(row.rstrip().endswith(".safetensors") for row in rows[1:])


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "ebr_engine", "--version"], capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("ebr-engine ")


def test_the_demo_gives_inputs_to_try_commands_on(cli):
    code, stdout, _ = cli("demo", "--inputs", "photos")
    assert code == 0
    assert sorted(os.listdir("photos")) == ["haze.jpg", "lowlight.jpg", "rain.jpg"]
    assert "ebr-engine restore photos/haze.jpg" in stdout
    assert read_image("photos/rain.jpg").width > 100
