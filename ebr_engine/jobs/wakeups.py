"""When to look at a folder again: as soon as the system tells of a change, and from time to time in any case.

A network mount tells nothing of what other machines do, and a system may run out of watches, so nobody relies on events: they
only say that it is worth looking.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EVERY = 2.0  # seconds between two looks where no event will come
SELDOM = 60.0  # and where events come
SLICE = 0.25  # seconds until a wait notices that it should end
MOUNTS = Path("/proc/self/mounts")
_REMOTE = ("9p", "afs", "ceph", "cifs", "drvfs", "fuse", "gluster", "lustre", "ncpfs", "nfs", "smb", "vboxsf", "virtiofs")


class Wakeups:
    """Waits for the next look at a folder. `every`: look so often (seconds), and ask the system for nothing."""

    def __init__(self, folder: Path, every: float | None = None) -> None:
        self._folder, self._every = folder, every
        self._changes: Iterator[Any] | None = None
        self.why_polling = "" if every is None else "as asked for"
        self.open()

    def open(self) -> None:
        """Ask for events, anew where the folder was away; `why_polling` tells why there will be none."""
        self.close()
        if self._every is None:
            self.why_polling = "it lies on a network mount" if is_remote(self._folder) else ""
            if not self.why_polling:
                self._changes = self._events()
                if self._changes is not None:
                    self._changed()  # from now on the system keeps what happens

    def close(self) -> None:
        changes, self._changes = self._changes, None
        if changes is not None:
            changes.close()

    def wait(self, at_most: float | None, stop: Callable[[], bool]) -> None:
        """Until something changes, `at_most` seconds have passed, it is time to look in any case, or `stop()`."""
        usual = self._every or (EVERY if self._changes is None else SELDOM)
        end = time.monotonic() + (usual if at_most is None else min(usual, at_most))
        while not stop() and (left := end - time.monotonic()) > 0:
            if self._changes is None:
                time.sleep(min(SLICE, left))
            elif self._changed():
                return

    def _events(self) -> Iterator[Any] | None:
        """What yields a set of changes, empty when there were none in a slice; None where there are no events to be had."""
        try:
            from watchfiles import watch
        except ModuleNotFoundError:
            self.why_polling = "pip install 'ebr-engine[watch]' lets the system tell of changes"
            return None
        slice_ = int(1000 * SLICE)
        return watch(self._folder, watch_filter=None, rust_timeout=slice_, yield_on_timeout=True, raise_interrupt=False)

    def _changed(self) -> bool:
        try:
            changes = next(self._changes, None)
            if changes is None:  # it has ended
                self._changes = None
            return changes is None or bool(changes)
        except (OSError, RuntimeError) as error:  # no more watches to be had, or the folder is away
            self._changes, self.why_polling = None, " ".join(str(error).split()) or type(error).__name__
            return True


def is_remote(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Whether a folder lies on a file system that others change unseen; False where the system does not say."""
    try:
        lines = mounts.read_bytes().decode(errors="surrogateescape").splitlines()
    except OSError:
        return False
    kinds = {_unescaped(parts[1]): parts[2] for line in lines if len(parts := line.split(" ")) > 2}
    real = Path(os.path.realpath(folder))
    kind = next((kinds[str(one)] for one in (real, *real.parents) if str(one) in kinds), "")
    return kind.startswith(_REMOTE)


def _unescaped(path: str) -> str:
    """A path as the table of mounts writes it: blanks are \\040."""
    for code, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, plain)
    return path
