"""A watched folder: what counts as whole, what is done once and what again, and how it ends."""

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
import pyvips

from ebr_engine.jobs import watch
from ebr_engine.jobs.journal import NAME
from ebr_engine.jobs.progress import Progress
from ebr_engine.media.images import Picture, read_image, write_image
from ebr_engine.request import RestoreRequest


def picture(path, value=0.25, size=(6, 10)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.float32)
    pixels[0, : size[1] // 2] += 0.01 * len(Path(path).name)  # so that files differ in length
    write_image(path, Picture(pixels))
    return Path(path)


def outputs(folder="out"):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


class Told(Progress):
    """Keeps what is told."""

    def __init__(self):
        self.outcomes, self.lines, self.ends = [], [], []

    def finish(self, outcome):
        self.outcomes.append(outcome)

    def line(self, text):
        self.lines.append(text)

    def error(self, text, kind="error"):
        self.lines.append(f"{kind}: {text}")

    def summary(self, *counts):
        self.ends.append(counts)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Bench:
    """A watched folder `in`, whose results go to `out`, on a clock of its own."""

    def __init__(self, engine, **options):
        Path("in").mkdir(exist_ok=True)
        Path("out").mkdir(exist_ok=True)
        self.engine, self.told, self.clock = engine, Told(), Clock()
        request = RestoreRequest(task="haze")
        self.watch = watch.Watch(engine(), Path("in"), Path("out"), request, self.told, clock=self.clock, **options)

    def pass_(self, seconds=0.0):
        """Look after so many seconds; the names of the files that were restored or failed."""
        before = len(self.told.outcomes)
        self.clock.now += seconds
        while self.watch.turn():
            pass
        return [str(outcome.job.source.relative_to("in")) for outcome in self.told.outcomes[before:]]


@pytest.fixture
def bench(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **options: Bench(engine, **options)


def test_a_file_counts_when_it_has_not_changed_for_some_seconds(bench):
    one = bench(settle=2)
    whole = picture("whole.png").read_bytes()
    Path("in/a.png").write_bytes(whole[:40])
    assert one.pass_() == one.pass_(1.9) == []
    Path("in/a.png").write_bytes(whole)  # the rest comes: the seconds begin anew
    assert one.pass_(0.1) == one.pass_(1.9) == []
    assert one.watch.folder.rest == pytest.approx(0.1)
    assert one.pass_(0.1) == ["a.png"]
    assert one.pass_(100) == []
    assert one.watch.folder.rest is None
    np.testing.assert_allclose(read_image("out/a.png").pixels[1:], 0.75, atol=0.01)


def test_files_come_in_order(bench):
    one = bench()
    for name in ("z.png", "deep/y.png", "x.png"):
        picture(f"in/{name}")
        one.pass_(0.5)
    order = [name for _ in range(8) for name in one.pass_(0.5)]
    assert order == ["z.png", "deep/y.png", "x.png"]
    assert outputs() == [NAME, "deep/y.png", "x.png", "z.png"]


def test_what_is_none_or_not_finished_is_left_alone(bench):
    one = bench()
    data = picture("whole.png").read_bytes()
    for name in ("a.png.part", "b.jpg.crdownload", ".hidden.png", "c.png~"):
        Path("in", name).write_bytes(data)
    Path("in/empty.png").touch()
    Path("in/notes.txt").write_text("no picture")
    Path("in/nowhere.png").symlink_to("gone.png")
    one.pass_()
    assert one.pass_(10) == []
    assert one.told.lines == []
    assert one.watch.folder.rest is None  # an empty file is not waited for: filling it changes it


def test_moves_renames_and_deletions(bench):
    one = bench()
    picture("in/gone.png")
    picture("in/a.png")
    old = picture("elsewhere.png")
    os.utime(old, (1, 1))  # moved in with a time of long ago
    one.pass_()
    Path("in/gone.png").unlink()
    old.rename("in/moved.png")
    assert one.pass_(2) == ["a.png"]
    Path("in/a.png").rename("in/b.png")
    assert one.pass_(2) == ["moved.png"]
    assert one.pass_(2) == ["b.png"]
    Path("in/b.png").unlink()
    assert one.pass_(2) == []
    assert outputs() == [NAME, "a.png", "b.png", "moved.png"]
    assert not one.watch.failed


def test_a_file_that_vanishes_while_its_turn_comes_is_no_failure(bench, monkeypatch):
    one = bench()
    for name in "abc":
        picture(f"in/{name}.png")
    one.pass_()

    def restore(self, image, original=one.engine.restore, **settings):
        Path("in/c.png").unlink(missing_ok=True)
        return original(self, image, **settings)

    monkeypatch.setattr(one.engine, "restore", restore)
    assert one.pass_(2) == ["a.png", "b.png"]
    assert one.told.lines == ["in/c.png is gone"]


def test_a_changed_file_is_restored_again_and_only_that(bench):
    one = bench()
    picture("in/a.png")
    picture("in/b.png")
    one.pass_()
    one.pass_(2)
    picture("in/a.png", 0.5, size=(80, 120))
    assert one.pass_() == []
    assert one.pass_(2) == ["a.png"]
    assert read_image("out/a.png").pixels.shape == (80, 120, 3)


def test_a_change_of_equal_length_is_restored_again_though_it_comes_at_once(bench):
    one = bench(settle=0)
    for value in (50, 120):
        flat = pyvips.Image.black(64, 48, bands=3).linear(1, value).cast("uchar")
        flat.write_to_file("in/a.tif", compression="none")
        assert one.pass_(0.1) == ["a.tif"]
    np.testing.assert_allclose(read_image("out/a.tif").pixels, 1 - 120 / 255, atol=0.01)


def test_what_somebody_put_into_the_output_folder_is_not_replaced(bench):
    one = bench()
    kept = picture("out/a.png", 0.9).read_bytes()
    picture("in/a.png")
    one.pass_()
    assert one.pass_(2) == ["a.png"]
    assert "out/a.png: exists; replace it with --overwrite" in one.told.outcomes[0].error
    assert Path("out/a.png").read_bytes() == kept
    picture("in/b.png")
    one.pass_()
    one.pass_(2)
    edited = picture("out/b.png", 0.9, size=(60, 90)).read_bytes()  # our own result, changed by its owner
    picture("in/b.png", 0.5, size=(80, 120))
    one.pass_()
    assert one.pass_(2) == ["b.png"]
    assert Path("out/b.png").read_bytes() == edited


def test_a_bad_file_fails_alone_and_is_tried_again_when_it_changes(bench):
    one = bench()
    whole = picture("whole.png").read_bytes()
    Path("in/a.png").write_bytes(whole[:40])
    picture("in/b.png")
    one.pass_()
    assert sorted(one.pass_(2)) == ["a.png", "b.png"]
    assert list(map(str, one.watch.failed)) == ["in/a.png"]
    assert one.pass_(100) == []
    Path("in/a.png").write_bytes(whole)
    one.pass_()
    assert one.pass_(2) == ["a.png"]
    assert not one.watch.failed


def test_an_earlier_run_is_gone_on_with(bench):
    picture("in/a.png")
    first = bench()
    first.pass_()
    first.pass_(2)
    picture("in/b.png")
    second = bench()
    second.pass_()
    assert second.pass_(2) == ["b.png"]
    assert second.watch.before == 1


def test_a_full_disk_is_waited_for(bench, monkeypatch):
    one = bench()
    picture("in/a.png")
    picture("in/b.png")
    one.pass_()
    from ebr_engine.jobs import pictures

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.png")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write", full)
        one.pass_(2)
    assert one.watch.full
    assert sorted(one.pass_(60)) == ["a.png", "b.png"]
    assert outputs() == [NAME, "a.png", "b.png"]
    assert not one.watch.failed


def test_the_whole_folder_is_not_lost_to_one_that_cannot_be_read(bench, monkeypatch):
    one = bench()
    picture("in/a.png")
    picture("in/locked/b.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    one.pass_()
    assert one.pass_(2) == ["a.png"]
    assert one.told.lines == ["warning: in/locked: cannot be read: Permission denied"]


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        (("gone", "out"), "gone: no such folder"),
        (("file.png", "out"), "file.png: is a file; watch a folder"),
        (("in", "file.png"), "file.png: is a file; name a folder"),
        (("in", "in"), "in: holds the watched folder"),
        (("in", "."), ".: holds the watched folder"),
    ],
)
def test_impossible_folders_are_refused(cli, engine, folders, why):
    Path("in").mkdir()
    picture("file.png")
    code, stdout, stderr = cli("watch", folders[0], "-o", folders[1], "--task", "haze")
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {why}")
    assert len(stderr.splitlines()) == 1
    assert not engine.made


