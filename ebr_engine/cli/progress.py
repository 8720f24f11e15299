"""What a person sees while files are worked on: a bar with time left on a terminal, plain lines anywhere else."""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from ebr_engine.cli.telling import tell
from ebr_engine.errors import EngineWarning
from ebr_engine.jobs.outcome import Outcome
from ebr_engine.jobs.progress import Progress

PLAIN_SECONDS = 30  # between two lines that tell of a long file where there is no bar
LONG_SECONDS = 10  # that a run has to be expected to take for this to be said


class Display(Progress):
    """A bar over files and their steps on stderr, when that is a terminal; one line a file on stdout.

    Every file counts the same; a file's share grows with its steps. `as_json` makes stdout one JSON object a file and a last
    one for the whole, and nothing else. Files may be finished from another thread.
    """

    def __init__(self, files: int, quiet: bool = False, as_json: bool = False):
        self.files = files
        self.quiet = quiet
        self.as_json = as_json
        self._begun = 0
        self._left_out = 0
        self._name = ""
        self._lock = threading.RLock()
        self._started = self._told = time.monotonic()
        self._bar = None if quiet or not sys.stderr.isatty() else _bar()
        self._task = self._bar.add_task("loading", total=files, step="", start=False) if self._bar else None

    def __enter__(self) -> "Display":
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always", EngineWarning)
        warnings.showwarning = self._warned
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._warnings.__exit__(*sys.exc_info())

    def _warned(self, message: Warning, *where: object) -> None:
        if isinstance(message, EngineWarning):
            self.error(str(message), "warning")

    def expect(self, files: int, seconds: Callable[[], float | None]) -> None:
        """Say before a long run how long it may take."""
        if self.quiet or (expected := seconds()) is None or expected < LONG_SECONDS:
            return
        self.error(f"about {_roughly(expected)} for {f'{files} files' if files > 1 else 'this file'}", "note")

    def start(self, name: str) -> None:
        """The next file begins."""
        if not self._begun:
            self._started = time.monotonic()
        self._begun += 1
        self._name = f"{self._begun}/{self.files} {name}" if self.files > 1 else name
        if self._bar:
            self._bar.start_task(self._task)
            self._bar.update(self._task, description=self._name, completed=self._begun - 1, step="", refresh=True)

    def share(self, part: float, text: str) -> None:
        """`part` of the current file, 0 to 1, is done; `text` says where it is."""
        self._show(self._begun - 1 + min(part, 1), text)

    def several(self, done: float, text: str) -> None:
        """`done` files, parts of some counted, of those that are worked on side by side; `text` says by whom."""
        if not self._begun:
            self._started, self._name = time.monotonic(), f"{self.files} files" if self.files > 1 else "1 file"
            if self._bar:
                self._bar.start_task(self._task)
                self._bar.update(self._task, description=self._name)
        self._begun = int(done) + 1
        self._show(done, f"{done:.4g} done, {text}")

    def _show(self, done: float, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, step=text)
        elif not self.quiet and (now := time.monotonic()) - self._told >= PLAIN_SECONDS:
            self._told = now
            left = (now - self._started) * (self.files / done - 1) if done > 0 else None
            typer.echo(f"{self._name}: {text}" + (f", {_clock(left)} left" if left is not None else ""), err=True)

    def finish(self, outcome: Outcome) -> None:
        """A file is finished; tells its result."""
        with self._lock:
            if self._bar:
                self._bar.update(self._task, completed=self._begun)
            self._left_out += outcome.skipped is not None
            if outcome.error:
                self.error(outcome.error)
            if self.as_json:
                self._object(outcome.as_json())
            elif not outcome.error:
                self.line(outcome.line)

    def summary(self, done: int, failures: Sequence[Outcome], skipped: int, left: int, seconds: float) -> None:
        """The end of a run: how many files were restored, how many needed nothing, and what failed and why.

        `done` counts those that needed nothing too; `skipped` are those that an earlier run finished.
        """
        if self.as_json:
            counts = {"done": done, "failed": len(failures), "skipped": skipped, "not_tried": left}
            self._object({"summary": counts, "seconds": round(seconds, 3), "failures": [each.as_json() for each in failures]})
            return
        if done + len(failures) + left + skipped <= 1:
            return
        parts = [f"{done - self._left_out} of {done + len(failures) + left} restored"]
        parts += [f"{self._left_out} left out"] if self._left_out else []
        parts += [f"{len(failures)} failed"] if failures else []
        parts += [f"{left} not tried"] if left else []
        parts += [f"{skipped} finished before"] if skipped else []
        self.line(", ".join([*parts, f"{seconds:.1f} s"]))
        width = min(60, max((len(str(each.job.source)) for each in failures), default=0))
        for each in failures:
            self.line(f"  {each.job.source!s:{width}}  {each.reason}")

    def line(self, text: str) -> None:
        """A line on stdout, above the bar where both are on the same terminal; for people only."""
        if self.quiet or self.as_json:
            return
        with self._lock:
            if self._bar and sys.stdout.isatty():
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                typer.echo(text)

    def error(self, text: str, kind: str = "error") -> None:
        """An error or warning line on stderr, quiet or not."""
        with self._lock:
            if self._bar:
                from rich.text import Text

                self._bar.console.print(Text.assemble((f"{kind}: ", "red"), text), soft_wrap=True)
            else:
                tell(text, kind)

    def ask(self, question: str) -> bool:
        """A yes or no of the person at the terminal; the bar waits."""
        if self._bar:
            self._bar.stop()
        answer = typer.confirm(question, default=True, err=True)
        if self._bar:
            self._bar.start()
        return answer

    def go_on(self, files: int, yes: bool) -> bool:
        """Whether to restore all files after a preview: asked on a terminal, else only with --yes."""
        what = f"{files} files" if files > 1 else "the whole file"
        if yes:
            return True
        if on_terminal():
            return self.ask(f"go on with {what}?")
        self.line(f"this was the preview; --yes goes on with {what}")
        return False

    def stopping(self, text: str) -> None:
        """Say that the run is about to stop: from a signal, which may have come in the middle of any other line."""
        if self._bar:
            self._bar.tasks[0].fields["step"] = text  # shown with the next refresh
        elif not self.quiet:
            os.write(2, f"{text}\n".encode())

    def _object(self, values: dict[str, Any]) -> None:
        with self._lock:
            typer.echo(json.dumps(values))


def on_terminal() -> bool:
    """Whether there is a person to ask."""
    return sys.stdin.isatty()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _roughly(seconds: float) -> str:
    """A time that is not known better than to a tenth."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{float(f'{seconds / length:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} seconds"


def _bar():
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=2)),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=2)),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[step]}", table_column=Column(no_wrap=True)),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
        expand=True,
        speed_estimate_period=3600,  # a step of a large model may take minutes
    )
