"""A watched folder wakes its watcher by the system's events, or is looked at from time to time where there are none."""

import errno
import sys
import time

import pytest

from ebr_engine.jobs import wakeups


def test_network_mounts_are_told_by_the_table_of_mounts(tmp_path):
    table = tmp_path / "mounts"
    table.write_text(
        f"/dev/x / ext4 rw 0 0\nserver:/a {tmp_path}/far\\040away nfs4 rw 0 0\n//s/b {tmp_path}/win cifs rw 0 0\nshort\n"
    )
    assert wakeups.is_remote(tmp_path / "far away" / "deep", table)
    assert wakeups.is_remote(tmp_path / "win", table)
    assert not wakeups.is_remote(tmp_path / "far", table)
    assert not wakeups.is_remote(tmp_path, tmp_path / "no such table")


def test_waiting_ends_with_an_event_long_before_the_next_look(tmp_path):
    pytest.importorskip("watchfiles")
    waiting = wakeups.Wakeups(tmp_path)
    assert not waiting.why_polling
    (tmp_path / "deep").mkdir()  # before the first wait, as what comes while files are restored
    began = time.monotonic()
    waiting.wait(None, lambda: time.monotonic() - began > 30)
    assert time.monotonic() - began < 20
    waiting.close()


def test_a_system_without_watches_to_give_is_polled(tmp_path, monkeypatch):
    watchfiles = pytest.importorskip("watchfiles")

    def watch(*_, **__):
        raise OSError(errno.ENOSPC, "OS file watch limit reached")
        yield

    monkeypatch.setattr(watchfiles, "watch", watch)
    assert "OS file watch limit reached" in wakeups.Wakeups(tmp_path).why_polling


def test_without_events_it_looks_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    waiting = wakeups.Wakeups(tmp_path)
    assert "pip install 'ebr-engine[watch]'" in waiting.why_polling
    began = time.monotonic()
    waiting.wait(0.3, lambda: False)
    assert 0.3 <= time.monotonic() - began < wakeups.EVERY
    assert wakeups.Wakeups(tmp_path, 0.1).why_polling == "as asked for"
