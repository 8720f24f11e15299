"""A journal vouches for what is there as told, and for nothing else."""

import json
import os
from pathlib import Path
from threading import Thread
from time import sleep

import pytest

from ebr_engine.jobs.files import Job
from ebr_engine.jobs.journal import NAME, Journal
from ebr_engine.media.decoding import MediaError


@pytest.fixture
def job(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "in.png").write_bytes(b"source")
    return Job(tmp_path / "in.png", tmp_path / "out" / "deep" / "in.png")


def finish(job, settings="s", content=b"result"):
    job.target.parent.mkdir(exist_ok=True)
    rename = Journal(job.target.parents[1]).commit(job, settings)
    (part := job.target.with_suffix(".part")).write_bytes(content)
    rename(part, job.target)


def finished(job, settings="s"):
    return Journal(job.target.parents[1]).finished(job, settings)


def test_it_knows_its_own_work_and_no_other(job):
    assert not finished(job)
    finish(job)
    assert finished(job)
    assert not finished(job, "other settings")
    assert not finished(Job(job.source, job.target, compare=job.target.with_name("compare.png")))
    os.rename(job.source.parent, moved := job.source.parent.with_name("moved"))
    assert finished(Job(moved / "in.png", moved / "out" / "deep" / "in.png"))


@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize("how", ["gone", "longer", "later"])
def test_files_that_have_changed_are_not_vouched_for(job, which, how):
    finish(job)
    path = getattr(job, which)
    if how == "gone":
        path.unlink()
    elif how == "longer":
        before = path.stat()
        path.write_bytes(path.read_bytes() + b"!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, (1, 1))
    assert not finished(job)


@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize("later", [5_000, 4_000_000, 1_700_000_000])
def test_a_change_of_equal_length_is_seen_however_soon_it_comes(job, which, later):
    os.utime(job.source, ns=(0, 1_750_000_000_123_456_789))
    finish(job)
    path = getattr(job, which)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + later))
    assert not finished(job)


@pytest.mark.parametrize("clock", [2 * 10**9, 10**9, 10**7, 10**6, 100])
@pytest.mark.parametrize("up", [False, True])
def test_a_copy_on_a_coarser_clock_is_the_same_file(job, clock, up):
    os.utime(job.source, ns=(0, 1_750_000_001_987_654_321))
    finish(job)
    for path in (job.source, job.target):
        time = path.stat().st_mtime_ns
        os.utime(path, ns=(0, (time // clock + up) * clock))
    assert finished(job)


def test_a_run_killed_before_the_renaming_has_finished_nothing(job, monkeypatch):
    finish(job, content=b"an earlier result")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(job, "new", b"result")
    assert job.target.read_bytes() == b"an earlier result"
    assert not finished(job, "new")


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_last_line_that_is_cut_short_counts_for_nothing_and_spoils_nothing(job, cut):
    finish(job)
    file = job.target.parents[1] / NAME
    file.write_bytes(file.read_bytes()[:-cut])
    assert finished(job) == (cut == 1)  # but the end of the line
    other = Job(job.source, job.target.with_name("other.png"))
    finish(other)
    assert finished(other)
    assert finished(job) == (cut == 1)


def test_a_journal_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(MediaError, match="no-resume"):
        Journal(tmp_path)


def test_the_latest_line_counts(job):
    finish(job, "a")
    finish(job, "b")
    assert not finished(job, "a")
    assert finished(job, "b")
    assert len(Path(job.target.parents[1] / NAME).read_text().splitlines()) == 2


def test_files_that_end_side_by_side_are_each_written_on_a_line(job, monkeypatch):
    folder = job.target.parent
    folder.mkdir()
    commit = Journal(folder.parent).commit(job, "s")
    write = os.write
    monkeypatch.setattr(os, "write", lambda *arguments: (sleep(0.01), write(*arguments))[1])
    parts = [folder / f"{index}.part" for index in range(8)]
    for part in parts:
        part.write_bytes(b"result")
    threads = [Thread(target=commit, args=(part, part.with_suffix(".png"))) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (folder.parent / NAME).read_bytes().split(b"\n")
    assert len(lines) == 9
    assert sorted(json.loads(line)["output"] for line in lines[:-1]) == [f"deep/{index}.png" for index in range(8)]
