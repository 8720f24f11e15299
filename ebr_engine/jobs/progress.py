"""What is heard of a run: events, for a terminal, a server or nobody."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from ebr_engine.jobs.outcome import Outcome


class Progress(AbstractContextManager):
    """Hears of a run and says nothing; others tell of it in their way. Files may be finished from another thread."""

    def __exit__(self, *_: object) -> None:
        """The run is over."""

    def expect(self, files: int, seconds: Callable[[], float | None]) -> None:
        """So many files are to come; `seconds()` tries how long that may take, and gives None where it cannot say."""

    def start(self, name: str) -> None:
        """The next file begins."""

    def step(self, index: int, total: int) -> None:
        """`index` of `total` steps of the current file are done."""
        self.share(index / total if total else 0, f"step {index}/{total}")

    def share(self, part: float, text: str) -> None:
        """`part` of the current file, 0 to 1, is done; `text` says where it is."""

    def several(self, done: float, text: str) -> None:
        """`done` files, parts of some counted, of those that are worked on side by side; `text` says by whom."""

    def finish(self, outcome: Outcome) -> None:
        """A file is finished, left out or has failed."""

    def summary(self, done: int, failures: Sequence[Outcome], skipped: int, left: int, seconds: float) -> None:
        """The end of a run: how many files were restored, and what failed and why."""

    def line(self, text: str) -> None:
        """A line for people."""

    def error(self, text: str, kind: str = "error") -> None:
        """An error or a warning."""

    def stopping(self, text: str) -> None:
        """The run is about to stop: from a signal, which may have come in the middle of any line."""
