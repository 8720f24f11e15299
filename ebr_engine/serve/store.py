"""The jobs of a server, in SQLite, and their files: a folder a job. What has been accepted survives the end of the process."""

import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.media.video.parts import PARTS

QUEUED, RUNNING, DONE, SKIPPED, FAILED, CANCELLED = "queued", "running", "done", "skipped", "failed", "cancelled"
OVER = (DONE, SKIPPED, FAILED, CANCELLED)
ATTEMPTS = 3  # a job that has ended the process so often is not tried again

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, state TEXT NOT NULL, name TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL, request TEXT NOT NULL, extra TEXT NOT NULL, created REAL NOT NULL,
    started REAL, finished REAL, attempts INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, error TEXT,
    outcome TEXT NOT NULL DEFAULT '{}'
)"""


class QueueFull(EbrError):
    """So many jobs wait that no more are taken."""


class StoreFull(EbrError):
    """The files of jobs that are not over leave no room for another."""


@dataclass(frozen=True)
class StoredJob:
    """One file to restore, as the database has it. Times are seconds since 1970; `source` and `target` lie in its folder."""

    number: int
    id: str
    state: str
    name: str  # what the client calls the file: for people, never a path
    source: str
    target: str
    request: dict[str, Any]
    extra: dict[str, Any]  # what an endpoint wants to have again
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    bytes: int = 0
    error: str | None = None
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def is_sheet(self) -> bool:
        """Whether every task is tried on a small version, to choose from, in place of restoring the file."""
        return bool(self.extra.get("sheet"))

    @property
    def has_result(self) -> bool:
        return bool(self.outcome.get("has_result"))

    @property
    def result_name(self) -> str:
        """What the result is called where it is downloaded."""
        stem = self.name.rpartition(".")[0] or self.name
        return f"{stem}_{'sheet' if self.is_sheet else 'restored'}{self.target.removeprefix('result')}"


class Store:
    """A folder with `jobs.sqlite` and `files/ID/`. Made for one process; any of its threads may call.

    `queue`: jobs that may wait. `limit`: bytes of all files. `keep`: seconds that a job's files stay after it is over.
    Opening puts jobs that were running when the last process ended back into the queue. Raises `EbrError` for a folder that
    another server uses, and OSError for one that cannot be written.
    """

    def __init__(self, folder: Path, queue: int = 64, limit: int = 20 << 30, keep: float = 24 * 3600):
        self.folder, self.queue, self.limit, self.keep = folder, queue, limit, keep
        self.files, self.incoming = folder / "files", folder / "incoming"
        for each in (folder, self.files, self.incoming):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self.arrived = threading.Condition()
        self._database = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None, timeout=1)
        self._database.row_factory = sqlite3.Row
        try:
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # outlives the process; a power cut may take the last moment
            self._database.execute(_TABLE)
            self._database.execute("CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number)")
        except sqlite3.OperationalError as error:
            self._database.close()
            raise EbrError(f"{folder}: another server uses this store, or it cannot be written ({error})") from None
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise EbrError(f"{folder / 'jobs.sqlite'}: is no store of jobs ({error})") from None
        self._recover()

    def _recover(self) -> None:
        """As the last process left it: half-written outputs and uploads go, what was running waits again."""
        for job in self._select("state = ?", RUNNING):
            given_up = job.attempts >= ATTEMPTS
            self.remove_outputs(job, but_parts=not given_up)
            if given_up:
                self.finish(job.id, FAILED, f"the server ended {ATTEMPTS} times while this was being restored")
            else:
                self._update(job.id, state=QUEUED)
        known = {job.id for job in self._select("1")}
        for left in [*self.incoming.iterdir(), *(each for each in self.files.iterdir() if each.name not in known)]:
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def receiving(self) -> Iterator[Path]:
        """An empty folder for files that come in; what is left in it at the end goes."""
        folder = self.incoming / secrets.token_hex(12)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, files: list[tuple[Path, str, str]], request: dict[str, Any], extra: dict[str, Any] | None = None) -> list[str]:
        """Queue (file, target's suffix, client's name for it) each; all or none. The files are moved. Returns the jobs' ids.

        Raises `QueueFull`, and `StoreFull` where even without the files of jobs that are over there is no room.
        """
        sizes = [path.stat().st_size for path, _, _ in files]
        with self._lock:
            if self.count(QUEUED) + len(files) > self.queue:
                raise QueueFull(f"{self.count(QUEUED)} jobs wait already, and at most {self.queue} may; try again later")
            self._make_room(sum(sizes))
            ids = [secrets.token_hex(12) for _ in files]
            for one, (path, _, _) in zip(ids, files):
                (self.files / one).mkdir(mode=0o700)
                path.replace(self.files / one / path.name)
            shared = json.dumps(request), json.dumps(extra or {}), time.time()
            rows = [
                (one, QUEUED, name[:200], path.name, f"result{suffix}", *shared, size)
                for one, (path, suffix, name), size in zip(ids, files, sizes)
            ]
            names = "id, state, name, source, target, request, extra, created, bytes"
            self._database.execute("BEGIN")
            self._database.executemany(f"INSERT INTO jobs ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")
        with self.arrived:
            self.arrived.notify_all()
        return ids

    def add_again(
        self, job: StoredJob, suffix: Callable[[Path], str], request: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> str:
        """Queue the file of another job once more, with the suffix that its result is to have; the new job's id."""
        with self.receiving() as folder:
            path = folder / job.source
            try:
                os.link(self.path(job, job.source), path)
            except FileNotFoundError:
                raise EbrError("this job's file is not kept any more; send it again") from None
            except OSError:  # a file system without links
                shutil.copyfile(self.path(job, job.source), path)
            return self.add([(path, suffix(path), job.name)], request, extra)[0]

    def get(self, id: str) -> StoredJob | None:
        return next(iter(self._select("id = ?", id)), None)

    def newest(self, limit: int = 100) -> list[StoredJob]:
        """The newest first."""
        return self._select("1 ORDER BY number DESC LIMIT ?", limit)

    def count(self, *states: str) -> int:
        marks = ", ".join("?" * len(states))
        with self._lock:
            return self._database.execute(f"SELECT count(*) FROM jobs WHERE state IN ({marks})", states).fetchone()[0]

    def before(self, job: StoredJob) -> int:
        """Jobs that wait or run ahead of this one."""
        with self._lock:
            query = "SELECT count(*) FROM jobs WHERE state IN (?, ?) AND number < ?"
            return self._database.execute(query, (QUEUED, RUNNING, job.number)).fetchone()[0]

    def claim(self) -> StoredJob | None:
        """The job that has waited longest, which runs from now on."""
        with self._lock:
            job = next(iter(self._select("state = ? ORDER BY number LIMIT 1", QUEUED)), None)
            if job is None:
                return None
            self._update(job.id, state=RUNNING, started=time.time(), attempts=job.attempts + 1)
            return self.get(job.id)

    def put_back(self, job: StoredJob) -> None:
        """A job that was stopped in good order waits again, at its old place; a clip's parts stay, to go on from."""
        self.remove_outputs(job, but_parts=True)
        with self._lock:
            self._update(job.id, state=QUEUED, started=None, attempts=job.attempts - 1)

    def finish(self, id: str, state: str, error: str | None = None, outcome: dict[str, Any] | None = None) -> None:
        """A job is over."""
        folder = self.files / id
        size = sum(each.stat().st_size for each in folder.iterdir()) if folder.is_dir() else 0
        with self._lock:
            self._update(id, state=state, finished=time.time(), error=error, outcome=json.dumps(outcome or {}), bytes=size)

    def cancel_queued(self, id: str) -> bool:
        """Cancel a job that has not begun; whether it had not."""
        with self._lock:
            job = self.get(id)
            if job is None or job.state != QUEUED:
                return False
            self.finish(id, CANCELLED)
            return True

    def delete(self, id: str) -> None:
        """Forget a job that is over, with its files."""
        with self._lock:
            self._database.execute("DELETE FROM jobs WHERE id = ?", (id,))
        shutil.rmtree(self.files / id, ignore_errors=True)

    def path(self, job: StoredJob, name: str) -> Path:
        """A file of a job; `name` is one that the store gave, never a client's."""
        return self.files / job.id / name

    def remove_outputs(self, job: StoredJob, but_parts: bool = False) -> None:
        """Everything of a job's folder but its source, and but the parts of a clip that is to go on from them."""
        folder = self.files / job.id
        for each in folder.iterdir() if folder.is_dir() else ():
            if each.name != job.source and not (but_parts and each.name.endswith(PARTS)):
                shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)

    def prune(self) -> None:
        """Forget jobs that have been over for longer than files are kept, and the oldest of the others while there is no room."""
        over = ", ".join("?" * len(OVER))
        for job in self._select(f"state IN ({over}) AND finished < ?", *OVER, time.time() - self.keep):
            self.delete(job.id)
        self._make_room(0, refuse=False)

    def used(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return self._database.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()[0]

    def _make_room(self, size: int, refuse: bool = True) -> None:
        over = self._select(f"state IN ({', '.join('?' * len(OVER))}) ORDER BY finished", *OVER)
        if refuse and self.used() - sum(job.bytes for job in over) + size > self.limit:
            raise StoreFull(f"the store has no room for {size} bytes; try again when other jobs are over")
        while over and self.used() + size > self.limit:
            self.delete(over.pop(0).id)

    def _select(self, where: str, *values: Any) -> list[StoredJob]:
        with self._lock:
            rows = self._database.execute(f"SELECT * FROM jobs WHERE {where}", values).fetchall()
        return [_job(dict(row)) for row in rows]

    def _update(self, id: str, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._database.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), id))


def _job(row: dict[str, Any]) -> StoredJob:
    return StoredJob(**{**row, **{name: json.loads(row[name]) for name in ("request", "extra", "outcome")}})