def test_a_task_is_asked_for_before_any_file_comes(cli, engine):
    Path("in").mkdir()
    code, _, stderr = cli("watch", "in", "-o", "out")
    assert code == 2
    assert "neither --task nor --prompt" in stderr
    code, _, stderr = cli("watch", "in", "-o", "out", "--task", "hase")
    assert code == 2
    assert "unknown task 'hase'" in stderr


SCRIPT = """
import sys, types, time
sys.path.insert(0, {folder!r})
import conftest
class Slow(conftest.FakeRestorer):
    def restore(self, image, *, plan, callback, **settings):
        for index in range(4):
            time.sleep({seconds})
            callback(index + 1, 4)
        return 1 - image
fake = types.ModuleType("ebr_engine.engine.restorer")
fake.Restorer = Slow
sys.modules["ebr_engine.engine.restorer"] = fake
from ebr_engine.cli import main
main()
"""


def started(folder, *more, seconds=0.01):
    """The command at work on `folder`/in."""
    script = SCRIPT.format(folder=str(Path(__file__).parent), seconds=seconds)
    command = [sys.executable, "-c", script, "watch", "in", "-o", "out", "--task", "haze", "--settle", "0.3", *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path, sign):
    picture(tmp_path / "in/a.png")
    process = started(tmp_path)
    assert process.stdout.readline().startswith("watching in")
    assert "in/a.png -> out/a.png" in process.stdout.readline()
    picture(tmp_path / "in/deep/b.png")
    assert "in/deep/b.png -> out/deep/b.png" in process.stdout.readline()
    process.send_signal(sign)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopping" in stderr
    assert len(stderr.splitlines()) == 1
    assert stdout.splitlines()[-1] == "stopped; the same command goes on"
    assert outputs(tmp_path / "out") == [NAME, "a.png", "deep/b.png"]


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_signal_in_the_middle_of_a_file_leaves_nothing_half_written(tmp_path):
    picture(tmp_path / "in/a.png")
    process = started(tmp_path, "--json", "--poll", "0.2", seconds=2)
    while not (tmp_path / "out" / ".ebr-journal.lock").exists():
        time.sleep(0.1)
    time.sleep(1.5)  # within the first step, or before it
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(stdout)["summary"] == {"done": 0, "failed": 0, "skipped": 0, "not_tried": 0}
    assert not (tmp_path / "out").exists() or outputs(tmp_path / "out") == []


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_kill_loses_nothing(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"in/{name}.png")
    process = started(tmp_path, seconds=0.05)
    process.stdout.readline()
    assert "in/a.png" in process.stdout.readline()
    process.kill()
    process.communicate()
    (tmp_path / "out/.ebr-b.png.part").write_bytes(b"left by the kill")
    again = started(tmp_path)
    lines = [again.stdout.readline() for _ in range(2)]
    assert not any("in/a.png" in line for line in lines)
    while "in/d.png" not in lines[-1]:
        lines.append(again.stdout.readline())
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=30)
    assert outputs(tmp_path / "out") == [NAME, "a.png", "b.png", "c.png", "d.png"]
