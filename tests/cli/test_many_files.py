"""Many files in one run: manifests, what an earlier run finished, what happens when something goes wrong half-way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ebr_engine.jobs.journal import NAME
from ebr_engine.media import images
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from tests.cli.conftest import Planned


def picture(path, value=0.25, size=(6, 10)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(np.full((*size, 3), value, np.float32)))


def outputs(folder="out"):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def tasks(engine, monkeypatch):
    """The stand-in engine with every task of mini; its plans are counted."""
    engine.planned = []

    def plan(self, task=None, prompt=None, **settings):
        self.planned.append((task, prompt))
        return Planned(task=task, prompt=prompt)

    monkeypatch.setattr(engine, "plan", plan)
    return engine


def test_a_manifest_names_inputs_outputs_and_tasks(cli, tasks):
    for name in ("a.png", "b.png", "deep/c.png"):
        picture(Path("work", name))
    Path("work/own.safetensors").write_bytes(b"x")
    Path("work/list.csv").write_text(
        "input,output,task\na.png,../done/first.png,rain\nb.png,../done/second.jpg,\ndeep/c.png,mine/,own.safetensors:0.5\n"
        "a.png,../done/third.png,rain\n"
    )
    code, _, stderr = cli("restore", "--manifest", "work/list.csv", "--task", "haze")
    assert (code, stderr) == (0, "")
    assert outputs("done") == ["first.png", "second.jpg", "third.png"]
    assert outputs("work/mine") == ["c.png"]
    assert tasks.planned == [("rain", None), ("haze", None), (None, [(Path("work/own.safetensors"), 0.5)])]  # each once
    assert len(tasks.made) == 1
    assert [call["task"] for call in tasks.calls] == ["rain", "haze", None, "rain"]


def test_a_manifest_of_json_lines_may_leave_outputs_to_a_folder(cli, tasks):
    for name in ("a.png", "deep/b.png", "deep/c.png"):
        picture(Path("work", name))
    Path("work/list.jsonl").write_text('{"input": "deep/*.png", "output": "x/"}\n\n{"input": "deep/b.png", "task": "snow"}\n')
    assert cli("restore", "--manifest", "work/list.jsonl", "-o", "out", "-t", "haze")[0] == 0
    assert outputs() == [NAME, "deep/b.png", "x/b.png", "x/c.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("input,output\nnope.png,x.png\n", ["list.csv:2", "nope.png", "no such file"]),
        ("input,output\na.png,x.png\na.png,x.png\n", ["a.png", "both", "x.png"]),
        ("input,output\na.png,a.png\n", ["a.png", "is an input"]),
        ("input,output\na.png,\n", ["list.csv:2", "no output", "--out"]),
        ("input,output,task\na.png,x.png,fog\n", ["fog"]),
        ("input,output,task\na.png,x.png,own.safetensors\n", ["own.safetensors", "no such prompt"]),
        ("input,output\na.png,x.bmp\n", ["list.csv:2", ".bmp"]),
        ("file,output\na.png,x.png\n", ["list.csv:1", "'file'", "input"]),
    ],
)
def test_what_a_manifest_gets_wrong_is_told_with_its_line_before_any_work(cli, tasks, content, words):
    picture("a.png")
    Path("list.csv").write_text(content)
    code, stdout, stderr = cli("restore", "--manifest", "list.csv", "--task", "haze")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    for word in words:
        assert word in stderr
    assert tasks.made == []
    assert sorted(os.listdir()) == ["a.png", "list.csv"]


def test_finished_outputs_are_left_out_of_the_next_run(cli, tasks):
    for name in ("a.png", "b.png"):
        picture(Path("in", name))
    run = ["restore", "in", "-o", "out", "--task", "haze"]
    assert cli(*run)[0] == 0
    before = {name: os.stat(Path("out", name)).st_mtime_ns for name in ("a.png", "b.png")}
    code, stdout, stderr = cli(*run)
    assert (code, stderr) == (0, "")
    assert "2 finished before" in stdout
    assert len(tasks.made) == 1  # the second run loads no model
    picture("in/c.png")
    code, stdout, _ = cli(*run)
    assert (code, len(tasks.calls)) == (0, 3)
    assert "1 of 1 restored, 2 finished before" in stdout
    assert before == {name: os.stat(Path("out", name)).st_mtime_ns for name in before}


@pytest.mark.parametrize("change", ["settings", "input", "output", "task", "no resume"])
def test_what_has_changed_is_never_taken_for_finished(cli, tasks, change):
    picture("in/a.png")
    run = ["restore", "in", "-o", "out", "--task", "haze"]
    assert cli(*run)[0] == 0
    if change == "input":
        picture("in/a.png", 0.75)
        os.utime("in/a.png", (1, 1))
    elif change == "output":
        picture("out/a.png", size=(3, 3))
    else:
        run += {"settings": ["--seed", "7"], "task": ["--task", "rain"], "no resume": ["--no-resume"]}[change]
    code, _, stderr = cli(*run)
    assert code == 2
    assert "out/a.png: exists" in stderr
    assert "--overwrite" in stderr
    assert cli(*run, "--overwrite")[0] == 0
    assert len(tasks.calls) == 2
    assert read_image("out/a.png").width == 10


def test_a_missing_output_is_made_again(cli, tasks):
    for name in ("a.png", "b.png"):
        picture(Path("in", name))
    run = ["restore", "in", "-o", "out", "--task", "haze"]
    assert cli(*run)[0] == 0
    os.unlink("out/a.png")
    assert cli(*run)[0] == 0
    assert len(tasks.calls) == 3
    assert outputs() == [NAME, "a.png", "b.png"]


def test_a_changed_prompt_file_is_another_setting(cli, tasks):
    picture("in/a.png")
    Path("p.safetensors").write_bytes(b"one")
    run = ["restore", "in", "-o", "out", "--prompt", "p.safetensors"]
    assert cli(*run)[0] == 0
    Path("p.safetensors").write_bytes(b"two")
    assert cli(*run)[0] == 2
    Path("p.safetensors").write_bytes(b"one")
    assert cli(*run)[0] == 0
    assert len(tasks.calls) == 1


def test_json_is_an_object_a_file_and_one_for_all(cli, tasks):
    picture("in/a.png")
    picture("in/c.png")
    Path("in/b.png").write_bytes(b"bad")
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze", "--json")
    assert code == 1
    assert stderr.count("error: ") == 1
    *files, last = (json.loads(line) for line in stdout.splitlines())
    assert sorted((each["input"], each["status"]) for each in files) == [
        ("in/a.png", "done"),
        ("in/b.png", "failed"),
        ("in/c.png", "done"),
    ]
    assert all((each["width"], each["height"], each["bits"]) == (10, 6, 8) for each in files if each["status"] == "done")
    assert last["summary"] == {"done": 2, "failed": 1, "skipped": 0, "not_tried": 0}
    assert "not a PNG" in last["failures"][0]["error"]
    assert json.loads(cli("restore", "in/a.png", "-o", "out", "-t", "haze", "--json")[1])["summary"]["skipped"] == 1


def test_the_end_of_a_run_tells_what_failed_and_why(cli, tasks):
    for index in range(20):
        picture(f"in/{index:02}.png")
    Path("in/03.png").write_bytes(b"")
    Path("in/11.png").write_bytes(b"bad")
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert code == 1
    *_, counts, first, second = stdout.splitlines()
    assert counts.startswith("18 of 20 restored, 2 failed")
    assert first.split(maxsplit=1) == ["in/03.png", "the file is empty"]
    assert second.startswith("  in/11.png  not a PNG")
    assert stderr.count("error: ") == 2


def test_fail_fast_ends_at_the_first_failure(cli, tasks):
    for name in ("a.png", "c.png", "d.png"):
        picture(Path("in", name))
    Path("in/b.png").write_bytes(b"bad")
    code, stdout, _ = cli("restore", "in", "-o", "out", "--task", "haze", "--fail-fast")
    assert code == 1
    assert "1 of 4 restored, 1 failed, 2 not tried" in stdout
    assert outputs() == [NAME, "a.png"]


def test_a_full_disk_ends_the_run_in_one_line_with_nothing_half_written(cli, tasks, monkeypatch):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(Path("in", name))

    parts = []

    def full(path, *more, original=open):
        if str(path).endswith(".part"):
            parts.append(path)
            if len(parts) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *more)

    monkeypatch.setattr(images, "open", full, raising=False)
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert code == 1
    assert stderr.splitlines() == ["error: in/b.png: out/b.png: No space left on device"]
    assert "1 of 4 restored, 1 failed, 2 not tried" in stdout
    assert outputs() == [NAME, "a.png"]


def test_an_input_that_vanishes_is_one_failure(cli, tasks, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        picture(Path("in", name))

    def restore(self, image, original=tasks.restore, **settings):
        Path("in/c.png").unlink(missing_ok=True)
        return original(self, image, **settings)

    monkeypatch.setattr(tasks, "restore", restore)
    code, stdout, stderr = cli("restore", "in", "-o", "out", "--task", "haze")
    assert (code, stderr) == (1, "error: in/c.png: No such file or directory\n")
    assert "2 of 3 restored, 1 failed" in stdout


def test_an_unexpected_error_is_not_hidden(cli, tasks, monkeypatch):
    picture("in/a.png")

    def broken(self, image, **settings):
        raise TypeError("a bug")

    monkeypatch.setattr(tasks, "restore", broken)
    with pytest.raises(TypeError, match="a bug"):
        cli("restore", "in", "-o", "out", "--task", "haze")


SCRIPT = """
import sys, types, time
sys.path.insert(0, {folder!r})
import conftest
class Slow(conftest.FakeRestorer):
    def restore(self, image, *, plan, callback, **settings):
        for index in range(10):
            time.sleep(0.05)
            callback(index + 1, 10)
        return 1 - image
fake = types.ModuleType("ebr_engine.engine.restorer")
fake.Restorer = Slow
sys.modules["ebr_engine.engine.restorer"] = fake
from ebr_engine.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_stops_in_order_and_the_same_command_goes_on(tmp_path):
    for index in range(4):
        picture(tmp_path / f"in/{index}.png")
    command = [sys.executable, "-c", SCRIPT.format(folder=str(Path(__file__).parent))]
    command += ["restore", "in", "-o", "out", "--task", "haze"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "in/0.png -> out/0.png" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    stopping, told = stderr.splitlines()
    assert "Ctrl-C again" in stopping
    assert told.startswith("error: interrupted: 1 of 4 files")
    assert "the same command goes on" in told
    assert outputs(tmp_path / "out") == [NAME, "0.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 3 restored, 1 finished before" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_second_ctrl_c_quits_at_once(tmp_path):
    picture(tmp_path / "in.png")
    script = SCRIPT.format(folder=str(Path(__file__).parent)).replace(
        "time.sleep(0.05)", "print('busy', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, "restore", "in.png", "-o", "out.png", "--task", "haze"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - began < 10
    process.communicate()
    assert not (tmp_path / "out.png").exists()
