"""What a run has finished, kept in its output folder: a line a file, so that a later run need not do it again.

A line is written, and has reached the disk, before the file that it tells of gets its name. So whatever moment a run is
killed at, a file that the journal vouches for is there as told, or is found to be missing or another one: the size and
the time of the output, of its source, and a digest of the settings all have to agree.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

from ebr_engine.errors import EbrError
from ebr_engine.jobs.files import Job
from ebr_engine.media.decoding import MediaError

NAME = ".ebr-journal.jsonl"
LOCK = ".ebr-journal.lock"
_CLOCKS = (2_000_000_000, 1_000_000_000, 10_000_000, 1_000_000)  # nanoseconds: of FAT, of ext3 and archives, …, from the coarsest
_FINEST = 1_000  # what tools that keep times as a fraction of a second lose


@dataclass(frozen=True)
class Stamp:
    """A file as it was: bytes, and nanoseconds of its last change."""

    size: int
    time: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def fits(self, other: "Stamp") -> bool:
        """Whether both may be of the same content: a copy may lie where the clock is coarser, and its time is rounded there."""
        clock = max(_clock_of(self.time), _clock_of(other.time))
        return self.size == other.size and abs(self.time - other.time) < clock


def _clock_of(time: int) -> int:
    """The coarsest clock that can show a time, in nanoseconds."""
    return next((clock for clock in _CLOCKS if time % clock == 0), _FINEST)


@dataclass(frozen=True)
class Entry:
    """One finished output."""

    output: Stamp
    source: Stamp
    name: str  # of the source, without its folder: a folder may be moved
    settings: str


class Journal:
    """The finished outputs of a folder. Lines that cannot be read, such as a last one cut short, count for nothing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        self._writing = Lock()  # clips and pictures may end side by side
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        except OSError as error:
            raise MediaError(f"{self.path}: cannot be read: {error.strerror}; --no-resume goes on without") from error
        self._torn = not content.endswith(b"\n") and content != b""
        for line in content.split(b"\n"):
            if found := _parse(line):
                self._entries[found[0]] = found[1]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While entered, no other run may write into the folder; what killed runs left half-written there is deleted first.

        Raises `EbrError` where another run is at work. Where files cannot be locked, nothing is.
        """
        made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._folder / LOCK
        with lock.open("a") as file:
            if not _lock(file):
                raise EbrError(f"{self._folder}: another run is writing into this folder; wait for it, or choose another --out")
            for part in self._folder.rglob(".ebr-*.part"):
                with suppress(OSError):
                    part.unlink()
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
                    for folder in made:  # where nothing was written
                        folder.rmdir()

    def finished(self, job: Job, settings: str) -> bool:
        """Whether all outputs of a job are there, from the same settings and the same source."""
        return all(self.vouches(path, job, settings) for path in job.outputs)

    def knows(self, path: Path) -> bool:
        """Whether an output was made by an earlier run, from whatever settings."""
        return self._key(path) in self._entries

    def outdated(self, path: Path, job: Job, settings: str) -> bool:
        """Whether this output of a job is as these settings made it from the same file, which has changed since."""
        entry = self._entries.get(self._key(path))
        if entry is None or (entry.name, entry.settings) != (job.source.name, settings):
            return False
        try:
            return entry.output.fits(Stamp.of(path)) and not entry.source.fits(Stamp.of(job.source))
        except OSError:
            return False

    def commit(self, job: Job, settings: str) -> Callable[[Path, Path], None]:
        """What gives the outputs of a job their names, and writes them down. To be called before the source is read."""
        source = Stamp.of(job.source)

        def rename(part: Path, target: Path) -> None:
            self._append(target, Entry(Stamp.of(part), source, job.source.name, settings))
            os.replace(part, target)

        return rename

    def vouches(self, path: Path, job: Job, settings: str) -> bool:
        """Whether this output of a job is there, from the same settings and the same source."""
        entry = self._entries.get(self._key(path))
        if entry is None or (entry.name, entry.settings) != (job.source.name, settings):
            return False
        try:
            return entry.output.fits(Stamp.of(path)) and entry.source.fits(Stamp.of(job.source))
        except OSError:
            return False

    def _key(self, path: Path) -> str:
        return Path(os.path.relpath(path, self._folder)).as_posix()

    def _append(self, target: Path, entry: Entry) -> None:
        key = self._key(target)
        values = {"output": key, "size": entry.output.size, "time": entry.output.time, "source": entry.name}
        values |= {"source_size": entry.source.size, "source_time": entry.source.time, "settings": entry.settings}
        text = json.dumps(values).encode("ascii") + b"\n"
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._writing:
            self._write(text)
            self._entries[key] = entry

    def _write(self, line: bytes) -> None:
        """A line behind the others, on the disk; behind what was cut short, on a line of its own."""
        line = (b"\n" if self._torn else b"") + line
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            self._torn = True
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file)
            self._torn = False
        finally:
            os.close(file)


def _lock(file: IO[str]) -> bool:
    """Whether a file is ours alone from now on, until it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _parse(line: bytes) -> tuple[str, Entry] | None:
    """The output that a line tells of; None for what is no line of a journal."""
    try:
        values = json.loads(line)
        texts = [values[name] for name in ("output", "source", "settings")]
        numbers = [values[name] for name in ("size", "time", "source_size", "source_time")]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return None
    return texts[0], Entry(Stamp(*numbers[:2]), Stamp(*numbers[2:]), *texts[1:])
