"""A folder that restores what is put into it: each file once it is whole, in the order in which they came.

What the folder holds, a look at it says, not an event: so it is the same whether files are written, moved in, renamed or
deleted, by this machine or by another, while this runs or while it does not. What is finished, the journal of the output
folder says, as for `ebr-engine restore`: after a kill the same command goes on.
"""

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebr_engine.backbones.registry import medium_of
from ebr_engine.errors import EbrError, one_line
from ebr_engine.jobs.files import Job, check_jobs, check_writable, pair_found, walk
from ebr_engine.jobs.interrupts import Interrupts
from ebr_engine.jobs.journal import Journal
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipes
from ebr_engine.jobs.run import run_work
from ebr_engine.jobs.wakeups import Wakeups
from ebr_engine.jobs.work import Work, prompts_of
from ebr_engine.media.kinds import reason_to_leave
from ebr_engine.media.video.parts import forget_finished
from ebr_engine.request import RestoreRequest

SETTLE = 2.0  # seconds that a file has to stay the same
AT_ONCE = 8  # files between two looks at the folder
RETRY = 60.0  # seconds until a full disk is tried again
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp", ".temp", ".swp")
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


@dataclass
class Seen:
    """A file as it was found, and since when (seconds of the clock) it is so."""

    relative: Path
    stamp: tuple[int, int, int]  # number, bytes, nanoseconds of the last change
    since: float
    tried: bool = False  # restored, refused or failed as it is
    reported: bool = False  # that it cannot be opened


class Folder:
    """What a folder holds, from look to look."""

    def __init__(
        self, top: Path, out: Path, settle: float, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.top, self.out, self.settle = top, out, settle
        self._tell, self._clock = tell, clock
        self._seen: dict[Path, Seen] = {}
        self._unreadable: set[str] = set()

    def look(self) -> list[Path]:
        """The files that are whole and not tried yet, in the order in which they came to be as they are.

        Whole is what has not changed for `settle` seconds, holds something and can be opened. OSError when the folder itself
        cannot be read, as when a network mount is away.
        """
        os.scandir(self.top).close()
        now, found = self._clock(), {}
        for path, relative in walk(self.top, self.out, onerror=self._not_read):
            if path.suffix.lower() in UNFINISHED or path.name.endswith("~"):
                continue
            try:
                status = path.stat()
            except OSError:  # gone since, or a link to nowhere
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            stamp = status.st_ino, status.st_size, status.st_mtime_ns
            before = self._seen.get(path)
            found[path] = before if before and before.stamp == stamp else Seen(relative, stamp, now)
        self._seen = found
        whole = [path for path, one in found.items() if self._is_whole(path, one, now)]
        return sorted(whole, key=lambda path: (found[path].since, found[path].stamp[2], path))

    def _is_whole(self, path: Path, one: Seen, now: float) -> bool:
        if one.tried or not one.stamp[1] or now - one.since < self.settle:
            return False
        try:
            path.open("rb").close()
        except OSError as error:  # another program holds it, or it is not ours to read
            if not one.reported and path.exists():
                one.reported = True
                self._tell(f"{path}: cannot be opened yet: {error.strerror}")
            return False
        return True

    def _not_read(self, error: OSError) -> None:
        if os.path.isdir(error.filename) and error.filename not in self._unreadable:
            self._unreadable.add(error.filename)
            self._tell(f"{error.filename}: cannot be read: {error.strerror}")

    def relative(self, path: Path) -> Path:
        """The path of a file of the last look below the folder."""
        return self._seen[path].relative

    def tried(self, path: Path) -> None:
        """Leave a file alone until it changes."""
        if path in self._seen:
            self._seen[path].tried = True

    @property
    def rest(self) -> float | None:
        """Seconds until the next file may be whole; None when none is waited for."""
        ends = [one.since + self.settle for one in self._seen.values() if not one.tried and one.stamp[1]]
        return max(0.05, min(ends) - self._clock()) if ends else None

    def __contains__(self, path: Path) -> bool:
        return path in self._seen


class Watch:
    """Restores what comes into a folder. `turn` is one look and the work that it finds; `run` goes on until it is stopped."""

    def __init__(
        self,
        restorer: Any,
        top: Path,
        out: Path,
        request: RestoreRequest,
        progress: Progress,
        *,
        settle: float = SETTLE,
        overwrite: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.restorer, self.request, self.progress, self.overwrite = restorer, request, progress, overwrite
        self.folder = Folder(top, out, settle, lambda text: progress.error(text, "warning"), clock)
        self.medium = medium_of(restorer.backbone.name)
        self.digest = request.digest(prompts_of(request))
        self.recipes = Recipes(restorer, {request: self.digest}, keep_parts=True)
        self.recipes.of(request)  # refuses what the backbone cannot do before any file comes
        self.journal = Journal(out)
        self.done = self.before = 0
        self.failed: dict[Path, Outcome] = {}
        self.full = False  # the disk, at the last turn
        self.stopping = False

    def run(self, wakeups: Wakeups) -> None:
        """Look, restore and wait until Ctrl-C or SIGTERM, which end after the step that is being made."""
        started, away = time.perf_counter(), False
        with self.journal.locked(), Interrupts(self._stop), _terminated():
            try:
                while not self.stopping:
                    try:
                        more = self.turn()
                        if away:
                            wakeups.open()
                            away = False
                    except OSError as error:
                        if os.path.isdir(self.folder.top):
                            raise
                        if not away:
                            self.progress.error(f"{one_line(error)}; waiting for it to come back", "warning")
                        more, away = False, True
                    if not more:
                        rest = RETRY if self.full else self.folder.rest
                        wakeups.wait(rest, lambda: self.stopping)
            except KeyboardInterrupt:  # from within a file: what is finished of it is kept
                pass
            finally:
                wakeups.close()
        self.progress.summary(self.done, list(self.failed.values()), self.before, 0, time.perf_counter() - started)
        self.progress.line("stopped; the same command goes on")

    def turn(self) -> bool:
        """Look at the folder and restore what is whole; whether there may be more to do at once."""
        whole = self.folder.look()
        self.failed = {path: outcome for path, outcome in self.failed.items() if path in self.folder}
        self.full = False
        jobs = [job for path in whole[:AT_ONCE] if (job := self._admitted(path))]
        if jobs:
            self._restore(jobs)
        return len(whole) > AT_ONCE and not self.full

    def _admitted(self, path: Path) -> Job | None:
        """The job of a file; None for what is finished, none of ours, or cannot be done, which is told."""
        job = Job(path, path)
        try:
            if (reason := reason_to_leave(path, self.medium)) is not None:
                self.folder.tried(path)
                if reason:
                    self.progress.error(f"{path}: left out: {reason}", "note")
                return None
            job = pair_found(path, self.folder.relative(path), self.folder.out, self.request.compare is not None)
            job = replace(job, request=self.request)
            if self.journal.finished(job, self.digest):
                self.folder.tried(path)
                self.before += 1
                return None
            if job.is_clip:
                forget_finished(job.target)
            check_jobs([job], self.overwrite, self._may_replace, self.journal.knows)
            return job
        except (EbrError, OSError) as error:
            self._finished(Outcome(job, error=_told(path, error)))
            return None

    def _may_replace(self, job: Job, path: Path) -> bool:
        """Whether an output is our own work that a later run would make again, or has to."""
        return self.journal.vouches(path, job, self.digest) or self.journal.outdated(path, job, self.digest)

    def _restore(self, jobs: list[Job]) -> None:
        try:
            work = Work(jobs, {self.request: self.digest}, journal=self.journal)
            run_work(self.restorer, work, _Hears(self.progress, self._finished, self._stop), self.recipes)
        except EbrError as error:  # such as clips that need --per-frame: those files' matter, not the folder's
            if len(jobs) == 1:
                self._finished(Outcome(jobs[0], error=_told(jobs[0].source, error)))
                return
            for job in jobs:
                self._restore([job])

    def _stop(self, text: str) -> None:
        """Ctrl-C, between runs or within one, which may be past its last step."""
        self.stopping = True
        self.progress.stopping(text)

    def _finished(self, outcome: Outcome) -> None:
        path = outcome.job.source
        if outcome.error and any(word in outcome.error for word in _FULL):
            self.full = True  # the file is tried again
        elif outcome.error and not path.exists():
            self.progress.line(f"{path} is gone")
            return
        else:
            self.folder.tried(path)
        if outcome.error:
            self.failed[path] = outcome
        else:
            self.done += 1
            self.failed.pop(path, None)
        self.progress.finish(outcome)


class _Hears(Progress):
    """Passes on what is heard of a run but for its end; the watch itself hears what became of each file, and of signals."""

    def __init__(self, progress: Progress, finished: Callable[[Outcome], None], stopping: Callable[[str], None]) -> None:
        self.start, self.share, self.line, self.error = progress.start, progress.share, progress.line, progress.error
        self.finish, self.stopping = finished, stopping


def check_folders(top: Path, out: Path) -> None:
    """`EbrError` unless files of folder `top` can be restored into folder `out`."""
    if not top.is_dir():
        raise EbrError(f"{top}: {'is a file; watch a folder' if top.exists() else 'no such folder'}")
    if out.exists() and not out.is_dir():
        raise EbrError(f"{out}: is a file; name a folder")
    real, target = Path(os.path.realpath(top)), Path(os.path.realpath(out))
    if target == real or target in real.parents:
        raise EbrError(f"{out}: holds the watched folder, whose files are never overwritten; choose a folder beside or in it")
    check_writable(out)


def _told(path: Path, error: BaseException) -> str:
    line = one_line(error) or type(error).__name__
    return line if str(path) in line else f"{path}: {line}"


@contextmanager
def _terminated() -> Iterator[None]:
    """While entered, SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
